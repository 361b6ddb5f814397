"""What every op must do under every transform of PyTorch; called by the CPU suite and the interpreter suite.

A transform gives the numbers of ``impl="reference"``, or an error that names the op and the way out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from wam_kernels import (
    FrameIndex,
    Geometry,
    ada_layer_norm,
    block_attention,
    compile_plan,
    gate_residual_ada_layer_norm,
    qk_norm_rope,
    rope_table,
    varlen_attention,
)

N = 2  # what is mapped over


class Op(NamedTuple):
    """One use of an op; ``call(impl, *inputs)`` returns its outputs."""

    name: str
    call: Callable[..., tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def all(self) -> tuple[int, ...]:
        return tuple(range(len(self.shapes)))

    def inputs(self, *mapped: int, seed: int = 0) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(*mapped, *shape, generator=g) for shape in self.shapes)

    def loss(self, impl: str) -> Callable[..., Tensor]:
        """Of all outputs, linear in none."""

        def loss(*inputs: Tensor) -> Tensor:
            # a fully masked row has lse -inf
            outputs = (t.masked_fill(t == float("-inf"), 0.0) for t in self.call(impl, *inputs))
            return sum(t.sin().sum() for t in outputs)

        return loss


_GEOMETRY = Geometry(
    program="joint", video_frames=2, video_tokens=2, action_frames=2, action_tokens=1, chunk_size=1, window=2,
    startup_action_frames=1,
)  # fmt: skip
PLAN = compile_plan(_GEOMETRY)
PLAN_OF_TWO = compile_plan([_GEOMETRY, Geometry(**{**_GEOMETRY.__dict__, "program": "video_then_action"})])
INDEX = FrameIndex.from_runs([2, 3])
TABLES = rope_table(torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 9, 8)


def _block(plan):
    return lambda impl, q, k, v: block_attention(q, k, v, plan, impl=impl, return_lse=True)


def _varlen(impl, q, k, v):
    return varlen_attention(q, k, v, [(0, 2), (2, 5)], [(0, 3), (1, 4)], impl=impl, return_lse=True)


def _norm(impl, x, shift, scale, shift_table, scale_table):
    options = {"shift_table": shift_table, "scale_table": scale_table, "impl": impl}
    return (ada_layer_norm(x, shift, scale, INDEX, **options),)


def _gate_norm(impl, x, y, gate, shift, scale, gate_table):
    return gate_residual_ada_layer_norm(x, y, gate, shift, scale, INDEX, gate_table=gate_table, impl=impl)


def _affine_norm(impl, x, y, weight, bias):
    return gate_residual_ada_layer_norm(x, y, None, None, None, INDEX, weight=weight, bias=bias, impl=impl)


def _rope(table, **options):
    return lambda impl, q, k, wq, wk: qk_norm_rope(q, k, wq, wk, table, head_dim=8, impl=impl, **options)


_HEADS = (2, PLAN.length, 2, 8)
_KEYS = (2, PLAN.length, 1, 8)
_ROWS, _MODULATION = (2, 5, 8), (2, 2, 8)
OPS = {
    "block_attention": Op("block_attention", _block(PLAN), (_HEADS, _KEYS, _KEYS)),
    "block_attention-plan-of-two": Op("block_attention", _block(PLAN_OF_TWO), (_HEADS, _KEYS, _KEYS)),
    "varlen_attention": Op("block_attention", _varlen, ((6, 2, 8), (4, 1, 8), (4, 1, 8))),
    "ada_layer_norm": Op("ada_layer_norm", _norm, (_ROWS, _MODULATION, _MODULATION, (8,), (8,))),
    "gate-and-norm": Op("gate_residual_ada_layer_norm", _gate_norm, (_ROWS, _ROWS, *[_MODULATION] * 3, (8,))),
    "sum-and-affine-norm": Op("gate_residual_ada_layer_norm", _affine_norm, (_ROWS, _ROWS, (8,), (8,))),
    "qk_norm_rope": Op("qk_norm_rope", _rope(TABLES[0]), ((2, 3, 16), (2, 3, 16), (16,), (16,))),
    "qk_norm_rope-per-head": Op(
        "qk_norm_rope", _rope(TABLES, per_head=True, interleaved=False), ((2, 3, 16), (2, 3, 16), (8,), (8,))
    ),
}


# ---- transforms: (loss, op) -> anything made of tensors ----


def _one_mapped(loss: Callable, op: Op) -> list:
    """Gradients of all inputs, of which one after the other is mapped over."""
    results = []
    for i in op.all:
        inputs = [op.inputs(N)[j] if j == i else t for j, t in enumerate(op.inputs())]
        results.append(vmap(grad(loss, op.all), tuple(0 if j == i else None for j in op.all))(*inputs))
    return results


def _shared(loss: Callable, op: Op) -> tuple:
    """Gradients through vmap, of the first input summed over all that share it."""
    first, rest = op.inputs()[0], op.inputs(N)[1:]
    mapped = vmap(loss, (None, *(0 for _ in rest)))
    return grad(lambda *x: mapped(*x).sum(), op.all)(first, *rest)


def _second_dim(loss: Callable, op: Op) -> Tensor:
    return vmap(loss, 1)(*(t.movedim(0, 1) for t in op.inputs(N)))


def _last_dim(loss: Callable, op: Op) -> Tensor:
    return vmap(lambda *x: loss(*(t.contiguous() for t in x)), -1)(*(t.movedim(0, -1) for t in op.inputs(N)))


def _graded_outside(transformed: Callable, op: Op, *mapped: int) -> tuple[Tensor, ...]:
    """Plain autograd around a transform."""
    leaves = [t.requires_grad_() for t in op.inputs(*mapped)]
    out = sum(t.sin().sum() for t in tree_leaves(transformed(*leaves)))
    return torch.autograd.grad(out, leaves, allow_unused=True)


RIGHT = {
    "grad": lambda loss, op: grad(loss, op.all)(*op.inputs()),
    "vjp": lambda loss, op: vjp(loss, *op.inputs())[1](torch.tensor(0.7)),
    "jacrev": lambda loss, op: jacrev(lambda *x: loss(*x).expand(2) * torch.arange(2), op.all)(*op.inputs()),
    "vmap": lambda loss, op: vmap(loss)(*op.inputs(N)),
    "vmap-second-dim": _second_dim,
    "vmap-last-dim": _last_dim,
    "vmap-of-grad": lambda loss, op: vmap(grad(loss, op.all))(*op.inputs(N)),
    "vmap-of-grad-one-mapped": _one_mapped,
    "vmap-of-vmap-of-grad": lambda loss, op: vmap(vmap(grad(loss, op.all)), 1)(*op.inputs(N, 3)),
    "grad-of-vmap-shared": _shared,
    "autograd-of-vmap": lambda loss, op: _graded_outside(vmap(loss), op, N),
    "inference-mode": lambda loss, op: torch.inference_mode()(lambda: vmap(grad(loss))(*op.inputs(N)))(),
}


def _jvp(loss: Callable, op: Op, *mapped: int) -> Tensor:
    return jvp(loss, op.inputs(*mapped), op.inputs(*mapped, seed=1))[1]


def _dual(loss: Callable, op: Op) -> Tensor:
    """The last input alone has a tangent, none requires a gradient."""
    *rest, last = op.inputs()
    with torch.no_grad(), forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(*rest, forward_ad.make_dual(last, torch.ones_like(last)))).tangent


def _create_graph(loss: Callable, op: Op) -> tuple[Tensor, ...]:
    leaves = [t.requires_grad_() for t in op.inputs()]
    out = loss(*leaves)
    # nothing that flows back requires a gradient itself
    first = torch.autograd.grad(out, leaves, create_graph=True)
    return torch.autograd.grad(sum(t.square().sum() for t in first) + out, leaves)


REFUSED = {
    "jvp": _jvp,
    "jvp-no-grad": lambda loss, op: torch.no_grad()(_jvp)(loss, op),
    # PyTorch 2.7 itself gives 0 there, whatever the function
    "jvp-inference-mode": lambda loss, op: torch.inference_mode()(_jvp)(loss, op),
    "jacfwd": lambda loss, op: jacfwd(loss)(*op.inputs()),
    "dual": _dual,
    "jvp-of-vmap": lambda loss, op: _jvp(vmap(loss), op, N),
    "vmap-of-jvp": lambda loss, op: vmap(lambda *x: jvp(loss, x, x)[1])(*op.inputs(N)),
    "jvp-of-grad": lambda loss, op: _jvp(grad(loss), op),
    "grad-of-jvp": lambda loss, op: grad(lambda *x: jvp(loss, x, x)[1])(*op.inputs()),
    "hessian": lambda loss, op: hessian(loss)(*op.inputs()),
    "create-graph": _create_graph,
    "grad-of-grad": lambda loss, op: grad(lambda *x: grad(loss)(*x).sin().sum())(*op.inputs()),
    "autograd-of-grad": lambda loss, op: _graded_outside(grad(loss), op),
    "autograd-of-vmap-of-grad": lambda loss, op: _graded_outside(vmap(grad(loss)), op, N),
    "vjp-of-vjp": lambda loss, op: vjp(lambda *x: vjp(loss, *x)[1](torch.tensor(0.7)), *op.inputs())[1](op.inputs()),
}


def check_right(transform: Callable, op: Op, impl: str) -> None:
    actual, expected = (tree_leaves(transform(op.loss(i), op)) for i in (impl, "reference"))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-3)


def check_refused(transform: Callable, op: Op, impl: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"{op.name}.*: has no .*; use impl='reference'"):
        transform(op.loss(impl), op)
