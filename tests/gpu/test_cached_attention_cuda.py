"""cached_attention's kernel by TMA on a Hopper GPU. The first tests are what a first run can trip over, one by one."""

import pytest
import torch

from tests.cached_attention.checks import Case, assert_right, run
from tests.csrc.conftest import compiled_extension
from tests.gpu.test_cached_attention import LIBERO
from wam_kernels.cached_attention import kernel_cuda

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def needs_hopper():
    compiled_extension()
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


def streamed(case, q, k, v):
    return kernel_cuda.forward(q, k, v, case.ranges(), case.rows, case.D**-0.5, streamed=True)


def check(samples, rows, N, **options):
    case = Case(samples, rows, N, device="cuda", **{"dtype": BF16, **options})
    inputs = case.inputs()
    assert_right(case, inputs, streamed(case, *inputs))


def test_the_driver_takes_the_maps_and_the_launch():
    """One whole step: cuTensorMapEncodeTiled, the attribute for shared memory, a launch of 512 threads."""
    check([[[(0, 64)]]], (64,), 64, H=1, D=64)


@pytest.mark.parametrize("slots", [1, 32, 40])
def test_boxes_of_a_map_with_overlapping_strides(slots):
    """One box alone, whole and with a gap of zeros, and two."""
    check([[[(3, 3 + slots)]]], (64,), 64, H=1, D=64)


@pytest.mark.parametrize("D", [64, 128])
def test_many_whole_steps_for_three_warpgroups(D):
    """setmaxnreg from 128 to 32 and 160 registers, and a ring that goes round."""
    check([[[(0, 2048)]]], (192,), 2048, H=1, D=D)


def test_a_strip_that_leaves_steps_out():
    check([[[(0, 500), (700, 1024)], [(100, 200), (600, 1000)]]], (128, 16), 1024, H=2, D=128)


@pytest.mark.parametrize("D", [8, 72, 80, 96])
def test_channels_that_are_filled_up_with_zeros(D):
    check([[[(5, 300)]]], (70,), 320, D=D, dtype=torch.float16)


def test_queries_that_share_a_cache():
    """The batch stride of 0 does not reach the driver."""
    case = Case([[[(0, 600), (600 + 16 * i, 616 + 16 * i)]] for i in range(4)], (144,), 664, dtype=BF16, device="cuda")
    q, k, v = case.inputs()
    k, v = (torch.randn(1, *t.shape[1:], device="cuda").to(BF16).expand_as(t) for t in (k, v))
    expected = streamed(case, q, k.contiguous(), v.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(streamed(case, q, k, v), expected, strict=True))


def test_grouped_heads():
    case = Case([LIBERO], (128, 16), 2304, H=8, D=128, dtype=BF16, device="cuda")
    q, k, v = case.inputs()
    k, v = k[:, :, :2], v[:, :, :2]
    expected = streamed(case, q, k.repeat_interleave(4, 2), v.repeat_interleave(4, 2))
    assert all(torch.equal(a, b) for a, b in zip(streamed(case, q, k, v), expected, strict=True))


def test_the_public_op_takes_it_and_the_kernel_by_mma_sync_agrees():
    case = Case([LIBERO], (128, 16), 2304, H=24, D=128, dtype=BF16, device="cuda")
    inputs = case.inputs()
    got = run(case, inputs, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(got, streamed(case, *inputs), strict=True))
    other = kernel_cuda.forward(*inputs, case.ranges(), case.rows, case.D**-0.5, streamed=False)
    assert_right(case, inputs, other)
    torch.testing.assert_close(got[0], other[0], atol=2e-2, rtol=2e-2)


def test_robotwin_rows_in_several_tiles():
    check([[[(200, 3000), (3100, 3900)], [(200, 3000)]]], (512, 64), 3900, H=24, D=128)
