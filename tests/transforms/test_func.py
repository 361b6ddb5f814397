"""torch.func, dual tensors and second order through every op, CPU backend."""

import pytest
import torch
from torch.func import grad, jvp, vmap

from tests.transforms.checks import OPS, REFUSED, RIGHT, TABLES, N, check_refused, check_right
from wam_kernels import cached_attention, qk_norm_rope, rope_table


@pytest.mark.parametrize("transform", RIGHT.values(), ids=RIGHT)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_right(op, transform):
    check_right(transform, op, "cpu")


@pytest.mark.parametrize("transform", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_refused(op, transform):
    check_refused(transform, op, "cpu")


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_nothing_to_map(op):
    leaves = [t.requires_grad_() for t in op.inputs(0)]
    actual, expected = (vmap(lambda *x, i=impl: op.call(i, *x))(*leaves) for impl in ("cpu", "reference"))
    torch.testing.assert_close(actual, expected)
    grads = torch.autograd.grad(sum(t.sum() for t in actual), leaves)
    assert [g.shape for g in grads] == [t.shape for t in leaves]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_reference_has_them_all(op):
    # so that the way out of every refusal is one
    for transform in REFUSED.values():
        transform(op.loss("reference"), op)


def test_a_level_without_tangents_is_no_forward_mode():
    op = OPS["block_attention"]
    with torch.autograd.forward_ad.dual_level():
        check_right(RIGHT["grad"], op, "cpu")


def _inputs(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g) for shape in shapes]


RANGES = torch.tensor([[[[0, 2], [3, 5]], [[1, 4], [0, 0]]]] * 2, dtype=torch.int32)


def _cached(impl, q, k, v, ranges=RANGES):
    return cached_attention(q, k, v, ranges, group_rows=(2, 1), impl=impl, return_lse=True)


def _rope_out(impl, q, k, weight, q_out, k_out):
    return qk_norm_rope(q, k, weight, weight, TABLES[0], head_dim=8, impl=impl, out=(q_out[:, 1:4], k_out[:, 1:4]))


INFERENCE = {
    "cached_attention": (_cached, [(2, 3, 2, 8), (2, 6, 2, 8), (2, 6, 2, 8)]),
    "qk_norm_rope": (_rope_out, [(2, 3, 16), (2, 3, 16), (16,), (2, 5, 2, 8), (2, 5, 2, 8)]),
}


@pytest.mark.parametrize("name", INFERENCE)
@pytest.mark.parametrize("dim, n", [(0, 2), (1, 2), (0, 0)])
def test_ops_for_inference_are_mapped(name, dim, n):
    call, shapes = INFERENCE[name]
    outputs = []
    for impl in ("cpu", "reference"):
        inputs = [t.movedim(0, min(dim, t.ndim - 2)) for t in _inputs(*((n, *shape) for shape in shapes))]
        in_dims = (None, *(min(dim, t.ndim - 2) for t in inputs))
        outputs.append([*vmap(call, in_dims)(impl, *inputs), *inputs])
    torch.testing.assert_close(*outputs)


def test_ranges_are_mapped():
    inputs = _inputs(*INFERENCE["cached_attention"][1])
    ranges = torch.stack([RANGES, RANGES.clamp(max=2)])
    actual, expected = (vmap(lambda r, i=impl: _cached(i, *inputs, r))(ranges) for impl in ("cpu", "reference"))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", INFERENCE)
def test_ops_for_inference_refuse_derivatives(name):
    call, shapes = INFERENCE[name]
    inputs = _inputs(*shapes)

    def first(q):
        return call("cpu", q, *(t.clone() for t in inputs[1:]))[0].sum()

    refused = pytest.raises(ValueError, match=f"{name}: .*for inference.*; use ")
    for ask in (grad(first), lambda q: jvp(first, (q,), (q,)), torch.no_grad()(lambda q: jvp(first, (q,), (q,)))):
        with refused:
            ask(inputs[0])

    def mapped(t):  # the level of vmap hides that its input requires a gradient
        mapped_inputs = [torch.stack([i, i]) for i in inputs[1:]]
        return vmap(lambda *x: call("cpu", *x)[0].sum())(t, *mapped_inputs).sum()

    with refused:
        grad(mapped)(torch.stack([inputs[0]] * 2))


def test_out_must_be_mapped():
    q, k, weight, q_out, k_out = _inputs(*INFERENCE["qk_norm_rope"][1])
    with pytest.raises(ValueError, match="qk_norm_rope: out must be mapped like the inputs"):
        vmap(lambda q: _rope_out("cpu", q, k, weight, q_out, k_out))(torch.stack([q] * N))


def test_a_table_that_requires_a_gradient_is_refused_at_every_level():
    q, k, weight, *_ = _inputs(*INFERENCE["qk_norm_rope"][1])

    def loss(table):
        return qk_norm_rope(q, k, weight, weight, table, head_dim=8, impl="cpu")[0].sin().sum()

    def of_positions(positions):
        return loss(rope_table(positions, 8))

    positions = torch.rand(3, 3)
    asked = (grad(loss), TABLES[0]), (grad(lambda t: vmap(loss)(t).sum()), TABLES), (grad(of_positions), positions)
    for ask, argument in asked:
        with pytest.raises(ValueError, match="qk_norm_rope: table must not require a gradient"):
            ask(argument)
    with pytest.raises(NotImplementedError, match="qk_norm_rope: has no forward-mode derivative"):
        jvp(of_positions, (positions,), (positions,))


def test_compiled():
    op = OPS["block_attention"]
    inputs = op.inputs(N)
    torch._dynamo.reset()
    compiled = torch.compile(vmap(grad(op.loss("cpu"))), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), vmap(grad(op.loss("reference")))(*inputs), atol=2e-5, rtol=1e-3)
    compiled = torch.compile(op.loss("cpu"), fullgraph=True, backend="aot_eager")
    compiled(*op.inputs())
    # compiled without forward mode, then called in it
    check_refused(lambda loss, op: REFUSED["dual"](compiled, op), op, "cpu")
