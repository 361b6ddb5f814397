"""The Triton kernels of the adaLN ops, run by Triton's interpreter, against the float64 reference."""

import pytest
import torch

from tests.adaln.checks import (
    FULL,
    LAYOUTS,
    ROW_DTYPES,
    SHAPES,
    SHARED,
    UNEVEN,
    VARIANTS,
    check_against_reference,
    check_fused_equals_parts,
    check_layout,
    check_nan_stays,
    check_one_gradient,
    check_row_dtypes,
    check_same_bits,
    make_inputs,
    run,
)
from wam_kernels.adaln import config
from wam_kernels.frame_index import FrameIndex


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_variant(variant):
    check_against_reference(variant, SHARED, make_inputs(SHARED, 1, 72, torch.float32), "triton")


@pytest.mark.parametrize("name", ["norm", "gate-and-affine-norm", "sum-alone"])
def test_variants_in_bf16(name):
    check_against_reference(VARIANTS[name], UNEVEN, make_inputs(UNEVEN, 1, 72, torch.bfloat16), "triton")


@pytest.mark.parametrize("index, B, D, dtype", SHAPES)
def test_shapes_and_dtypes(index, B, D, dtype):
    check_against_reference(FULL, index, make_inputs(index, B, D, dtype), "triton")


@pytest.mark.parametrize("index, dtype, rows", ROW_DTYPES)
def test_rows_of_their_own_dtype(index, dtype, rows):
    check_row_dtypes(index, dtype, rows, "triton")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_never_changes_the_answer(layout):
    check_layout(layout, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_equals_its_parts(dtype):
    check_fused_equals_parts(SHARED, make_inputs(SHARED, 1, 72, dtype), "triton")


@pytest.mark.parametrize("variant", ["norm", "gate-and-norm", "gate-and-affine-norm"])
def test_a_program_of_several_tokens_gives_the_same_bits(variant, monkeypatch):
    index = FrameIndex.from_runs([3, 1, 2, 2], rows=[0, 1, 0, 2])  # rows change inside a program, and come back
    inputs = make_inputs(index, 2, 24, torch.bfloat16)
    one = run(VARIANTS[variant], index, inputs, "triton")
    monkeypatch.setattr(config, "PROGRAMS", 1)
    monkeypatch.setattr(config, "TOKENS_OF_PROGRAM", 3)  # the last program has fewer
    several = run(VARIANTS[variant], index, inputs, "triton")
    assert config.tokens_of_program(16) == 3 and all(torch.equal(one[name], several[name]) for name in one)


def test_only_one_output_used():
    check_one_gradient(SHARED, make_inputs(SHARED, 1, 64, torch.float32), "triton")


def test_same_bits_from_run_to_run():
    index = FrameIndex.from_runs([3, 2], rows=[0, 0])
    check_same_bits(index, make_inputs(index, 2, 72, torch.float32), "triton")


def test_nan_stays():
    check_nan_stays(FrameIndex.from_runs([2, 1, 2]), "triton")
