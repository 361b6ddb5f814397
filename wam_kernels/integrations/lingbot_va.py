"""LingBot-VA: ``WanTransformer3DModel`` with ``WanAttention``, its flex training mask and its slot-pool inference.

Training (``attn_mode="flex"``). ``forward_train`` hands sizes to ``FlexAttnFunc.init_mask``, which compiles a block
mask of S x S and keeps it on the class. While a patched ``forward_train`` runs, ``init_mask``
notes the sizes of ``lingbot_va_train`` and ``lingbot_va_text``; each ``FlexAttnFunc`` instance of this model attends
under them. q, k and v keep their dtype (the original rounds float32 to bfloat16 there).

Inference. ``WanAttention`` writes the chunk's keys into free slots of a pool, gathers all valid slots, attends, and
takes the chunk out again; finding slots costs four stops for the device in every layer. Here a mirror on the host keeps
the slots' ids and flags by the same rules, the pool is read in place (``cached_attention``), and nothing stops.

In both, ``WanAttention.forward`` runs q/k norm and rope in one launch, and ``WanTransformerBlock.forward`` its norms
with their modulation, gates and residual sums in one launch each. The modulation stays ``[B, L, 6, D]`` in the dtype of
``temb``; the original makes a float32 sum of it and the block's table, a token each.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import numpy as np
import torch
from torch import Tensor, nn

from ..cached_attention import cached_attention
from ..masks import RuleProgram
from ..masks.systems import lingbot_va_text, lingbot_va_train
from ..runtime.host import eager
from . import _glue
from ._kernels import Tables, attend_under_program, device_ranges, norm_rope, require_complex, require_kernel
from ._patching import (
    Cache,
    Foreign,
    Patch,
    Policy,
    Replacement,
    Unsupported,
    of_class,
    require_class,
    require_norms,
    require_parts,
)

SYSTEM = "LingBot-VA"
TEXT_TOKENS = 512  # of each sample, as init_mask has it
_PARTS = ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", "inner_dim", "heads", "attn_op", "attn_caches")


def find(model: nn.Module) -> list[nn.Module]:
    """The transformers of a model; diffusers has a class of the same name, with neither ``attn_caches`` nor flex."""
    return [m for m in of_class(model, "WanTransformer3DModel") if _has_caches(m) or of_class(m, "FlexAttnFunc")]


def _has_caches(model: Foreign) -> bool:
    return all(hasattr(getattr(block, "attn1", None), "attn_caches") for block in getattr(model, "blocks", [None]))


def apply(patch: Patch, models: list[Foreign]) -> None:
    tables, mirrors = Tables(), _Mirrors()
    for model in models:
        require_class(SYSTEM, model, "WanTransformer3DModel")
        step = _StepPrograms()
        for block in model.blocks:
            require_class(SYSTEM, block.attn1, "WanAttention")
            require_parts(SYSTEM, block.attn1, _PARTS)
            require_kernel(SYSTEM, block.attn1.to_q.weight.new_empty(model.attention_head_dim))
            require_norms(SYSTEM, block.attn1.norm_q, block.attn1.norm_k, block.attn1.inner_dim)
            patch.method(block.attn1, "forward", _forward, tables, mirrors)
            for new in (_update_cache, _restore_cache, _clear_pred_cache):
                patch.method(block.attn1, new.__name__[1:], new, mirrors)
            if not _is_flex(block.attn2):
                patch.leave_alone(block.attn2, "attends to all of a short text: nothing to skip")
            _apply_glue(patch, block)
            for attn in (block.attn1, block.attn2):
                if _is_flex(attn):
                    require_class(SYSTEM, attn.attn_op, "FlexAttnFunc")
                    patch.method(attn.attn_op, "forward", _flex_forward, step)
        if any(_is_flex(block.attn1) for block in model.blocks):
            shared = patch.policy, step, _flex_class(model)
            patch.method(model, "forward_train", _forward_train, *shared, replacement=_TrainingStep)


def _apply_glue(patch: Patch, wrapped: Foreign) -> None:
    block: Foreign = next(iter(of_class(wrapped, "WanTransformerBlock")), None)
    table = getattr(block, "scale_shift_table", None)
    if block is None or not isinstance(table, Tensor) or table.ndim != 3 or tuple(table.shape[:2]) != (1, 6):
        patch.leave_alone(wrapped, "gates, residual sums and norms: no WanTransformerBlock with a [1, 6, D] table")
        return
    _glue.replace(patch, block, "forward", _block_forward, partial(_why_no_glue, block))


def _why_no_glue(block: Foreign) -> str | None:
    require_class(SYSTEM, block, "WanTransformerBlock")
    return _glue.why_not(block.scale_shift_table.shape[-1], (block.norm1, block.norm3), (block.norm2,))


def _block_forward(
    block: Foreign, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Tensor,
    update_cache: int = 0, cache_name: str = "pos",
) -> Tensor:  # fmt: skip
    """norm + modulation, gate + residual + norm, residual + norm + modulation, gate + residual."""
    x, text = hidden_states, encoder_hidden_states
    if temb.ndim != 4 or temb.shape[2] != 6:
        raise Unsupported(f"patch: {SYSTEM}'s temb must be [B, L, 6, D], got {list(temb.shape)}")
    shift, scale, gate, *mlp = _glue.split_rows(temb, block.scale_shift_table[0], torch.float32)
    _glue.require_rows(SYSTEM, x, shift)
    c_shift, c_scale, c_gate = mlp
    h = _glue.modulated(block.norm1, x, shift, scale)
    y = block.attn1(h, h, h, rotary_emb, update_cache=update_cache, cache_name=cache_name)
    x, h = _glue.added_and_normed(x, y, gate, block.norm2)
    y = block.attn2(h, text, text, None, update_cache=0, cache_name=cache_name)
    x, h = _glue.added_and_modulated(x, y, None, block.norm3, c_shift, c_scale, _glue.promoted(x, y))
    return _glue.added(x, block.ffn(h), c_gate)


def _is_flex(attn: Foreign) -> bool:
    return any(cls.__name__ == "FlexAttnFunc" for cls in type(attn.attn_op).__mro__)


# --- training ---------------------------------------------------------------------------------------------------------


class _StepPrograms(Cache):
    """Program and sizes of the training step at work, by ``is_cross``."""

    def __init__(self) -> None:
        self.of: dict[bool, tuple[RuleProgram, dict[str, int]]] = {}


class _InitMask:
    """``FlexAttnFunc.init_mask`` while the process has patched models: the model names the class, not an instance.

    It is the class's own unless a patched model is in its training step.
    """

    def __init__(self, own: staticmethod) -> None:
        self.own = own
        self.models: WeakSet[nn.Module] = WeakSet()
        self.step: tuple[Policy, _StepPrograms] | None = None

    def __call__(self, latent_shape, action_shape, padded_length, chunk_size, window_size, patch_size, device):
        sizes = (latent_shape, action_shape, padded_length, chunk_size, window_size, patch_size, device)
        if self.step is None:
            return self.own.__func__(*sizes)
        policy, programs = self.step
        programs.of.clear()
        try:
            programs.of.update(_programs(*sizes))
        except Unsupported as reason:
            policy.refuse(reason)
            return self.own.__func__(*sizes)
        return None


class _TrainingStep(Replacement):
    """Stands for ``forward_train``, and keeps an :class:`_InitMask` on the class for as long as a model needs it."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.flex = _flex_class(self.owner)
        self._install()

    def _install(self) -> None:
        if not isinstance(_init_mask_of(self.flex), _InitMask):
            self.flex.init_mask = staticmethod(_InitMask(vars(self.flex)["init_mask"]))
        _init_mask_of(self.flex).models.add(self.owner)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._install()

    def removed(self) -> None:
        shared = _init_mask_of(self.flex)
        if isinstance(shared, _InitMask):
            shared.models.discard(self.owner)
            if not shared.models:
                self.flex.init_mask = shared.own


def _flex_class(model: Foreign) -> Any:
    """The class whose ``init_mask`` the model calls; FSDP2 may have derived that of its instances."""
    return next(cls for cls in type(model.blocks[0].attn1.attn_op).__mro__ if "init_mask" in vars(cls))


def _init_mask_of(flex: Any) -> Any:
    return vars(flex)["init_mask"].__func__


def _forward_train(policy: Policy, programs: _StepPrograms, flex: Any, model: Foreign, input_dict: dict):
    shared = flex.init_mask
    shared.step = (policy, programs)
    try:
        return type(model).forward_train(model, input_dict)
    finally:
        shared.step = None


def _programs(latent_shape, action_shape, padding: int, chunk_size: int, window: int, patch_size, device) -> dict:
    samples, _, frames, rows, columns = latent_shape
    _, _, action_frames, *slots = action_shape
    if patch_size[0] != 1:
        raise Unsupported(
            f"patch: {SYSTEM}'s patch_size must be 1 frame, as in its mask's frame ids, got {patch_size[0]}"
        )
    video_tokens = (rows // patch_size[1]) * (columns // patch_size[2])
    action_tokens = math.prod(slots)
    train = {
        "samples": samples, "video_frames": frames, "video_tokens": video_tokens, "action_frames": action_frames,
        "action_tokens": action_tokens, "chunk_size": int(chunk_size), "window": int(window), "padding": int(padding),
    }  # fmt: skip
    text = {
        "samples": samples, "video": frames * video_tokens, "actions": action_frames * action_tokens,
        "text_tokens": TEXT_TOKENS, "padding": int(padding),
    }  # fmt: skip
    return {False: (lingbot_va_train, train), True: (lingbot_va_text, text)}


def _flex_forward(
    step: _StepPrograms, op: Foreign, query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    if op.is_cross not in step.of:
        raise Unsupported(f"patch: {SYSTEM}'s flex attention has no program; only a patched forward_train gives one")
    query, key = query.to(value.dtype), key.to(value.dtype)
    return attend_under_program(SYSTEM, query[:1], key[:1], value[:1], *step.of[op.is_cross])


# --- WanAttention -----------------------------------------------------------------------------------------------------


class _Mirrors(Cache):
    """The slots of every layer's pools, by layer and name."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[nn.Module, dict[str, SlotMirror]] = WeakKeyDictionary()

    def slots(self, attn: Foreign, cache_name: str) -> SlotMirror:
        cache = attn.attn_caches[cache_name]
        mirrors = self._of.setdefault(attn, {})
        if cache_name not in mirrors or mirrors[cache_name].pool() is not cache["mask"]:
            mirrors[cache_name] = SlotMirror(cache)  # a new pool: init_kv_cache makes a new dict
        return mirrors[cache_name]


# What follows has the slots in NumPy, on purpose: nothing of it may become part of a graph.


@eager
def _update_cache(
    mirrors: _Mirrors, attn: Foreign, cache_name: str, key: Tensor, value: Tensor, is_pred: bool
) -> np.ndarray:
    cache, slots = attn.attn_caches[cache_name], mirrors.slots(attn, cache_name)
    taken, _ = slots.write(cache, key, value, bool(is_pred))
    slots.publish(cache)
    return taken


@eager
def _restore_cache(mirrors: _Mirrors, attn: Foreign, cache_name: str, slots: np.ndarray) -> None:
    mirror = mirrors.slots(attn, cache_name)
    mirror.release(slots)
    mirror.publish(attn.attn_caches[cache_name])


@eager
def _clear_pred_cache(mirrors: _Mirrors, attn: Foreign, cache_name: str) -> None:
    mirror = mirrors.slots(attn, cache_name)
    mirror.release(mirror.is_pred)
    mirror.publish(attn.attn_caches[cache_name])


@eager
def _pooled(
    mirrors: _Mirrors, attn: Foreign, cache_name: str, query: Tensor, key: Tensor, value: Tensor, update_cache: int
) -> Tensor:
    """Attention over the pool and the chunk, which stays in it where ``update_cache`` says so."""
    cache, slots = attn.attn_caches[cache_name], mirrors.slots(attn, cache_name)
    taken, evicted = slots.write(cache, key, value, update_cache == 1)
    out = slots.attend(cache, query)
    if update_cache == 0:
        slots.release(taken)
    if update_cache or evicted:
        slots.publish(cache)
    return out


def _forward(
    tables: Tables, mirrors: _Mirrors, attn: Foreign, q: Tensor, k: Tensor, v: Tensor, rotary_emb: Tensor,
    update_cache: int = 0, cache_name: str = "pos",
) -> Tensor:  # fmt: skip
    cache: Any = (attn.attn_caches or {}).get(cache_name)
    pooled = cache is not None and cache["k"] is not None
    if pooled and torch.is_grad_enabled() and (q.requires_grad or attn.to_q.weight.requires_grad):
        raise Unsupported(f"patch: {SYSTEM}'s cached attention has no gradient; run it under torch.no_grad()")
    require_complex(SYSTEM, rotary_emb)
    head_dim = attn.inner_dim // attn.heads
    query, key, value = attn.to_q(q), attn.to_k(k), attn.to_v(v).unflatten(2, (attn.heads, -1))
    table = tables.of(rotary_emb, _rope_table)
    query, key = norm_rope(SYSTEM, query, key, attn.norm_q, attn.norm_k, table, head_dim=head_dim)
    if pooled:
        require_kernel(SYSTEM, query)  # before anything is written
        out = _pooled(mirrors, attn, cache_name, query, key, value, update_cache)
    else:
        out = attn.attn_op(query, key, value)
    return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(query)))


def _rope_table(freqs: Tensor) -> Tensor:
    """``[B or 1, S, 1, D / 2]`` complex to ``[B, S, D / 2, 2]``, or ``[S, D / 2, 2]`` where the batch shares it."""
    table = torch.view_as_real(freqs[:, :, 0])
    return table[0] if len(table) == 1 else table


class SlotMirror:
    """Which slots of one layer's pool hold what; numpy on the host, by the rules of ``WanAttention``.

    The pool's own tensors ``id``, ``mask`` and ``is_pred`` follow whenever slots change hands for good, so that the
    model can be unpatched between two chunks. A chunk that is written, attended and taken out again leaves them alone.
    """

    def __init__(self, cache: dict[str, Tensor]) -> None:
        self.pool = ref(cache["mask"])  # which pool it mirrors, without keeping it alive
        self.id, self.mask, self.is_pred = (cache[name].cpu().numpy().copy() for name in ("id", "mask", "is_pred"))

    def write(self, cache: dict[str, Tensor], key: Tensor, value: Tensor, is_pred: bool) -> tuple[np.ndarray, bool]:
        """Put ``[B, n, H, D]`` into the first n free slots; returns them, and whether the lowest ids had to go."""
        n = key.shape[1]
        free = (~self.mask).nonzero()[0]
        evicts = free.size < n
        if evicts:
            used = self.mask.nonzero()[0]
            # PyTorch's sort, not a stable one: which slots of one chunk go first is then what it is in the original
            oldest = torch.argsort(torch.from_numpy(self.id[used])).numpy()
            evicted = used[oldest[: n - free.size]]
            self.mask[evicted], self.id[evicted] = False, -1
            free = (~self.mask).nonzero()[0]
        if free.size < n:
            raise ValueError(f"{SYSTEM}: the cache must have {n} slots for the chunk, got {self.mask.size} in all")
        taken = free[:n]
        new_id = self.id[self.mask].max() + 1 if self.mask.any() else 0
        at = 0
        for lo, hi in stretches(taken):
            cache["k"][:, lo:hi] = key[:, at : at + hi - lo]
            cache["v"][:, lo:hi] = value[:, at : at + hi - lo]
            at += hi - lo
        self.mask[taken], self.id[taken], self.is_pred[taken] = True, new_id, is_pred
        return taken, evicts

    def release(self, slots: np.ndarray) -> None:
        self.mask[slots] = False

    def attend(self, cache: dict[str, Tensor], query: Tensor) -> Tensor:
        """Queries ``[B, S, H, D]`` over all valid slots, where they lie."""
        ranges = device_ranges(stretches(self.mask.nonzero()[0]), query.shape[0], query.device)
        pool = cache["k"], cache["v"]
        return cached_attention(query.to(pool[0].dtype), *pool, ranges, group_rows=(query.shape[1],)).to(query.dtype)

    def publish(self, cache: dict[str, Tensor]) -> None:
        """Bring the pool's own tensors up to date."""
        for name in ("id", "mask", "is_pred"):
            cache[name].copy_(torch.from_numpy(getattr(self, name)), non_blocking=True)


def stretches(slots: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Sorted slots as ranges [begin, end)."""
    if not slots.size:
        return ()
    begins = [0, *((slots[1:] - slots[:-1] > 1).nonzero()[0] + 1).tolist()]
    ends = [*begins[1:], slots.size]
    return tuple([(int(slots[a]), int(slots[b - 1]) + 1) for a, b in zip(begins, ends, strict=True)])
