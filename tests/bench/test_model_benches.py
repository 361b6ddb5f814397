"""The checks that stand before the model benchmarks' speeds: they pass, and they fail where they should."""

from dataclasses import replace

import pytest
import torch

from bench.harness import require_equal
from bench.suites import rollout, train_step
from bench.workloads.models import make_model
from bench.workloads.rollout import (
    accepted_history,
    make_episode,
    noise_for,
    packed_chunk,
    require_equal_chunks,
    with_compiled_blocks,
)
from wam_kernels import PROGRAMS
from wam_models import RolloutConfig, golden_config
from wam_models.objectives import OBJECTIVES
from wam_models.rollout.config import CACHES
from wam_models.rollout.stages import stages

SMALL = replace(golden_config(), text_dim=8, freq_dim=16)
GRID = (2, 4)


@pytest.fixture(scope="module")
def model():
    return make_model(SMALL, "cpu", torch.float32, 0).eval().requires_grad_(False)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("program", [p for p, row in PROGRAMS.items() if row.has_rollout])
def test_a_chunk_equals_the_packed_forward(program, cache, model):
    config = RolloutConfig(program=program, history="video_only", window=8, steps=2, chunk_size=2, cache=cache)
    require_equal_chunks(model, config, GRID, 0, 1e-4)


@pytest.mark.slow
def test_the_providers_under_torch_compile_give_the_same_chunk(model):
    """``wam_compiled`` and ``packed_compiled`` as they run on a GPU, but for Inductor."""
    config = RolloutConfig(program="joint", history="video_only", window=8, steps=1, chunk_size=2)
    compiled = with_compiled_blocks(model, "aot_eager")
    weights = {t.data_ptr() for t in model.parameters()}
    assert {t.data_ptr() for t in compiled.parameters()} == weights and not any(
        block._compiled_call_impl for block in model.packed_block_stack.packed_blocks
    )
    require_equal_chunks(compiled, config, GRID, 0, 1e-4)
    episode, text = make_episode(model, config, GRID, 4, 0)
    rest = config, accepted_history(episode), episode.next_frame[0], text, noise_for(episode, GRID, 0)
    chunks = (packed_chunk(m, *rest) for m in (torch.compile(model, backend="aot_eager"), model))
    for a, b in zip(*chunks, strict=True):
        require_equal("the chunk under torch.compile", a, b, 1e-5)


def test_another_history_is_noticed(model):
    config = RolloutConfig(program="joint", history="video_only", window=8, steps=2, chunk_size=2)
    episode, text = make_episode(model, config, GRID, 4, 0)
    noise = noise_for(episode, GRID, 0)
    got = episode.propose(**noise)
    video, action = accepted_history(episode)
    expected = packed_chunk(model, config, (video.flip(2), action), episode.next_frame[0], text, noise)
    with pytest.raises(RuntimeError, match="is wrong"):
        require_equal("video", got.video, expected[0], 1e-4)


def test_roofline_counts_each_weight_once_a_step(model):
    limits = {"copy_GB/s": 1.0, "bf16_GFLOP/s": 1.0, "float32_GFLOP/s": 1.0}
    config = RolloutConfig(program="joint", steps=3, chunk_size=2)
    roofline = rollout.roofline(model, config, GRID, limits)
    c = SMALL
    video = c.hidden * c.inner * 4 + 2 * c.hidden * c.inner + 2 * c.hidden * c.ffn  # attn1, attn2 q and out, FFN
    action = c.action_hidden * c.inner * 6 + 2 * c.action_hidden * c.action_ffn
    assert roofline.weights_ms == pytest.approx(3 * c.layers * (video + action) * 4 / 1e6)
    rows = 2 * GRID[0] * GRID[1] // 4, 2 * c.actions_per_frame
    assert roofline.products_ms == pytest.approx(3 * 2 * c.layers * (video * rows[0] + action * rows[1]) / 1e6)
    ordered = replace(config, program="video_then_action")
    assert len(stages(ordered.program, OBJECTIVES["joint"], "both")) == 2
    assert rollout.roofline(model, ordered, GRID, limits) == roofline  # each expert runs in one of two stages


def test_the_training_check_passes_and_notices(monkeypatch):
    monkeypatch.setattr(train_step, "ROWS", GRID[0])
    monkeypatch.setattr(train_step, "COLUMNS", GRID[1])
    batch = train_step.make_batch(SMALL, 1, 5, 3, "cpu", 0)
    train_step.check(SMALL, batch, "cpu", torch.float32, 0)
    loss_of = train_step.loss_of
    monkeypatch.setattr(train_step, "loss_of", lambda m, b, s, impl: loss_of(m, b, s, impl) * (1 if impl else 1.001))
    with pytest.raises(RuntimeError, match="loss of wam is wrong"):
        train_step.check(SMALL, batch, "cpu", torch.float32, 0)


def test_attention_flops_are_those_of_the_plan():
    config = golden_config()
    two = train_step.attention_flops(config, 2, 8)
    assert two == 2 * train_step.attention_flops(config, 1, 8) > 0
