"""``wam rollout --estimate`` and ``wam train --estimate``: which sizes the flags ask for, and the page about them."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from wam_kernels.roofline import DEFAULT_DEVICE_MODEL, DEVICE_MODELS, DeviceModel, device_model_of

from ..checkpoint import CONFIG, EXTRA, read_settings, tensor_shape
from ..config import ModelConfig
from ..data import LeRobotDataset
from ..estimate import (
    PRESETS,
    Share,
    Sizes,
    report,
    rollout_chunk,
    rollout_memory,
    total,
    train_memory,
    train_step,
)
from ..estimate.presets import Preset
from ..rollout import RolloutConfig
from ..rollout.policy import Camera
from ..runtime.checks import choice
from ..runtime.json_fields import from_fields
from ..train.config import TrainConfig

DEFAULT_TEXT_TOKENS = 16  # of a training run on words, whose instructions are not read


def check_estimate_flags(args: argparse.Namespace) -> None:
    """Raises ValueError where a flag of the estimate comes without --estimate."""
    if args.estimate:
        return
    for flag in ("preset", "device_model", "video_tokens", "text_tokens", "gpus"):
        if getattr(args, flag, None) is not None:
            raise ValueError(f"--{flag.replace('_', '-')} must be left out without --estimate")


def _device_model(args: argparse.Namespace) -> tuple[str, DeviceModel]:
    if args.device_model is not None:
        name = choice("--device-model", args.device_model, DEVICE_MODELS)
    else:
        reported = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        found = None if reported is None else device_model_of(reported)
        if reported is not None and found is None:
            raise ValueError(
                f"--device-model must be one of {tuple(DEVICE_MODELS)}: there is no row of this machine's {reported}"
            )
        name = found or DEFAULT_DEVICE_MODEL
    return name, DEVICE_MODELS[name]


def _preset(args: argparse.Namespace) -> Preset:
    return PRESETS[choice("--preset", args.preset, PRESETS)]


def _with_tokens(args: argparse.Namespace, s: Sizes) -> Sizes:
    grid = s.grid if args.video_tokens is None else (1, args.video_tokens)
    return replace(s, grid=grid, text_tokens=args.text_tokens or s.text_tokens)


# ---- rollout ----


def rollout_sizes(args: argparse.Namespace) -> tuple[Sizes, RolloutConfig]:
    """Those of --preset or of --checkpoint.

    Raises:
        ValueError: not exactly one of the two, or a checkpoint that does not say how many tokens a frame has.
    """
    if (args.preset is None) == (args.checkpoint is None):
        raise ValueError("--estimate must have exactly one of --preset and --checkpoint")
    if args.preset is not None:
        preset = _preset(args)
        return _with_tokens(args, preset.sizes()), preset.rollout
    settings = read_settings(args.checkpoint)
    where, metadata = args.checkpoint / CONFIG, settings.get("metadata", {})
    model = ModelConfig.from_dict(settings["model"], f"{where}: model")
    rollout = from_fields(RolloutConfig, metadata.get("rollout", {}), f"{where}: metadata.rollout", defaults=True)
    grid = (1, args.video_tokens) if args.video_tokens else _grid(args.checkpoint, model, metadata)
    return _with_tokens(args, Sizes(model, grid, settings.get("text_tokens", DEFAULT_TEXT_TOKENS))), rollout


def _grid(folder: Path, model: ModelConfig, metadata: dict) -> tuple[int, int]:
    """Of a policy's frames, from its camera and the cells of its codec."""
    where = folder / CONFIG
    if "camera" not in metadata:
        raise ValueError(f"--video-tokens must be given: {where} does not say how large its pictures are")
    camera = from_fields(Camera, metadata["camera"], f"{where}: metadata.camera", defaults=True)
    codec = metadata.get("codec", {"kind": "patch_pca"})
    match codec["kind"]:
        case "state":
            cell = 1
        case "patch_pca":
            (numbers,) = tensor_shape(folder, EXTRA, "codec.mean")
            cell = round((numbers / 3) ** 0.5)
        case kind:
            raise ValueError(f"--video-tokens must be given: the cells of codec {kind!r} are not in {where}")
    return tokens_of(camera.height, camera.width, cell, model)


def tokens_of(height: int, width: int, cell: int, model: ModelConfig) -> tuple[int, int]:
    """Rows and columns of the video tokens of a picture."""
    return height // (cell * model.patch[1]), width // (cell * model.patch[2])


def rollout_estimate(args: argparse.Namespace, s: Sizes, config: RolloutConfig, objective: str) -> str:
    """The page about one chunk."""
    name, on = _device_model(args)
    parts = rollout_chunk(s, config, objective=objective)
    what = f"rollout of {args.preset or args.checkpoint}, one chunk of {config.chunk_size} frames, {config.program}"
    ms = sum(part.ms(on) for part in parts)
    actions = config.chunk_size * s.model.actions_per_frame
    rate = f"at most {1e3 / ms:.1f} chunks and {1e3 * actions / ms:.0f} action tokens a second"
    return f"{report(what, s, parts, rollout_memory(s, config, objective=objective), name, on)}\n{rate}"


# ---- training ----


def training_estimate(args: argparse.Namespace, config: TrainConfig) -> str:
    """The page about one step of --preset, or of a config.

    Raises:
        ValueError: both, --resume, --init, frozen parts, adapters, or nothing that says how many tokens a frame has.
    """
    if args.resume is not None:
        raise ValueError("--resume must be left out with --estimate; name its config")
    if args.preset is not None and (args.config is not None or args.set):
        raise ValueError("--estimate must have one of --preset and CONFIG, got both")
    if args.init is not None:
        raise ValueError("--init must be left out with --estimate, which reads no weights")
    name, on = _device_model(args)
    if args.preset is not None:
        preset = _preset(args)
        sizes, config = _with_tokens(args, preset.sizes()), preset.train()
    else:
        if config.frozen or config.lora:
            raise ValueError(
                f"{args.config or '--set'}: frozen and lora must be left out with --estimate, which counts all weights"
            )
        sizes = _with_tokens(args, Sizes(config.model, _grid_of_data(args, config), DEFAULT_TEXT_TOKENS))
    gpus = args.gpus or 1
    share, parts = Share.of(sizes, config, gpus), train_step(sizes, config, gpus)
    ms = sum(part.ms(on) for part in parts)
    named = args.preset or args.config or "the defaults"
    clips = (
        f"packed clips of at most {config.frames} frames, {config.tokens:,} tokens"
        if config.tokens
        else (f"{config.batch} x {config.frames} frames")
    )
    what = f"training of {named}, one step of {clips}"
    steps = args.steps or config.steps
    ends = []
    if gpus > 1:
        what += f", on one of {gpus} GPUs"
        moved = share.exchanged(sizes, config.frames)
        if on.link:
            ms = max(ms, 1e3 * moved / on.link)
            beside = f"at least {1e3 * moved / on.link:.3f} ms at {on.link / 1e9:.0f} GB/s, beside the rest"
        else:
            beside = "whose time is not in this, for want of a link in the data sheet"
        ends.append(f"from the other GPUs {moved / 1e9:.2f} GB a step, {beside}")
    work = total(parts[1:3])
    ends.append(
        f"a step takes at least {ms:.1f} ms, {steps:,} steps {ms * steps / 3.6e6:.2f} hours; without the optimizers at "
        f"most {gpus * parts[1].times * parts[1].tokens / (work.ms(on) / 1e3):,.0f} tokens a second"
    )
    return "\n".join([report(what, sizes, parts, train_memory(sizes, config, gpus), name, on), *ends])


def _grid_of_data(args: argparse.Namespace, config: TrainConfig) -> tuple[int, int]:
    if args.video_tokens is not None:
        return 1, args.video_tokens
    if args.data is None:
        raise ValueError("--estimate must have one of --preset, --data and --video-tokens: how large is a frame?")
    dataset = LeRobotDataset(args.data, args.camera)
    cell = 1 if dataset.has_states_as_frames else config.cell
    return tokens_of(*dataset.picture_size, cell, config.model)
