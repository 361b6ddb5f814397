"""``wam rollout``: predict an episode chunk by chunk, recorded or in a simulator; show how fast and how well."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..data.latents import pictures_of
from ..draw.charts import labelled, save_film
from ..evaluate import Chunk, join, mean_psnr, rmse, stream
from ..objectives import GJD, MODEL_PROGRAMS, OBJECTIVES
from ..rollout import RolloutConfig, RolloutEngine
from ..rollout.layout import frames_of_chunk
from ..rollout.policy import Policy
from ..runtime.checks import check_device, peak_memory, writable_folder
from ..runtime.config_files import with_settings
from ..runtime.files import new_file
from ..runtime.json_fields import from_fields
from ..runtime.threads import pick_threads, restores_threads
from ..simulator import control_freq, load, play
from ..simulator.closed_loop import imagined_of_frames
from ..simulator.named import file_name
from .eight_bit import check_eight_bit_flags, with_eight_bits
from .estimate import check_estimate_flags, rollout_estimate, rollout_sizes
from .live import drawing, window
from .realtime import SIMULATED_CHUNKS, roll_out_in_real_time


@restores_threads
def run(args: argparse.Namespace) -> int:
    """``wam rollout``."""
    check_estimate_flags(args)
    objective = args.objective or "joint"
    if objective not in OBJECTIVES:
        raise ValueError(f"--objective must be one of {tuple(OBJECTIVES)}, got {objective!r}")
    denoised = OBJECTIVES[objective]
    if args.program is not None and args.program not in MODEL_PROGRAMS:
        raise ValueError(f"--program must be one of {tuple(MODEL_PROGRAMS)}, got {args.program!r}")
    if denoised.conditional and args.program not in (None, GJD):
        raise ValueError(f"--program must be {GJD} for --objective {objective}, got {args.program}; leave it out")
    check_eight_bit_flags(args)
    if args.estimate:
        sizes, config = rollout_sizes(args)
        if args.eight_bit is not None:
            sizes = replace(sizes, block_itemsize=1)
        print(rollout_estimate(args, sizes, _with_flags(args, config, objective), objective))
        return 0
    if (args.realtime and args.simulator is None) or (args.control and not args.realtime):
        raise ValueError("--realtime must be with --simulator, and --control with --realtime")
    device = check_device(args.device)
    if args.out is not None:
        writable_folder("--out", args.out)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    policy, _ = Policy.load(args.checkpoint, device, training=False, robot=args.robot)
    writable_folder("--out, by default the checkpoint,", _out(args))
    config = _with_flags(args, policy.rollout, objective)
    name = f"{objective}_{config.program}"
    policy = with_eight_bits(args, policy, config, _out(args))
    if args.simulator is not None:
        recorded = (("--camera", args.camera), ("--episode", args.episode), ("--open-loop", args.open_loop or None))
        for flag, value in recorded:
            if value is not None:
                raise ValueError(f"{flag} must be left out with --simulator: it concerns recorded episodes")
        if denoised.conditional:
            raise ValueError(f"--objective must be joint with --simulator, got {objective}")
        if args.realtime:
            return roll_out_in_real_time(args, policy, config)
        return roll_out_in_simulator(args, policy, config, name)
    return _recorded(args, policy, config, objective, name)


def _with_flags(args: argparse.Namespace, config: RolloutConfig, objective: str) -> RolloutConfig:
    program = GJD if OBJECTIVES[objective].conditional else args.program or config.program
    config = replace(config, program=program, steps=args.steps or config.steps)
    return from_fields(RolloutConfig, with_settings(asdict(config), args.set), "--set")


def _recorded(args: argparse.Namespace, policy: Policy, config: RolloutConfig, objective: str, name: str) -> int:
    denoised, dataset = OBJECTIVES[objective], policy.dataset(args.data, args.camera)
    number = args.episode
    if number is None:
        number = next((e.index for e in dataset.episodes if e.split and e.split != "train"), 0)
    if number >= len(dataset.episodes):
        raise ValueError(f"--episode must be below {len(dataset.episodes)}, got {number}")
    clip = policy.clip(dataset, number)
    size = frames_of_chunk(config, denoised, policy.model.config.full_attention)
    frames = clip["video"].shape[2]
    total = min((frames - 1) // size, args.chunks or frames)
    if total < 1:
        raise ValueError(f"--episode {number} has {frames} latent frames, too few for one chunk of {size}")
    with torch.no_grad():
        text = policy.text([clip["text"]])
    engine = RolloutEngine(policy.model, config)

    def predict(chunks: int) -> Iterator[Chunk]:
        return stream(
            engine, clip["video"], clip["action"], text, objective=objective, end=1 + chunks * size,
            generator=torch.Generator().manual_seed(args.seed), closed_loop=not args.open_loop, state=clip["state"],
        )  # fmt: skip

    if policy.model.device.type == "cpu":
        pick_threads(lambda: list(predict(1)))
    done = list(tqdm(predict(total), total=total, desc="rollout", unit="chunk", dynamic_ncols=True))

    split = dataset.episodes[number].split or "no split"
    print(f'episode        {number} ({split}), {frames} latent frames: "{clip["text"]}"')
    print(
        f"objective      {objective}, program {config.program}, {_steps(config)} denoising steps, {policy.model.device}"
    )
    history = "predicted frames become history" if args.open_loop else "recorded frames become history"
    print(f"chunks         {len(done)} ({_size(size, policy)} each); {history}")
    if config.skips:
        print(f"forwards run   {np.mean([c.forwards for c in done]):.1f} a chunk; --set reuse_flow=, reuse_chunk=")
    _print_speed([c.seconds for c in done], size, f"the recording runs at {dataset.fps:g}", policy)

    frames, name, arrays = np.arange(1, 1 + len(done) * size), f"episode{number:03d}_{name}_seed{args.seed}", {}
    if denoised.action and policy.model.config.has_actions:
        guess, real = join((c.action for c in done), 1), clip["action"][:, frames]
        if policy.varying.any():
            print(f"action error   {rmse(guess, real, policy.varying):.3f} (units of the training split's std)")
        else:
            print("action error   none: no number of an action varies in the training split")
        predicted, recorded = (policy.denormalize_action(a[0]).numpy() for a in (guess, real))
        arrays = {"action": predicted, "recorded": recorded, "frame": frames}
    if denoised.video:
        latents = join((clip["video"][:, :, :1], *(c.video for c in done)), 2)
        imagined = pictures_of(policy.codec, latents[0])
        real = clip["frames"][: len(imagined)]
    if denoised.video and policy.frames_are_states:
        error = (latents[0] - clip["video"][0, :, : len(imagined)])[:, 1:].square().mean().sqrt()
        print(f"state error    {error:.3f} (units of the training split's std)")
        arrays |= {"state": real, "imagined": imagined}
    if arrays:
        _write(args, name, **arrays)
    if denoised.video and not policy.frames_are_states:
        print(f"video          {mean_psnr(imagined[None, 1:], real[None, 1:]):.2f} dB PSNR")
        pictures = [labelled({"real": real[f], "imagined": imagined[f]}, f) for f in range(len(imagined))]
        _film(args, name, pictures, dataset.fps / policy.actions_per_frame)
    return 0


def roll_out_in_simulator(args: argparse.Namespace, policy: Policy, config: RolloutConfig, name: str) -> int:
    simulator = load(args.simulator, policy.cameras)
    freq = control_freq(simulator)
    generator = torch.Generator().manual_seed(args.seed)
    if policy.model.device.type == "cpu" and policy.camera is not None:  # else no picture is known before the episode
        black = np.zeros((1, policy.camera.height, policy.camera.width, 3), np.uint8)
        first = np.zeros((1, policy.codec.channels), np.float32) if policy.frames_are_states else black
        with torch.no_grad():
            text = policy.text([""])
        state = policy.state(np.zeros((1, 1, policy.model.config.state_dim), np.float32))
        trial = RolloutEngine(policy.model, config).start(policy.codec.encode(first)[None], text, state=state)
        pick_threads(lambda: trial.propose(generator=torch.Generator().manual_seed(0)))
    draw, frames_a_second = drawing(policy, simulator), freq / policy.actions_per_frame
    with window(draw, f"wam rollout: {args.simulator}", 1 / frames_a_second) as watch:
        played = play(
            policy, config, simulator, chunks=args.chunks or SIMULATED_CHUNKS, generator=generator, seed=args.seed,
            watch=watch,
        )  # fmt: skip
    print(f'simulator      {args.simulator}: "{played.instruction}"')
    print(f"program        {config.program}, {_steps(config)} denoising steps, {policy.model.device}")
    executed = len(played.pictures) - 1
    size = _size(config.chunk_size, policy)
    print(f"chunks         {len(played.chunk_seconds)} ({size} each), {executed} frames executed and observed")
    why = f": {played.failure}" if played.failure else ""
    print(f"task           {'done' if played.done else 'not done'}{why}")
    _print_speed(played.chunk_seconds, config.chunk_size, f"without the simulator, whose robot takes {freq:g}", policy)
    arrays = {"action": played.actions, "frame": played.frames}
    if policy.frames_are_states:
        arrays |= {"state": played.pictures, "imagined": played.imagined}
    # another task, program or seed is another film
    name = f"simulated_{file_name(args.simulator)}_{name}_seed{args.seed}"
    _write(args, name, **arrays)
    if draw is not None:
        imagined = imagined_of_frames(played.imagined, played.frames, len(played.pictures))
        _film(args, name, draw(played.pictures, imagined, 0), frames_a_second)
    return 0


def _steps(config: RolloutConfig) -> str:
    """Of both streams, of each where they differ."""
    video, action = (config.steps if s.steps is None else s.steps for s in (config.video, config.action))
    return f"{video}" if video == action else f"{video} video and {action} action"


def _size(frames: int, policy: Policy) -> str:
    """Of a chunk, in words."""
    return f"{frames} frame{'s' if frames > 1 else ''}, {frames * policy.actions_per_frame} actions"


def _print_speed(seconds: list[float], frames: int, remark: str, policy: Policy) -> None:
    """``frames`` of a chunk."""
    p50, p95 = np.percentile(seconds, [50, 95])
    actions = frames * policy.actions_per_frame
    print(f"seconds/chunk  p50 {p50:.4f}, p95 {p95:.4f} ({1 / p50:.1f} Hz)")
    print(f"actions/second {actions / p50:.1f} ({remark})")
    print(f"peak memory    {_peak_memory(policy.model.device)}")


def _out(args: argparse.Namespace) -> Path:
    return args.out or args.checkpoint


def _write(args: argparse.Namespace, name: str, **arrays: np.ndarray) -> None:
    """``action`` and ``recorded`` float32 ``[F, n, k A]`` in the units of the data set; ``frame`` int64 ``[F]``: row i
    leads to latent frame ``frame[i]``, which is video frame ``n k frame[i]``. ``state`` and ``imagined`` ``[F, S]``."""
    path = _out(args) / f"{name}.npz"
    with new_file(path) as part:
        np.savez(part, allow_pickle=True, **arrays)
    print(f"written        {path}: {', '.join(f'{key} {list(a.shape)}' for key, a in arrays.items())}")


def _film(args: argparse.Namespace, name: str, pictures: list[Image.Image], frames_a_second: float) -> None:
    path = _out(args) / f"{name}.gif"
    save_film(pictures, path, round(1000 / frames_a_second))
    print(f"written        {path}")


def _peak_memory(device: torch.device) -> str:
    where = f"on {device}" if device.type == "cuda" else "(whole process)"
    return f"{peak_memory(device) / 2**20:.0f} MiB {where}"
