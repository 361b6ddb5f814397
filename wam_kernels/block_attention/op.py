"""Public op: checks, backend choice, torch.library registration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from ..ops import OPS
from ..plan import Plan, Side
from ..plan.boxes import BoxSide
from ..runtime import autograd
from ..runtime.backends import launchers, select_backend
from ..runtime.checks import bind_dims, heads_first, number, same_kind
from . import cpu, reference
from .config import MAX_CUDA_D, MAX_D, fits_triton

_OP = "block_attention"
_ROW = OPS[_OP]
_SIDE = len(Side.FIELDS)
_BOX_SIDE = len(BoxSide.FIELDS)

# ---- the registered forward and backward: after the tensors, those of a plan (query side, key side, tiles of dq, runs
# ---- with a gradient, runs) ----


def _forward(q: Tensor, k: Tensor, v: Tensor, *args):
    *plan, shared, step, scale, impl = args
    if impl == "cpu":
        return cpu.forward(q, k, v, plan[-1], shared, scale)
    return launchers(__package__, impl).forward(q, k, v, plan[:_SIDE], step, shared, scale)


def _backward(dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *args):
    *plan, shared, step, scale, impl = args
    if impl == "cpu":
        return cpu.backward(dout, dlse, q, k, v, out, lse, plan[-1], plan[-2], shared, scale)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    sides = [plan[2 * _SIDE], *plan[1:_SIDE]], plan[_SIDE : 2 * _SIDE]
    grads = launchers(__package__, impl).backward
    return grads(dout, dlse.contiguous(), q, k, v, out, lse, *sides, step, shared, scale)


# ---- the same for a plan as boxes, which the CUDA kernels walk (query side, key side, tiles of dq, pairs) ----


def _boxes_forward(q: Tensor, k: Tensor, v: Tensor, *args):
    *boxes, shared, scale = args
    return launchers(__package__, "cuda").forward(q, k, v, boxes[:_BOX_SIDE], shared, scale)


def _boxes_backward(dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *args):
    *boxes, shared, scale = args
    sides = [boxes[2 * _BOX_SIDE], *boxes[1:_BOX_SIDE]], boxes[_BOX_SIDE : 2 * _BOX_SIDE]
    return launchers(__package__, "cuda").backward(dout, dlse.contiguous(), q, k, v, out, lse, *sides, shared, scale)


def _forward_fake(q, k, v, *args):
    B, S, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, S), dtype=torch.promote_types(q.dtype, torch.float32))


def _backward_fake(dout, dlse, q, k, v, *args):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def register_attention(
    op: str,
    name: str,
    forward: Callable,
    backward: Callable,
    tensors: Sequence[str],
    options: Sequence[str],
    joins_batch: bool = True,
    tags: Sequence[torch.Tag] = (),
) -> None:
    """Defines ``name`` and ``name_backward``, attention of q, k and v, with their rules for autograd.

    One argument for each tensor: a list would cost PyTorch's autograd 150 us a call.

    Args:
        op: What a message calls it.
        name: ``"wam::op"``.
        forward: ``(q, k, v, *tensors, *options)``: out and lse.
        backward: ``(dout, dlse, q, k, v, out, lse, *tensors, *options)``: dq, dk and dv.
        tensors: Names of what else it takes, a plan's tensors above all.
        options: Types and names of what is no tensor.
        joins_batch: vmap may join its dim to the batch where the first option, whether a plan's one element serves all
            of the batch, is True; else it calls for one sample after another.
        tags: Of both ops.
    """
    n = len(options)
    rest = ", ".join([*(f"Tensor {tensor}" for tensor in tensors), *options])
    torch.library.define(name, f"(Tensor q, Tensor k, Tensor v, {rest}) -> (Tensor, Tensor)", tags=tags)
    torch.library.define(
        f"{name}_backward",
        f"(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {rest}) "
        "-> (Tensor, Tensor, Tensor)",
        tags=tags,
    )
    torch.library.impl(name, ["CPU", "CUDA"], forward)
    torch.library.impl(f"{name}_backward", ["CPU", "CUDA"], backward)
    torch.library.register_fake(name, _forward_fake)
    torch.library.register_fake(f"{name}_backward", _backward_fake)

    def save(ctx, inputs, output) -> None:
        ctx.options = inputs[-n:]
        ctx.save_for_backward(*inputs[:3], *output, *inputs[3:-n])

    grads = getattr(torch.ops.wam, f"{name.removeprefix('wam::')}_backward").default

    def gradients(ctx, dout, dlse):
        dq, dk, dv = autograd.call(grads, dout, dlse, *ctx.saved_tensors, *ctx.options)
        return (dq, dk, dv, *[None] * (len(tensors) + n))

    def samples(count: int) -> autograd.Samples:
        """The tensors before those of the plan, if its one element serves all of the batch."""
        return lambda inputs, mapped: range(count if joins_batch and inputs[-n] else 0)

    autograd.register(op, name, save, gradients, samples(3), samples(7))


register_attention(
    _OP,
    "wam::block_attention",
    _forward,
    _backward,
    [*(f"{side}_{name}" for side in ("query", "key") for name in Side.FIELDS), "dq_tiles", "gradient_runs", "runs"],
    ["bool shared", "int step", "float scale", "str impl"],
)
register_attention(
    _OP,
    "wam::block_attention_boxes",
    _boxes_forward,
    _boxes_backward,
    [*(f"{side}_{name}" for side in ("query", "key") for name in BoxSide.FIELDS), "dq_tiles", "pairs"],
    ["bool shared", "float scale"],
)


def chosen_backend(q: Tensor, impl: str | None = None) -> str:
    """The backend of a call with queries ``[B, S, H, D]``; ValueError, see :func:`block_attention`, if it has none."""
    D = q.shape[-1]
    beyond = {
        "triton": None if fits_triton(D, q.itemsize) else f"{q.dtype} with D={D}",
        "cuda": None if D <= MAX_CUDA_D else f"D={D}",
    }
    return select_backend(_OP, _ROW, impl, beyond, q=q)


def registered_arguments(plan: Plan, scale: float, impl: str) -> tuple:
    """What ``wam::block_attention`` takes after v, and its backward after lse."""
    return *plan.tensors(impl), plan.batch == 1, plan.full_step, scale, impl


@overload
def block_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *,
    scale: float | None = None, impl: str | None = None, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def block_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *,
    scale: float | None = None, impl: str | None = None, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def block_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *,
    scale: float | None = None, impl: str | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    impl: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention in which each token attends to what the plan's interaction program allows.

    .. math:: out_i = \sum_{j \in N(i)} softmax_j(scale \; q_i \cdot k_j) \; v_j

    Differentiable in q, k, v (and through ``lse``), once and in reverse mode, also under ``torch.func``; forward mode
    and second order are for ``impl="reference"``, others refuse them. Deterministic; registered, so it traces under
    ``torch.compile(fullgraph=True)``. A fully masked row gives out 0, lse -inf and gradients 0. NaN and Inf stay in
    their sample and in rows that share a tile with one that attends to them; what attends to nothing, or is attended
    to by nothing, gets gradient 0 whatever it holds.

    Pairs with a stop-gradient in the plan are left out of dk and dv; out, lse and dq are as without. Frozen streams get
    gradients 0.

    Args:
        q: ``[B, S, H, D]``, bf16, fp16 or float32; last dim stride 1, others free. D a multiple of 8 from 8 to 256.
        k: ``[B, T, Hkv, D]``, otherwise as ``q``; Hkv divides H, and query head h reads key head h // (H / Hkv).
        v: As ``k``.
        plan: From :func:`wam_kernels.compile_plan`, for S query and T key tokens (T = S unless made of rectangular
            ranges), 1 or B batch elements, on the tensors' device.
        scale: Factor on the scores; default ``D ** -0.5``.
        impl: ``"reference"`` (dense S x S, any device, also float64), ``"cpu"`` (GEMMs over the plan's runs, also
            float64), ``"triton"`` (CUDA; float32 up to D = 128), ``"cuda"`` (Hopper, the compiled extension; bf16 and
            fp16 up to D = 128, every token and head on 16 bytes), or ``None``: ``"cpu"`` for CPU tensors; for CUDA
            tensors ``"triton"``, or ``"reference"`` where Triton cannot (float64, and float32 beyond D = 128);
            ``"reference"`` on other devices.
        return_lse: Also return the log-sum-exp of every row's scores.

    Returns:
        out ``[B, S, H, D]``, dtype of ``q``, contiguous; with ``return_lse`` also lse ``[B, H, S]``, float32 (float64
        for float64 inputs). Softmax and sums are float32.

    Raises:
        ValueError: a shape, dtype, device, stride or ``impl`` outside the above, or a plan made for something else.
        TypeError: ``plan`` is not a Plan, or something else not a tensor.
        NotImplementedError: forward mode or a second derivative through another ``impl`` than ``"reference"``.

    Source: Vaswani et al. 2017; the online softmax of Dao 2023 (FlashAttention-2); grouped heads: Ainslie et al. 2023.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"{_OP}: plan must be a Plan from compile_plan, got {type(plan).__name__}")
    dims = bind_dims(_OP, q=(q, "B S H D"), k=(k, "B T Hkv D"), v=(v, "B T Hkv D"))
    same_kind(_OP, "q", q, k=k, v=v)
    for name, t, letter, length in (("q", q, "S", plan.length), ("k", k, "T", plan.key_length)):
        if dims[letter] != length:
            hint = heads_first(name, t, f"B {letter} H D", {letter: length})
            raise ValueError(
                f"{_OP}: {name} must have {letter}={length} tokens like plan, got {dims[letter]}"
                + (hint or "; compile a plan for this geometry")
            )
    if dims["Hkv"] == 0 or dims["H"] % dims["Hkv"]:
        raise ValueError(
            f"{_OP}: k must have a number of heads that divides H={dims['H']}, got {dims['Hkv']}; query head h reads "
            "key head h // (H / Hkv)"
        )
    if dims["D"] % 8 or not 8 <= dims["D"] <= MAX_D:
        raise ValueError(f"{_OP}: D must be a multiple of 8 from 8 to {MAX_D}, got {dims['D']}; pad the heads")
    # not `in`: Dynamo finds no symbolic size in a tuple
    if plan.batch != 1 and plan.batch != dims["B"]:
        raise ValueError(f"{_OP}: plan must have 1 or B={dims['B']} batch elements, got {plan.batch}")
    if plan.device != q.device:
        raise ValueError(f"{_OP}: plan must be on {q.device} like q, got {plan.device}; use plan.to({str(q.device)!r})")
    impl = chosen_backend(q, impl)
    scale = dims["D"] ** -0.5 if scale is None else number(_OP, "scale", scale)
    if impl == "reference":
        mask = plan.mask()
        stopped = plan.gradient_pairs != plan.visible_pairs
        if plan.query_gradient_pairs != plan.visible_pairs:
            q = torch.where(plan.frozen_queries()[:, :, None, None], q.detach(), q)
        out, lse = reference.block_attention(q, k, v, mask, plan.mask(gradient=True) if stopped else mask, scale)
        return (out, lse) if return_lse else out
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.stride(-1) != 1:
            raise ValueError(f"{_OP}: {name} must have last-dim stride 1, got {t.stride(-1)}; use .contiguous()")
    if impl == "cuda":
        boxes = plan.boxes.tensors()
        out, lse = autograd.call(torch.ops.wam.block_attention_boxes.default, q, k, v, *boxes, plan.batch == 1, scale)
    else:
        arguments = registered_arguments(plan, scale, impl)
        out, lse = autograd.call(torch.ops.wam.block_attention.default, q, k, v, *arguments)
    return (out, lse) if return_lse else out
