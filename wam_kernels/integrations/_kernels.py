"""What integrations call of this library: attention under a mask or a program, norm and rope, each refused by name.

A model hands over its mask, or the sizes that it follows from, in every call. Eager calls find the plan first. Under
``torch.compile`` the plan is not to be found yet, so the call becomes one registered op (``wam::mask_attention``,
``wam::program_attention``) that finds it where it runs: the graph stays whole.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from ..block_attention import block_attention
from ..block_attention.config import MAX_D, fits_triton
from ..block_attention.op import chosen_backend, register_attention, registered_arguments
from ..masks import RULE_PROGRAMS, RuleProgram
from ..masks.ranges import Ranges
from ..plan import Plan, compile_plan
from ..qk_norm_rope.op import unchecked_qk_norm_rope
from ..runtime.host import host_side, plain
from ._patching import Cache, Foreign, Unsupported

# ---- plans of masks ----


class MaskPlans(Cache):
    """Plans of dense masks ``[Sq, Sk]``, or ``[B, Sq, Sk]``, that a model builds at run time.

    A mask is converted to the ranges that it spells out, so the plan is equal to it, not alike. That takes a copy to
    the host, done once for each mask tensor: the same tensor, or the same view of it, is recognised as long as nobody
    writes to it. A copy of an equal mask finds its plan by the mask's digest, so no mask is kept. Inference tensors do
    not tell whether they were written to, so each of their calls goes by the digest.
    """

    KEPT = 32  # plans remembered; a model has a handful of masks

    def __init__(self) -> None:
        self._by_tensor: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._by_digest: OrderedDict[tuple, Plan] = OrderedDict()

    def __len__(self) -> int:
        """Plans that are remembered by digest."""
        return len(self._by_digest)

    def of(self, mask: Tensor, device: torch.device) -> Plan:
        """The plan, on ``device``, of a boolean mask ``[Sq, Sk]`` or ``[B, Sq, Sk]``, or of an additive one
        ``[B, 1, Sq, Sk]``: 0 is visible, -1e30 and less is not; or of a :class:`PaddedBlocks`.

        Raises:
            Unsupported: another value in an additive mask (a bias, which a plan cannot express), or a mask that needs
                more key columns than a plan has.
        """
        if isinstance(mask, PaddedBlocks):
            if mask.plan is None:
                mask.plan = self._of_blocks(mask)
            return mask.plan.to(device)
        if mask.is_inference():
            return self._find(mask).to(device)
        plans, key = self._views_of(mask)
        version, plan = plans.get(key, (None, None))
        if version != mask._version:
            plan = self._find(mask)
            plans[key] = (mask._version, plan)
        return plan.to(device)

    def _views_of(self, mask: Tensor) -> tuple[dict, tuple]:
        """What is remembered of a mask's base, whose views share its version; and the key of this view."""
        base = mask._base if mask._is_view() else mask
        return self._by_tensor.setdefault(base, {}), (mask.shape, mask.stride(), mask.storage_offset())

    def _find(self, mask: Tensor) -> Plan:
        """By the mask's digest. Its values are read once where its rows are a staircase, else twice."""
        visible, clear = mask, torch.ones((), dtype=torch.bool, device=mask.device)
        if mask.is_floating_point():
            visible = (mask == 0)[:, 0]
            clear = (visible | (mask <= -1e30)[:, 0]).all()
        by_sample = visible.reshape(-1, *visible.shape[-2:])
        keys, counts, staircase = staircase_vectors(by_sample)
        flags = torch.stack((clear, staircase)).to(torch.int32)
        host = torch.cat((flags, keys.to(torch.int32).flatten(), counts.flatten())).cpu().numpy()
        if not host[0]:
            raise Unsupported("patch: attention_mask must hold 0 and at most -1e30, but it is a bias of other values")
        if host[1]:
            return self._of_vectors(host[2:], visible.shape)
        host_mask = by_sample.cpu().numpy()
        return self._remembered(np.packbits(host_mask), visible.shape, lambda: map(Ranges.from_mask, host_mask))

    def _of_blocks(self, mask: PaddedBlocks) -> Plan:
        """From the two vectors, which are all that goes to the host."""
        keys, counts, staircase = mask.vectors()
        flag = staircase.to(torch.int32)[None]
        host = torch.cat((flag, keys.to(torch.int32).flatten(), counts.flatten())).cpu().numpy()
        return self._of_vectors(host[1:], (keys.shape[0], *mask.shape[-2:])) if host[0] else self._find(mask.spelled())

    def _of_vectors(self, host: np.ndarray, shape: Sequence[int]) -> Plan:
        """Of keys ``[B, Sk]`` and counts ``[B, Sq]``, flat, one behind the other."""
        batch, queries, keys = (1, *shape)[-3:]
        n = batch * keys
        vectors = zip(host[:n].reshape(batch, keys) > 0, host[n:].reshape(batch, queries), strict=True)
        return self._remembered(host, shape, lambda: map(staircase_ranges, vectors))

    def _remembered(self, digested: np.ndarray, shape: Sequence[int], samples: Callable[[], Iterable[Ranges]]) -> Plan:
        key = tuple(shape), digested.dtype, hashlib.sha256(digested.data).digest()
        plan = self._by_digest.pop(key, None)
        if plan is None:
            plan = plan_of_ranges(list(samples()), shape)
        self._by_digest[key] = plan
        while len(self._by_digest) > self.KEPT:
            self._by_digest.popitem(last=False)
        return plan


class PaddedBlocks(Tensor):
    """A mask of padding and blocks, bool ``[B, S, S]`` or additive ``[B, 1, S, S]``, as the two vectors behind it.

    A token attends to its own block and those before it; padding attends to nothing and nothing to it. There is a mask
    of S x S only from where a short call, or other code than this library's, reads it. It cannot be written to.

    Attributes:
        pads: bool ``[B, S]``: no padding.
        blocks: ``[B, S]``: where it is not 0, a block begins.
        plan: Of the mask, once it was needed.
    """

    pads: Tensor
    blocks: Tensor
    plan: Plan | None = None
    _spelled: Tensor | None = None

    @staticmethod
    def __new__(cls, pads: Tensor, blocks: Tensor, spell: Callable[[], Tensor], dtype: torch.dtype) -> PaddedBlocks:
        B, S = pads.shape
        shape = (B, S, S) if dtype == torch.bool else (B, 1, S, S)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=pads.device)

    def __init__(self, pads: Tensor, blocks: Tensor, spell: Callable[[], Tensor], dtype: torch.dtype) -> None:
        self.pads, self.blocks, self._spell = pads, blocks, spell

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        if func._schema.is_mutable:
            raise RuntimeError("a patched model's mask cannot be written to; write to a clone() of it")
        args, kwargs = tree_map_only(cls, lambda mask: mask.spelled(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def spelled(self) -> Tensor:
        """The mask itself, of S x S, kept from here on."""
        if self._spelled is None:
            self._spelled = self._spell()
        return self._spelled

    def vectors(self) -> tuple[Tensor, Tensor, Tensor]:
        """As :func:`staircase_vectors` of the mask; blocks that count down are no staircase."""
        at = torch.cumsum(self.blocks, 1).float()
        ends = torch.searchsorted(at, at, right=True)
        rank = self.pads.cumsum(1, dtype=torch.int32)
        counts = rank.gather(1, (ends - 1).clamp(0)) * self.pads  # below 0 where no staircase
        return self.pads, counts, (at.diff(dim=1) >= 0).all()


def staircase_vectors(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two vectors that spell out bool ``[B, Sq, Sk]`` where every row attends to the first keys of the sample's.

    Masks of padding and blocks, each of which attends to those before it, are of this kind, and as vectors they take
    S numbers a sample to the host instead of S x S.

    Returns:
        keys bool ``[B, Sk]``, that any row attends to; counts int32 ``[B, Sq]``, to how many of them each row attends;
        whether the two give the mask.
    """
    keys, counts = mask.any(1), mask.sum(-1, dtype=torch.int32)
    rank = keys.cumsum(-1, dtype=torch.int32)
    again = keys[:, None] & (rank[:, None] <= counts[..., None])
    return keys, counts, (again == mask).all()


def staircase_ranges(vectors: tuple[np.ndarray, np.ndarray]) -> Ranges:
    """``Ranges.from_mask`` of what the two vectors of one sample spell out."""
    keys, counts = vectors
    edge = np.flatnonzero(np.diff(keys.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    before = np.concatenate([[0], np.cumsum(edge[:, 1] - edge[:, 0])])  # keys before each run of them
    rows = np.concatenate([[0], np.flatnonzero(np.diff(counts)) + 1, [counts.size]])
    queries, attended = [], []
    for begin, end in zip(rows[:-1], rows[1:], strict=True):
        for (first, last), so_far in zip(edge, before[:-1], strict=True):
            if counts[begin] > so_far:
                queries.append((begin, end))
                attended.append((first, min(last, first + counts[begin] - so_far)))
    q_ranges, k_ranges = (np.array(x, np.int64).reshape(-1, 2) for x in (queries, attended))
    return Ranges(q_ranges, k_ranges, counts.size, keys.size)


PLANS = MaskPlans()


def plan_of_ranges(samples: list[Ranges], shape: Sequence[int]) -> Plan:
    try:
        return compile_plan(samples[0] if len(set(samples)) == 1 else samples)
    except ValueError as error:
        raise Unsupported(f"patch: no plan for an attention_mask of shape {list(shape)}: {error}") from error


def required_mask(mask: Any) -> Tensor:
    """``mask``, which a plan can be made of as far as its dtype and shape tell.

    Raises:
        Unsupported: neither a boolean ``[Sq, Sk]`` or ``[B, Sq, Sk]`` nor an additive ``[B, 1, Sq, Sk]``.
    """
    if isinstance(mask, Tensor):
        if mask.dtype == torch.bool and mask.ndim in (2, 3):
            return mask
        if mask.is_floating_point() and mask.ndim == 4 and mask.shape[1] == 1:
            return mask
    got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
    raise Unsupported(
        f"patch: attention_mask must be torch.bool [Sq, Sk] or [B, Sq, Sk], or additive [B, 1, Sq, Sk], got {got}"
    )


# ---- attention ----

# Up to so many pairs of a query and a key a call is dense: the mask is not read, no plan is looked for, and PyTorch's
# fused kernel takes the mask as it is. Where a plan begins to gain is measured: bench/results/short_calls.jsonl.
DENSE_PAIRS = 2**18


def attend_under_mask(
    system: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """Attention ``[B, S, H, D]`` under a mask that the model passes, bool ``[Sq, Sk]`` or ``[B, Sq, Sk]``, or additive
    ``[B, 1, Sq, Sk]``.

    Raises:
        Unsupported: no kernel, a mask of another kind or size, or one that no plan can express. Under
            ``torch.compile`` what only the mask's values tell is raised where the compiled model runs.
    """
    D = q.shape[-1]
    if D % 8 or D > MAX_D or q.device.type != "cpu" or not q.dtype == k.dtype == v.dtype:
        _require_qkv(system, q, k, v)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim not in (2, 3):
        mask = required_mask(mask)
    if mask.shape[-2] != q.shape[1] or mask.shape[-1] != k.shape[1]:
        _refuse_lengths(system, q, k, mask.shape[-2], mask.shape[-1])
    if q.shape[1] * k.shape[1] <= DENSE_PAIRS:
        return _dense(q, k, v, mask.spelled() if isinstance(mask, PaddedBlocks) else mask, scale)
    if torch.compiler.is_compiling():
        # a compiled rollout may be one CUDA graph, in which no mask can be read
        if not torch.is_grad_enabled():
            return _dense(q, k, v, mask, scale)
        return torch.ops.wam.mask_attention(q, k, v, mask, _scale(q, scale))[0]
    return _attend(system, q, k, v, PLANS.of(mask, q.device), scale)


def attend_under_program(
    system: str, q: Tensor, k: Tensor, v: Tensor, program: RuleProgram, sizes: Mapping[str, int]
) -> Tensor:
    """Attention ``[B, S, H, D]`` under a registered program of these sizes, all of them ints.

    Raises:
        Unsupported: no kernel, or tokens of another number than the program's.
    """
    _require_qkv(system, q, k, v)
    names = ",".join(sizes)
    if torch.compiler.is_compiling():
        return torch.ops.wam.program_attention(q, k, v, program.name, names, list(sizes.values()), _scale(q, None))[0]
    plan = _plan_of_sizes(program.name, names, tuple(sizes.values()), q.device)
    if plan.length != q.shape[1] or plan.key_length != k.shape[1]:
        _refuse_lengths(system, q, k, plan.length, plan.key_length)
    return _attend(system, q, k, v, plan, None)


def _attend(system: str, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None) -> Tensor:
    if plan.batch not in (1, q.shape[0]):
        raise Unsupported(f"patch: {system}'s mask must have {q.shape[0]} samples like its tokens, got {plan.batch}")
    return block_attention(q, k, v, plan.to(q.device), scale=scale)


def plan_of_program(name: str, names: str, sizes: Sequence[int], device: torch.device) -> Plan:
    """The plan of a registered program; ``names`` are those of its sizes, with commas between."""
    return _plan_of_sizes(name, names, tuple(sizes), device)


@lru_cache(maxsize=MaskPlans.KEPT)
def _plan_of_sizes(name: str, names: str, sizes: tuple[int, ...], device: torch.device) -> Plan:
    sample = RULE_PROGRAMS[name](**dict(zip(names.split(","), sizes, strict=True)))
    return compile_plan(sample, device=device)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    mask = mask.to(q.device) if mask.dtype == torch.bool else mask.to(q.device, q.dtype)
    mask = mask[:, None] if mask.ndim == 3 else mask
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if k.shape[1] == 1:  # PyTorch 2.7 has no fused kernel for groups, but for keys that several heads share in memory
        k, v = k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped).transpose(1, 2)


def of_heads(t: Tensor, heads: int) -> Tensor:
    """``[B, S, H, D]`` of ``[B, S, H * D]``."""
    return t.view(*t.shape[:-1], heads, -1)


def _require_qkv(system: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    require_kernel(system, q)
    if not q.dtype == k.dtype == v.dtype:
        raise Unsupported(f"patch: {system}'s q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")


def _refuse_lengths(system: str, q: Tensor, k: Tensor, queries: int, keys: int) -> None:
    raise Unsupported(
        f"patch: {system} has {q.shape[1]} queries and {k.shape[1]} keys, but its mask is for {queries} and {keys}"
    )


def _register(name: str, tensors: Sequence[str], options: Sequence[str], plan_of: Callable[..., Plan]) -> None:
    """Defines ``name`` as ``block_attention`` under the plan that ``plan_of(*tensors, *options, device)`` finds when it
    runs; the op's last option is the scale."""

    def forward(q, k, v, *args):
        *source, scale = args
        plan = plan_of(*source, q.device)
        return torch.ops.wam.block_attention(q, k, v, *registered_arguments(plan, scale, chosen_backend(q)))

    def backward(dout, dlse, q, k, v, out, lse, *args):
        *source, scale = args
        plan = plan_of(*source, q.device)
        arguments = registered_arguments(plan, scale, chosen_backend(q))
        return torch.ops.wam.block_attention_backward(dout, dlse, q, k, v, out, lse, *arguments)

    # a mask is read on the host, which no CUDA graph can hold
    tags = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
    options = [*options, "float scale"]
    register_attention("patch", name, forward, backward, tensors, options, joins_batch=False, tags=tags)


_register("wam::mask_attention", ["mask"], [], lambda mask, device: PLANS.of(mask, device))
_register("wam::program_attention", [], ["str program", "str names", "int[] sizes"], plan_of_program)


def require_kernel(system: str, q: Tensor) -> None:
    """There is a fast path for the heads of ``q`` ``[..., D]`` where it lives.

    Raises:
        Unsupported: the head dim, or the head dim in this dtype on a GPU.
    """
    D = q.shape[-1]
    if D % 8 or not 8 <= D <= MAX_D:
        raise Unsupported(
            f"patch: {system} has heads of {D} channels; block_attention takes multiples of 8 up to {MAX_D}"
        )
    if q.device.type == "cuda" and not (q.itemsize <= 4 and fits_triton(D, q.itemsize)):
        raise Unsupported(
            f"patch: {system} has heads of {D} channels in {q.dtype}, for which there is no GPU kernel; run it in "
            "bfloat16"
        )


# ---- norm and rope ----


class Tables(Cache):
    """Rope tables ``[.., S, D / 2, 2]`` of the frequencies that a model passes, once for each tensor.

    Inference tensors do not tell whether they were written to, so a table of one is made anew for every call. Under
    ``torch.compile`` tables are computed in the graph.
    """

    def __init__(self) -> None:
        self._tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def of(self, freqs: Tensor, make: Callable[[Tensor], Tensor], key: tuple = ()) -> Tensor:
        """``make(freqs)`` in float32, contiguous, without a gradient; ``key`` holds what else it depends on."""
        if torch.compiler.is_compiling():
            return make(freqs.detach()).float().contiguous()
        if freqs.is_inference():
            return self._make(freqs, make)
        tables = self._tables.setdefault(freqs, {})
        version, table = tables.get(key, (None, None))
        if version != freqs._version:
            table = self._make(freqs, make)
            tables[key] = (freqs._version, table)
        return table

    def _make(self, freqs: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        # whatever mode the call is in, a later one may train on the table
        with torch.inference_mode(False), torch.no_grad():
            return plain(make(freqs.detach()).float().contiguous())


def require_complex(system: str, freqs: Tensor) -> None:
    """Rope frequencies are complex numbers.

    Raises:
        Unsupported: they are not.
    """
    if not isinstance(freqs, Tensor) or not freqs.is_complex():
        got = freqs.dtype if isinstance(freqs, Tensor) else type(freqs).__name__
        raise Unsupported(f"patch: {system}'s rope frequencies must be a complex tensor, got {got}")


def norm_rope(
    system: str, q: Tensor, k: Tensor, norm_q: Foreign, norm_k: Foreign, table: Tensor, head_dim: int,
    per_head: bool = False, interleaved: bool = True, v: Tensor | None = None, out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``qk_norm_rope`` with the weights of the model's two norms, refused as Unsupported where the op refuses them.

    ``q`` and ``k`` ``[B, S, inner]`` as they leave their projections; returns ``[B, S, H, D]``. ``out``, where given,
    is made for them and for ``v``. The op's checks are left out: what they ask for is asked here or of the model.
    """
    for norm in (norm_q, norm_k):
        if norm.weight.dtype not in (q.dtype, torch.float32):
            raise Unsupported(
                f"patch: {system}'s {type(norm).__name__} must be {q.dtype} like q, or float32, got {norm.weight.dtype}"
            )
    if k.dtype != q.dtype or v is not None and v.dtype != q.dtype:
        raise Unsupported(
            f"patch: {system}'s keys and values must be {q.dtype} like its queries, got {k.dtype}"
            + (f" and {v.dtype}" if v is not None else "")
        )
    row = q.shape[1], head_dim // 2, 2
    if table.shape not in (row, (q.shape[0], *row)) or table.device != q.device:
        raise Unsupported(
            f"patch: {system}'s rope must be of {row[0]} tokens and {head_dim} channels on {q.device} like its "
            f"queries, got a table {list(table.shape)} on {table.device}"
        )
    if q.stride(-1) != 1 or k.stride(-1) != 1:
        q, k = q.contiguous(), k.contiguous()
    if v is not None and v.stride(-1) != 1:
        v = v.contiguous()
    options = head_dim, per_head, interleaved, norm_q.eps
    return unchecked_qk_norm_rope(q, k, norm_q.weight, norm_k.weight, table, *options, v, out)


@lru_cache(maxsize=256)
@host_side
def device_ranges(ranges: tuple[tuple[int, int], ...], batch: int, device: torch.device) -> Tensor:
    """int32 ``[batch, 1, R, 2]``; a rollout comes back to the same few lists, so this seldom copies anything."""
    one = torch.tensor(ranges or [(0, 0)], dtype=torch.int32, device=device)
    return one.expand(batch, 1, -1, 2).contiguous()
