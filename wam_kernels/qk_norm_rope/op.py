"""Public op: checks, backend choice, torch.library registration."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..ops import OPS
from ..runtime import autograd
from ..runtime.backends import launchers, select_backend
from ..runtime.checks import accumulator, are_tensors, bind_dims, integer, number, same_kind
from . import reference
from .config import MAX_HEAD_DIM, MAX_INNER

_OP = "qk_norm_rope"
_TABLE_GRADED = f"{_OP}: table must not require a gradient, there is none for it; use table.detach()"
_ROW = OPS[_OP]


def _heads(q: Tensor, head_dim: int) -> tuple[int, int, int, int]:
    B, S, inner = q.shape
    return B, S, inner // head_dim, head_dim


def _forward(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor,
    head_dim: int, per_head: bool, interleaved: bool, eps: float, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = _heads(q, head_dim)
    outs = q.new_empty(shape), k.new_empty(shape)
    launchers(__package__, impl).forward(q, k, weight_q, weight_k, table, head_dim, per_head, interleaved, eps, *outs)
    return outs


def _forward_out(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor,
    head_dim: int, per_head: bool, interleaved: bool, eps: float, impl: str, q_out: Tensor, k_out: Tensor,
    v: Tensor | None, v_out: Tensor | None, q_first: int, kv_first: int,
) -> None:  # fmt: skip
    q_rows, k_rows, v_rows = _written(q.shape[1], (q_out, k_out, v_out), q_first, kv_first)
    args = q, k, weight_q, weight_k, table, head_dim, per_head, interleaved, eps, q_rows, k_rows, v, v_rows
    launchers(__package__, impl).forward(*args)
    # a graph that saved one of them must notice
    torch.autograd.graph.increment_version([t for t in (q_out, k_out, v_out) if t is not None])


def _written(tokens: int, out: tuple[Any, ...], q_first: int, kv_first: int) -> tuple[Any, ...]:
    """The tokens of q_out, k_out and v_out that a call writes, views where that is not all of them."""
    firsts = q_first, kv_first, kv_first
    return tuple(
        [
            t if t is None or t.shape[1] == tokens else t.narrow(1, first, tokens)
            for t, first in zip(out, firsts, strict=False)
        ]
    )


def _backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor,
    head_dim: int, per_head: bool, interleaved: bool, eps: float, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    # the gradient of a sum arrives expanded, with stride 0 in the last dim
    if dq_out.stride(-1) != 1:
        dq_out = dq_out.contiguous()
    if dk_out.stride(-1) != 1:
        dk_out = dk_out.contiguous()
    return launchers(__package__, impl).backward(
        dq_out, dk_out, q, k, weight_q, weight_k, table, head_dim, per_head, interleaved, eps
    )


def _forward_fake(q, k, weight_q, weight_k, table, head_dim, per_head, interleaved, eps, impl):
    return q.new_empty(_heads(q, head_dim)), k.new_empty(_heads(k, head_dim))


def _forward_out_fake(
    q, k, weight_q, weight_k, table, head_dim, per_head, interleaved, eps, impl, q_out, k_out, v, v_out,
    q_first, kv_first,
) -> None:  # fmt: skip
    return None


def _backward_fake(
    dq_out, dk_out, q, k, weight_q, weight_k, table, head_dim, per_head, interleaved, eps, impl
):  # fmt: skip
    return tuple(t.new_empty(t.shape) for t in (q, k, weight_q, weight_k))


_INPUTS = "Tensor q, Tensor k, Tensor weight_q, Tensor weight_k, Tensor table"
_OPTIONS = "int head_dim, bool per_head, bool interleaved, float eps, str impl"
torch.library.define("wam::qk_norm_rope", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
torch.library.define(
    "wam::qk_norm_rope_out",
    f"({_INPUTS}, {_OPTIONS}, Tensor(a!) q_out, Tensor(b!) k_out, Tensor? v, Tensor(c!)? v_out, "
    "int q_first, int kv_first) -> ()",
)
torch.library.define(
    "wam::qk_norm_rope_backward",
    f"(Tensor dq_out, Tensor dk_out, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("wam::qk_norm_rope", ["CPU", "CUDA"], _forward)
torch.library.impl("wam::qk_norm_rope_out", ["CPU", "CUDA"], _forward_out)
torch.library.impl("wam::qk_norm_rope_backward", ["CPU", "CUDA"], _backward)
torch.library.register_fake("wam::qk_norm_rope", _forward_fake)
torch.library.register_fake("wam::qk_norm_rope_out", _forward_out_fake)
torch.library.register_fake("wam::qk_norm_rope_backward", _backward_fake)


def _save(ctx, inputs, output) -> None:
    q, k, weight_q, weight_k, table, *ctx.options = inputs
    ctx.table_graded = table.requires_grad
    ctx.save_for_backward(q, k, weight_q, weight_k, table)


def _gradients(ctx, dq_out, dk_out):
    if ctx.table_graded:
        raise ValueError(_TABLE_GRADED)
    backward = torch.ops.wam.qk_norm_rope_backward.default
    grads = autograd.call(backward, dq_out, dk_out, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, *[None] * len(ctx.options))


def _samples(inputs: tuple, mapped: Collection[int]) -> tuple[int, ...]:
    """q, k and a table of every sample."""
    return (0, 1) if inputs[4].ndim == 3 + (4 in mapped) else (0, 1, 4)


def _no_samples(inputs: tuple, mapped: Collection[int]) -> tuple[int, ...]:
    return ()


# the gradients of the weights are sums over the batch
autograd.register(_OP, "wam::qk_norm_rope", _save, _gradients, _samples, backward_samples=_no_samples)
autograd.register_inference(_OP, "wam::qk_norm_rope_out", _no_samples, outs=(10, 11, 13))


def _check(
    q: Tensor, k: Tensor, v: Tensor | None, weights: dict[str, Tensor], table: Tensor, head_dim: int, per_head: bool
) -> None:
    are_tensors(_OP, **weights, table=table)
    rows = {"q": q, "k": k} if v is None else {"q": q, "k": k, "v": v}
    dims = bind_dims(_OP, **{name: (t, "B S inner") for name, t in rows.items()})
    same_kind(_OP, "q", q, **rows)
    inner = dims["inner"]
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{_OP}: head_dim must be a multiple of 8 from 8 to {MAX_HEAD_DIM}, got {head_dim}")
    if inner % head_dim or not head_dim <= inner <= MAX_INNER:
        raise ValueError(
            f"{_OP}: q must have inner a multiple of head_dim={head_dim} from {head_dim} to {MAX_INNER}, got {inner}"
        )
    width = head_dim if per_head else inner
    for name, w in weights.items():
        if w.shape != (width,):
            covers = "a head, since per_head=True" if per_head else "all heads, since per_head=False"
            raise ValueError(f"{_OP}: {name} must have shape [{width}] ({covers}), got {list(w.shape)}")
        if w.dtype not in (q.dtype, torch.float32) or w.device != q.device:
            choices = "torch.float32" if q.dtype == torch.float32 else f"{q.dtype} or torch.float32"
            raise ValueError(f"{_OP}: {name} must be {choices} on {q.device}, got {w.dtype} on {w.device}")
    same_kind(_OP, "weight_q", weights["weight_q"], weight_k=weights["weight_k"])
    row = dims["S"], head_dim // 2, 2
    if table.shape not in (row, (dims["B"], *row)):
        want = ", ".join(map(str, row[1:]))
        raise ValueError(
            f"{_OP}: table must have shape [S={row[0]}, {want}] or [B={dims['B']}, S={row[0]}, {want}], "
            f"got {list(table.shape)}; use rope_table(positions, head_dim)"
        )
    if table.device != q.device or table.dtype not in (torch.float32, accumulator(q)):
        raise ValueError(f"{_OP}: table must be torch.float32 on {q.device}, got {table.dtype} on {table.device}")
    for name, t in {**rows, **weights}.items():
        if t.stride(-1) != 1:
            raise ValueError(f"{_OP}: {name} must have last-dim stride 1, got {t.stride(-1)}; use .contiguous()")
    if not table.is_contiguous():
        raise ValueError(f"{_OP}: table must be contiguous, got strides {table.stride()}; use .contiguous()")


def _check_out(
    q: Tensor, v: Tensor | None, head_dim: int, out: tuple[Tensor, ...], firsts: tuple[int, int] | None
) -> None:
    slots, count = ("q_out, k_out", 2) if v is None else ("q_out, k_out, v_out", 3)
    if len(out) != count:
        raise ValueError(
            f"{_OP}: out must be ({slots}) {'without' if v is None else 'with'} v, got {len(out)} tensors; "
            "v and v_out go together"
        )
    are_tensors(_OP, **{f"out[{i}]": t for i, t in enumerate(out)})
    want = list(_heads(q, head_dim))
    for i, t in enumerate(out):
        name = f"out[{i}]"
        if firsts is not None and t.ndim == 4 and t.shape[1] >= firsts[i > 0] + want[1]:
            want[1] = t.shape[1]
        if list(t.shape) != want:
            at_least = "" if firsts is None else f" or more tokens, as out_first={firsts} says"
            raise ValueError(f"{_OP}: {name} must have shape [B, S, H, D] = {want}{at_least}, got {list(t.shape)}")
        want[1] = q.shape[1]
        same_kind(_OP, "q", q, **{name: t})
        if t.stride(-1) != 1:
            raise ValueError(f"{_OP}: {name} must have last-dim stride 1, got {t.stride(-1)}")
        for stride, size in zip(t.stride(), t.shape, strict=True):
            if stride == 0 and size > 1:
                got = t.stride()
                raise ValueError(f"{_OP}: {name} must not be expanded, got strides {got}: its tokens share memory")


def _firsts(out_first: tuple[int, int]) -> tuple[int, int]:
    if len(out_first) != 2:
        raise ValueError(f"{_OP}: out_first must be 2 tokens, of q_out and of k_out and v_out, got {out_first}")
    q_first, kv_first = (integer(_OP, f"out_first[{i}]", first) for i, first in enumerate(out_first))
    return q_first, kv_first


def unchecked_qk_norm_rope(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor,
    head_dim: int, per_head: bool = False, interleaved: bool = True, eps: float = 1e-6,
    v: Tensor | None = None, out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """:func:`qk_norm_rope` for callers that know what they pass: nothing is checked."""
    args = q, k, weight_q, weight_k, table, head_dim, per_head, interleaved, eps
    return _run(args, select_backend(_OP, _ROW, None, q=q), v, out, 0, 0)


def _run(
    args: tuple, impl: str, v: Tensor | None, out: tuple[Tensor, ...] | None, q_first: int, kv_first: int
) -> tuple[Tensor, ...]:
    if out is None:
        if impl == "reference":
            return reference.qk_norm_rope(*args)
        return autograd.call(torch.ops.wam.qk_norm_rope.default, *args, impl)
    if impl == "reference":
        values: tuple[Tensor, ...] = reference.qk_norm_rope(*args)
        if v is not None:
            values = *values, v.unflatten(-1, (-1, args[5]))
        for t, value in zip(_written(args[0].shape[1], out, q_first, kv_first), values, strict=True):
            t.copy_(value)
    else:
        q_out, k_out, *v_out = out
        into = q_out, k_out, v, *(v_out or (None,)), q_first, kv_first
        autograd.call(torch.ops.wam.qk_norm_rope_out.default, *args, impl, *into)
    return tuple(out)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    table: Tensor,
    *,
    head_dim: int,
    per_head: bool = False,
    interleaved: bool = True,
    eps: float = 1e-6,
    v: Tensor | None = None,
    out: tuple[Tensor, ...] | None = None,
    out_first: tuple[int, int] | None = None,
    impl: str | None = None,
) -> tuple[Tensor, ...]:
    r"""RMSNorm of queries and keys, then their rotary position embedding, in one pass over both.

    .. math:: n = \frac{x}{\sqrt{mean(x^2) + \epsilon}} \; w, \qquad
              (y_a, y_b) = (n_a \cos - n_b \sin, \; n_a \sin + n_b \cos)

    The mean runs over all heads together (Wan) or with ``per_head`` over each head (Cosmos). Everything is float32
    until the one rounding at the end; plain PyTorch rounds n to the dtype of q before it rotates. Differentiable in q,
    k and the weights, not in the table, once and in reverse mode, also under ``torch.func``; forward mode and second
    order are for ``impl="reference"``, others refuse them. Deterministic; registered, so it traces under
    ``torch.compile(fullgraph=True)``.

    Args:
        q: ``[B, S, inner]``, bf16, fp16 or float32; last dim stride 1, others free (a slice of a fused projection).
            inner = heads x head_dim, up to 8192.
        k: As ``q``.
        weight_q: ``[inner]``, or ``[head_dim]`` with ``per_head``; dtype of ``q`` or float32.
        weight_k: As ``weight_q``.
        table: ``[S, head_dim // 2, 2]`` from :func:`wam_kernels.rope_table`, float32, contiguous, shared by the batch;
            or ``[B, S, head_dim // 2, 2]``, where its samples are at different positions.
        head_dim: Channels of a head, a multiple of 8 from 8 to 256.
        per_head: One norm for each head, its weight shared by them, instead of one over the whole row.
        interleaved: Pairs are ``(x[2i], x[2i + 1])`` of a head (Wan); False: ``(x[i], x[i + head_dim / 2])`` (Cosmos).
        eps: Added to the mean square.
        v: As ``q``: values that go with the keys into a cache, unchanged, in the same launch. Only with ``out``.
        out: Where to write, instead of new tensors: ``(q_out, k_out)``, with ``v`` ``(q_out, k_out, v_out)``, each
            ``[B, S, H, D]`` of the dtype of ``q``, last dim stride 1, other strides free, such as the slot
            ``cache[:, start : start + S]`` of a key cache. They must not overlap each other or an input. Inference
            only: no gradient flows through them.
        out_first: First token that is written of q_out, and of k_out and v_out, which then may have more than S tokens.
            Under ``torch.compile`` a whole layer of a cache and a place in it: it cannot write to views of views.
        impl: ``"reference"`` (plain PyTorch, any device, also float64), ``"cpu"`` (also float64), ``"triton"`` and
            ``"cuda"`` (CUDA tensors), or ``None``: ``"cpu"`` for CPU tensors, for CUDA tensors
            ``"triton"``, or ``"reference"`` for float64 and on other devices.

    Returns:
        ``(q_out, k_out)``, ``[B, S, H, D]`` each, dtype of ``q``, contiguous; or the tensors of ``out``.

    Raises:
        ValueError: a shape, dtype, device, stride or ``impl`` outside the above; ``out`` where a gradient is needed;
            ``v`` without ``v_out`` or the reverse.
        TypeError: something that is not a tensor.
        NotImplementedError: forward mode or a second derivative through another ``impl`` than ``"reference"``.
        RuntimeError: ``impl="cuda"`` and the CUDA extension was not built.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019; Su et al., "RoFormer", 2021.
    """
    weights = {"weight_q": weight_q, "weight_k": weight_k}
    head_dim = integer(_OP, "head_dim", head_dim)
    _check(q, k, v, weights, table, head_dim, per_head)
    impl = select_backend(_OP, _ROW, impl, q=q)
    graded = torch.is_grad_enabled()
    if graded and table.requires_grad:
        raise ValueError(_TABLE_GRADED)
    args = q, k, weight_q, weight_k, table, head_dim, per_head, interleaved, number(_OP, "eps", eps, least=0.0)
    if out is None:
        if v is not None:
            raise ValueError(f"{_OP}: v must be None without out, got a tensor; pass out=(q_out, k_out, v_out)")
        return _run(args, impl, None, None, 0, 0)
    firsts = None if out_first is None else _firsts(out_first)
    _check_out(q, v, head_dim, out, firsts)
    q_first, kv_first = firsts or (0, 0)
    if graded and any(t is not None and t.requires_grad for t in (q, k, v, weight_q, weight_k, *out)):
        raise ValueError(f"{_OP}: out is for inference, but an input requires a gradient; use torch.no_grad()")
    return _run(args, impl, v, out, q_first, kv_first)
