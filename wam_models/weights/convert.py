"""Weights from another system's keys to ours, and back: one function each way, over the rows of ``layouts``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..model.dual_expert import WorldActionModel
from ..runtime.checks import choice
from ..runtime.json_fields import from_fields
from ..state_dicts import abridged, bare_names, not_here
from .layouts import LAYOUTS, PARTS, PATCHES, STATE, Layout, part_of


@dataclass(frozen=True)
class Converted:
    """Weights under our names.

    Args:
        state: All parameters of the streams in ``parts``.
        parts: Streams of ours that are in it, of ``video`` and ``action``.
        left_out: By part of theirs: the keys that are not in it, since our model has no place for them.
    """

    state: dict[str, Tensor]
    parts: tuple[str, ...]
    left_out: dict[str, list[str]] = field(default_factory=dict)


def shapes_of(config: ModelConfig) -> dict[str, list[int]]:
    """Names and shapes of a model's parameters."""
    return {name: list(shape) for name, shape in _shapes(config)}


@lru_cache(maxsize=8)  # a model at full size takes seconds, on the meta device as well
def _shapes(config: ModelConfig) -> tuple[tuple[str, torch.Size], ...]:
    with torch.device("meta"):
        return tuple((name, value.shape) for name, value in WorldActionModel(config).state_dict().items())


def weights_from(
    layout: str, state: Mapping[str, Tensor], config: ModelConfig, *, without: Collection[str] = ()
) -> Converted:
    """Another system's weights under our names, strictly: every key is used, left out by name, or refused.

    Args:
        layout: Whose keys they are, one of ``LAYOUTS``.
        state: Their tensors by name, of any floating dtype, which stays.
        config: Sizes of our model; those of the streams that the layout holds must be theirs. Actions have a place in
            models of the layout's topology alone: ``openwam`` in ``dual_expert``, ``lingbot_va`` and
            ``openwam_parallel`` in ``parallel_stream``.
        without: Parts to leave out: of theirs those that our model has no place for (``image``, ``state``, ...), and
            ``action`` where only the video expert is wanted.

    Returns:
        Our tensors, of whole streams. Those of a linear patch embedding share memory with the convolution.

    Raises:
        ValueError: an unknown layout or part; keys that are missing, unexpected, of another shape or of a part that
            our model has no place for, by their names.
    """
    table = _layout(layout, without, config, "weights_from")
    parts = tuple(part for part in _places(table, config) if part not in without)
    expected = {name: shape for name, shape in shapes_of(config).items() if part_of(name) in parts}
    own: dict[str, Tensor] = {}
    unexpected, misfits = [], []
    left_out: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for bare, key in bare_names(state).items():
        name, value = table.ours(bare), state[key]
        if name in expected:
            if problem := _misfit(value, _their_shape(table, name, expected[name], config)):
                misfits.append(f"{key}: {problem}")
            own[name] = value.flatten(1) if table.convolution and name == PATCHES else value
        elif absent := table.absent_part(bare):
            taken = left_out if absent.part in without or not absent.runs else refused
            taken.setdefault(absent.part, []).append(key)
        elif name is not None and part_of(name) not in parts:
            taken = left_out if part_of(name) in without else refused
            taken.setdefault(part_of(name), []).append(key)
        else:
            unexpected.append(key)
    missing = [str(table.theirs(name)) for name in expected if name not in own]
    _refuse("weights_from", table, refused, missing, unexpected, misfits)
    return Converted({name: own[name] for name in expected}, parts, left_out)


def weights_to(
    layout: str, state: Mapping[str, Tensor], config: ModelConfig, *, without: Collection[str] = ()
) -> dict[str, Tensor]:
    """A model's weights under another system's names, strictly.

    What the other system has besides (see the ``absent`` rows of its layout) is not in the result.

    Args:
        layout: Whose keys to use, one of ``LAYOUTS``.
        state: The state dict of a ``WorldActionModel``, with or without what wrappers add to the names.
        config: Its sizes.
        without: Streams to leave out: ``action`` for a layout that has no place for it.

    Returns:
        Their tensors by name, in the order of ``state``; memory is shared.

    Raises:
        ValueError: an unknown layout or part, an expert that the layout has no place for, keys that are missing,
            unexpected or of another shape.
    """
    table = _layout(layout, without, config, "weights_to")
    places = _places(table, config)
    homeless = [s.name for s in config.streams if s.name not in places and s.name not in without]
    if homeless:
        raise ValueError(
            f"weights_to: {table.system} has no place for our stream {', '.join(homeless)} of topology "
            f"{config.topology}; leave it out with without={homeless}"
        )
    expected, given = shapes_of(config), bare_names(state)
    misfits = [
        f"{name}: {problem}"
        for name, shape in expected.items()
        if name in given and (problem := _misfit(state[given[name]], shape))
    ]
    _refuse(
        "weights_to",
        None,
        {},
        [name for name in expected if name not in given],
        [key for name, key in given.items() if name not in expected],
        misfits,
    )
    ours = {name for name in given if part_of(name) not in without}
    if unplaced := sorted(name for name in ours if table.theirs(name) is None):
        raise ValueError(f"weights_to: {table.system} has no place for {abridged(unplaced)}")
    theirs = {}
    for name, key in given.items():
        if name in ours:
            value = state[key]
            shape = _their_shape(table, name, expected[name], config)
            theirs[str(table.theirs(name))] = value.reshape(shape)
    return theirs


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of ``diffusers.WanTransformer3DModel`` under this library's names: the video expert, without actions.

    Unknown keys pass unchanged; :func:`weights_from` is the strict one. To load, update the state dict of a fresh model
    with the result. :func:`read_weights` reads a folder of diffusers, sharded or not.
    """
    table = LAYOUTS["diffusers"]
    renamed = {table.ours(key) or key: value for key, value in state.items()}
    if PATCHES in renamed:  # a convolution whose stride is its kernel is a linear map of patches
        renamed[PATCHES] = renamed[PATCHES].flatten(1)
    return renamed


def sizes_from(layout: str, state: Mapping[str, Tensor], **given: Any) -> ModelConfig:
    """Sizes of the model that such weights are of, read from their shapes.

    Args:
        layout: Whose keys they are.
        state: Their tensors by name; only shapes are read.
        **given: Fields of ``ModelConfig`` that weights do not tell: ``actions_per_frame``, ``head_dim`` (default 128,
            as all Wan models have), ``patch`` of a linear patch embedding (default 1, 2, 2), and of a layout without
            actions ``action_hidden``, ``action_ffn`` and ``action_dim`` (else the model is ``video_only``).

    Raises:
        ValueError: an unknown layout, or weights without the keys that tell the sizes.
    """
    table = LAYOUTS[choice("sizes_from: layout", layout, LAYOUTS)]
    shapes = {name: list(state[key].shape) for bare, key in bare_names(state).items() if (name := table.ours(bare))}
    block = "packed_block_stack.packed_blocks.0."

    def size(name: str, dim: int) -> int:
        if name not in shapes:
            raise ValueError(f"sizes_from: the weights lack {table.theirs(name)}, which tells a size; is it {layout}?")
        return shapes[name][dim]

    patches = shapes.get(PATCHES, [])
    patch = tuple(patches[2:]) if len(patches) == 5 else tuple(given.get("patch", (1, 2, 2)))
    width = size(PATCHES, 1) if len(patches) == 5 else size(PATCHES, 1) // (patch[0] * patch[1] * patch[2])
    head_dim = given.get("head_dim", 128)
    inner, hidden = (size(block + "video_block.attn1.to_q.weight", dim) for dim in (0, 1))
    ffn = size(block + "video_block.ffn.net.0.proj.weight", 0)
    if inner % head_dim:
        raise ValueError(f"sizes_from: head_dim must divide {inner}, the width of attention, got {head_dim}")
    found = {
        "hidden": hidden,
        "heads": inner // head_dim,
        "head_dim": head_dim,
        "layers": 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("packed_block_stack.")),
        "ffn": ffn,
        "latent_channels": width,
        "text_dim": size("core.text_proj.linear_1.weight", 1),
        "freq_dim": size("core.time_conditioner.time_embedder.linear_1.weight", 1),
        "patch": patch,
    }
    if "action" in table.parts:
        shared = table.topology == "parallel_stream"
        found["topology"] = table.topology
        found["action_hidden"] = hidden if shared else size(block + "action_block.attn1.to_q.weight", 1)
        found["action_ffn"] = ffn if shared else size(block + "action_block.ffn.net.0.proj.weight", 0)
        found["action_dim"] = size("action_expert.action_embedder.weight", 1)
        found["state_dim"] = shapes.get(STATE, [0, 0])[1]
    elif "action_hidden" not in given:
        found |= {"topology": "video_only", "action_hidden": hidden, "action_ffn": ffn, "action_dim": 1}
    return from_fields(ModelConfig, {"actions_per_frame": 1} | found | given, "sizes_from", defaults=True)


def _places(table: Layout, config: ModelConfig) -> tuple[str, ...]:
    """Streams of a model of this config that the layout holds."""
    names = {stream.name for stream in config.streams}
    fits = config.topology == table.topology
    return tuple(part for part in table.parts if part in names and (part == "video" or fits))


def _layout(name: str, without: Collection[str], config: ModelConfig, caller: str) -> Layout:
    table = LAYOUTS[choice(f"{caller}: layout", name, LAYOUTS)]
    known = {*PARTS, *(stream.name for stream in config.streams), *(absent.part for absent in table.absent)}
    if not set(without) <= known or "video" in without:
        raise ValueError(
            f"{caller}: without must be some of {sorted(known - {'video'})} for {name}, got {sorted(without)}"
        )
    return table


def _their_shape(table: Layout, name: str, shape: list[int], config: ModelConfig) -> list[int]:
    if table.convolution and name == PATCHES:
        return [shape[0], config.latent_channels, *config.patch]
    return shape


def _misfit(value: object, shape: list[int]) -> str | None:
    if not isinstance(value, Tensor):
        return f"expected a tensor, got {type(value).__name__}"
    if list(value.shape) != shape:
        return f"expected {shape}, got {list(value.shape)}"
    if not value.is_floating_point():
        return f"expected floating point, got {value.dtype}"
    return not_here(value)


def _refuse(
    caller: str,
    table: Layout | None,
    refused: Mapping[str, list[str]],
    missing: list[str],
    unexpected: list[str],
    misfits: list[str],
) -> None:
    wrong = [
        f"{what} {abridged(names)}"
        for what, names in (("missing keys", missing), ("unexpected keys", unexpected), ("misfits", misfits))
        if names
    ]
    if table is not None:
        reasons = {"action": f"actions, which models of topology {table.topology} have a place for"}
        reasons |= {absent.part: absent.why for absent in table.absent}
        wrong += [
            f"no place in our model for part {part!r}, {reasons[part]}: {abridged(keys)}"
            for part, keys in refused.items()
        ]
    if not wrong:
        return
    way_out = "the sizes must be those of the weights, see sizes_from" if missing or unexpected or misfits else ""
    if refused:
        way_out = f"{way_out}{'; ' if way_out else ''}leave parts out with without={sorted(refused)}"
    raise ValueError(f"{caller}: {'; '.join(wrong)}; {way_out}")
