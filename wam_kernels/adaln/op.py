"""Public ops: checks, backend choice, torch.library registration. Both are variants of one registered pair."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..frame_index import FrameIndex
from ..ops import OPS
from ..runtime import autograd
from ..runtime.backends import launchers, select_backend
from ..runtime.checks import accumulator, are_tensors, bind_dims, number
from . import cpu, plain, reference
from .config import MAX_D

_TABLES = ("gate_table", "shift_table", "scale_table")
_ROW = OPS["ada_layer_norm"]


class _Inputs(NamedTuple):
    """Tensors of the registered forward, in the order of its schema and of the launchers' arguments."""

    x: Tensor
    y: Tensor | None = None
    gate: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None
    gate_table: Tensor | None = None
    shift_table: Tensor | None = None
    scale_table: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


_NO_GRADIENTS = (None,) * len(_Inputs._fields)

# ---- the registered forward: (r, h), empty where a variant has none ----


def _forward(
    x, y, gate, shift, scale, gate_table, shift_table, scale_table, weight, bias,
    row_of_token, segments, row_begin, row_segments, run, token_rows, eps, impl,
):  # fmt: skip
    tensors = x, y, gate, shift, scale, gate_table, shift_table, scale_table, weight, bias
    if impl == "cpu":
        r, h = cpu.forward(*tensors, row_of_token, run, eps)
    else:
        r, h = launchers(__package__, impl).forward(*tensors, row_of_token, eps)
    return x.new_empty(0) if r is None else r, x.new_empty(0) if h is None else h


def _forward_fake(*args):
    t, empty = _Inputs(*args[: len(_Inputs._fields)]), (0,)
    has_norm = t.scale is not None or t.weight is not None
    return t.x.new_empty(empty if t.y is None else t.x.shape), t.x.new_empty(t.x.shape if has_norm else empty)


# ---- the registered backward: dx, dy, dgate, dshift, dscale, dweight, dbias, empty where a variant has none ----
# dx is empty without dh, because it equals dr; dy is empty without gate, because it equals dx; dshift is empty where
# every token has a row of its own, because it equals dh


def _present(dh, gate, scale, token_rows: bool) -> tuple[bool, ...]:
    adaptive = dh is not None and scale is not None
    affine = dh is not None and scale is None
    return dh is not None, gate is not None, gate is not None, adaptive and not token_rows, adaptive, affine, affine


def _backward(
    dr, dh, r, y, gate, scale, gate_table, scale_table, weight,
    row_of_token, segments, row_begin, row_segments, run, token_rows, eps, impl,
):  # fmt: skip
    # an incoming gradient has any strides: that of a sum is expanded from one number
    if dr is not None and dr.stride(-1) != 1:
        dr = dr.contiguous()
    if dh is not None and dh.stride(-1) != 1:
        dh = dh.contiguous()
    others = y, gate, scale, gate_table, scale_table, weight
    if impl == "cpu":
        grads = cpu.backward(dr, dh, r, *others, row_of_token, row_begin, run, eps, token_rows)
    else:
        index = segments, row_begin, row_segments
        grads = launchers(__package__, impl).backward(dr, dh, r, *others, *index, eps, token_rows)
    like = dr if dh is None else dh
    present = _present(dh, gate, scale, token_rows)
    found = list(grads)
    for i, wanted in enumerate(present):
        if not wanted:
            found[i] = like.new_empty(0)
    return tuple(found)


def _backward_fake(
    dr, dh, r, y, gate, scale, gate_table, scale_table, weight,
    row_of_token, segments, row_begin, row_segments, run, token_rows, eps, impl,
):  # fmt: skip
    return _empty_gradients(dr, dh, gate, scale, row_begin.shape[0] - 1, token_rows)


def _empty_gradients(dr, dh, gate, scale, rows: int, token_rows: bool) -> tuple[Tensor, ...]:
    like = dr if dh is None else dh
    B, _, D = like.shape
    row, sums, channels = like.shape, (B, rows, D), (D,)
    shapes = (row, row, sums, sums, sums, channels, channels)
    acc = accumulator(like)
    of_rows = [acc if t is None else t.dtype for t in (gate, scale, scale)]
    dtypes = like.dtype, like.dtype, *of_rows, acc, acc
    present = _present(dh, gate, scale, token_rows)
    return tuple(
        like.new_empty(shape, dtype=dtype) if wanted else like.new_empty(0)
        for shape, dtype, wanted in zip(shapes, dtypes, present, strict=True)
    )


# one argument for each tensor of the index: a list would cost PyTorch's autograd 150 us a call
_OPTIONS = f"{', '.join(f'Tensor {name}' for name in FrameIndex.FIELDS)}, bool token_rows, float eps, str impl"


def _define(name: str, options: str, forward, backward, backward_fake) -> None:
    tensors = ", ".join(f"Tensor? {field}" for field in _Inputs._fields[1:])
    torch.library.define(name, f"(Tensor x, {tensors}, {options}) -> (Tensor, Tensor)")
    torch.library.define(
        f"{name}_backward",
        "(Tensor? dr, Tensor? dh, Tensor? r, Tensor? y, Tensor? gate, Tensor? scale, Tensor? gate_table, "
        f"Tensor? scale_table, Tensor? weight, {options}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    )
    torch.library.impl(name, ["CPU", "CUDA"], forward)
    torch.library.impl(f"{name}_backward", ["CPU", "CUDA"], backward)
    torch.library.register_fake(name, _forward_fake)
    torch.library.register_fake(f"{name}_backward", backward_fake)


_define("wam::gate_residual_norm", _OPTIONS, _forward, _backward, _backward_fake)


# ---- the same for rows of equally many tokens each, whose index is found where the op runs ----


@lru_cache(maxsize=256)
def _uniform(tokens: int, rows: int, device: torch.device) -> tuple:
    index = FrameIndex.uniform(tokens, rows, device=device)
    return (*index.tensors(), index.token_rows)


def _uniform_forward(x, *args):
    *others, rows, eps, impl = args
    arguments = [x, *others, *_uniform(x.shape[1], rows, x.device), eps, impl]
    return _forward(*arguments)


def _uniform_backward(dr, dh, *args):
    *others, rows, eps, impl = args
    like = dr if dh is None else dh
    arguments = [dr, dh, *others, *_uniform(like.shape[1], rows, like.device), eps, impl]
    return _backward(*arguments)


def _uniform_backward_fake(dr, dh, r, y, gate, scale, gate_table, scale_table, weight, rows, eps, impl):
    like = dr if dh is None else dh
    return _empty_gradients(dr, dh, gate, scale, rows, rows == like.shape[1])


_define(
    "wam::uniform_gate_residual_norm", "SymInt rows, float eps, str impl",
    _uniform_forward, _uniform_backward, _uniform_backward_fake,
)  # fmt: skip


def _save(ctx, inputs, output) -> None:
    # a gradient that nobody asked for stays None and costs nothing
    ctx.set_materialize_grads(False)
    x, y, gate, _, scale, gate_table, shift_table, scale_table, weight, bias, *index = inputs[:-3]
    ctx.options = inputs[-3:]
    # of the uniform op the first option is the number of rows
    ctx.token_rows = ctx.options[0] if index else ctx.options[0] == x.shape[1]
    has_norm = scale is not None or weight is not None
    ctx.has_y = y is not None
    row = (output[0] if ctx.has_y else x) if has_norm else None
    ctx.shift_table_dtype = None if shift_table is None else shift_table.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    y = y if gate is not None else None
    ctx.save_for_backward(row, y, gate, scale, gate_table, scale_table, weight, *index)


def _gradients(ctx, dr, dh):
    row, y, gate, scale, gate_table, scale_table, weight, *index = ctx.saved_tensors
    if not ctx.has_y:
        dr = None  # of the empty r
    if row is None:
        dh = None  # of the empty h
    nothing = [None] * (len(index) + len(ctx.options))
    if dr is None and dh is None:
        return (*_NO_GRADIENTS, *nothing)
    if dh is None and gate is None:
        return (dr, dr, *_NO_GRADIENTS[2:], *nothing)
    ops = torch.ops.wam
    backward = (ops.gate_residual_norm_backward if index else ops.uniform_gate_residual_norm_backward).default
    dx, dy, dgate, dshift, dscale, dweight, dbias = autograd.call(
        backward, dr, dh, row, y, gate, scale, gate_table, scale_table, weight, *index, *ctx.options
    )
    adaptive = dh is not None and scale is not None
    dx = dr if dh is None else dx
    if adaptive and ctx.token_rows:
        dshift = dh
    of_rows = dgate if gate is not None else None, dshift if adaptive else None, dscale if adaptive else None
    dtypes = (
        None if gate_table is None else gate_table.dtype,
        ctx.shift_table_dtype,
        None if scale_table is None else scale_table.dtype,
    )
    dtables: list[Tensor | None] = [None] * 3
    for i, (g, dtype) in enumerate(zip(of_rows, dtypes, strict=True)):
        if g is not None and dtype is not None:
            acc = torch.float64 if g.dtype == torch.float64 else torch.float32
            dtables[i] = g.sum((0, 1), dtype=acc).to(dtype)
    dgate, dshift, dscale = of_rows
    if dshift is not None:
        dshift = dshift.to(scale.dtype)
    dy = (dx if gate is None else dy) if ctx.has_y else None
    affine = dh is not None and scale is None
    dweight, dbias = (dweight.to(weight.dtype), dbias.to(ctx.bias_dtype)) if affine else (None, None)
    return (dx, dy, dgate, dshift, dscale, *dtables, dweight, dbias, *nothing)


def _backward_samples(inputs: tuple, mapped: Collection[int]) -> range:
    """dr, dh, r, y, gate and scale; but the gradients of weight and bias are sums over the batch."""
    return range(6 if inputs[8] is None else 0)


for _name in ("wam::gate_residual_norm", "wam::uniform_gate_residual_norm"):
    autograd.register(
        "ada_layer_norm (or gate_residual_ada_layer_norm)", _name, _save, _gradients,
        samples=lambda inputs, mapped: range(5), backward_samples=_backward_samples,
    )  # fmt: skip


# ---- checks ----


def _check(op: str, t: _Inputs, index: FrameIndex) -> None:
    """Everything that can be told from shapes, dtypes, strides and devices."""
    if not isinstance(index, FrameIndex):
        raise TypeError(f"{op}: index must be a FrameIndex, got {type(index).__name__}; see FrameIndex.from_tensor")
    are_tensors(op, x=t.x)
    x, acc = t.x, accumulator(t.x)
    of_rows = (acc,) if acc == torch.float64 else (acc, torch.bfloat16, torch.float16)
    kinds = (
        (("x", "y"), "B S D", (x.dtype,)),
        (("gate", "shift", "scale"), "B F D", of_rows),
        (_TABLES, "D", of_rows),
        (("weight", "bias"), "D", (acc, x.dtype)),
    )
    given = [(n, u, spec, dtypes) for names, spec, dtypes in kinds for n in names if (u := getattr(t, n)) is not None]
    dims = bind_dims(op, **{name: (u, spec) for name, u, spec, _ in given})
    if dims["D"] % 8 or not 8 <= dims["D"] <= MAX_D:
        raise ValueError(f"{op}: D must be a multiple of 8 from 8 to {MAX_D}, got {dims['D']}; pad the channels")
    if dims["S"] != index.length:
        raise ValueError(
            f"{op}: x must have S={index.length} tokens like index, got {dims['S']}; make an index for this S"
        )
    if dims.get("F", index.frames) != index.frames:
        rows = ", ".join(name for name, _, spec, _ in given if spec == "B F D")
        raise ValueError(
            f"{op}: {rows} must have F={index.frames} rows like index, got {dims['F']}; "
            "pass frames= when making the index"
        )
    device = x.device
    if index.device != device:
        raise ValueError(f"{op}: index must be on {device} like x, got {index.device}; use index.to({str(device)!r})")
    for name, u, _, dtypes in given:
        if u.dtype not in dtypes or u.device != device:
            raise ValueError(
                f"{op}: {name} must be {' or '.join(dict.fromkeys(map(str, dtypes)))} on {device}, "
                f"got {u.dtype} on {u.device}; use .to({str(device)!r}, {dtypes[0]})"
            )
        if u.stride(-1) != 1:
            raise ValueError(f"{op}: {name} must have last-dim stride 1, got {u.stride(-1)}; use .contiguous()")
    if t.shift is not None and t.scale is not None and t.shift.dtype != t.scale.dtype:
        raise ValueError(
            f"{op}: shift must be {t.scale.dtype} like scale, got {t.shift.dtype}; use .to({t.scale.dtype})"
        )


def uniform_gate_residual_norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    gate_table: Tensor | None, shift_table: Tensor | None, scale_table: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, rows: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """r and h, each of no meaning where there is none, for ``rows`` rows of equally many tokens, as
    :meth:`FrameIndex.uniform`.

    For callers that know what they pass: nothing is checked. The index of a length is found where the op runs, so a
    traced graph has none.
    """
    inputs = x, y, gate, shift, scale, gate_table, shift_table, scale_table, weight, bias
    S = x.shape[1]
    even = S % rows == 0
    if even and x.device.type == "cpu" and _is_plain(inputs, S, rows, eps):
        r, h = plain.forward(inputs, None, S // rows, eps)
        return r, r if h is None else h
    impl = select_backend("gate_residual_ada_layer_norm", _ROW, None, x=x)
    if impl == "reference":
        row_of_token = None if even else torch.arange(S, device=x.device) // -(-S // rows)
        r, h = reference.gate_residual_norm(*inputs, row_of_token, eps, S // rows if even else 0)
        return r, r if h is None else h
    return autograd.call(torch.ops.wam.uniform_gate_residual_norm.default, *inputs, rows, eps, impl)


def _is_plain(t: plain.Tensors, tokens: int, rows: int, eps: float) -> bool:
    return plain.takes(t, tokens, rows, eps, _ROW.small)


def _small(t: plain.Tensors, index: FrameIndex, eps: float, impl: str | None) -> tuple[Tensor, Tensor | None] | None:
    """r and h of a call that PyTorch's own ops take, or None."""
    if impl is not None or not isinstance(index, FrameIndex) or not index.buffer.is_cpu:
        return None
    if not _is_plain(t, index.length, index.frames, eps):
        return None
    return plain.forward(t, index.row_of_token, index.tokens_a_row, eps)


def _call(op: str, t: _Inputs, index: FrameIndex, eps: float, impl: str | None) -> tuple[Tensor, Any]:
    """r and h; a variant without a norm has no use for h."""
    _check(op, t, index)
    eps = number(op, "eps", eps, least=0.0)
    impl = select_backend(op, _ROW, impl, x=t.x)
    if impl == "reference":
        # a graph is for all lengths
        tokens_a_row = 0 if torch.compiler.is_compiling() else index.tokens_a_row
        return reference.gate_residual_norm(*t, index.row_of_token, eps, tokens_a_row)
    op_call = torch.ops.wam.gate_residual_norm.default
    return autograd.call(op_call, *t, *index.tensors(), index.token_rows, eps, impl)


# ---- public ----


def ada_layer_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    index: FrameIndex,
    *,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    eps: float = 1e-6,
    impl: str | None = None,
) -> Tensor:
    r"""LayerNorm without affine, then one shift and scale for each frame (or sample, or token).

    .. math:: y_s = \frac{x_s - mean(x_s)}{\sqrt{var(x_s) + eps}} (1 + scale_f + scale\_table) + shift_f + shift\_table,
        \quad f = index(s)

    Differentiable in all tensors, once and in reverse mode, also under ``torch.func``; forward mode and second order
    are for ``impl="reference"``, others refuse them. Deterministic; registered, so it traces under
    ``torch.compile(fullgraph=True)``.
    Arithmetic is float32 (float64 for float64), rounded once. Nothing is expanded from frames to tokens.

    Args:
        x: ``[B, S, D]``, bf16, fp16 or float32; last dim stride 1, others free. D a multiple of 8 from 8 to 8192.
        shift: ``[B, F, D]``, float32, bf16 or fp16 whatever ``x`` is (float64 with float64 x); last dim stride 1, so a
            view ``t_proj[:, :, 0]`` will do. Its gradient is summed in float32 and comes in its dtype.
        scale: As ``shift``, and of its dtype.
        index: Row f of every token, for S tokens and F rows, on the device of ``x``.
        shift_table: ``[D]``, float32, bf16 or fp16, added to every row of ``shift`` in float32; None for none.
        scale_table: As ``shift_table``, for ``scale``.
        eps: Added to the variance.
        impl: ``"reference"`` (plain PyTorch, any device, also float64), ``"cpu"`` (also float64), ``"triton"`` or
            ``"cuda"`` (CUDA tensors), or ``None``: ``"cpu"`` for CPU tensors, but PyTorch's own ops up to 2**19
            elements of a sample and where a sample has one row and no ``y``, outside a graph; for CUDA tensors
            ``"triton"``, or ``"reference"`` for float64; ``"reference"`` on other devices.

    Returns:
        ``[B, S, D]``, dtype of ``x``, contiguous.

    Raises:
        ValueError: a shape, dtype, device, stride or ``impl`` outside the above, or an index made for something else.
        TypeError: ``index`` is not a FrameIndex, or something else not a tensor.
        NotImplementedError: forward mode or a second derivative through another ``impl`` than ``"reference"``.

    Source: Ba et al. 2016 (LayerNorm); Peebles and Xie 2023 (adaLN of DiT).
    """
    tensors = x, None, None, shift, scale, None, shift_table, scale_table, None, None
    small = _small(tensors, index, eps, impl)
    if small is not None:
        assert small[1] is not None
        return small[1]
    are_tensors("ada_layer_norm", shift=shift, scale=scale)
    t = _Inputs(*tensors)
    return _call("ada_layer_norm", t, index, eps, impl)[1]


def gate_residual_ada_layer_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    index: FrameIndex,
    *,
    gate_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Gated residual sum and the norm that follows it, in one pass over x and y.

    .. math:: r_s = x_s + (gate_f + gate\_table) \, y_s, \quad f = index(s)
    .. math:: h_s = LN(r_s) (1 + scale_f + scale\_table) + shift_f + shift\_table
        \quad\text{or}\quad LN(r_s) \, weight + bias

    r is rounded to the dtype of x and the norm is of the rounded r, so this equals the two steps one after the
    other. Otherwise as :func:`ada_layer_norm`: differentiable in all tensors, deterministic, float32 inside.

    Args:
        x: ``[B, S, D]``, bf16, fp16 or float32; last dim stride 1, others free. D a multiple of 8 from 8 to 8192.
        y: As ``x``: the output of the attention or feed-forward.
        gate: ``[B, F, D]``, float32, bf16 or fp16 whatever ``x`` is (float64 with float64 x), last dim stride 1; None
            for ``r = x + y``. Its gradient is summed in float32 and comes in its dtype.
        shift: As ``gate``, for the adaptive norm; None, together with ``scale``, for another norm or none.
        scale: As ``shift``, and of its dtype.
        index: Row f of every token, for S tokens and F rows, on the device of ``x``.
        gate_table: ``[D]``, float32, bf16 or fp16, added to every row of ``gate`` in float32; None for none.
        shift_table: As ``gate_table``, for ``shift``.
        scale_table: As ``gate_table``, for ``scale``.
        weight: ``[D]``, float32 or dtype of ``x``, with ``bias`` and without ``shift`` and ``scale``: the affine norm.
        bias: As ``weight``.
        eps: Added to the variance.
        impl: As for :func:`ada_layer_norm`.

    Returns:
        r and h, ``[B, S, D]``, dtype of ``x``, contiguous; h is None when neither ``scale`` nor ``weight`` is given.

    Raises:
        ValueError: a shape, dtype, device, stride or ``impl`` outside the above, tensors that do not go together, or an
            index made for something else.
        TypeError: ``index`` is not a FrameIndex, or something else not a tensor.
        NotImplementedError: forward mode or a second derivative through another ``impl`` than ``"reference"``.

    Source: Ba et al. 2016 (LayerNorm); Peebles and Xie 2023 (adaLN of DiT).
    """
    op = "gate_residual_ada_layer_norm"
    t = _Inputs(x, y, gate, shift, scale, gate_table, shift_table, scale_table, weight, bias)
    small = None if y is None else _small(t, index, eps, impl)
    if small is not None:
        return small
    if y is None:
        raise ValueError(f"{op}: y must be a tensor, got None; without a residual use ada_layer_norm")
    for a, b in (("shift", "scale"), ("weight", "bias")):
        if (getattr(t, a) is None) != (getattr(t, b) is None):
            absent, given = (a, b) if getattr(t, a) is None else (b, a)
            raise ValueError(f"{op}: {absent} must be given with {given}, got None; give both or neither")
    if scale is not None and weight is not None:
        raise ValueError(f"{op}: weight must be None with scale, got both; choose the adaptive or the affine norm")
    for name in ("gate", "shift", "scale"):
        if getattr(t, f"{name}_table") is not None and getattr(t, name) is None:
            raise ValueError(f"{op}: {name}_table must be None without {name}, got a tensor; leave it out")
    r, h = _call(op, t, index, eps, impl)
    return r, None if scale is None and weight is None else h
