"""Attention under a plan in plain PyTorch: the definition that every backend is tested against.

Dense products multiply masked pairs by 0, and 0 * NaN is NaN. The two products here leave masked pairs out, forward and
backward, so NaN and Inf reach what they do in the formula and nothing else.

A plan may stop gradients: then ``flow`` is the pairs that keys and values get gradients through, otherwise the mask
itself. For all other pairs they are constants, in both modes and at every order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.backends import product


class _Product(torch.autograd.Function):
    """Two tensors and ``mask`` ``[.., S, T]`` to their product over the pairs that are in it.

    The second one, keys or values, is a constant outside ``flow`` ``[.., S, T]``.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


class _Scores(_Product):
    @staticmethod
    def forward(x: Tensor, y: Tensor, mask: Tensor, flow: Tensor) -> Tensor:
        return product(x, y.mT).masked_fill(~mask, 0.0)

    @staticmethod
    def backward(ctx, grad):
        x, y, mask, flow = ctx.saved_tensors
        dx = _sums(grad.masked_fill(~mask, 0.0), y, mask, flow)
        return dx, _sums(grad.masked_fill(~flow, 0.0).mT, x, flow.mT, flow.mT), None, None


class _Sums(_Product):
    @staticmethod
    def forward(p: Tensor, y: Tensor, mask: Tensor, flow: Tensor) -> Tensor:
        # NaN in the rows that attend to a token which is not finite, in the channels where some token is not
        finite = y.isfinite()
        bad = (~finite).any(-1, keepdim=True).to(y.dtype)
        reached = (product(mask.to(y.dtype), bad) > 0) & ~finite.all(-2, keepdim=True)
        return product(p, y.masked_fill(~finite, 0.0)).masked_fill(reached, torch.nan)

    @staticmethod
    def backward(ctx, grad):
        p, y, mask, flow = ctx.saved_tensors
        dy = _sums(p.masked_fill(~flow, 0.0).mT, grad, flow.mT, flow.mT)
        return _scores(grad, y, mask, flow), dy, None, None


# With a forward mode; torch.compile traces no function that has one.
class _ScoresBothModes(_Scores):
    @staticmethod
    def jvp(ctx, dx, dy, *_):
        x, y, mask, flow = ctx.saved_tensors
        return _scores(dx, y, mask, flow) + _scores(x, dy, flow, flow)


class _SumsBothModes(_Sums):
    @staticmethod
    def jvp(ctx, dp, dy, *_):
        p, y, mask, flow = ctx.saved_tensors
        return _sums(dp, y, mask, flow) + _sums(p.masked_fill(~flow, 0.0), dy, flow, flow)


def _scores(x: Tensor, y: Tensor, mask: Tensor, flow: Tensor) -> Tensor:
    """``x_S y_T`` of every pair in ``mask`` ``[.., S, T]``, 0 elsewhere."""
    return (_Scores if torch.compiler.is_compiling() else _ScoresBothModes).apply(x, y, mask, flow)


def _sums(p: Tensor, y: Tensor, mask: Tensor, flow: Tensor) -> Tensor:
    """Sums over T of ``p_ST y_T``, where p is 0 outside ``mask`` ``[.., S, T]``."""
    return (_Sums if torch.compiler.is_compiling() else _SumsBothModes).apply(p, y, mask, flow)


def block_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, flow: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense: scores ``[B, H, S, T]`` in float32 (float64 for float64 inputs). Differentiable, any device."""
    acc = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2] if k.shape[2] else 1
    # query head h reads key head h // group
    k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    q_BHSD, k_BHTD, v_BHTD = (t.to(acc).transpose(1, 2) for t in (q, k, v))
    scores = (_scores(q_BHSD, k_BHTD, mask, flow) * scale).masked_fill(~mask, float("-inf"))
    # a constant that cancels; -inf, of a row that is fully masked or has no score above it, would make -inf - -inf NaN
    shift = torch.logsumexp(scores.detach(), -1, keepdim=True)
    shift = shift.masked_fill(shift == float("-inf"), 0.0)
    weights = torch.exp(scores - shift)
    total = weights.sum(-1, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    lse = (shift + total.log()).masked_fill(nothing, float("-inf"))
    p = (weights / total).masked_fill(~mask, 0.0)  # also where total is NaN
    return _sums(p, v_BHTD, mask, flow).transpose(1, 2).to(q.dtype), lse.squeeze(-1)
