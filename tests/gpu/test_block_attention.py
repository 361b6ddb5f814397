"""block_attention on a GPU: the Triton kernels as compiled, at the sizes that matter."""

import pytest
import torch

from tests.block_attention.checks import (
    blind_plan,
    check_against_reference,
    make_inputs,
    ragged_plan,
    rectangular_plan,
    run,
)
from tests.geometries import libero, small
from wam_kernels import HISTORIES, PROGRAMS, block_attention, compile_plan


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program(program, history):
    plan = compile_plan(small(program, history=history), device="cuda")
    check_against_reference(plan, make_inputs(plan, 2, 3, 64, torch.bfloat16, "cuda"), "triton")


@pytest.mark.parametrize(
    "make_plan, B, H, D, dtype",
    [
        pytest.param(ragged_plan, 2, 2, 64, torch.float32, id="ragged-batch-float32"),
        pytest.param(ragged_plan, 2, 2, 128, torch.float32, id="largest-float32-head"),
        pytest.param(ragged_plan, 2, 2, 128, torch.float16, id="fp16"),
        pytest.param(blind_plan, 1, 2, 64, torch.bfloat16, id="rows-that-see-nothing"),
        pytest.param(lambda: compile_plan(small()), 2, 1, 8, torch.bfloat16, id="smallest-D"),
        pytest.param(lambda: compile_plan(small()), 2, 1, 72, torch.bfloat16, id="D-not-power-of-two"),
        pytest.param(lambda: compile_plan(small()), 2, 1, 256, torch.bfloat16, id="largest-D"),
        pytest.param(lambda: compile_plan(libero(4, 64)), 1, 4, 128, torch.bfloat16, id="libero-long-window"),
        pytest.param(lambda: compile_plan(libero(1, 8)), 1, 4, 128, torch.bfloat16, id="libero-short-window"),
    ],
)
def test_shapes_and_dtypes(make_plan, B, H, D, dtype):
    plan = make_plan().to("cuda")
    check_against_reference(plan, make_inputs(plan, B, H, D, dtype, "cuda"), "triton")


@pytest.mark.parametrize(
    "make_plan, B, H, kv_heads, D, dtype",
    [
        pytest.param(lambda: compile_plan(libero(4, 64)), 1, 4, 2, 128, torch.bfloat16, id="groups-of-two"),
        pytest.param(ragged_plan, 2, 6, 2, 64, torch.float32, id="groups-of-three-float32"),
        pytest.param(rectangular_plan, 2, 2, 2, 128, torch.bfloat16, id="rectangular"),
        pytest.param(rectangular_plan, 2, 8, 1, 256, torch.bfloat16, id="rectangular-pi-heads"),
    ],
)
def test_grouped_query_heads_and_rectangular_plans(make_plan, B, H, kv_heads, D, dtype):
    plan = make_plan().to("cuda")
    check_against_reference(plan, make_inputs(plan, B, H, D, dtype, "cuda", kv_heads), "triton")


def test_same_bits_over_100_runs():
    plan = compile_plan(libero(4, 64, frames=34), device="cuda")
    inputs = make_inputs(plan, 1, 4, 128, torch.bfloat16, "cuda")
    first = run(plan, inputs, None)
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(run(plan, inputs, None), first, strict=True))


def test_captured_in_a_cuda_graph():
    plan = compile_plan(libero(4, 8, frames=12), device="cuda")
    q, k, v, *_ = make_inputs(plan, 1, 4, 128, torch.bfloat16, "cuda")
    expected = block_attention(q, k, v, plan)  # also compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_attention(q, k, v, plan)
    out.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(out, expected, atol=0, rtol=0)


def test_compiles_whole():
    plan = compile_plan(libero(4, 8, frames=12), device="cuda")
    q, k, v, *_ = make_inputs(plan, 1, 4, 64, torch.bfloat16, "cuda")

    @torch.compile(fullgraph=True)
    def step(q, k, v, plan):
        return block_attention(q, k, v, plan).float().sin()

    torch.testing.assert_close(step(q, k, v, plan), block_attention(q, k, v, plan).float().sin())


def test_float64_has_no_kernel_and_takes_the_reference():
    plan = compile_plan(small(), device="cuda")
    q, k, v, *_ = (t.double() for t in make_inputs(plan, 1, 1, 16, torch.float32, "cuda"))
    assert torch.equal(block_attention(q, k, v, plan), block_attention(q, k, v, plan, impl="reference"))
    with pytest.raises(ValueError, match="impl='triton'.*float64"):
        block_attention(q, k, v, plan, impl="triton")
