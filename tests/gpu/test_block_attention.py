"""block_attention on a GPU: the Triton kernels as compiled, at the sizes that matter."""

import pytest
import torch

from tests.block_attention.checks import (
    blind_plan,
    check_against_reference,
    frozen_plan,
    make_inputs,
    ragged_plan,
    rectangular_plan,
    run,
    stopped_plan,
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
        pytest.param(blind_plan, 1, 2, 64, torch.bfloat16, id="fully-masked-rows"),
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
        pytest.param(stopped_plan, 2, 4, 2, 128, torch.bfloat16, id="stop-gradient"),
        pytest.param(frozen_plan, 2, 4, 2, 64, torch.bfloat16, id="frozen-streams"),
    ],
)
def test_grouped_query_heads_and_rectangular_plans(make_plan, B, H, kv_heads, D, dtype):
    plan = make_plan().to("cuda")
    check_against_reference(plan, make_inputs(plan, B, H, D, dtype, "cuda", kv_heads), "triton")


def test_longer_than_int32():
    # 2**31 numbers of output: offsets must not wrap; a batch stride of 0 keeps the inputs small
    plan = compile_plan(libero(4, 64), device="cuda")
    q, k, v, *_ = make_inputs(plan, 1, 8, 128, torch.bfloat16, "cuda")
    expected = block_attention(q, k, v, plan, impl="triton")
    B = 2**31 // expected.numel() + 2
    got = block_attention(*(t.expand(B, -1, -1, -1) for t in (q, k, v)), plan, impl="triton")
    assert got.numel() > 2**31 and torch.equal(got[-1], expected[0]) and torch.equal(got[0], expected[0])


def test_tokens_further_apart_than_int32():
    # the last token of a sample stands more than 2**31 numbers after its first
    plan = compile_plan(libero(4, 8, frames=12), device="cuda")
    inputs = make_inputs(plan, 1, 2, 64, torch.bfloat16, "cuda")
    S = plan.length
    buffer = torch.zeros(1, S, 2**31 // S // 128 + 2, 128, dtype=torch.bfloat16, device="cuda")
    far = []
    for i, t in zip((0, 1, -2, -1), inputs[:4], strict=True):
        buffer[:, :, i] = t.flatten(2)
        far.append(buffer[:, :, i].unflatten(-1, (2, 64)))
    assert buffer.numel() > 2**31
    for a, b in zip(run(plan, [*far, inputs[4]], "triton"), run(plan, inputs, "triton"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("D", [64, 72])
def test_unaligned_tokens(D):
    # slices at odd places of rows of odd length: no 16-byte access is legal
    plan = compile_plan(small(), device="cuda")
    inputs = make_inputs(plan, 2, 3, D, torch.bfloat16, "cuda")
    odd = [torch.cat((t.flatten(2)[..., :1], t.flatten(2)), -1)[..., 1:].unflatten(-1, (3, D)) for t in inputs[:4]]
    assert all(t.stride(1) % 2 and t.storage_offset() % 2 for t in odd)
    for a, b in zip(run(plan, [*odd, inputs[4]], "triton"), run(plan, inputs, "triton"), strict=True):
        torch.testing.assert_close(a, b)


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
