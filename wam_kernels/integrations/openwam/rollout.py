"""A denoising step of the dual-expert rollout that computes only the tokens that changed.

The package embeds, carries and projects the whole window at every step, and computes the clean history anew for every
chunk. Here a step runs the tokens of the chunk alone, over the keys and values of the history. What the last chunk
computed of the history is taken over where it is still the same: a clean frame keeps its keys and values as long as its
content, its position and everything that it attends to, directly or through others, are what they were. That is
checked, not assumed: what an observation that replaces a prediction, a frame that leaves the window or another text
touches is computed anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from open_wam.models.common.denoising_cache import DenoisingCache
from open_wam.models.common.video_geometry import unpatchify_video_sequence, video_token_grid_from_latent_shape
from open_wam.models.visual_tower.grid_ids import build_video_grid_ids
from open_wam.models.visual_tower.runtime_parameter_ops import (
    linear_with_materialized_params,
    materialize_runtime_parameter,
)
from torch import Tensor, nn

from ... import ada_layer_norm
from .._patching import Foreign, NotOurs
from . import blocks
from .cache import Direct, LayerCache, is_ours
from .modulation import per_token
from .visibility import Visibility

_STAGE = "_wam_stage"  # of a DenoisingCache: what its steps share


@dataclass
class Inputs:
    """The arguments of ``forward_dual_expert_packed_coupling_denoise`` that a step reads."""

    visual_tower: Foreign
    noisy_video_latents: Tensor  # [B, C, F, h, w]
    clean_video_latents: Tensor
    noisy_video_timesteps: Tensor  # [B, F]
    clean_video_timesteps: Tensor
    packed_action_pre: Any  # or None; else tokens [B, 2 F n, D'], noisy then clean, and what goes with them
    text_context: Tensor
    frame_start: int
    video_hidden_context: Tensor | None  # [B, 2 F tokens, D]

    @property
    def frames(self) -> int:
        return self.noisy_video_latents.shape[2]

    @property
    def frame_tokens(self) -> int:
        """Video tokens of a frame."""
        _, _, _, height, width = self.noisy_video_latents.shape
        _, patch_height, patch_width = self.visual_tower.core.patch_size
        return (height // patch_height) * (width // patch_width)

    @property
    def video_count(self) -> int:
        return 2 * self.frames * self.frame_tokens

    @property
    def action_count(self) -> int:
        return 0 if self.packed_action_pre is None else self.packed_action_pre.tokens.shape[1]


@dataclass(frozen=True)
class Tokens:
    """Some tokens of the packed sequence, by joint index: whole video frames, then actions."""

    joint: Tensor  # int64 [n], on the device
    video_frames: np.ndarray  # of the 2 F noisy and clean frames
    video: Tensor  # int64: the tokens of those frames
    action: Tensor  # int64: of the 2 F n action tokens


def _tokens(joint: Tensor, inputs: Inputs) -> Tokens | None:
    """None where a video frame is not whole."""
    is_video = joint < inputs.video_count
    video, action = joint[is_video], joint[~is_video] - inputs.video_count
    per_frame = inputs.frame_tokens
    frames = video.cpu().numpy()[::per_frame] // per_frame
    whole = (frames[:, None] * per_frame + np.arange(per_frame)).ravel()
    if not np.array_equal(whole, video.cpu().numpy()):
        return None
    return Tokens(joint, frames, video, action)


@dataclass
class Units:
    """The clean frames and clean action frames that a stage keeps keys and values of."""

    names: list[tuple[int, int]]  # (stream, absolute frame)
    slots: np.ndarray  # int64 [units, most tokens of a unit]: where its keys are; -1: fewer tokens
    attends: np.ndarray  # bool [units, units]
    content: dict[tuple[int, int], tuple[Tensor, ...]]  # by name: what the tokens are made of


@dataclass
class Stage:
    """One denoising stage of one chunk under one text: the buffers that its steps share."""

    layers: list[LayerCache]
    text: Tensor  # projected, for the video expert
    tokens: Tokens  # that change from step to step
    visible: Visibility  # those over all slots
    slots: Tensor  # int64: theirs
    rope: dict[int, Tensor] = field(default_factory=dict)  # by number of video tokens: of the first step, of the others


@dataclass(frozen=True)
class Weights:
    """What tells one state of the weights from another, at one more reading of them for each stage.

    Versions alone do not: FSDP gathers new weights into the memory of the old ones, an average of weights is written to
    ``parameter.data``, both behind the version's back, and what was born in inference mode has none. Norms alone do not
    tell the other shards of a sharded parameter, of which a version speaks.
    """

    versions: tuple[int, ...]
    norms: Tensor  # float64 [parameters]

    @classmethod
    @torch.no_grad()
    def of(cls, *modules: nn.Module) -> Weights:
        parameters = [p for module in modules for p in module.parameters()]
        versions = tuple(0 if p.is_inference() else p._version for p in parameters)
        shards = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
        shards = [p if p.is_floating_point() else p.double() for p in shards]
        norms = torch._foreach_norm(shards, 2, dtype=torch.float64)
        return cls(versions, torch.stack([norm.to(norms[0].device) for norm in norms]))

    def same(self, other: Weights) -> bool:
        return self.versions == other.versions and _equal(self.norms, other.norms)


@dataclass
class Remembered:
    """What a stage leaves for the next chunk."""

    weights: Weights  # of the blocks and the video side; what the action side computes is compared itself
    text_context: Tensor
    action_text: Tensor | None  # projected, for the action expert
    units: Units
    layers: list[LayerCache]


class History:
    """The last stage of each text of each model. Two texts: with and without guidance."""

    TEXTS = 2

    def __init__(self) -> None:
        self._by_model: WeakKeyDictionary[nn.Module, list[Remembered]] = WeakKeyDictionary()

    def get(self, stack: Foreign, weights: Weights, text: Tensor) -> Remembered | None:
        for known in self._by_model.get(stack, ()):
            if known.weights.same(weights) and _equal(known.text_context, text):
                return known
        return None

    def put(self, stack: Foreign, new: Remembered) -> None:
        kept = [r for r in self._by_model.get(stack, ()) if not _equal(r.text_context, new.text_context)]
        self._by_model[stack] = [new, *kept][: self.TEXTS]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def denoise(
    original, history: History | None, *, attention_profile, packed_block_stack, denoising_cache=None, **options
):
    """``forward_dual_expert_packed_coupling_denoise`` in a rollout with the package's cache switched on.

    Args:
        original: The package's function.
        history: Where keys and values wait for the next chunk; None: every chunk computes its whole window.
    """
    visible = attention_profile.self_attention_block_mask
    first = packed_block_stack.packed_blocks[0]
    if not is_ours(denoising_cache) or not isinstance(visible, Visibility):
        raise NotOurs("a denoising step without the cache, or under a profile that OpenWAM's pipeline did not prepare")
    if options.get("video_cross_attention_mask") is not None or options["text_context"] is None:
        raise NotOurs("a denoising step with arguments of training")
    if any(map(blocks.why_not, (first.video_block, first.action_block))):
        raise NotOurs("a denoising step of blocks that the fused ops do not take")  # which each of them refuses by name
    inputs = Inputs(**{name: options[name] for name in Inputs.__dataclass_fields__})
    result = _step(history, visible, packed_block_stack, denoising_cache, inputs)
    if result is None:
        raise NotOurs("a denoising step of parts of video frames")
    return result


def _step(history: History | None, visible: Visibility, stack: Foreign, cache: DenoisingCache, inputs: Inputs):
    begun, stage = None, getattr(cache, _STAGE, None)
    if stage is None:
        begun = _begin(history, visible, stack, cache, inputs)
        if begun is None:
            return None
        stage = begun.stage
        setattr(cache, _STAGE, stage)
    step = stage if begun is None else begun
    fresh = step.tokens
    video, video_rest, embedding = _embed_video(inputs, fresh, stage)
    action, action_rest = _embed_action(inputs, fresh)
    for layer, block in zip(stage.layers, stack.packed_blocks, strict=True):
        layer.positions = step.slots
        direct = Direct(layer)
        video, action = block(
            video, action, block_mask=step.visible, token_cache=(direct, direct), **video_rest, **action_rest
        )
    if history is not None and begun is not None and begun.remembered is not None:
        history.put(stack, begun.remembered)  # now that all of it is there
    return _project_video(inputs, fresh, video, embedding), _scatter_action(inputs, fresh, action)


@dataclass
class Begun:
    """A new stage, and its first step: the tokens to compute are those that change and those that are not known."""

    stage: Stage
    tokens: Tokens
    visible: Visibility
    slots: Tensor
    remembered: Remembered | None  # what to leave for the next chunk, once it is computed


def _begin(
    history: History | None, visible: Visibility, stack: Foreign, cache: DenoisingCache, inputs: Inputs
) -> Begun | None:
    """A new stage, its buffers holding what is known; None where frames are not whole."""
    required = cache.key_indices
    active, all_tokens = _tokens(cache.query_indices, inputs), _tokens(required, inputs)
    if active is None or all_tokens is None:
        return None
    core = inputs.visual_tower.core
    slot_of = torch.full((inputs.video_count + inputs.action_count,), -1, dtype=torch.int64)
    slot_of[required.cpu()] = torch.arange(required.numel())
    layers = [LayerCache() for _ in stack.packed_blocks]
    known, leave = np.zeros(required.numel(), bool), None
    if history is not None:
        weights = Weights.of(stack, core)
        units = _units(inputs, visible, all_tokens, slot_of.numpy())
        action_text = None if inputs.packed_action_pre is None else inputs.packed_action_pre.context
        remembered = history.get(stack, weights, inputs.text_context)
        old, new = (np.zeros(0, np.int64),) * 2 if remembered is None else same_units(remembered.units, units)
        known[new] = True
        if remembered is not None and new.size:
            past_text = remembered.action_text
            same = past_text is not None and action_text is not None and _equal(past_text, action_text)
            same_text = (0, 1) if same else (0,)
            source, target = (torch.from_numpy(slots).to(required.device) for slots in (old, new))
            for layer, past in zip(layers, remembered.layers, strict=True):
                layer.copy_from(past, source, target, required.numel())
                layer.text = {stream: past.text[stream] for stream in same_text if stream in past.text}
        leave = Remembered(weights, inputs.text_context.clone(), action_text, units, layers)
    for layer in layers:
        layer.slots = required.numel()
    fresh_slots = torch.from_numpy(np.flatnonzero(~known)).to(required.device)
    fresh = _tokens(required[fresh_slots], inputs)
    assert fresh is not None  # whole frames less whole frames
    text = core._exact_text_hidden_states(inputs.text_context, dtype=inputs.noisy_video_latents.dtype)
    active_slots = slot_of.to(required.device)[active.joint]
    stage = Stage(layers, text, active, visible.select(active.joint, required), active_slots)
    return Begun(stage, fresh, visible.select(fresh.joint, required), fresh_slots, leave)


# ---- the history ----


def _units(inputs: Inputs, visible: Visibility, tokens: Tokens, slot_of: np.ndarray) -> Units:
    frames, per_frame = inputs.frames, inputs.frame_tokens
    names, members = [], []
    content: dict[tuple[int, int], tuple[Tensor, ...]] = {}
    still = not bool(inputs.clean_video_timesteps.any())
    for frame in tokens.video_frames[tokens.video_frames >= frames] if still else ():
        ids = np.arange(frame * per_frame, (frame + 1) * per_frame)
        name = (0, inputs.frame_start + int(frame) - frames)
        context = inputs.video_hidden_context
        # a copy: it may lie in a buffer of the caller's, who writes the next observation there
        parts: tuple[Tensor, ...] = (inputs.clean_video_latents[:, :, frame - frames].clone(),)
        content[name] = parts if context is None else (*parts, context[:, ids[0] : ids[-1] + 1])
        names.append(name)
        members.append(ids)
    pre = inputs.packed_action_pre
    if pre is not None and inputs.action_count:
        half = inputs.action_count // 2
        n = half // frames
        if not bool(pre.timesteps[:, half:].any()):
            for frame in range(frames):
                ids = inputs.video_count + half + np.arange(frame * n, (frame + 1) * n)
                if (slot_of[ids] >= 0).all():
                    name = (1, inputs.frame_start + frame)
                    own = slice(half + frame * n, half + (frame + 1) * n)
                    content[name] = (pre.tokens[:, own], pre.t_mod[:, own], pre.context)
                    names.append(name)
                    members.append(ids)
    first = np.array([ids[0] for ids in members], np.int64)
    attends = visible.attends[visible.query_run[first]][:, visible.key_run[first]]
    slots = np.full((len(members), max(map(len, members), default=0)), -1)
    for row, ids in zip(slots, members, strict=True):
        row[: len(ids)] = slot_of[ids]
    return Units(names, slots, attends, content)


def same_units(old: Units, new: Units) -> tuple[np.ndarray, np.ndarray]:
    """Slots in the old buffers and in the new ones of the tokens whose keys and values are still right."""
    common = [name for name in new.names if name in old.content]
    place = [{name: i for i, name in enumerate(units.names)} for units in (old, new)]
    i, j = (np.array([p[name] for name in common], np.int64) for p in place)
    if not common:
        return i, j
    same = np.array([
        len(old.content[name]) == len(new.content[name])
        and all(_equal(a, b) for a, b in zip(old.content[name], new.content[name], strict=True))
        for name in common
    ])  # fmt: skip
    # it attends to the same frames, and none that only one of the two has
    among_old, among_new = old.attends[np.ix_(i, i)], new.attends[np.ix_(j, j)]
    same &= (among_old == among_new).all(1)
    same &= (old.attends[i].sum(1) == among_old.sum(1)) & (new.attends[j].sum(1) == among_new.sum(1))
    while (next_same := same & ~(among_new & ~same).any(1)).sum() < same.sum():
        same = next_same  # and all that it attends to is unchanged in turn
    old_slots, new_slots = old.slots[i[same]], new.slots[j[same]]
    return old_slots[old_slots >= 0], new_slots[new_slots >= 0]


# ---- before and behind the blocks ----


def _embed_video(inputs: Inputs, tokens: Tokens, stage: Stage) -> tuple[Tensor | None, dict, Tensor | None]:
    """Hidden states of the chosen frames, the block arguments that go with them, and their time embedding."""
    names = ("video_timestep_proj", "video_rotary_emb", "video_text_hidden_states")
    if not tokens.video.numel():
        return None, dict.fromkeys(names), None
    core, latents = inputs.visual_tower.core, inputs.noisy_video_latents
    _, _, frames, height, width = latents.shape
    chosen = torch.from_numpy(tokens.video_frames).to(latents.device)
    noisy, clean = chosen[chosen < frames], chosen[chosen >= frames] - frames
    picked = [inputs.noisy_video_latents[:, :, noisy], inputs.clean_video_latents[:, :, clean]]
    x = core._input_embed(torch.cat(picked, 2), input_type="latent")
    if inputs.video_hidden_context is not None:
        x = x + inputs.video_hidden_context[:, tokens.video].to(x)
    times = [inputs.noisy_video_timesteps[:, noisy], inputs.clean_video_timesteps[:, clean]]
    embedding, modulation = core._time_embed(torch.cat(times, 1), height, width, dtype=x.dtype)
    if tokens.video.numel() not in stage.rope:
        grid = video_token_grid_from_latent_shape(latents, patch_size=core.patch_size)
        ids = build_video_grid_ids(grid, device=latents.device, frame_shift=float(inputs.frame_start))
        per_copy = inputs.frames * inputs.frame_tokens
        ids = ids[:, tokens.video % per_copy][None].expand(latents.shape[0], -1, -1)
        stage.rope[tokens.video.numel()] = core.rope(ids)[:, :, None]
    return x, dict(zip(names, (modulation, stage.rope[tokens.video.numel()], stage.text), strict=True)), embedding


def _embed_action(inputs: Inputs, tokens: Tokens) -> tuple[Tensor | None, dict]:
    pre = inputs.packed_action_pre
    if pre is None or not tokens.action.numel():
        names = ("action_temb", "action_rotary_emb", "action_text_hidden_states")
        return None, dict.fromkeys(names)
    mask = pre.cross_attention_mask
    rest = {
        "action_temb": pre.t_mod[:, tokens.action],
        "action_rotary_emb": pre.freqs[:, tokens.action][:, :, None],
        "action_text_hidden_states": pre.context,
        "action_cross_attention_mask": None if mask is None else mask[:, tokens.action],
    }
    return pre.tokens[:, tokens.action], rest


def _project_video(inputs: Inputs, tokens: Tokens, hidden: Tensor | None, embedding: Tensor | None) -> Tensor:
    """The head on the noisy frames that were computed; the flow of all others is 0, and nobody reads it."""
    core, latents = inputs.visual_tower.core, inputs.noisy_video_latents
    batch, channels, frames, height, width = latents.shape
    computed = tokens.video_frames[tokens.video_frames < frames]
    count = computed.size * inputs.frame_tokens
    flow = latents.new_zeros(latents.shape)
    if not count:
        return flow
    assert hidden is not None and embedding is not None
    hidden, embedding = hidden[:, :count], embedding[:, :count]
    table = materialize_runtime_parameter(core.scale_shift_table, device=hidden.device, dtype=embedding.dtype)[0]
    shift, scale = (embedding + row for row in table)
    index = per_token(count, hidden.device)
    hidden = ada_layer_norm(hidden.contiguous(), shift.float(), scale.float(), index, eps=core.norm_out.eps)
    tokens_out = linear_with_materialized_params(core.proj_out, hidden)
    picked = unpatchify_video_sequence(core.patch_size, tokens_out, computed.size, height, width, batch_size=batch)
    flow[:, :, torch.from_numpy(computed).to(flow.device)] = picked.to(flow.dtype)
    return flow


def _scatter_action(inputs: Inputs, tokens: Tokens, hidden: Tensor | None) -> Tensor | None:
    if inputs.packed_action_pre is None:
        return None
    full = torch.zeros_like(inputs.packed_action_pre.tokens)
    return full if hidden is None else full.index_copy_(1, tokens.action, hidden)
