"""The adaLN ops on a GPU: the Triton and CUDA kernels as compiled, at the sizes that matter."""

import pytest
import torch

from tests.adaln import checks
from tests.gpu import impls
from wam_kernels.adaln import ada_layer_norm
from wam_kernels.frame_index import FrameIndex

each_impl = impls.each_impl("ada_layer_norm")


def on_gpu(index: FrameIndex, B: int, D: int, dtype: torch.dtype):
    return index.to("cuda"), checks.make_inputs(index, B, D, dtype, "cuda")


@each_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", checks.VARIANTS.values(), ids=checks.VARIANTS)
def test_every_variant(variant, dtype, impl):
    checks.check_against_reference(variant, *on_gpu(checks.SHARED, 2, 72, dtype), impl)


@each_impl
@pytest.mark.parametrize("index, B, D, dtype", checks.SHAPES)
def test_shapes_and_dtypes(index, B, D, dtype, impl):
    for variant in (checks.FULL, checks.VARIANTS["gate-and-affine-norm"]):
        checks.check_against_reference(variant, *on_gpu(index, B, D, dtype), impl)


@each_impl
@pytest.mark.parametrize(
    "S, D, tokens", [(8704, 3072, 32), (4800, 3072, 200), (144, 3072, 36), (8704, 2048, 4), (64, 576, 4)]
)
def test_sizes_of_the_model(S, D, tokens, impl):
    index, inputs = on_gpu(FrameIndex.from_runs([tokens] * (S // tokens)), 1, D, torch.bfloat16)
    checks.check_against_reference(checks.FULL, index, inputs, impl)
    checks.check_same_bits(index, inputs, impl)
    checks.check_fused_equals_parts(index, inputs, impl)


@each_impl
@pytest.mark.parametrize("layout", checks.LAYOUTS.values(), ids=checks.LAYOUTS)
def test_layout_never_changes_the_answer(layout, impl):
    checks.check_layout(layout, impl, "cuda")


@each_impl
def test_same_bits_over_100_runs(impl):
    index, inputs = on_gpu(FrameIndex.from_runs([32] * 68), 1, 3072, torch.bfloat16)
    for _ in range(50):
        checks.check_same_bits(index, inputs, impl)


@each_impl
def test_longer_than_int32(impl):
    # 2**31 numbers of output: offsets must not wrap; a batch stride of 0 keeps the inputs small
    index, inputs = on_gpu(FrameIndex.from_runs([32] * 64), 1, 4096, torch.bfloat16)
    shift, scale, *_ = inputs["t_proj"].unbind(2)
    expected = ada_layer_norm(inputs["x"], shift, scale, index, impl=impl)
    B = 2**31 // expected.numel() + 2
    got = ada_layer_norm(*(t.expand(B, -1, -1) for t in (inputs["x"], shift, scale)), index, impl=impl)
    assert got.numel() > 2**31 and torch.equal(got[-1], expected[0]) and torch.equal(got[0], expected[0])
