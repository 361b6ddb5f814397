"""The rollout on a GPU: CUDA graphs, captured once, give what the eager passes give."""

import pytest
import torch

from wam_models import GJD, MODEL_PROGRAMS, ModelConfig, RolloutConfig, RolloutEngine, WorldActionModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CONFIG = ModelConfig(
    hidden=256, heads=4, head_dim=64, layers=2, ffn=512, action_hidden=128, action_ffn=256, action_dim=7,
    actions_per_frame=4, text_dim=32,
)  # fmt: skip
B, GRID = 2, (4, 16)


def model(dtype):
    torch.manual_seed(0)
    made = WorldActionModel(CONFIG).to("cuda", dtype).eval().requires_grad_(False)
    for name, p in made.named_parameters():
        if "proj_out" in name:
            p.normal_(std=0.1)
    return made


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def frames(count, seed):
    return randn(B, 48, count, *GRID, seed=seed), randn(B, count, 4, 7, seed=seed + 100)


def play(made, program, **config):
    """Chunks of an episode past eviction, with replaced predictions, partial execution and a restart."""
    engine = RolloutEngine(made, RolloutConfig(program=program, chunk_size=2, window=4, steps=3, lookahead=2, **config))
    episode = engine.start(frames(1, 0)[0], randn(B, 5, 32, seed=1))
    out = []
    for i in range(7):
        candidate = episode.propose(generator=torch.Generator().manual_seed(i))
        out += [candidate.video, candidate.action]
        episode.accept(candidate)
        if i % 2:
            episode.observe(*frames(2, 10 + i), frames=[2, 1])
        if i == 4:
            episode.restart([1], frames(1, 50)[0][:1], randn(1, 5, 32, seed=51))
    return episode, out


@pytest.mark.parametrize("config", [{}, {"guidance": 2.0}, {"cache": "recomputed"}], ids=str)
@pytest.mark.parametrize("program", [p for p, row in MODEL_PROGRAMS.items() if row.has_rollout and p != GJD])
def test_graphs_equal_eager_passes(program, config):
    made = model(torch.bfloat16)
    episode, graphed = play(made, program, **config)
    assert len(episode.solver.chunks) == 1  # one graph for all chunks
    _, eager = play(made, program, cuda_graphs=False, **config)
    for a, b in zip(graphed, eager, strict=True):
        assert torch.equal(a, b)


def test_float32_equals_the_cpu():
    made = model(torch.float32)
    _, got = play(made, "video_then_action")
    _, want = play(made.cpu(), "video_then_action")
    for a, b in zip(got, want, strict=True):
        assert ((a.cpu() - b).norm() / b.norm()).item() < 1e-3  # TF32 stays off by default


def test_memory_is_flat_and_replays_do_not_wait():
    made = model(torch.bfloat16)
    engine = RolloutEngine(made, RolloutConfig(program="joint", chunk_size=2, window=8, steps=3))
    episode = engine.start(frames(1, 0)[0], randn(B, 5, 32, seed=1))
    noise = {"video_noise": frames(2, 3)[0].cuda(), "action_noise": frames(2, 3)[1].cuda()}
    held = []
    for i in range(60):
        if i == 20:
            torch.cuda.set_sync_debug_mode("error")  # whatever waits for the device now raises
        episode.accept(episode.propose(**noise))
        held.append(torch.cuda.memory_allocated())
    torch.cuda.set_sync_debug_mode("default")
    assert len(set(held[20:])) == 1


@pytest.fixture(autouse=True)
def _no_debug_mode_left():
    yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
