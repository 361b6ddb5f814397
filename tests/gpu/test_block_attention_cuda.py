"""block_attention's CUDA kernels on a Hopper GPU. The first tests are what a first run can trip over, one by one."""

import pytest
import torch

from tests.block_attention.checks import (
    blind_plan,
    check_against_reference,
    make_inputs,
    ragged_plan,
    rectangular_plan,
    run,
    stopped_plan,
)
from tests.csrc.conftest import compiled_extension
from tests.geometries import libero, small
from wam_kernels import HISTORIES, PROGRAMS, Ranges, block_attention, compile_plan


@pytest.fixture(autouse=True)
def needs_hopper():
    compiled_extension()
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


def check(plan, *inputs, **options):
    plan = plan.to("cuda")
    check_against_reference(plan, make_inputs(plan, *inputs, device="cuda", **options), "cuda")


def dense(tokens: int):
    """Every query attends to every key: with a multiple of 128 keys there is no masked step."""
    return compile_plan(Ranges([(0, tokens)], [(0, tokens)], tokens))


def test_the_driver_takes_the_maps_and_the_launch():
    """One tile of full steps: cuTensorMapEncodeTiled, the attribute for shared memory, the launch."""
    plan = dense(128).to("cuda")
    q, k, v, *_ = make_inputs(plan, 1, 1, 64, torch.bfloat16, "cuda")
    out = block_attention(q, k, v, plan, impl="cuda")
    torch.cuda.synchronize()
    torch.testing.assert_close(out, block_attention(q, k, v, plan, impl="reference"), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("tokens", [1, 32, 40])
def test_boxes_of_a_map_with_overlapping_strides(tokens):
    """One box alone, whole and with a gap of zeros."""
    plan = dense(tokens).to("cuda")
    q, k, v, *_ = make_inputs(plan, 1, 1, 64, torch.bfloat16, "cuda")
    out = block_attention(q, k, v, plan, impl="cuda")
    torch.testing.assert_close(out, block_attention(q, k, v, plan, impl="reference"), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("D", [64, 128])
def test_many_full_steps(D):
    check(dense(1024), 1, 2, D, torch.bfloat16)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program(program, history):
    check(compile_plan(small(program, history=history)), 2, 3, 64, torch.bfloat16)


@pytest.mark.parametrize(
    "make_plan, B, H, kv_heads, D, dtype",
    [
        pytest.param(ragged_plan, 2, 2, 2, 128, torch.float16, id="fp16"),
        pytest.param(blind_plan, 1, 2, 2, 64, torch.bfloat16, id="fully-masked-rows"),
        pytest.param(lambda: compile_plan(small()), 2, 1, 1, 8, torch.bfloat16, id="smallest-D"),
        pytest.param(lambda: compile_plan(small()), 2, 2, 1, 72, torch.bfloat16, id="D-72"),
        pytest.param(lambda: compile_plan(small()), 2, 2, 1, 80, torch.bfloat16, id="D-80"),
        pytest.param(lambda: compile_plan(small()), 2, 2, 1, 96, torch.float16, id="D-96"),
        pytest.param(rectangular_plan, 2, 8, 2, 128, torch.bfloat16, id="rectangular"),
        pytest.param(stopped_plan, 2, 4, 2, 128, torch.bfloat16, id="stop-gradient"),
        pytest.param(lambda: compile_plan(libero(4, 64)), 1, 4, 2, 128, torch.bfloat16, id="libero-long-window"),
        pytest.param(lambda: compile_plan(libero(1, 8)), 1, 4, 4, 128, torch.bfloat16, id="libero-short-window"),
    ],
)
def test_shapes_and_dtypes(make_plan, B, H, kv_heads, D, dtype):
    check(make_plan(), B, H, D, dtype, kv_heads=kv_heads)


def test_same_bits_over_100_runs():
    plan = compile_plan(libero(4, 64, frames=34), device="cuda")
    inputs = make_inputs(plan, 1, 4, 128, torch.bfloat16, "cuda")
    first = run(plan, inputs, "cuda")
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(run(plan, inputs, "cuda"), first, strict=True))


def test_captured_in_a_cuda_graph():
    """The work counter is cleared at every replay."""
    plan = compile_plan(libero(4, 8, frames=12), device="cuda")
    q, k, v, *_ = make_inputs(plan, 1, 4, 128, torch.bfloat16, "cuda")
    expected = block_attention(q, k, v, plan, impl="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_attention(q, k, v, plan, impl="cuda")
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(out, expected, atol=0, rtol=0)


def test_compiles_whole_once_the_boxes_are_there():
    plan = compile_plan(libero(4, 8, frames=12), device="cuda")
    q, k, v, *_ = make_inputs(plan, 1, 4, 64, torch.bfloat16, "cuda")
    assert plan.boxes is not None

    @torch.compile(fullgraph=True)
    def step(q, k, v, plan):
        return block_attention(q, k, v, plan, impl="cuda").float().sin()

    torch.testing.assert_close(step(q, k, v, plan), block_attention(q, k, v, plan, impl="cuda").float().sin())
