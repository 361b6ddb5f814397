"""Weights by name: strict loading into a model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

# What wrappers put into the names of parameters: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Copy every parameter of ``model`` from ``state``; values are cast to the model's dtype.

    Names may hold what wrappers add to them (``torch.compile``, DDP, FSDP, activation checkpointing) on either side,
    and a prefix that all keys of ``state`` share. What of the model is on the meta device gets the device of its value.

    Returns:
        Sorted keys of ``state`` that the model has no place for. OpenWAM's checkpoints carry some that only run with
        proprioception (``core.action_*``, ``core.runtime_stream_adapters.*``, ``action_expert.hidden_context_proj``);
        the caller decides whether others are acceptable.

    Raises:
        TypeError: ``state`` is no mapping.
        ValueError: naming the parameters that ``state`` lacks, or holds in another shape, not as floating point or not
            here (sharded over ranks, on the meta device); the model is unchanged.
    """
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise TypeError(f"load_weights: state must map names to tensors, got {type(state).__name__}; see read_weights")
    own = model.state_dict()
    buffers = [name for name, value in model.named_buffers() if value.is_meta and name not in own]
    if buffers:
        raise ValueError(
            f"load_weights: no state dict holds the model's {abridged(buffers)}, which are on the meta device; make "
            "the model on its device"
        )
    names, given = bare_names(own), bare_names(state)
    first = {name.partition(".")[0] for name in names}
    while len(prefix := {name.partition(".")[0] for name in given}) == 1 and not prefix & first:
        if not all("." in name for name in given):
            break
        given = {name.partition(".")[2]: key for name, key in given.items()}
    missing = sorted(set(names) - set(given))
    misfits = [
        f"{name}: {misfit}"
        for name, key in names.items()
        if name in given and (misfit := _misfit(own[key], state[given[name]]))
    ]
    if missing or misfits:
        wrong = [f"{what} {abridged(keys)}" for what, keys in (("missing keys", missing), ("misfits", misfits)) if keys]
        raise ValueError(
            f"load_weights: {', '.join(wrong)}; the checkpoint must come from a model of the same config"
            f"{_hint(state, missing, given)}"
        )
    values = {key: state[given[name]] for name, key in names.items()}
    meta = {key: values.pop(key) for key in own if own[key].is_meta}
    model.load_state_dict(values, strict=False)
    if meta:
        with torch.inference_mode(False):  # these become parameters
            meta = {
                key: value.detach().to(own[key].dtype, copy=True, memory_format=torch.contiguous_format)
                for key, value in meta.items()
            }
            model.load_state_dict(meta, strict=False, assign=True)
    return sorted(key for name, key in given.items() if name not in names)


def bare_names(keys: Iterable[str]) -> dict[str, str]:
    """Keys of a state dict by the names that they had without wrappers."""
    bare = {_WRAPPERS.sub("", key): key for key in keys}
    if bare and all(name.startswith("module.") for name in bare):  # DDP
        bare = {name.removeprefix("module."): key for name, key in bare.items()}
    return bare


def _misfit(own: Tensor, given: object) -> str | None:
    if not isinstance(given, Tensor):
        return f"expected a tensor, got {type(given).__name__}"
    if given.shape != own.shape:
        return f"expected {list(own.shape)}, got {list(given.shape)}"
    if own.is_floating_point() and not given.is_floating_point():
        return f"expected floating point, got {given.dtype}"
    if not own.is_meta and not_here(own):
        return f"the model's {not_here(own)}"
    return not_here(given)


def not_here(value: Tensor) -> str | None:
    """Why the numbers of a tensor cannot be read or written in this process, None where they can."""
    if value.is_meta:
        return "is on the meta device, which holds no numbers"
    if hasattr(value, "full_tensor"):
        return "is a DTensor, sharded over ranks; use torch.distributed.checkpoint.state_dict with full_state_dict=True"
    return None


def _hint(state: Mapping[str, Tensor], missing: list[str], given: Mapping[str, str]) -> str:
    nested = [key for key, value in state.items() if isinstance(value, Mapping)]
    if nested:
        return f"; state holds mappings, {abridged(nested)}: pass one of them"
    prefixes = {name[: -len(missing[0])] for name in given if name.endswith("." + missing[0])} if missing else ()
    if prefixes:
        return f"; state holds them behind {abridged(sorted(prefixes))}, beside others: pass those alone"
    return ""


def abridged(names: list[str]) -> str:
    """The first few, and how many more: a model has hundreds."""
    return f"{names[:3]}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def check_finite(named: Mapping[str, Tensor], where: str = "") -> None:
    """One pass over the numbers. Raises ValueError that names the first tensor with a NaN or an infinity."""
    for name, value in named.items():
        if value.numel() and not all(map(math.isfinite, torch.stack(value.detach().aminmax()).tolist())):
            raise ValueError(
                f"{where}{name} must hold finite numbers, got {value.numel() - int(value.isfinite().sum())} others"
            )
