"""qk_norm_rope on a GPU: the Triton and CUDA kernels as compiled, at the sizes that matter."""

import dataclasses

import pytest
import torch

from tests.gpu import impls
from tests.qk_norm_rope import checks
from tests.qk_norm_rope.checks import Case

each_impl = impls.each_impl("qk_norm_rope")


@each_impl
@pytest.mark.parametrize("case", checks.SHAPES)
@pytest.mark.parametrize("variant", checks.VARIANTS)
def test_shapes_and_dtypes(case, variant, impl):
    checks.check_against_reference(dataclasses.replace(case, device="cuda"), impl, **checks.VARIANTS[variant])


@each_impl
@pytest.mark.parametrize("variant", ["wan", "cosmos"])
@pytest.mark.parametrize("tokens", [144, 4896, 8704])
def test_sizes_of_the_model(tokens, variant, impl):
    case = Case(1, tokens, 24 if variant == "wan" else 16, 128, torch.bfloat16, device="cuda")
    checks.check_against_reference(case, impl, **checks.VARIANTS[variant])


@each_impl
def test_longer_than_int32(impl):
    # 2 x 2**31 numbers of output: offsets must not wrap; a batch stride of 0 keeps the inputs small
    case = Case(1, 4096, 32, 256, torch.bfloat16, device="cuda")
    inputs = case.inputs(per_head=False)
    B = 2**31 // (4096 * 32 * 256) + 2
    call = {n: inputs[n] for n in ("weight_q", "weight_k", "table")} | {"head_dim": 256, "impl": impl}
    expected = checks.qk_norm_rope(inputs["q"], inputs["k"], **call)
    got = checks.qk_norm_rope(*(inputs[n].expand(B, -1, -1) for n in ("q", "k")), **call)
    for a, b in zip(got, expected, strict=True):
        assert a.numel() > 2**31 and torch.equal(a[-1], b[0]) and torch.equal(a[0], b[0])


@each_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_and_cache_slots(dtype, impl):
    checks.check_strides_are_free(Case(2, 37, 24, 128, dtype, device="cuda"), impl)
    checks.check_out_into_a_cache_slot(Case(2, 37, 24, 128, dtype, device="cuda"), impl)


@each_impl
def test_a_table_per_sample_is_one_call_a_sample(impl):
    checks.check_a_table_per_sample_is_one_call_a_sample(impl, "cuda")


@each_impl
@pytest.mark.parametrize("per_head", [False, True])
def test_same_bits_from_run_to_run(per_head, impl):
    for _ in range(50):
        checks.check_same_bits_from_run_to_run(Case(2, 2000, 24, 128, torch.bfloat16, device="cuda"), impl, per_head)
