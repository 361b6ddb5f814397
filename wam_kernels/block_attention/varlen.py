"""Adapter: attention over packed tokens with visibility given as ranges, as in other libraries' varlen calls."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks.ranges import Flags, IntPairs, Ranges
from ..plan import Plan, compile_plan
from ..runtime.checks import bind_dims, number
from ..runtime.host import eager
from .op import block_attention


@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, q_ranges: IntPairs, k_ranges: IntPairs, *,
    softmax_scale: float | None = None, return_lse: Literal[False] = False, impl: str | None = None,
    stop_gradient: Flags | None = None,
) -> Tensor: ...  # fmt: skip


@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, q_ranges: IntPairs, k_ranges: IntPairs, *,
    softmax_scale: float | None = None, return_lse: Literal[True], impl: str | None = None,
    stop_gradient: Flags | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, q_ranges: IntPairs, k_ranges: IntPairs, *,
    softmax_scale: float | None = None, return_lse: bool = False, impl: str | None = None,
    stop_gradient: Flags | None = None,
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
    stop_gradient: Flags | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over packed tokens in which the queries of ``q_ranges[i]`` attend to the keys of ``k_ranges[i]``, for
    every i.

    A query range may come with several key ranges and the other way round; what a query attends to is the union, each
    key once. Queries in no range give 0 (lse -inf). The ranges are compiled into a plan, cached by their values;
    everything else is :func:`block_attention`, with its gradients. ``torch.compile`` breaks its graph at the ranges:
    for ``fullgraph=True`` make the plan outside (``compile_plan(Ranges(...))``) and call :func:`block_attention`. A NaN
    in one document never reaches another: rows share a tile only if they share a visible key, forward and backward.

    Args:
        q: ``[total_q, H, D]``.
        k: ``[total_k, Hkv, D]``; Hkv divides H.
        v: As ``k``.
        q_ranges: ``[R, 2]`` begin and end of queries: pairs, a NumPy array or a CPU tensor of integers.
        k_ranges: As ``q_ranges``, of keys.
        softmax_scale: Factor on the scores; default ``D ** -0.5``.
        return_lse: Also return the log-sum-exp of every row's scores.
        impl: As in :func:`block_attention`.
        stop_gradient: bool ``[R]``, on the host: keys and values of ``k_ranges[i]`` get no gradient from the queries of
            ``q_ranges[i]``, as if they were detached for them. A pair that another i names without it keeps its
            gradient.

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
    plan = _plan_of(q_ranges, k_ranges, stop_gradient, queries, keys, q.device)
    # a plan has tokens: where there are none, one that nothing attends to
    q, k, v = (t if t.shape[0] else F.pad(t, (0, 0, 0, 0, 0, 1)) for t in (q, k, v))
    out, lse = block_attention(q[None], k[None], v[None], plan, scale=softmax_scale, impl=impl, return_lse=True)
    out, lse = out[0, :queries], lse[0, :, :queries]
    return (out, lse) if return_lse else out


@eager
def _plan_of(
    q_ranges: IntPairs,
    k_ranges: IntPairs,
    stop_gradient: Flags | None,
    queries: int,
    keys: int,
    device: torch.device,
) -> Plan:
    ranges = Ranges(q_ranges, k_ranges, queries, keys, stop_gradient)
    return compile_plan(ranges, length=max(queries, 1), key_length=max(keys, 1), device=device)
