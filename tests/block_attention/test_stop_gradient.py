"""Stop-gradient between streams: dk and dv against autograd with detached keys and values, the rest as without."""

import functools

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.block_attention.checks import (
    NAMES,
    attend_detached,
    check_against_reference,
    frozen_plan,
    frozen_ranges,
    insulated_plan,
    make_inputs,
    run,
    run_detached,
    stopped_plan,
)
from tests.geometries import small
from wam_kernels import (
    PROGRAMS,
    Ranges,
    block_attention,
    compile_plan,
    roofline,  # noqa: F401 - tells PyTorch's counter the formulas
    varlen_attention,
)
from wam_kernels.block_attention import op

ACTION_TO_VIDEO = [("action", "video")]
FROZEN_VIDEO = [("video", "video"), ("action", "video")]


def check(plan, kv_heads=2, impls=("reference", "cpu")):
    inputs = [t.double() for t in make_inputs(plan, plan.batch, 4, 8, torch.float64, kv_heads=kv_heads)]
    expected = run_detached(plan, inputs)
    for impl in impls:
        for name, a, b in zip(NAMES, run(plan, inputs, impl), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9, msg=lambda m, at=(impl, name): f"{at}: {m}")


@pytest.mark.parametrize("pairs", [ACTION_TO_VIDEO, [("video", "action")], FROZEN_VIDEO], ids=str)
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program(program, pairs):
    batch = [[small(program, history="full"), small(program, prefix_frames=2)], [small(program, chunk_size=3)]]
    plan = compile_plan(batch, length=190, stop_gradient=pairs)
    assert 0 < plan.gradient_pairs < plan.visible_pairs
    check(plan)


@pytest.mark.parametrize("make_plan", [stopped_plan, insulated_plan, frozen_plan, frozen_ranges])
def test_other_plans(make_plan):
    plan = make_plan()
    check(plan, kv_heads=1)
    check_against_reference(plan, make_inputs(plan, plan.batch, 4, 64, torch.bfloat16, kv_heads=2), "cpu")


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_forward_and_queries_have_the_same_bits_as_without(impl):
    stopped, plain = stopped_plan(), compile_plan(stopped_plan().geometries, length=75)
    assert stopped is not plain and plain.gradient_pairs == plain.visible_pairs == stopped.visible_pairs
    inputs = make_inputs(plain, 2, 2, 16, torch.float32)
    ours, theirs = run(stopped, inputs, impl), run(plain, inputs, impl)
    if impl == "reference":
        assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))
    else:  # runs are the longest with the same keys and gradients: other GEMMs
        torch.testing.assert_close(ours[:3], theirs[:3], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours[3], theirs[3]) and not torch.allclose(ours[4], theirs[4])


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_frozen_stream_gets_zeros_whatever_the_rest_holds(impl):
    plan, queries_too = compile_plan(small(), stop_gradient=FROZEN_VIDEO), compile_plan(small(), frozen=["video"])
    inputs = make_inputs(plan, 1, 2, 16, torch.float32)
    video = torch.arange(plan.length) < 2 * 6 * 5
    inputs[3][0, -1] = torch.nan  # dout of an action, which attends to video
    _, _, dq, dk, dv = run(plan, inputs, impl)
    assert not dk[0, video].any() and not dv[0, video].any()
    assert dv[0, ~video].isnan().any() and dq[0, video].isfinite().all() and dq[0, video].any()
    _, _, frozen, *others = run(queries_too, inputs, impl)
    assert not frozen[0, video].any()
    dq[0, video] = 0.0
    torch.testing.assert_close([frozen, *others], [dq, dk, dv], equal_nan=True)


@pytest.mark.parametrize("flags", [[True, False, False], np.array([True, True, True]), torch.tensor([False] * 3)])
def test_ranges_mark_their_entries(flags):
    q_ranges, k_ranges = [(0, 9), (4, 30), (30, 37)], [(3, 50), (40, 61), (20, 45)]
    plan = compile_plan(Ranges(q_ranges, k_ranges, 45, 70, stop_gradient=flags))
    flow = torch.zeros(45, 70, dtype=torch.bool)
    for (q, q_end), (k, k_end), stopped in zip(q_ranges, k_ranges, flags, strict=True):
        flow[q:q_end, k:k_end] |= not stopped  # a pair that another entry names keeps its gradient
    assert torch.equal(plan.mask(gradient=True)[0, 0], flow) and plan.gradient_pairs == flow.sum()
    check(plan)
    q, k, v, dout, dlse = (t[0] for t in make_inputs(plan, 1, 2, 16, torch.float32))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = varlen_attention(*leaves, q_ranges, k_ranges, stop_gradient=flags)
    expected = run_detached(plan, [t.detach()[None].double() for t in (*leaves, dout, 0 * dlse)])[2:]
    for a, b in zip(torch.autograd.grad(out, leaves, dout), expected, strict=True):
        torch.testing.assert_close(a.double(), b[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stops", [{"stop_gradient": ACTION_TO_VIDEO}, {"frozen": ["action"]}], ids=str)
def test_second_order_and_forward_mode_of_the_reference(stops):
    plan = compile_plan(small(video_frames=3, action_frames=3), **stops)
    inputs = [t.double() for t in make_inputs(plan, 1, 2, 8, torch.float64)]
    weights = inputs[3]

    def second(attend):
        q, k, v = (t.detach().requires_grad_() for t in inputs[:3])
        first = torch.autograd.grad((attend(q, k, v) * weights).sum(), (q, k, v), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v))

    def tangent(attend):
        return torch.func.jvp(attend, tuple(inputs[:3]), tuple(t.flip(1) for t in inputs[:3]))[1]

    ours = functools.partial(block_attention, plan=plan, impl="reference")
    for of in (second, tangent):
        torch.testing.assert_close(of(ours), of(lambda q, k, v: attend_detached(plan, q, k, v)[0]))


@pytest.mark.parametrize("stops", [{"stop_gradient": ACTION_TO_VIDEO}, {"frozen": ["action"]}], ids=str)
def test_compiles_whole_and_batches_under_vmap(stops):
    plan = compile_plan(small(), **stops)
    q, k, v, dout, _ = make_inputs(plan, 2, 2, 16, torch.float32)

    def loss(k):
        return (block_attention(q[:1], k[None], v[:1], plan) * dout[:1]).sum()

    expected = torch.stack([torch.func.grad(loss)(one) for one in k])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(k), expected)
    torch._dynamo.reset()
    step = torch.compile(lambda k: block_attention(q, k, v, plan), fullgraph=True, backend="aot_eager")
    k.requires_grad_()
    dk, eager = (torch.autograd.grad(f(k), k, dout)[0] for f in (step, lambda k: block_attention(q, k, v, plan)))
    assert torch.equal(dk, eager)


def counted(op, *args) -> int:
    with FlopCounterMode(display=False) as counter:
        op(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "stops", [{}, {"stop_gradient": ACTION_TO_VIDEO}, {"frozen": ["video"]}, {"frozen": ["action", "video"]}], ids=str
)
def test_flops_leave_out_what_is_stopped(stops, monkeypatch):
    """The same by runs and by the numbers that boxes carry: scores and dp, dq, dk and dv, each over its own pairs."""
    plan, (B, H, D) = compile_plan(small(), **stops), (2, 3, 16)
    q, k, v = (t.requires_grad_() for t in make_inputs(plan, B, H, D, torch.float32)[:3])
    of_queries = plan.mask()[0, 0] & ~plan.frozen_queries()[0, :, None]
    of_keys = plan.mask(gradient=True)[0, 0]
    products = 2 * (of_queries | of_keys).sum() + of_queries.sum() + 2 * of_keys.sum()
    out, lse = block_attention(q, k, v, plan, return_lse=True)
    assert counted(out.sum().backward) == 2 * B * H * D * products
    monkeypatch.setattr(op, "launchers", lambda *_: Nothing)
    boxes = *plan.boxes.tensors(), True, 1.0
    assert counted(torch.ops.wam.block_attention_boxes, q, k, v, *boxes) == 4 * B * H * D * plan.visible_pairs
    gradients = torch.ops.wam.block_attention_boxes_backward
    assert counted(gradients, out, lse, q, k, v, out, lse, *boxes) == 2 * B * H * D * products


class Nothing:
    """Launchers that launch nothing."""

    @staticmethod
    def forward(q, k, v, *_):
        return torch.empty_like(q), q.new_empty(q.shape[:3]).transpose(1, 2)

    @staticmethod
    def backward(dout, dlse, q, k, v, *_):
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
