"""The CUDA kernels of block_attention, through their launchers, against the reference in float64.

Emulated, threads run in random order and what Hopper does on its own (TMA, wgmma) is done late, at random: every case
must give the same bits in several orders (``csrc/common/sm90_emulation.h``).
"""

import copy

import numpy as np
import pytest
import torch

from tests.block_attention.checks import (
    NAMES,
    blind_plan,
    frozen_plan,
    frozen_ranges,
    insulated_plan,
    make_inputs,
    ragged_plan,
    rectangular_plan,
    run,
    run_rounded,
    stopped_plan,
)
from tests.budget import assert_within_budget
from tests.geometries import libero, small
from wam_kernels import HISTORIES, PROGRAMS, Ranges, compile_plan
from wam_kernels.block_attention import kernel_cuda

BF16, FP16 = torch.bfloat16, torch.float16
# Roundings are those of run_rounded, but for p, which the kernel rounds at another running maximum: the largest error
# is another draw. lse has none but those of float32 sums, and is compared with the reference's.
SLACK = {"out": 1.5, "lse": 3.0, "dq": 1.5, "dk": 1.5, "dv": 1.5}


def run_cuda(plan, inputs, scale=None):
    """out, lse, dq, dk, dv."""
    q, k, v, dout, dlse = inputs
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    boxes, shared = plan.boxes, plan.batch == 1
    out, lse = kernel_cuda.forward(q, k, v, boxes.queries.tensors(), shared, scale)
    dlse = dlse.masked_fill(torch.isinf(lse), 0.0)
    sides = boxes.query_gradients.tensors(), boxes.keys.tensors()
    return out, lse, *kernel_cuda.backward(dout, dlse, q, k, v, out, lse, *sides, shared, scale)


def check(machine, plan, inputs, scale=None, orders=2):
    plan = plan.to(machine.device)
    inputs = [t.to(machine.device) for t in inputs]
    actual = machine.run(lambda: run_cuda(plan, inputs, scale), orders=orders)
    rounded = run_rounded(plan, inputs, scale)
    rounded[1] = run(plan, inputs, "reference", scale)[1]  # lse is float32: no rounding but that of sums
    truth = run(plan, [t.double() for t in inputs], "reference", scale)
    assert actual[0].dtype == inputs[0].dtype and actual[0].is_contiguous()
    for name, a, r, t in zip(NAMES, actual, rounded, truth, strict=True):
        assert_within_budget(name, a, r, t, SLACK[name])


def beyond_budget(plan, inputs, wrong) -> list[str]:
    """Which of the results would fail in :func:`check`."""
    truth, rounded = run(plan, [t.double() for t in inputs], "reference"), run_rounded(plan, inputs)
    failing = []
    for name, w, r, t in zip(NAMES, wrong, rounded, truth, strict=True):
        try:
            assert_within_budget(name, w, r, t, SLACK[name])
        except AssertionError:
            failing.append(name)
    return failing


def test_the_budget_finds_what_is_lost():
    plan = long_plan(frames=12)
    inputs = make_inputs(plan, 1, 1, 64, BF16)
    assert beyond_budget(plan, inputs, run_rounded(plan, inputs)) == []
    mask = plan.mask()[0, 0].numpy()
    rows = np.arange(500, 564)  # a half of a tile that loses one of its keys
    mask[rows, np.flatnonzero(mask[rows].all(0))[-1]] = False
    lost = compile_plan(Ranges.from_mask(mask))
    assert beyond_budget(plan, inputs, run_rounded(lost, inputs)) == list(NAMES)
    without_dlse = [*inputs[:4], torch.zeros_like(inputs[4])]
    assert beyond_budget(plan, inputs, run_rounded(plan, without_dlse)) == ["dq", "dk"]


def long_plan(chunk_size=4, frames=9):
    """432 tokens: full steps, and masked ones of both halves, of one alone, before and behind."""
    plan = compile_plan(libero(chunk_size, 64, frames))
    n0, n_full, n_both, n1 = plan.boxes.queries.tiles[:, 3:7].sum(0).tolist()
    assert min(n_full, n_both) > 0 and n0 + n1 > 0
    return plan


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program(machine, program, history):
    plan = compile_plan(small(program, history=history))
    check(machine, plan, make_inputs(plan, 2, 1, 64, BF16))


@pytest.mark.parametrize(
    "make_plan, B, H, kv_heads, D, dtype",
    [
        pytest.param(ragged_plan, 2, 2, 2, 64, FP16, id="ragged-batch"),
        pytest.param(blind_plan, 1, 1, 1, 128, BF16, id="fully-masked-rows"),
        pytest.param(rectangular_plan, 2, 3, 1, 64, BF16, id="rectangular-groups-of-three"),
        pytest.param(stopped_plan, 2, 2, 1, 64, BF16, id="stop-gradient"),
        pytest.param(insulated_plan, 1, 1, 1, 128, FP16, id="insulated-prefix"),
        pytest.param(frozen_plan, 2, 1, 1, 64, BF16, id="frozen-streams"),
        pytest.param(frozen_ranges, 1, 2, 1, 128, FP16, id="frozen-queries"),
        pytest.param(lambda: compile_plan([small(), small(window=2)]), 2, 4, 2, 128, FP16, id="groups-of-two"),
        pytest.param(lambda: compile_plan(Ranges((), (), 70, 40)), 1, 1, 1, 64, BF16, id="no-pair"),
        pytest.param(lambda: compile_plan(small(video_tokens=13), length=203), 3, 1, 1, 64, BF16, id="shared-plan"),
    ],
)
def test_plans_and_groups(machine, make_plan, B, H, kv_heads, D, dtype):
    plan = make_plan()
    check(machine, plan, make_inputs(plan, B, H, D, dtype, kv_heads=kv_heads))


@pytest.mark.parametrize("D", [8, 40, 72, 80, 96, 128])
def test_every_head_dim(machine, D):
    plan = compile_plan(small(video_tokens=11))
    check(machine, plan, make_inputs(plan, 1, 2, D, BF16))


@pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
def test_scales(machine, scale):
    plan = compile_plan(small())
    check(machine, plan, make_inputs(plan, 1, 1, 64, BF16), scale)


@pytest.mark.parametrize("D, H, kv_heads, dtype", [(64, 2, 1, FP16), (128, 1, 1, BF16)])
def test_long_windows_in_many_orders(machine, D, H, kv_heads, dtype):
    plan = long_plan()
    check(machine, plan, make_inputs(plan, 1, H, D, dtype, kv_heads=kv_heads), orders=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chunk_size, frames, D, H, kv_heads",
    [
        (4, 24, 64, 3, 1),
        (4, 24, 128, 2, 1),
        (1, 12, 64, 3, 1),
        (1, 12, 128, 2, 1),
        (3, 17, 64, 3, 1),
        (3, 17, 128, 2, 1),
    ],
)
def test_longer_windows_in_more_orders(machine, chunk_size, frames, D, H, kv_heads):
    plan = compile_plan(libero(chunk_size, 64, frames))
    check(machine, plan, make_inputs(plan, 1, H, D, BF16, kv_heads=kv_heads), orders=6)


def test_queries_of_several_elements_share_the_keys_of_one(machine):
    """What the plan's format has room for: tiles whose steps are of another batch element than their rows."""
    plan = compile_plan([small(), small()]).to(machine.device)
    q, k, v, dout, dlse = (t.to(machine.device) for t in make_inputs(plan, 2, 2, 64, BF16, kv_heads=1))
    shared = [q, *(t[:1].repeat(2, 1, 1, 1) for t in (k, v)), dout, dlse]
    boxes = copy.deepcopy(plan.boxes)
    boxes.queries.tiles[:, 7] = 0
    k[1], v[1] = torch.nan, torch.nan

    def run_shared():
        queries = boxes.queries.tensors()
        out, lse = kernel_cuda.forward(q, k, v, queries, False, 0.125)
        dq, _, _ = kernel_cuda.backward(dout, dlse, q, k, v, out, lse, queries, boxes.keys.tensors(), False, 0.125)
        return out, lse, dq

    actual = machine.run(run_shared)
    rounded, truth = run_rounded(plan, shared), run(plan, [t.double() for t in shared], "reference")
    rounded[1] = run(plan, shared, "reference")[1]
    for name, a, r, t in zip(NAMES, actual, rounded, truth, strict=False):
        assert_within_budget(name, a, r, t, SLACK[name])


def test_strided_tensors(machine):
    """Slices of a wider tensor; what lies between is NaN."""
    plan = compile_plan(small())
    q, k, v, dout, dlse = make_inputs(plan, 2, 2, 40, BF16)
    wide = [torch.full((2, plan.length, 5, 48), torch.nan, dtype=BF16) for _ in range(4)]
    for w, t in zip(wide, (q, k, v, dout), strict=True):
        w[:, :, 1:5:2, :40] = t
    q, k, v, dout = (w[:, :, 1:5:2, :40] for w in wide)
    check(machine, plan, [q, k, v, dout, dlse])


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_tma_cannot_take_is_refused_by_name(machine, name):
    plan = compile_plan(small()).to(machine.device)
    tensors = dict(zip("qkv", make_inputs(plan, 1, 2, 64, BF16, machine.device)[:3], strict=True))
    wide = torch.zeros(1, plan.length, 2, 65, dtype=BF16, device=machine.device)
    queries = plan.boxes.queries.tensors()
    with pytest.raises(ValueError, match=f"block_attention: {name}'s token stride must be a multiple of 8"):
        kernel_cuda.forward(*(tensors | {name: wide[..., :64]}).values(), queries, True, 1.0)
    flat = torch.zeros(plan.length * 128 + 1, dtype=BF16, device=machine.device)[1:]
    with pytest.raises(ValueError, match=f"block_attention: {name} must be aligned to 16 bytes"):
        kernel_cuda.forward(*(tensors | {name: flat.view(1, -1, 2, 64)}).values(), queries, True, 1.0)


def test_other_head_dims_and_dtypes_are_refused(machine):
    plan = compile_plan(small()).to(machine.device)
    queries = plan.boxes.queries.tensors()
    for D, dtype, message in ((136, BF16, "D must be a multiple of 8"), (64, torch.float32, "q must be bfloat16")):
        q, k, v, *_ = make_inputs(plan, 1, 1, D, dtype, machine.device)
        with pytest.raises(ValueError, match=message):
            kernel_cuda.forward(q, k, v, queries, True, 1.0)


def test_nan_of_what_attends_to_nothing_or_is_attended_to_by_nothing(machine):
    """It changes no number, and its gradients are 0."""
    plan = compile_plan([[small("decoupled_same_step"), Ranges([(0, 40)], [(10, 17)], 50)]]).to(machine.device)
    mask = plan.mask()[:, 0]
    inputs = make_inputs(plan, 1, 2, 64, BF16, machine.device)
    clean = run_cuda(plan, inputs)
    q, k, v, dout, dlse = (t.clone() for t in inputs)
    blind, unseen = ~mask.any(2), ~mask.any(1)
    assert blind.any() and unseen.any()
    q[blind] = dout[blind] = torch.nan
    k[unseen] = v[unseen] = torch.inf
    got = machine.run(lambda: run_cuda(plan, [q, k, v, dout, dlse]))
    for name, a, b in zip(NAMES, got, clean, strict=True):
        assert torch.equal(a, b), name
    assert not got[2][blind].any() and not got[3][unseen].any() and not got[4][unseen].any()
