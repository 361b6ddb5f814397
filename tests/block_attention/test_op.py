"""block_attention on the CPU: the cpu backend against the reference, registration, refusals."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from tests.block_attention.checks import (
    blind_plan,
    check_against_reference,
    check_infinite_scores,
    check_nan_stays,
    make_inputs,
    ragged_plan,
    rectangular_plan,
    run,
)
from tests.geometries import libero, small
from tests.programs import JOINT_THEN_ACTION, registered
from wam_kernels import HISTORIES, PROGRAMS, RULE_PROGRAMS, block_attention, compile_plan


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("program", [*PROGRAMS, JOINT_THEN_ACTION.name])
def test_every_program(program, history):
    with registered(JOINT_THEN_ACTION):
        plan = compile_plan(small(program, history=history))
    check_against_reference(plan, make_inputs(plan, 2, 3, 16, torch.float32), "cpu")


@pytest.mark.parametrize(
    "plan, B, H, D, dtype",
    [
        pytest.param(ragged_plan(), 2, 2, 32, torch.float32, id="ragged-batch"),
        pytest.param(ragged_plan(), 2, 2, 64, torch.bfloat16, id="bf16"),
        pytest.param(ragged_plan(), 2, 2, 64, torch.float16, id="fp16"),
        pytest.param(ragged_plan(), 2, 1, 32, torch.float64, id="float64"),
        pytest.param(blind_plan(), 1, 2, 32, torch.float32, id="fully-masked-rows"),
        pytest.param(compile_plan(small()), 3, 1, 8, torch.float32, id="smallest-D"),
        pytest.param(compile_plan(small()), 1, 1, 256, torch.float32, id="largest-D"),
        pytest.param(compile_plan(small()), 0, 2, 16, torch.float32, id="no-batch"),
        pytest.param(compile_plan(libero(1, 8, frames=12)), 1, 2, 64, torch.float32, id="libero"),
    ],
)
def test_shapes_and_dtypes(plan, B, H, D, dtype):
    check_against_reference(plan, make_inputs(plan, B, H, D, dtype), "cpu")


@pytest.mark.parametrize(
    "plan, B, H, kv_heads, D, dtype",
    [
        pytest.param(ragged_plan(), 2, 6, 2, 32, torch.float32, id="groups-of-three"),
        pytest.param(ragged_plan(), 2, 4, 1, 64, torch.bfloat16, id="one-kv-head-bf16"),
        pytest.param(compile_plan(small()), 3, 4, 2, 16, torch.float32, id="shared-plan"),
        pytest.param(compile_plan(small()), 0, 4, 2, 16, torch.float32, id="no-batch"),
        pytest.param(rectangular_plan(), 2, 2, 2, 32, torch.float32, id="rectangular"),
        pytest.param(rectangular_plan(), 2, 8, 1, 256, torch.bfloat16, id="rectangular-pi-heads"),
    ],
)
def test_grouped_query_heads_and_rectangular_plans(plan, B, H, kv_heads, D, dtype):
    check_against_reference(plan, make_inputs(plan, B, H, D, dtype, kv_heads=kv_heads), "cpu")


def test_a_group_is_its_key_head_repeated():
    # the reference repeats key heads itself, so say once what that means: heads (0 1 2) (3 4 5) read key heads 0, 1
    plan = compile_plan(small())
    q, k, v, dout, dlse = make_inputs(plan, 1, 6, 16, torch.float64, kv_heads=2)
    head = torch.tensor([0, 0, 0, 1, 1, 1])
    out, lse, dq, dk, dv = run(plan, [q, k, v, dout, dlse], "cpu")
    expected = run(plan, [q, k[:, :, head], v[:, :, head], dout, dlse], "cpu")
    torch.testing.assert_close([out, lse, dq], expected[:3])
    torch.testing.assert_close([dk, dv], [g.unflatten(2, (2, 3)).sum(3) for g in expected[3:]])


SYSTEMS = {
    "fast_wam_uncond": {"video_frames": 3, "video_tokens": 6, "actions": 5},
    "fast_wam_idm": {"video_frames": 3, "video_tokens": 6, "actions": 5},
    "lingbot_va_train": {"samples": 2, "video_frames": 5, "video_tokens": 4, "action_frames": 5}
    | {"action_tokens": 3, "chunk_size": 2, "window": 3, "padding": 7},
    "dreamzero_train": {"video_frames": 5, "video_tokens": 6, "frames_per_block": 2, "action_tokens": 3}
    | {"state_tokens": 1, "window": 3},
    "dreamzero_cached": {"cached": 40, "video": 12, "actions": 5, "states": 1},
    "prefix_suffix": {"prefix": 40, "actions": 8, "states": 1, "padding": ((20, 26),)},
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_programs_of_other_systems(name):
    plan = compile_plan(RULE_PROGRAMS[name](**SYSTEMS[name]))
    check_against_reference(plan, make_inputs(plan, 2, 2, 16, torch.float32), "cpu")


@pytest.mark.parametrize("scale", [0.7, -0.7, 0.0])
def test_scale(scale):
    plan = compile_plan(small())
    check_against_reference(plan, make_inputs(plan, 1, 2, 16, torch.float32), "cpu", scale=scale)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_nan_stays(impl):
    check_nan_stays(impl)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_infinite_scores(impl):
    check_infinite_scores(impl)


LAYOUTS = {
    "heads-first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced-from-qkv": lambda x: torch.stack((x, x, x), 2)[:, :, 1],
    "expanded-batch": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_never_changes_the_answer(layout):
    plan = compile_plan(small())
    q, k, v, dout, dlse = make_inputs(plan, 2, 3, 16, torch.float32)
    strided = [layout(t) for t in (q, k, v, dout)]
    expected = run(plan, [*(t.contiguous() for t in strided), dlse], "cpu")
    for a, b in zip(run(plan, [*strided, dlse], "cpu"), expected, strict=True):
        assert torch.equal(a, b)


def test_fully_masked_rows_give_zero():
    plan = blind_plan()
    out, lse, dq, *_ = run(plan, make_inputs(plan, 1, 2, 16, torch.float32), None)
    blind = ~plan.mask()[0, 0].any(-1)
    assert blind.any() and not blind.all()
    assert (out[0, blind] == 0).all() and (dq[0, blind] == 0).all()
    assert (lse[0, :, blind] == float("-inf")).all()


def test_same_bits_from_run_to_run():
    plan = ragged_plan()
    inputs = make_inputs(plan, 2, 2, 32, torch.float32)
    first, second = run(plan, inputs, None), run(plan, inputs, None)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_is_linear_in_length():
    # the largest scores tensor of a run is rows x keys of one chunk: bounded by the window, whatever the length
    largest = {}
    for frames in (40, 80):
        runs = compile_plan(libero(chunk_size=4, window=8, frames=frames)).runs
        keys = (runs[:, 4::2] - runs[:, 3::2]).sum(1)
        largest[frames] = int(((runs[:, 2] - runs[:, 1]) * keys).max())
    assert largest[40] == largest[80]


def test_registration():
    plan = ragged_plan()
    q, k, v, *_ = make_inputs(plan, 2, 2, 16, torch.float32)
    args = (q, k, v, *plan.tensors(), False, plan.queries.shape.step, 0.25, "cpu")
    torch.library.opcheck(torch.ops.wam.block_attention.default, args)
    for t in (q, k, v):
        t.requires_grad_()
    torch.library.opcheck(torch.ops.wam.block_attention.default, args)


def test_compiles_whole_and_only_once_for_all_geometries():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(q, k, v, plan):
        return block_attention(q * 2, k, v, plan).sin()

    longer = {"video_frames": 9, "action_frames": 9}
    for changes in ({}, {"window": 6}, {"chunk_size": 3}, longer, {"program": "joint"}):
        plan = compile_plan(small(**changes))
        q, k, v, *_ = make_inputs(plan, 2, 2, 16, torch.float32)
        q.requires_grad_()
        out = step(q, k, v, plan)
        expected = block_attention(q * 2, k, v, plan).sin()
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(*(torch.autograd.grad(o.sum(), q)[0] for o in (out, expected)))
    # the first geometry compiles with fixed integers, the second learns that they change
    assert counter.frame_count <= 2


def test_a_plan_of_several_elements_compiles_for_any_size():
    plan = compile_plan([small(), small(program="video_then_action")])
    q, k, v, *_ = make_inputs(plan, 2, 2, 16, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(block_attention, fullgraph=True, backend="eager", dynamic=True)
    assert torch.equal(compiled(q, k, v, plan), block_attention(q, k, v, plan))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_autocast_leaves_the_op_alone(impl):
    plan = compile_plan(small())
    q, k, v = (torch.randn(1, plan.length, 2, 32, requires_grad=True) for _ in range(3))
    weights = torch.randn(1, plan.length, 2, 32)

    def results():
        out = block_attention(q, k, v, plan, impl=impl)
        return out, *torch.autograd.grad((out * weights).sum(), (q, k, v))

    plain = results()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = results()
    for a, b in zip(mixed, plain, strict=True):
        assert torch.equal(a, b)


def test_activation_checkpointing():
    plan = ragged_plan()
    q, k, v, dout, _ = make_inputs(plan, 2, 2, 16, torch.float32)
    q.requires_grad_()

    def attend(q):
        return block_attention(q, k, v, plan)

    expected = torch.autograd.grad(attend(q), q, dout)[0]
    assert torch.equal(torch.autograd.grad(checkpoint(attend, q, use_reentrant=False), q, dout)[0], expected)


def _kv(tokens: int, heads: int) -> dict:
    return {"k": torch.zeros(2, tokens, heads, 16), "v": torch.zeros(2, tokens, heads, 16)}


def good_call() -> dict:
    plan = compile_plan(small())
    q, k, v, *_ = make_inputs(plan, 2, 2, 16, torch.float32)
    return {"q": q, "k": k, "v": v, "plan": plan}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"plan": None}, TypeError, "plan must be a Plan from compile_plan, got NoneType"),
        ({"plan": compile_plan(small(video_frames=7))}, ValueError, "q must have S=94 tokens like plan, got 84"),
        ({"plan": compile_plan([small()] * 3)}, ValueError, "plan must have 1 or B=2 batch elements, got 3"),
        ({"plan": compile_plan(small()).to("meta")}, ValueError, r"plan must be on cpu like q, got meta; use plan.to"),
        ({"k": torch.zeros(2, 84, 2, 8)}, ValueError, r"k must have shape \[B=2, T=84, Hkv=2, D=16\], got .*8\]"),
        ({"v": torch.zeros(2, 84, 1, 16)}, ValueError, r"v must have shape \[B=2, T=84, Hkv=2, D=16\]"),
        (_kv(84, 3), ValueError, "k must have a number of heads that divides H=2, got 3"),
        (_kv(83, 2), ValueError, "k must have T=84 tokens like plan, got 83; compile a plan"),
        (
            {n: torch.zeros(2, 2, 84, 16) for n in "qkv"},
            ValueError,
            r"q must have S=84 tokens like plan, got 2; q looks like \[B, H, S, D\]: use q.transpose\(1, 2\)",
        ),
        (
            {n: torch.zeros(2, 2, 84, 16) for n in "kv"},
            ValueError,
            r"k must have T=84 tokens like plan, got 2; k looks like \[B, H, T, D\]: use k.transpose\(1, 2\)",
        ),
        ({"plan": small()}, TypeError, "plan must be a Plan from compile_plan, got Geometry"),
        (
            {"v": torch.zeros(2, 84, 2, 16).double()},
            ValueError,
            "v must be torch.float32 on cpu like q, got torch.float64",
        ),
        ({"impl": "flash"}, ValueError, "impl must be None or one of .*got 'flash'"),
        ({"impl": "triton"}, ValueError, r"impl='triton' needs CUDA tensors \(or TRITON_INTERPRET=1\), got cpu"),
    ],
)
def test_refusals_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        block_attention(**(good_call() | change))


@pytest.mark.parametrize("D", [4, 12, 264])
def test_refuses_head_dims_outside_its_range(D):
    x = torch.zeros(1, 84, 1, D)
    with pytest.raises(ValueError, match=f"D must be a multiple of 8 from 8 to 256, got {D}"):
        block_attention(x, x, x, compile_plan(small()))


def test_refuses_a_strided_head_dim():
    call = good_call()
    call["k"] = call["k"].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match=r"k must have last-dim stride 1, got 2; use .contiguous\(\)"):
        block_attention(**call)
