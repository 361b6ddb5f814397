"""Weights in and out: strict loading, and the folder that a training run leaves behind."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import ModelConfig
from .model import WorldActionModel
from .text import WordEmbedding

MODEL, CONFIG, EXTRA, TRAINING = "model.safetensors", "config.json", "extra.safetensors", "training.pt"
_TEXT_KEY = "text."  # prefix of the word embedding's tensors among the extra tensors

# diffusers.WanTransformer3DModel holds the video expert only; its names, and ours.
_DIFFUSERS = (
    (r"^blocks\.(\d+)\.", r"packed_block_stack.packed_blocks.\1.video_block."),
    (r"^condition_embedder\.time_embedder\.", "core.time_conditioner.time_embedder."),
    (r"^condition_embedder\.time_proj\.", "core.time_conditioner.time_proj."),
    (r"^condition_embedder\.text_embedder\.", "core.text_proj."),
    (r"^patch_embedding\.", "core.patch_embedding_mlp."),
    (r"^(proj_out\.|scale_shift_table$)", r"core.\1"),
)


def load_weights(model: torch.nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Copy every parameter of ``model`` from ``state``; values are cast to the model's dtype.

    Returns:
        Sorted keys of ``state`` that the model has no place for. Checkpoints of the reference system carry some that
        only run with proprioception (``core.action_*``, ``core.runtime_stream_adapters.*``,
        ``action_expert.hidden_context_proj``); the caller decides whether others are acceptable.

    Raises:
        ValueError: naming the parameters that ``state`` lacks or holds in another shape; the model is unchanged.
    """
    own = model.state_dict()
    missing = sorted(set(own) - set(state))
    shapes = [
        f"{k}: expected {list(v.shape)}, got {list(state[k].shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    if missing or shapes:
        raise ValueError(
            f"load_weights: missing keys {missing}, mis-shaped keys {shapes}; "
            "the checkpoint must come from a model of the same config"
        )
    model.load_state_dict({k: state[k] for k in own})
    return sorted(set(state) - set(own))


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of ``diffusers.WanTransformer3DModel`` under this library's names: the video expert, without actions.

    Unknown keys pass unchanged. To load, update the state dict of a fresh model with the result.
    """
    renamed = {}
    for key, value in state.items():
        if key == "patch_embedding.weight":  # a convolution whose stride is its kernel is a linear map of patches
            value = value.flatten(1)
        for pattern, name in _DIFFUSERS:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed


@dataclass
class Checkpoint:
    """What :func:`load_checkpoint` finds."""

    model: WorldActionModel
    text: WordEmbedding | None
    extra: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict = field(default_factory=dict)
    training_state: dict | None = None


def save_checkpoint(
    folder: str | Path,
    model: WorldActionModel,
    *,
    text: WordEmbedding | None = None,
    extra: Mapping[str, Tensor] | None = None,
    metadata: dict | None = None,
    training_state: dict | None = None,
) -> None:
    """Write ``model.safetensors``, ``config.json``, ``extra.safetensors`` and, if given, ``training.pt`` to ``folder``.

    Args:
        folder: Made if it does not exist; files of an earlier save are replaced.
        model: The model, any dtype, on any device.
        text: The word embedding trained with it; its vocabulary goes to ``config.json``.
        extra: Further tensors, for example of the latent codec; names must not start with ``text.``.
        metadata: Anything ``json.dumps`` takes: program, normalisation, codec sizes.
        training_state: For resume: optimizer and generator states, step; read back with ``weights_only=True``.

    Raises:
        ValueError: an extra tensor under a reserved name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    extra = dict(extra or {})
    reserved = sorted(name for name in extra if name.startswith(_TEXT_KEY))
    if reserved:
        raise ValueError(f"save_checkpoint: names of extra tensors must not start with {_TEXT_KEY!r}, got {reserved}")
    config = {"model": model.config.to_dict(), "metadata": metadata or {}}
    if text is not None:
        config["vocabulary"] = list(text.vocabulary)
        config["text_tokens"] = text.tokens
        extra |= {_TEXT_KEY + k: v for k, v in text.state_dict().items()}
    files = {
        MODEL: lambda path: save_file(_plain(model.state_dict()), path),
        EXTRA: lambda path: save_file(_plain(extra), path),
        CONFIG: lambda path: path.write_text(json.dumps(config, indent=1) + "\n"),
    }
    if training_state is not None:
        files[TRAINING] = lambda path: torch.save(training_state, path)
    else:  # an older one would not belong to these weights
        (folder / TRAINING).unlink(missing_ok=True)
    for name, write in files.items():
        # a run that is killed while it saves leaves whole files behind, old or new
        scratch = folder / (name + ".part")
        write(scratch)
        scratch.replace(folder / name)


def load_checkpoint(folder: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read what :func:`save_checkpoint` wrote; the model is in float32, in eval mode, on ``device``.

    Raises:
        ValueError: a missing or unreadable file, unknown or missing config fields, weights that do not fit or are left
            over; the message names the file.
    """
    folder = Path(folder)
    config = _read(folder / CONFIG, device)
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(f"load_checkpoint: {folder / CONFIG} must hold an object with a 'model' entry; save it again")
    state, extra = (_read(folder / name, device) for name in (MODEL, EXTRA))
    model = WorldActionModel(ModelConfig.from_dict(config["model"])).to(device)
    unused = load_weights(model, state)
    if unused:
        raise ValueError(f"load_checkpoint: {folder / MODEL} has keys that the model does not: {unused}")
    text = None
    if "vocabulary" in config:
        text = WordEmbedding(config["vocabulary"], model.config.text_dim, tokens=config["text_tokens"]).to(device)
        load_weights(text, {k.removeprefix(_TEXT_KEY): v for k, v in extra.items() if k.startswith(_TEXT_KEY)})
        extra = {k: v for k, v in extra.items() if not k.startswith(_TEXT_KEY)}
        text.eval()
    training = _read(folder / TRAINING, "cpu") if (folder / TRAINING).exists() else None
    return Checkpoint(model.eval(), text, extra, config.get("metadata", {}), training)


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in state.items()}


def _read(path: Path, device):
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=str(device))
        if path.suffix == ".pt":
            return torch.load(path, map_location=device, weights_only=True)
        return json.loads(path.read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"load_checkpoint: cannot read {path}: {error}; expected a folder of save_checkpoint"
        ) from error
