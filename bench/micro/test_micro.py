"""Every op once on one CPU thread, small enough to repeat often: `make bench` compares it with a saved baseline.

The baseline is of one machine; ``test_yardstick`` (a plain matrix product and a copy) says how this machine compares
with that one, and so how far the other ratios can be believed. Save a new one with
``pytest bench/micro --benchmark-storage=bench/micro/baseline --benchmark-save=cpu``.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.workloads import attention as workloads
from wam_kernels import (
    FrameIndex,
    ada_layer_norm,
    block_attention,
    gate_residual_ada_layer_norm,
    qk_norm_rope,
    rope_table,
    varlen_attention,
)
from wam_kernels.cached_attention import cached_attention
from wam_kernels.frame_index import forget_frame_indices
from wam_models import RolloutConfig, RolloutEngine, StepConfig, WorldActionModel, demo_config, training_step

WORK = workloads.packed(1000, heads=4, head_dim=64)
TOKENS, WIDTH, HEADS = 288, 768, 6


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("what", ["product", "copy"])
def test_yardstick(benchmark, what):
    a = randn(512, 512)
    b = torch.empty_like(a)
    benchmark((lambda: a @ a) if what == "product" else (lambda: b.copy_(a)))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_block_attention(benchmark, backward):
    q, k, v, dout = WORK.inputs("cpu", torch.float32, 0)
    leaves, plan = [t.requires_grad_(backward) for t in (q, k, v)], WORK.plan("cpu")

    def call():
        out = block_attention(q, k, v, plan)
        return torch.autograd.grad(out, leaves, dout) if backward else out

    benchmark(call)


def test_varlen_attention(benchmark):
    q, k, v = (randn(300, heads, 64) for heads in (HEADS, 2, 2))
    q_ranges, k_ranges = [(0, 100), (100, 300), (100, 300)], [(0, 100), (0, 40), (100, 300)]
    benchmark(lambda: varlen_attention(q, k, v, q_ranges, k_ranges))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("fused", [False, True], ids=["ada_layer_norm", "gate_residual_ada_layer_norm"])
def test_norms(benchmark, fused, backward):
    index = FrameIndex.from_runs([32] * (TOKENS // 32))
    x, y, dout = (randn(1, TOKENS, WIDTH, seed=i).requires_grad_(backward) for i in range(3))
    gate, shift, scale = (randn(1, index.frames, WIDTH, seed=i).requires_grad_(backward) for i in range(3))

    def call():
        outs: Any
        if fused:
            outs = gate_residual_ada_layer_norm(x, y, gate, shift, scale, index)
        else:
            outs = (ada_layer_norm(x, shift, scale, index),)
        if not backward:
            return outs
        given = (x, y, gate, shift, scale) if fused else (x, shift, scale)
        return torch.autograd.grad(outs, given, [dout.detach()] * len(outs))

    benchmark(call)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_qk_norm_rope(benchmark, backward):
    q, k = (randn(1, TOKENS, WIDTH, seed=i).requires_grad_(backward) for i in range(2))
    weight_q, weight_k = ((1 + 0.1 * randn(WIDTH, seed=i)).requires_grad_(backward) for i in range(2))
    table = rope_table(60 * torch.rand(TOKENS, 3, dtype=torch.float64), WIDTH // HEADS)
    douts = [randn(1, TOKENS, HEADS, WIDTH // HEADS, seed=i) for i in range(2)]

    def call():
        outs = qk_norm_rope(q, k, weight_q, weight_k, table, head_dim=WIDTH // HEADS)
        return torch.autograd.grad(outs, (q, k, weight_q, weight_k), douts) if backward else outs

    benchmark(call)


def test_cached_attention(benchmark):
    q, k, v = randn(1, 144, HEADS, 128), randn(1, 2304, HEADS, 128), randn(1, 2304, HEADS, 128)
    ranges = torch.tensor([[[[0, 2160], [2160, 2304]]]], dtype=torch.int32)
    benchmark(lambda: cached_attention(q, k, v, ranges, group_rows=(144,)))


@pytest.mark.parametrize("tokens", [1_000, 100_000])
def test_plan_cold(benchmark, tokens):
    work = workloads.packed(tokens, heads=1, head_dim=64)
    benchmark(lambda: workloads.cold_plan(work, "cpu", "triton"))


@pytest.mark.parametrize("tokens", [1_000, 100_000])
def test_plan_cold_boxes(benchmark, tokens):
    work = workloads.packed(tokens, heads=1, head_dim=64)
    benchmark(lambda: workloads.cold_plan(work, "cpu", "cuda"))


def test_frame_index_cold(benchmark):
    def call():
        forget_frame_indices()
        return FrameIndex.from_runs([32] * 272)

    benchmark(call)


def small_model() -> WorldActionModel:
    torch.manual_seed(0)
    return WorldActionModel(replace(demo_config(), layers=1))


def test_training_step(benchmark):
    model = small_model()
    c = model.config
    batch = {
        "video": randn(1, c.latent_channels, 5, 8, 16),
        "action": randn(1, 5, c.actions_per_frame, c.action_dim),
        "text": randn(1, 8, c.text_dim),
    }
    config = StepConfig(program="joint", chunk_sizes=(2, 2), windows=(8, 8))

    def call():
        loss, _ = training_step(model, batch, torch.Generator().manual_seed(0), config)
        loss.backward()

    benchmark(call)


def test_denoising_step(benchmark):
    model = small_model().eval()
    c = model.config
    engine = RolloutEngine(model, RolloutConfig(program="joint", chunk_size=4, window=16, steps=1))
    episode = engine.start(randn(1, c.latent_channels, 1, 8, 16), randn(1, 8, c.text_dim))
    episode.observe(randn(1, c.latent_channels, 4, 8, 16), randn(1, 4, c.actions_per_frame, c.action_dim))
    benchmark(lambda: episode.propose(generator=torch.Generator().manual_seed(0)))
