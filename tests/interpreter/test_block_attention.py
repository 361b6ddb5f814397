"""The Triton kernels of block_attention, run by Triton's interpreter, against the float64 reference."""

import numpy as np
import pytest
import torch

from tests.block_attention.checks import (
    EDGES,
    blind_plan,
    check_against_reference,
    check_edge,
    check_infinite_scores,
    check_nan_stays,
    frozen_plan,
    insulated_plan,
    make_inputs,
    ragged_plan,
    rectangular_plan,
    run,
    stopped_plan,
)
from tests.geometries import libero, small
from tests.interpreter.bf16 import pack, unpack
from tests.programs import JOINT_THEN_ACTION, registered
from wam_kernels import PROGRAMS, Ranges, TileShape, compile_plan
from wam_kernels.block_attention import config


def test_interpreted_bf16_rounds_like_torch():
    x = torch.cat(
        [torch.randn(4096) * 10.0 ** torch.randint(-30, 30, (4096,)), torch.tensor([0.0, -0.0, float("inf")])]
    )
    bits = pack(x.numpy())
    np.testing.assert_array_equal(bits, x.bfloat16().view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(unpack(bits), x.bfloat16().float().numpy())


@pytest.mark.parametrize("program", [*PROGRAMS, JOINT_THEN_ACTION.name])
def test_every_program(program):
    with registered(JOINT_THEN_ACTION):
        plan = compile_plan(small(program, history="full"))
    check_against_reference(plan, make_inputs(plan, 1, 2, 16, torch.float32), "triton")


@pytest.mark.parametrize(
    "plan, B, H, D, dtype",
    [
        pytest.param(ragged_plan(), 2, 1, 32, torch.float32, id="ragged-batch"),
        pytest.param(ragged_plan(), 2, 1, 64, torch.bfloat16, id="bf16"),
        pytest.param(ragged_plan(), 2, 1, 64, torch.float16, id="fp16"),
        pytest.param(blind_plan(), 1, 2, 32, torch.float32, id="fully-masked-rows"),
        pytest.param(blind_plan(), 1, 1, 32, torch.bfloat16, id="fully-masked-rows-bf16"),
        pytest.param(compile_plan(small()), 2, 1, 8, torch.float32, id="smallest-D"),
        pytest.param(compile_plan(small()), 1, 1, 72, torch.float32, id="D-not-power-of-two"),
        pytest.param(compile_plan(small()), 0, 1, 16, torch.float32, id="no-batch"),
        pytest.param(
            compile_plan(libero(4, 64, frames=12), tile=TileShape(64, 64)), 1, 1, 64, torch.bfloat16, id="full-steps"
        ),
    ],
)
def test_shapes_and_dtypes(plan, B, H, D, dtype):
    check_against_reference(plan, make_inputs(plan, B, H, D, dtype), "triton")


@pytest.mark.parametrize(
    "plan, B, H, kv_heads, D, dtype",
    [
        pytest.param(blind_plan(), 1, 3, 1, 16, torch.float32, id="group-of-three"),
        pytest.param(compile_plan(small()), 1, 2, 1, 16, torch.bfloat16, id="one-kv-head-bf16"),
        pytest.param(rectangular_plan(), 2, 1, 1, 32, torch.float32, id="rectangular"),
        pytest.param(rectangular_plan(), 2, 2, 1, 32, torch.float32, id="rectangular-groups"),
        pytest.param(
            compile_plan(libero(4, 64, frames=8), tile=TileShape(64, 64)), 1, 2, 1, 32, torch.float32, id="full-steps"
        ),
    ],
)
def test_grouped_query_heads_and_rectangular_plans(plan, B, H, kv_heads, D, dtype):
    check_against_reference(plan, make_inputs(plan, B, H, D, dtype, kv_heads=kv_heads), "triton")


@pytest.mark.parametrize(
    "make_plan, B, H, dtype",
    [
        (stopped_plan, 2, 2, torch.float32),
        (insulated_plan, 1, 1, torch.bfloat16),
        (frozen_plan, 2, 2, torch.float32),
    ],
)
def test_stop_gradient(make_plan, B, H, dtype):
    plan = make_plan()
    check_against_reference(plan, make_inputs(plan, B, H, 16, dtype, kv_heads=1), "triton")


def test_pieces_of_tiles_and_sums_apart(monkeypatch):
    # what the largest rows do: a program owns a half of a tile, and dk and dv are launches of their own
    for name in ("forward", "dq", "dkdv"):
        monkeypatch.setattr(config, name, lambda D, itemsize, rows: config.Config(rows // 2, 4, 1))
    monkeypatch.setattr(config, "dkdv_launches", lambda *_: ({"DK": False, "DV": True}, {"DK": True, "DV": False}))
    plan = compile_plan(Ranges([(0, 20), (9, 28)], [(0, 24), (10, 30)], 28, 30), tile=TileShape(32, 16))
    check_against_reference(plan, make_inputs(plan, 1, 2, 16, torch.float32, kv_heads=1), "triton")


def test_full_steps_are_walked():
    # the row above must reach the unmasked loop, or it would prove nothing about it
    plan = compile_plan(libero(4, 64, frames=12), tile=TileShape(64, 64))
    assert plan.queries.full.numel() > 20 and plan.keys.full.numel() > 20


def test_strides_of_batch_token_and_head_are_free():
    plan = compile_plan(small())
    q, k, v, dout, dlse = make_inputs(plan, 2, 2, 16, torch.float32)
    expected = run(plan, [q, k, v, dout, dlse], "triton")
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    zero_stride = dout[:, :1].expand_as(dout)
    for a, b in zip(run(plan, [*heads_first, dout, dlse], "triton"), expected, strict=True):
        assert torch.equal(a, b)
    expanded = run(plan, [*heads_first, zero_stride, dlse], "triton")
    for a, b in zip(expanded, run(plan, [q, k, v, zero_stride.contiguous(), dlse], "triton"), strict=True):
        assert torch.equal(a, b)


def test_large_scores_do_not_overflow():
    # scores near 40,000: exp of them overflows unless the running maximum is taken off first
    plan = compile_plan(small())
    q, k, v, dout, dlse = make_inputs(plan, 1, 1, 16, torch.float32)
    inputs = [q * 100, k * 100, v, dout, dlse]
    out, lse, *grads = run(plan, inputs, "triton")
    out_truth, lse_truth, *_ = run(plan, [t.double() for t in inputs], "reference")
    torch.testing.assert_close(out.double(), out_truth, atol=1e-2, rtol=0)  # a score has 0.002 of rounding itself
    torch.testing.assert_close(lse.double(), lse_truth, atol=0, rtol=1e-6)
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scale(scale):
    plan = compile_plan(small(video_frames=3, action_frames=2))
    check_against_reference(plan, make_inputs(plan, 1, 1, 16, torch.float32), "triton", scale=scale)


def test_nan_stays():
    check_nan_stays("triton")


def test_infinite_scores():
    check_infinite_scores("triton")


@pytest.mark.parametrize("name", EDGES)
def test_varlen_attention_at_the_edges(name):
    check_edge(name, "triton")
