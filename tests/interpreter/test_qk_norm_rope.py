"""The Triton kernels of qk_norm_rope, run by Triton's interpreter, against the float64 reference."""

import pytest
import torch

from tests.qk_norm_rope import checks
from wam_kernels.qk_norm_rope import config


@pytest.mark.parametrize("case", checks.SHAPES)
@pytest.mark.parametrize("variant", ["wan", "cosmos"])
def test_shapes_and_dtypes(case, variant, monkeypatch):
    monkeypatch.setattr(config, "REDUCE_COLUMNS", 1024)  # the interpreter takes a program's time, however small it is
    checks.check_against_reference(case, "triton", **checks.VARIANTS[variant])


@pytest.mark.parametrize("variant", ["row-norm-rotate-half", "head-norm-interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_variants(variant, dtype):
    checks.check_against_reference(checks.Case(2, 2, 3, 24, dtype), "triton", **checks.VARIANTS[variant])


@pytest.mark.parametrize("per_head", [False, True])
def test_partials_of_many_programs(per_head, monkeypatch):
    # 2 x 5 tokens, 3 a program: a run crosses samples, the last is shorter; 4 rows of partials are 2 tiles to sum
    monkeypatch.setattr(config, "PROGRAMS", 4)
    monkeypatch.setattr(config, "REDUCE_ROWS", 2)
    case = checks.Case(2, 5, 3, 16)
    checks.check_against_reference(case, "triton", per_head=per_head, interleaved=True)
    checks.check_same_bits_from_run_to_run(case, "triton", per_head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_are_free(dtype):
    checks.check_strides_are_free(checks.Case(2, 2, 3, 16, dtype), "triton")


def test_a_graph_notices_that_out_was_written_to():
    checks.check_a_graph_notices_that_out_was_written_to("triton")


def test_a_table_per_sample_is_one_call_a_sample():
    checks.check_a_table_per_sample_is_one_call_a_sample("triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_into_a_cache_slot(dtype):
    checks.check_out_into_a_cache_slot(checks.Case(2, 2, 3, 16, dtype), "triton")


@pytest.mark.parametrize("variant", ["wan", "cosmos"])
def test_nan_stays(variant):
    checks.check_nan_stays("triton", **checks.VARIANTS[variant])
