"""Two doors for users of other attention libraries: ranges as in a varlen call, and FlexAttention's mask functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import bind_dims, integer, number
from .._host import device_of, eager
from ..plan import Plan, Sample, compile_plan
from ..ranges import IntPairs, Ranges
from .op import block_attention

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_ROWS = 512  # queries that a mask_mod is evaluated for at a time


@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, q_ranges: IntPairs, k_ranges: IntPairs, *,
    softmax_scale: float | None = None, return_lse: Literal[False] = False, impl: str | None = None,
) -> Tensor: ...  # fmt: skip


@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, q_ranges: IntPairs, k_ranges: IntPairs, *,
    softmax_scale: float | None = None, return_lse: Literal[True], impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, q_ranges: IntPairs, k_ranges: IntPairs, *,
    softmax_scale: float | None = None, return_lse: bool = False, impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ranges: IntPairs,
    k_ranges: IntPairs,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over packed tokens in which the queries of ``q_ranges[i]`` see the keys of ``k_ranges[i]``, for every
    i.

    A query range may come with several key ranges and the other way round; what a query sees is the union, each key
    once. Queries in no range give 0 (lse -inf). The ranges are compiled into a plan, cached by their values; everything
    else is :func:`block_attention`, with its gradients. ``torch.compile`` breaks its graph at the ranges: for
    ``fullgraph=True`` make the plan outside (``compile_plan(Ranges(...))``) and call :func:`block_attention`. A NaN in
    one document never reaches another: rows share a tile only if they see a key in common, forward and backward.

    Args:
        q: ``[total_q, H, D]``.
        k: ``[total_k, Hkv, D]``; Hkv divides H.
        v: As ``k``.
        q_ranges: ``[R, 2]`` begin and end of queries: pairs, a NumPy array or a CPU tensor of integers.
        k_ranges: As ``q_ranges``, of keys.
        softmax_scale: Factor on the scores; default ``D ** -0.5``.
        return_lse: Also return the log-sum-exp of every row's scores.
        impl: As in :func:`block_attention`.

    Returns:
        out ``[total_q, H, D]``; with ``return_lse`` also lse ``[H, total_q]``, float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape, ranges on a GPU or outside the tokens, or what :func:`block_attention` refuses.

    Source: ``flash_attn_varlen_func`` of FlashAttention, with the range lists of MagiAttention's flexible attention.
    """
    dims = bind_dims("varlen_attention", q=(q, "total_q H D"), k=(k, "total_k Hkv D"), v=(v, "total_k Hkv D"))
    queries, keys = dims["total_q"], dims["total_k"]
    if softmax_scale is not None:
        softmax_scale = number("varlen_attention", "softmax_scale", softmax_scale)
    plan = _plan_of(q_ranges, k_ranges, queries, keys, q.device)
    # a plan has tokens: where there are none, one that nothing attends to
    q, k, v = (t if t.shape[0] else F.pad(t, (0, 0, 0, 0, 0, 1)) for t in (q, k, v))
    out, lse = block_attention(q[None], k[None], v[None], plan, scale=softmax_scale, impl=impl, return_lse=True)
    out, lse = out[0, :queries], lse[0, :, :queries]
    return (out, lse) if return_lse else out


@eager
def _plan_of(q_ranges: IntPairs, k_ranges: IntPairs, queries: int, keys: int, device: torch.device) -> Plan:
    ranges = Ranges(q_ranges, k_ranges, queries, keys)
    return compile_plan(ranges, length=max(queries, 1), key_length=max(keys, 1), device=device)


@eager
def plan_from_mask_mod(
    mask_mod: MaskMod,
    geometry: Sample | Sequence | int | tuple[int, int],
    *,
    batch: int = 1,
    heads: int = 1,
    device: torch.device | str = "cpu",
    max_length: int = 32_768,
) -> Plan:
    """The plan that equals a FlexAttention ``mask_mod``, checked on every pair, or a refusal that names a pair.

    Evaluates ``mask_mod`` on all pairs, a block of queries at a time: memory is linear in the tokens, time is not. Do
    it once and keep the plan.

    Args:
        mask_mod: ``mask_mod(b, h, q_idx, kv_idx)``, integer tensors that broadcast, to bool, as for ``flex_attention``.
        geometry: What the mask is believed to be, as :func:`wam_kernels.compile_plan` takes it: its plan is returned if
            ``mask_mod`` says the same of every pair. Or the lengths, S or (S, T): then the plan is read off
            ``mask_mod``.
        batch: Batch elements that ``mask_mod`` is evaluated for. It may depend on b; then the plan has as many.
        heads: Heads that ``mask_mod`` is evaluated for. It may not depend on h.
        device: Where ``mask_mod`` is evaluated (where the tensors that it reads are) and where the plan goes.
        max_length: Longest S or T to evaluate.

    Raises:
        ValueError: ``mask_mod`` differs from ``geometry`` (the message has the first pair), depends on the head, is not
            boolean, cuts the keys into more columns than a plan has, or is longer than ``max_length``.

    Source: ``create_block_mask`` of ``torch.nn.attention.flex_attention``.
    """
    name = "plan_from_mask_mod"
    device, batch, heads = device_of(name, device), integer(name, "batch", batch, 1), integer(name, "heads", heads, 1)
    given: Any = geometry if isinstance(geometry, tuple | list) else (geometry, geometry)
    by_length = len(given) == 2 and any(isinstance(n, int | float | np.number | np.ndarray | Tensor) for n in given)
    known = None if by_length else compile_plan(cast("Sample | Sequence", geometry), device=device)
    if known is None:
        queries, keys = (integer(name, "geometry", n, 1) for n in given)
        lengths = queries, keys
    else:
        lengths = known.length, known.key_length
        if known.batch not in (1, batch):
            raise ValueError(f"{name}: batch must be {known.batch} like geometry, got {batch}")
    if max(lengths) > integer(name, "max_length", max_length, 1, most=None):
        raise ValueError(
            f"{name}: geometry must have at most max_length={max_length} tokens, because every pair is evaluated, got "
            f"{max(lengths)}; raise max_length if the time is no matter"
        )
    pieces: list[list[Ranges]] = []
    for first, mask in _evaluate(mask_mod, lengths, batch, heads, device):
        if known is not None:
            _same(name, mask, _rows_of(known, first, first + mask.shape[1]), first)
        else:
            pieces.append([Ranges.from_mask(m) for m in mask])
    if known is not None:
        return known
    samples = []
    for rows in zip(*pieces, strict=True):  # of one batch element
        starts = np.cumsum([0, *(r.length for r in rows)])
        q_ranges = np.concatenate([r.q_ranges + start for r, start in zip(rows, starts, strict=False)])
        samples.append((Ranges(q_ranges, np.concatenate([r.k_ranges for r in rows]), *lengths),))
    return compile_plan(samples if len(samples) > 1 else samples[0][0], device=device)


def _evaluate(
    mask_mod: MaskMod, lengths: tuple[int, int], batch: int, heads: int, device: torch.device
) -> Iterator[tuple[int, np.ndarray]]:
    """(first query, bool ``[batch or 1, rows, T]``) of one block of queries after the other."""
    name = "plan_from_mask_mod"
    S, T = lengths
    b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    h = torch.arange(heads, device=device).view(1, -1, 1, 1)
    k = torch.arange(T, device=device).view(1, 1, 1, -1)
    for first in range(0, S, _ROWS):
        q = torch.arange(first, min(S, first + _ROWS), device=device).view(1, 1, -1, 1)
        mask = mask_mod(b, h, q, k)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{name}: mask_mod must return a bool tensor, got {got}")
        shape = batch, heads, q.shape[2], T
        if mask.ndim > 4 or any(n not in (1, want) for n, want in zip(mask.shape[::-1], shape[::-1], strict=False)):
            raise ValueError(
                f"{name}: mask_mod must return what broadcasts to {list(shape)} like its arguments, got "
                f"{list(mask.shape)}"
            )
        while mask.ndim < 4:
            mask = mask[None]
        # an axis that mask_mod does not read still has size 1, and needs no second look
        other = mask != mask[:, :1]
        if other.any():
            at_b, at_h, at_q, at_k = (int(i) for i in other.nonzero()[0])
            raise ValueError(
                f"{name}: mask_mod must not depend on the head, but heads 0 and {at_h} differ at (b={at_b}, "
                f"q={first + at_q}, k={at_k}); make a plan for each group of heads"
            )
        mask = mask[:, 0].expand(mask.shape[0], q.shape[2], T)
        yield first, mask.cpu().numpy()


def _rows_of(plan: Plan, begin: int, end: int) -> np.ndarray:
    """bool ``[plan.batch, end - begin, T]``: what these queries see, read off the plan."""
    mask = np.zeros((plan.batch, end - begin, plan.key_length), bool)
    for b, lo, hi, *bounds in plan.runs.tolist():
        lo, hi = max(lo, begin) - begin, min(hi, end) - begin
        if lo < hi:
            for k_lo, k_hi in zip(bounds[::2], bounds[1::2], strict=True):
                mask[b, lo:hi, k_lo:k_hi] = True
    return mask


def _same(name: str, mask: np.ndarray, expected: np.ndarray, first: int) -> None:
    mask, expected = np.broadcast_arrays(mask, expected)
    different = np.argwhere(mask != expected)
    if len(different):
        b, q, k = (int(i) for i in different[0])
        raise ValueError(
            f"{name}: mask_mod must equal geometry, but at (b={b}, q={first + q}, k={k}) mask_mod says {mask[b, q, k]} "
            f"and geometry {expected[b, q, k]}; pass the lengths instead to take mask_mod as it is"
        )
