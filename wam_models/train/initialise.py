"""Initial weights by hand: a fresh model that starts near what any trained one does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from wam_kernels.masks.visibility import VIDEO

from ..config import ModelConfig
from ..model.blocks import ExpertBlock, PackedBlock
from ..model.dual_expert import WorldActionModel
from ..model.streams import ActionSide, VideoSide

Kind = TypeVar("Kind", bound=nn.Module)


def initialise(
    model: WorldActionModel,
    *,
    timestep_gain: float = 0.1,
    content_gain: float = 0.3,
    video_logit_scale: float = 5.0,
    action_logit_scale: float = 3.0,
    first_gate: float = 1.0,
    gate: float = 0.5,
) -> None:
    """Start a fresh model near what any trained one does, which saves the first few hundred steps.

    - Both heads undo the embedding of their stream: near noise the flow is the noise itself, so passing the input
      through is the best first guess.
    - The first block passes on minus what it attends to, unchanged: the flow is noise minus picture.
    - Attention starts out by place rather than by content, through constant parts of q and k that rope turns apart
      with the distance: video tokens attend to their own place in all frames, the heads of the action expert to places
      spread over the picture.
    - Everything else that a block adds starts at 0, behind gates that are open: it disturbs nothing and learns at once.

    Args:
        timestep_gain: Factor on the modulation that depends on the timestep.
        content_gain: Factor on the parts of q and k that depend on contents.
        video_logit_scale: Factor on the logits of the video expert's queries; the larger, the less of a place's
            neighbours they attend to.
        action_logit_scale: The same of the action expert's queries.
        first_gate: Gate of the first block's attention: how much it passes on.
        gate: Gates of the blocks.
    """
    config, core = model.config, model.core
    blocks = model.packed_block_stack.packed_blocks
    with torch.no_grad():
        scale = _pass_video_through(config, core)
        if config.has_actions:
            _pass_actions_through(model.action_expert)
        for side in (core, model.action_expert) if config.has_actions else (core,):
            side.time_conditioner.time_proj.weight.mul_(timestep_gain)
            side.time_conditioner.time_embedder.linear_2.weight.mul_(timestep_gain)
        for i, block in enumerate(blocks):
            block = _of(PackedBlock, block)
            for stream, expert in own_experts(config, block):
                logit_scale = video_logit_scale if stream == "video" else action_logit_scale
                attention = expert.attn1
                for layer in (attention.to_q, attention.to_k):
                    layer.weight.mul_(content_gain)
                    frame = None if layer is attention.to_q else 0
                    layer.bias.copy_(_place_bias(config, [(frame, 0, 0)] * config.heads))
                attention.norm_q.weight.fill_(logit_scale)
                for last in (attention.to_out[0], expert.attn2.to_out[0], expert.ffn.net[2]):
                    _of(nn.Linear, last).weight.zero_()
                expert.scale_shift_table[0, (2, 5), :] = gate
            offsets = [_head_offset(i * config.heads + h, len(blocks) * config.heads) for h in range(config.heads)]
            for stream, expert in own_experts(config, block):
                if stream == "action":
                    expert.attn1.to_q.bias.copy_(_place_bias(config, offsets))
        first = _of(PackedBlock, blocks[0]).expert(VIDEO)
        nn.init.orthogonal_(first.attn1.to_v.weight)
        passed_on = _of(nn.Linear, first.attn1.to_out[0]).weight
        passed_on.copy_(-first.attn1.to_v.weight.T)
        if scale is not None:  # the latents alone and at their size, without the constant part
            patch = core.patch_embedding_mlp.weight
            passed_on.copy_(scale * patch @ (patch.T @ passed_on))
        first.scale_shift_table[0, 2] = first_gate


def own_experts(config: ModelConfig, block: PackedBlock) -> list[tuple[str, ExpertBlock]]:
    """The experts of a block, each with the name of the stream that owns it."""
    return [(s.name, block.expert(i)) for i, s in enumerate(config.streams) if s.owns_expert]


def _of(kind: type[Kind], module: nn.Module) -> Kind:
    """A module that a list holds, as what it is."""
    if not isinstance(module, kind):
        raise TypeError(f"initialise: model must be fresh, but a {kind.__name__} of it is a {type(module).__name__}")
    return module


CONSTANT = 0.5  # of a narrow patch's token, in each place
NARROW = 4  # times as wide is a token whose patch is narrow


def _pass_video_through(config: ModelConfig, core: VideoSide) -> float | None:
    """Embedding and head undo each other.

    LayerNorm takes a token's size away. That of many latents is always about the same; a narrow patch, as a state is,
    gets a constant part, as actions do. Returns by what LayerNorm then divides a token; None without a constant part.
    """
    patch, proj = core.patch_embedding_mlp.weight, core.proj_out.weight
    width, hidden = config.patch_width, config.hidden
    nn.init.orthogonal_(patch)
    scale = None
    shrink = min(1.0, width / hidden) ** 0.5  # a patch, of one number's size, is in hidden places
    if NARROW * width < hidden:
        columns = _columns(hidden, width + 1)
        patch.copy_(columns[:, :width])
        core.patch_embedding_mlp.bias.copy_(columns[:, width] * CONSTANT * hidden**0.5)
        shrink = scale = (CONSTANT**2 + width / hidden) ** 0.5
    per_patch = width // config.latent_channels
    # the head's patches are ordered (place, channel), those of the embedding (channel, place)
    undo = patch.T.unflatten(0, (config.latent_channels, per_patch)).transpose(0, 1).flatten(0, 1)
    proj.copy_(undo * shrink)
    return scale


def _columns(width: int, count: int) -> Tensor:
    """Orthonormal columns ``[width, count]`` without mean."""
    return torch.linalg.qr(torch.cat([torch.ones(width, 1), torch.randn(width, count)], 1))[0][:, 1:]


def _pass_actions_through(expert: ActionSide) -> None:
    """An action is far narrower than its token: a constant part keeps LayerNorm from taking its size away."""
    embedder = expert.action_embedder
    width, numbers = embedder.weight.shape
    columns = _columns(width, numbers + 1)  # the last is the constant part, of one number's size in each place
    embedder.weight.copy_(columns[:, :numbers])
    embedder.bias.copy_(columns[:, numbers] * width**0.5)
    expert.action_proj_out.weight.copy_(columns[:, :numbers].T)


ROWS, COLUMNS = 4, 8  # the token grid over which the action expert's heads are spread


def _head_offset(i: int, count: int) -> tuple[float, int, int]:
    """Where head i of ``count`` attends to at first, in frames, rows and columns from an action token.

    The token's position is about half a frame behind the frame that it leads to, at row and column -1. Heads come in
    pairs: one attends to that frame, the other to the one before, because motion is what tells actions.
    """
    cell = i // 2 * 2 * ROWS * COLUMNS // count
    return -0.5 - i % 2, 1 + cell // COLUMNS, 1 + cell % COLUMNS


def _place_bias(config: ModelConfig, offsets: Sequence[tuple[float | None, int, int]]) -> Tensor:
    """A q bias ``[inner]`` with which heads attend most to the keys at these offsets; with offset 0 also the k bias.

    None is no preference.
    """
    bias = torch.zeros(config.heads, config.head_dim)
    frame, row, column = config.rope_split
    for h, head_offset in enumerate(offsets):
        starts = (0, frame, frame + row)
        for offset, start, width, weight in zip(head_offset, starts, config.rope_split, (1.5, 1, 1), strict=True):
            if offset is None:
                continue
            for pair in range(min(2, width // 2)):  # the first turns by a radian a place, the rest ever slower
                angle = offset * config.rope_theta ** -(2 * pair / width)
                bias[h, start + 2 * pair] = weight * math.cos(angle)
                bias[h, start + 2 * pair + 1] = weight * math.sin(angle)
    return bias.flatten()
