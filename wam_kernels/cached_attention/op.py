"""Public op: checks, backend choice, torch.library registration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from ..ops import OPS
from ..runtime import autograd
from ..runtime.backends import launchers, select_backend
from ..runtime.checks import are_tensors, bind_dims, heads_first, integers, number, same_kind
from . import cpu, reference
from .config import MAX_D, MAX_GROUPS, MAX_KERNEL_D

_OP = "cached_attention"
_ROW = OPS[_OP]
_CPU_DTYPES = _ROW.backends["cpu"].dtypes


def _forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, ranges: Tensor, group_rows: Sequence[int], scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    return launchers(__package__, impl).forward(q, k_cache, v_cache, ranges, group_rows, scale)


def _forward_fake(q, k_cache, v_cache, ranges, group_rows, scale, impl):
    B, S, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, S), dtype=torch.promote_types(q.dtype, torch.float32))


torch.library.define(
    "wam::cached_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor ranges, int[] group_rows, float scale, str impl) "
    "-> (Tensor, Tensor)",
)
torch.library.impl("wam::cached_attention", ["CPU", "CUDA"], _forward)
torch.library.register_fake("wam::cached_attention", _forward_fake)
autograd.register_inference(_OP, "wam::cached_attention", samples=lambda inputs, mapped: range(4))


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, ranges: Tensor, group_rows: tuple[int, ...]) -> None:
    are_tensors(_OP, q=q)
    rows = sum(group_rows)
    if q.ndim == 4 and q.shape[1] != rows and (hint := heads_first("q", q, "B S H D", {"S": rows})):
        raise ValueError(f"{_OP}: q must have shape [B, S={rows}, H, D] like group_rows, got {list(q.shape)}{hint}")
    dims = bind_dims(
        _OP, q=(q, "B S H D"), k_cache=(k_cache, "C N H D"), v_cache=(v_cache, "C N H D"), ranges=(ranges, "B G R 2")
    )
    if dims["B"] % max(dims["C"], 1) or bool(dims["B"]) > bool(dims["C"]):
        raise ValueError(f"{_OP}: k_cache must have a batch that divides B={dims['B']}, that of q, got {dims['C']}")
    same_kind(_OP, "q", q, k_cache=k_cache, v_cache=v_cache)
    if dims["D"] % 8 or not 8 <= dims["D"] <= MAX_D:
        raise ValueError(f"{_OP}: D must be a multiple of 8 from 8 to {MAX_D}, got {dims['D']}; pad the heads")
    if dims["2"] != 2 or dims["G"] < 1 or dims["R"] < 1:
        raise ValueError(f"{_OP}: ranges must have shape [B, G >= 1, R >= 1, 2], got {list(ranges.shape)}")
    if ranges.dtype != torch.int32 or ranges.device != q.device:
        raise ValueError(
            f"{_OP}: ranges must be torch.int32 on {q.device} like q, got {ranges.dtype} on {ranges.device}"
        )
    if not ranges.is_contiguous():
        raise ValueError(f"{_OP}: ranges must be contiguous, got strides {ranges.stride()}; use .contiguous()")
    if len(group_rows) != dims["G"] or rows != dims["S"]:
        raise ValueError(
            f"{_OP}: group_rows must be G={dims['G']} counts (one for each group of ranges) that sum to S={dims['S']} "
            f"(the rows of q), got {group_rows}"
        )
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if t.stride(-1) != 1:
            raise ValueError(f"{_OP}: {name} must have last-dim stride 1, got {t.stride(-1)}; use .contiguous()")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k_cache, v_cache)):
        raise ValueError(
            f"{_OP}: is for inference and has no gradient, but an input requires one; use torch.no_grad(), or "
            "block_attention to train"
        )


def _is_plain(q: Tensor, k_cache: Tensor, v_cache: Tensor, ranges: Tensor, group_rows: tuple[int, ...]) -> bool:
    """One quick look says that all is as :func:`_check` wants it, on a CPU, with nothing that watches or traces.

    The checks and the registered op take a tenth of a millisecond of a chunk's call, whose attention takes one. What
    this does not take goes that way, with its errors.
    """
    if torch.compiler.is_compiling() or type(group_rows) is not tuple or not {int}.issuperset(map(type, group_rows)):
        return False
    for t in (q, k_cache, v_cache):
        # no subclass: a fake tensor has a kernel of its own
        if type(t) is not Tensor or not t.is_cpu or t.dtype not in _CPU_DTYPES or t.ndim != 4 or t.stride(-1) != 1:
            return False
    if type(ranges) is not Tensor or not ranges.is_cpu or ranges.dtype is not torch.int32 or ranges.ndim != 4:
        return False
    (B, S, H, D), (C, _, heads, width), (of, G, R, two) = q.shape, k_cache.shape, ranges.shape
    return (
        k_cache.shape == v_cache.shape
        and q.dtype is k_cache.dtype is v_cache.dtype
        and (heads, width, of, two) == (H, D, B, 2)
        and (B > 0 and C > 0 and B % C == 0)
        and (G > 0 and R > 0 and len(group_rows) == G and min(group_rows) >= 0 and sum(group_rows) == S)
        and (D % 8 == 0 and 8 <= D <= MAX_D)
        and ranges.is_contiguous()
        and autograd.nothing_watches(q, k_cache, v_cache)
    )


@overload
def cached_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, ranges: Tensor, *,
    group_rows: tuple[int, ...], scale: float | None = None, impl: str | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def cached_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, ranges: Tensor, *,
    group_rows: tuple[int, ...], scale: float | None = None, impl: str | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def cached_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, ranges: Tensor, *,
    group_rows: tuple[int, ...], scale: float | None = None, impl: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def cached_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    ranges: Tensor,
    *,
    group_rows: tuple[int, ...],
    scale: float | None = None,
    impl: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention of the current chunk's queries over ranges of a key/value cache with fixed slots.

    .. math:: out_i = \sum_{j \in N(i)} softmax_j(scale \; q_i \cdot k_j) \; v_j

    N(i) are the slots in the ranges of row i's group: the rows that attend to the same slots, such as the video rows or
    the action rows of a chunk. The chunk's own keys and values stand in slots as well (``qk_norm_rope(out=...)`` writes
    them there). Slots outside all ranges are never read into a result, whatever they hold. Inference only;
    deterministic; registered, so it traces under ``torch.compile(fullgraph=True)``.

    Args:
        q: ``[B, S, H, D]``, bf16, fp16 or float32; last dim stride 1, others free. D a multiple of 8 from 8 to 256.
        k_cache: ``[C, N, H, D]``, dtype and device of ``q``; last dim stride 1, others free: a view of a
            ``[layers, 2, C, N, H, D]`` buffer. C is B, or divides it: then each B / C samples of ``q``, one after the
            other, share a row of the cache, as candidates that continue one history do.
        v_cache: As ``k_cache``.
        ranges: ``[B, G, R, 2]``, int32, contiguous, on the device of ``q``: slots ``[start, end)`` that group g of
            sample b attends to. ``end <= start`` is empty. Ranges of a group must lie in the N slots, without overlap;
            ``impl="cpu"`` refuses those that do, the GPU kernels cannot look without stopping for the host: they cut
            ranges off at 0 and N, and may count a slot as often as it comes. Values may change from launch to launch
            of one CUDA graph; nothing on the host depends on them there.
        group_rows: How many rows of ``q`` each group has, in order; they sum to S. 0 is allowed.
        scale: Factor on the scores; default ``D ** -0.5``.
        impl: ``"reference"`` (dense, any device, also float64), ``"cpu"`` (also float64), ``"triton"`` and ``"cuda"``
            (CUDA tensors, D up to 128, up to 4 groups; ``"cuda"`` no float32), or ``None``: ``"cpu"`` for CPU tensors;
            for CUDA tensors ``"triton"``, or ``"reference"`` where that cannot (float64, larger D, more groups);
            ``"reference"`` on other devices.
        return_lse: Also return the log-sum-exp of every row's scores.

    Returns:
        out ``[B, S, H, D]``, dtype of ``q``, contiguous; with ``return_lse`` also lse ``[B, H, S]``, float32 (float64
        for float64 inputs). A row whose ranges are all empty gives out 0 and lse -inf.

    Raises:
        ValueError: a shape, dtype, device, stride or ``impl`` outside the above; an input that requires a gradient or
            has a tangent.
        TypeError: something that is not a tensor.
        RuntimeError: ``impl="cuda"`` and the CUDA extension was not built.

    Source: Vaswani et al. 2017; splitting the keys: Dao et al. 2023, "Flash-Decoding for long-context inference".
    """
    if impl is None and scale is None and _is_plain(q, k_cache, v_cache, ranges, group_rows):
        out, lse = cpu.forward(q, k_cache, v_cache, ranges, group_rows, q.shape[-1] ** -0.5)
        return (out, lse) if return_lse else out
    group_rows = integers(_OP, "group_rows", group_rows)
    _check(q, k_cache, v_cache, ranges, group_rows)
    D, groups, beyond = q.shape[-1], len(group_rows), None
    if D > MAX_KERNEL_D or groups > MAX_GROUPS:
        beyond = f"D={D} and {groups} groups"
    impl = select_backend(_OP, _ROW, impl, dict.fromkeys(_ROW.gpu_backends, beyond), q=q)
    scale = D**-0.5 if scale is None else number(_OP, "scale", scale)
    if impl == "reference":
        out, lse = reference.cached_attention(q, k_cache, v_cache, ranges, group_rows, scale)
    else:
        out, lse = autograd.call(
            torch.ops.wam.cached_attention.default, q, k_cache, v_cache, ranges, group_rows, scale, impl
        )
    return (out, lse) if return_lse else out
