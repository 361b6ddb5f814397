"""cached_attention on a GPU: the kernels as compiled, at the sizes that matter."""

import dataclasses

import pytest
import torch

from tests.cached_attention import checks
from tests.cached_attention.checks import Case, run
from tests.gpu import impls
from wam_kernels.cached_attention import cached_attention

each_impl = impls.each_impl("cached_attention")

# a ring that has wrapped round, and the chunk's own slots; the action rows attend to less
LIBERO = [[(900, 2160), (0, 800), (2160, 2304)], [(900, 2160), (2160, 2304)]]


@each_impl
@pytest.mark.parametrize("case", checks.CASES)
def test_shapes_and_dtypes(case, impl):
    if impl == "cuda" and case.dtype == torch.float32:
        case = dataclasses.replace(case, dtype=torch.bfloat16)
    checks.check_against_reference(dataclasses.replace(case, device="cuda"), impl)


@each_impl
@pytest.mark.parametrize(
    "samples, rows, N, H, D",
    [
        pytest.param([LIBERO], (128, 16), 2304, 24, 128, id="libero"),
        pytest.param([LIBERO, [[(0, 32), (2160, 2304)], [(2160, 2304)]]], (128, 16), 2304, 24, 128, id="two-robots"),
        pytest.param([[[(0, 13_800), (14_000, 14_864)]]], (864,), 14_864, 24, 128, id="franka"),
        pytest.param([[[(0, 9_792), (9_792, 10_032)]]], (16,), 10_032, 24, 128, id="action-rows-alone"),
        pytest.param([LIBERO], (128, 16), 2304, 9, 64, id="small-expert"),
        pytest.param([LIBERO], (128, 16), 2304, 2, 32, id="smallest-head"),
    ],
)
def test_sizes_of_the_model(samples, rows, N, H, D, impl):
    case = Case(samples, rows, N, H=H, D=D, dtype=torch.bfloat16, device="cuda")
    checks.check_against_reference(case, impl)


def test_float32_at_the_largest_head():
    checks.check_against_reference(Case([LIBERO], (128, 16), 2304, H=4, D=128, device="cuda"), "triton")


@each_impl
def test_strides_are_free(impl):
    case = Case([[[(5, 300), (333, 606)]], [[(6, 40)]]], (37,), 640, H=5, D=64, dtype=torch.bfloat16, device="cuda")
    checks.check_strides_are_free(case, impl)


@each_impl
def test_slots_further_apart_than_int32(impl):
    case = Case([LIBERO], (128, 16), 2304, H=2, D=128, dtype=torch.bfloat16, device="cuda")
    q, k, v = case.inputs()
    cache = torch.zeros(1, 2304, 2**31 // 2304 // 256 + 2, 256, dtype=torch.bfloat16, device="cuda")
    cache[:, :, 0], cache[:, :, -1] = k.flatten(2), v.flatten(2)
    far = [cache[:, :, i].unflatten(-1, (2, 128)) for i in (0, -1)]
    assert cache.numel() > 2**31 and far[0].stride(1) * 2303 > 2**31 - 2**24
    for a, b in zip(run(case, [q, *far], impl), run(case, [q, k, v], impl), strict=True):
        assert torch.equal(a, b)


@each_impl
def test_same_bits_over_100_runs(impl):
    case = Case([LIBERO], (128, 16), 2304, H=24, D=128, dtype=torch.bfloat16, device="cuda")
    checks.check_same_bits_from_run_to_run(case, impl, runs=100)


@each_impl
def test_one_graph_serves_every_fill(impl):
    full = Case([LIBERO], (128, 16), 2304, H=4, D=128, dtype=torch.bfloat16, device="cuda")
    inputs, ranges = full.inputs(), full.ranges()
    arguments = {"group_rows": full.rows, "impl": impl, "return_lse": True}
    cached_attention(*inputs, ranges, **arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = cached_attention(*inputs, ranges, **arguments)
    for fill in (0, 36, 1152, 2160):
        groups = [[(0, fill), (2160, 2304)], [(max(0, fill - 300), fill), (2160, 2304)]]
        fill_case = dataclasses.replace(full, samples=[[group + [(0, 0)] for group in groups]])
        ranges.copy_(fill_case.ranges())
        # slots that no longer belong to anyone must not leak
        inputs[1][:, fill:2160], inputs[2][:, fill:2160] = torch.nan, torch.nan
        valid = full.inputs()
        inputs[1][:, :fill], inputs[2][:, :fill] = valid[1][:, :fill].nan_to_num(), valid[2][:, :fill].nan_to_num()
        for t in got:
            t.fill_(torch.nan)
        graph.replay()
        checks.assert_right(fill_case, inputs, got)
        assert all(torch.equal(a, b) for a, b in zip(got, run(fill_case, inputs, impl), strict=True))


@each_impl
def test_nothing_waits_for_the_device(impl):
    case = Case([LIBERO], (128, 16), 2304, H=4, D=128, dtype=torch.bfloat16, device="cuda")
    inputs, ranges = case.inputs(), case.ranges()
    run(case, inputs, impl, ranges)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, inputs, impl, ranges)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_float64_has_no_kernel_and_takes_the_reference():
    case = Case([[[(3, 50)]]], (5,), 64, dtype=torch.float64, device="cuda")
    inputs = case.inputs()
    assert all(torch.equal(a, b) for a, b in zip(run(case, inputs, None), run(case, inputs, "reference"), strict=True))
    with pytest.raises(ValueError, match="impl='triton'.*float64"):
        run(case, inputs, "triton")
