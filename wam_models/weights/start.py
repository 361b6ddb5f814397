"""Weights to start a training from: a checkpoint, another system's weights, an action expert made of the video's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import holds_checkpoint, load_checkpoint
from ..config import ModelConfig
from ..runtime.checks import choice
from .convert import shapes_of, weights_from
from .folders import read_folder

ACTION_STARTS = ("copy", "interpolate")
_HEAD_TABLE = "action_expert.scale_shift_table"
# of the action expert, by the video expert's name: what is not here (embedder, text, head) has no twin
_TWINS = {
    "action_expert.time_conditioner.": "core.time_conditioner.",
    _HEAD_TABLE: "core.scale_shift_table",
    ".action_block.": ".video_block.",
}


def initial_weights(
    path: str | Path,
    config: ModelConfig,
    *,
    layout: str | None = None,
    without: Collection[str] = (),
    action: str | None = None,
) -> dict[str, Tensor]:
    """Weights for a new model of this config, by our names; experts that they lack are left to the caller.

    Args:
        path: A checkpoint of ``save_checkpoint``, or a folder, an index of shards or a file of weights in ``layout``.
        config: Of the model to train.
        layout: Whose keys the weights have, one of ``LAYOUTS``; None for a checkpoint of ours.
        without: Parts to leave out, as in ``weights_from``.
        action: Make the action expert from the video expert: see :func:`action_from_video`; None leaves it as it is.

    Raises:
        ValueError: weights that cannot be read or do not fit the config; the message names the keys.
    """
    if layout is None:
        if not holds_checkpoint(path):
            raise ValueError(
                f"initial weights: {path} is no checkpoint of wam train; say whose keys it has with a layout"
            )
        if without:
            raise ValueError(f"initial weights: without must be left out for a checkpoint, got {sorted(without)}")
        state = load_checkpoint(path, training=False).model.state_dict()
        expected = shapes_of(config)
        misfits = [name for name in expected if name not in state or list(state[name].shape) != expected[name]]
        if misfits or set(state) - set(expected):
            raise ValueError(
                f"initial weights: the model in {path} has other sizes than the config, as of "
                f"{(misfits or sorted(set(state) - set(expected)))[0]}; take its config's model"
            )
    else:
        state = weights_from(layout, read_folder(path)[0], config, without=without).state
    return state if action is None else state | action_from_video(state, config, action)


def action_from_video(state: Mapping[str, Tensor], config: ModelConfig, how: str) -> dict[str, Tensor]:
    """An action expert's weights from those of the video expert, as OpenWAM offers it.

    Blocks, time conditioner and the table of the head have a twin there; what reads actions, text and writes actions
    has none and is not in the result.

    Args:
        state: Our tensors by name, of the video expert at least.
        config: Sizes of both experts.
        how: ``"copy"``, of experts of one size, or ``"interpolate"``: linearly, from the first to the last place, along
            every dim in which the sizes differ; then a block's matrices and tables are multiplied by the root of
            (inputs before / inputs now).

    Raises:
        ValueError: ``how`` is neither, experts of other sizes are to be copied, or a tensor of the video expert is
            missing.
    """
    choice("action_from_video: how", how, ACTION_STARTS)
    made = {}
    for name, shape in shapes_of(config).items():
        twin = next((name.replace(ours, video) for ours, video in _TWINS.items() if ours in name), None)
        if twin is None:
            continue
        if twin not in state:
            raise ValueError(f"action_from_video: state lacks {twin} of the video expert; give all of it")
        if how == "copy" and list(state[twin].shape) != shape:
            raise ValueError(
                f"action_from_video: {name} is {shape}, {twin} is {list(state[twin].shape)}; "
                "experts of other sizes are made with 'interpolate'"
            )
        made[name] = _resized(state[twin], shape, scaled=name != _HEAD_TABLE)
    if not made:
        raise ValueError(f"action_from_video: a model of topology {config.topology} has no actions; leave it out")
    return made


def _resized(value: Tensor, shape: list[int], *, scaled: bool) -> Tensor:
    """A copy with these sizes; ``scaled`` matrices keep the size of what they give when their inputs are fewer."""
    out = value.detach().clone()
    for dim, size in enumerate(shape):
        if out.shape[dim] != size:
            rows = out.float().movedim(dim, -1)
            resized = F.interpolate(rows.reshape(-1, 1, rows.shape[-1]), size=size, mode="linear", align_corners=True)
            out = resized.reshape(*rows.shape[:-1], size).movedim(-1, dim)
    if scaled and out.ndim > 1:
        out = out * (value.shape[-1] / shape[-1]) ** 0.5
    return out.to(value.dtype).contiguous()
