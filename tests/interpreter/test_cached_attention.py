"""The Triton kernels of cached_attention, run by Triton's interpreter, against the float64 reference."""

import dataclasses

import pytest
import torch

from tests.cached_attention import checks
from tests.cached_attention.checks import WRAPPED, Case, run
from wam_kernels.cached_attention import config, kernel_triton


@pytest.mark.parametrize("case", checks.CASES)
def test_shapes_and_dtypes(case):
    checks.check_against_reference(case, "triton")


@pytest.mark.parametrize("parts", [2, 7])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case([[[(0, 190), (200, 301)], [(3, 9)]]], (9, 3), 320, H=1), id="typical"),
        pytest.param(
            Case([[[(40, 64), (0, 17), (64, 73)]], [[(1, 2)]], [[]]], (5,), 80, dtype=torch.bfloat16), id="wrap"
        ),
    ],
)
def test_split_over_the_keys(case, parts, monkeypatch):
    # more parts than steps: the last ones have no slots
    monkeypatch.setattr(config, "splits", lambda programs, slots: parts)
    checks.check_against_reference(case, "triton")


def test_tiles_of_several_groups():
    case = Case([[[(0, 70)], [], [(70, 90), (3, 40)], [(9, 10)]]], (70, 5, 0, 65), 96, H=1)
    checks.check_against_reference(case, "triton")


def test_strides_are_free():
    checks.check_strides_are_free(Case([[[(5, 60)]], [[(5, 9), (20, 62)]]], (7,), 64), "triton")


def test_ranges_are_cut_off_at_the_cache():
    case = Case([[[(-4, 5), (70, 99)], [(0, 5)]]], (6, 2), 80)
    checks.check_against_reference(case, "triton")


def test_large_scores_do_not_overflow():
    # scores near 40,000: exp of them overflows unless the running maximum is taken off first
    case = Case([[WRAPPED]], (5,), 80, H=1, spread=100.0)
    q, k, v = case.inputs()
    inputs = [q, k * 100, v]
    out, lse = run(case, inputs, "triton")
    out_truth, lse_truth = run(case, [t.double() for t in inputs], "reference")
    torch.testing.assert_close(out.double(), out_truth, atol=1e-2, rtol=0)  # a score has 0.002 of rounding itself
    torch.testing.assert_close(lse.double(), lse_truth, atol=0, rtol=1e-6)


@pytest.mark.parametrize("parts", [1, 3])
def test_nan_stays(parts, monkeypatch):
    monkeypatch.setattr(config, "splits", lambda programs, slots: parts)
    checks.check_nan_stays(lambda case, inputs: run(case, inputs, "triton"))


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scale(scale):
    checks.check_against_reference(Case([[WRAPPED, []]], (17, 2), 80, H=1, scale=scale), "triton")


def test_every_slot_is_read_once(monkeypatch):
    """All scores 0 and v one-hot: out holds each slot's weight, 1 / visible, so one read twice or never would show."""
    for parts in (1, 3):
        monkeypatch.setattr(config, "splits", lambda programs, slots, parts=parts: parts)
        case = Case([[[(130, 152), (2, 101), (101, 120)]]], (1,), 160, H=2, D=128)
        q, k, v = (torch.zeros_like(t) for t in case.inputs())
        order = [slot for start, end in case.samples[0][0] for slot in range(start, end)]
        for i, slot in enumerate(order):
            v[0, slot, i // 128, i % 128] = 1.0
        out, _ = run(case, [q, k, v], "triton")
        weights = out[0, 0].flatten()
        torch.testing.assert_close(weights[: len(order)], torch.full((len(order),), 1 / len(order)))
        assert (weights[len(order) :] == 0).all()


def test_refuses_what_the_kernel_does_not_take():
    def refuses(message, case):
        with pytest.raises(ValueError, match=f"cached_attention: {message}"):
            run(case, case.inputs(), "triton")

    case = Case([[WRAPPED]], (5,), 80)
    limits, way_out = "impl='triton' takes D up to 128 and up to 4 groups, got", "use impl='reference'"
    refuses(f"{limits} D=136 and 1 groups; {way_out}", dataclasses.replace(case, D=136))
    refuses(f"{limits} D=32 and 5 groups; {way_out}", dataclasses.replace(case, samples=[[WRAPPED] * 5], rows=(1,) * 5))
    dtypes = "q must be bfloat16, float16, float32 for .*got torch.float64; use impl=None"
    refuses(dtypes, dataclasses.replace(case, dtype=torch.float64))


def test_splits_depend_on_shapes_and_fill_the_machine():
    # LIBERO rollout: tiles of 64 over 128 video and 16 action rows, 24 heads, 2,160 cached slots and the chunk's own
    launch = config.forward(128, 128, 2)
    assert launch.block_m == 64 and kernel_triton.launch_constants(launch, 128, torch.bfloat16)["BLOCK_N"] == 64
    assert config.splits(3 * 24, 2304) == 3
    assert config.splits(3 * 24, 255) == 1 and config.splits(16 * 24, 14_000) == 1 and config.splits(2, 14_000) == 54
