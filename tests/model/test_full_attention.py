"""Models whose observed frame and context attend to the noisy tokens of their chunk (Motus, UWM, PAD)."""

from dataclasses import replace

import pytest
import torch

from wam_kernels import compile_plan
from wam_models import RolloutConfig, RolloutEngine
from wam_models.objectives import GJD, OBJECTIVES, sample_for, told_frames
from wam_models.train.samples import StepConfig
from wam_models.train.step import training_step

from .test_streams import (
    CONTEXT,
    GRID,
    PARALLEL,
    REGISTERS,
    SMALL,
    STATE_TOKENS,
    STATES,
    TOKENS,
    VIDEO_ONLY,
    B,
    C,
    context_tokens,
    features,
    made,
    randn,
)

MODELS = {
    name: replace(config, full_attention=True)
    for name, config in {
        "two_experts": SMALL,
        "parallel_stream": replace(PARALLEL, context=(REGISTERS,)),
        "video_only": VIDEO_ONLY,
        "context": CONTEXT,
        "states": STATES,
        "state tokens": STATE_TOKENS,
        "modes": replace(SMALL, mode_token=True),
    }.items()
}  # fmt: skip
SIZE = 2
FRAMES = 1 + SIZE


def rollout(**changes) -> RolloutConfig:
    return RolloutConfig(**{"program": GJD, "chunk_size": SIZE, "steps": 1, "cache": "last_frame"} | changes)


def packed(config, model, video, action, text, state, objective="joint", start=0):
    """One step from noise of one forward over the observed frame and the chunk."""
    o, frames = OBJECTIVES[objective], torch.ones(B, FRAMES, dtype=torch.float64)
    plan = compile_plan(
        sample_for(
            GJD,
            o,
            frames=FRAMES,
            video_tokens=TOKENS,
            action_tokens=2 * config.has_actions,
            chunk_size=SIZE,
            window=4,
            context=context_tokens(config),
            full_attention=True,
            state_tokens=config.state_tokens,
        )  # fmt: skip
    )
    level = 1000 * frames * o.video
    level[:, 0] = 0
    of_actions = (action, None, 1000 * frames * o.action) if config.has_actions else (None, None, None)
    modes = torch.full((B,), list(OBJECTIVES).index(objective)) if config.mode_token else None
    flows = model(
        video, None, *of_actions[:2], level, of_actions[2], text * (not o.conditional), plan, context=features(config),
        state=None if state is None else state[:, told_frames(FRAMES, SIZE, config.state_tokens)], modes=modes,
        frame_start=start,
    )  # fmt: skip
    found = {"video": video[:, :, 1:] - flows[0][:, :, 1:] * o.video}
    if config.has_actions:
        found["action"] = action[:, 1:] - flows[1][:, 1:] * o.action
    return found


@pytest.mark.parametrize("name", MODELS)
def test_streaming_equals_one_packed_forward_of_each_chunk(name):
    config = MODELS[name]
    model = made(config).requires_grad_(False)
    text, states = randn(B, 3, 8, seed=1), randn(B, 5, config.state_dim, seed=4) if config.state_dim else None
    last = randn(B, C, 1, *GRID)
    episode = RolloutEngine(model, rollout()).start(
        last, text, context=features(config), state=None if states is None else states[:, :1]
    )
    assert episode.cache is None
    for i in range(2):
        noise = {"video": randn(B, C, SIZE, *GRID, seed=10 + i)}
        action = None
        if config.has_actions:
            noise["action"] = randn(B, SIZE, 2, 7, seed=20 + i)
            action = torch.cat([randn(B, 1, 2, 7, seed=30), noise["action"]], 1)  # of frame 0: nobody reads them
        candidate = episode.propose(**{f"{stream}_noise": t for stream, t in noise.items()})
        state = None if states is None else states[:, SIZE * i :]
        wanted = packed(config, model, torch.cat([last, noise["video"]], 2), action, text, state, start=SIZE * i)
        for stream, t in wanted.items():
            torch.testing.assert_close(getattr(candidate, stream), t, rtol=1e-10, atol=1e-10)
        reached = None if states is None else states[:, 1 + SIZE * i : 1 + SIZE * (i + 1)]
        episode.observe(candidate.video, candidate.action, state=reached)
        last = candidate.video[:, :, -1:]


@pytest.mark.parametrize("objective", ["forward_dynamics", "inverse_dynamics"])
def test_a_stream_that_is_given_is_a_clean_chunk(objective):
    """As t = 0 gives a stream in UWM: the whole chunk of it, at timestep 0."""
    config = MODELS["modes"]
    model = made(config).requires_grad_(False)
    last, text, chunk = randn(B, C, 1, *GRID), randn(B, 3, 8, seed=1), randn(B, C, SIZE, *GRID, seed=2)
    action = randn(B, FRAMES, 2, 7, seed=3)
    episode = RolloutEngine(model, rollout()).start(last, text, objective=objective)
    video = objective == "forward_dynamics"
    given = {"video_noise": chunk, "clean_action": action[:, 1:]} if video else {
        "clean_video": chunk, "action_noise": action[:, 1:]
    }  # fmt: skip
    candidate = episode.propose(**given)
    wanted = packed(config, model, torch.cat([last, chunk], 2), action, text, None, objective)
    for stream, t in wanted.items():
        torch.testing.assert_close(getattr(candidate, stream), t, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("changes", [{"guidance": 3.0}, {}, {"video": {"steps": 5}, "action": {"steps": 2}}])
def test_candidates_are_proposals_one_after_the_other(changes):
    config = MODELS["context"]
    model = made(config).requires_grad_(False)
    engine = RolloutEngine(model, rollout(steps=2, candidates=3, **changes))
    episode = engine.start(randn(B, C, 1, *GRID), randn(B, 3, 8, seed=1), context=features(config))
    episode.accept(episode.propose(generator=torch.Generator().manual_seed(0)))
    many = episode.propose_many(generator=torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(1)
    for candidate in many:
        one = episode.propose(generator=draw)
        torch.testing.assert_close(candidate.video, one.video, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(candidate.action, one.action, rtol=1e-10, atol=1e-10)


def test_what_is_told_anew_is_what_the_next_chunk_attends_to():
    """Another context, another frame, a fork that is taken back: as an episode that began with them."""
    config = MODELS["context"]
    engine = RolloutEngine(made(config).requires_grad_(False), rollout())
    first, second, text = randn(B, C, 1, *GRID), randn(B, C, 1, *GRID, seed=8), randn(B, 3, 8, seed=1)
    other = {"understanding": randn(B, 4, 10, seed=9)}
    episode = engine.start(first, text, context=features(config))
    noise = {"video_noise": randn(B, C, SIZE, *GRID, seed=10), "action_noise": randn(B, SIZE, 2, 7, seed=11)}
    before = episode.propose(**noise)
    with episode.fork():
        episode.accept(before)
        ahead = episode.propose(**noise)
    assert not torch.equal(ahead.video, before.video) and torch.equal(episode.propose(**noise).video, before.video)
    episode.set_context(other)
    fresh = engine.start(first, text, context=other).propose(**noise)
    assert torch.equal(episode.propose(**noise).video, fresh.video) and not torch.equal(fresh.video, before.video)
    episode.restart([1], second[1:], text[1:], context={"understanding": other["understanding"][1:]})
    anew = episode.propose(**noise).video
    assert torch.equal(anew[0], fresh.video[0])
    again = engine.start(second, text, context=other).propose(**noise).video
    assert torch.equal(anew[1], again[1]) and not torch.equal(anew[1], fresh.video[1])


@pytest.mark.parametrize("noised,marginal", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_a_training_step_gives_the_observed_frame(noised, marginal):
    """It is a frame of the one copy: clean at timestep 0, or noised as a history may be; no action of it is a key."""
    model = made(MODELS["two_experts"])
    batch = {"video": randn(B, C, FRAMES, *GRID), "action": randn(B, FRAMES, 2, 7), "text": randn(B, 3, 8)}
    config = StepConfig(
        program="joint", chunk_sizes=(SIZE, SIZE), noised_history=noised, video_marginal=marginal, action_weight=1.0
    )
    calls = []
    hook = model.register_forward_pre_hook(lambda module, args: calls.append(args))
    loss, metrics = training_step(model, batch, torch.Generator().manual_seed(0), config)
    hook.remove()
    ((video, clean_video, _, clean_action, level, _, _, plan),) = calls
    level = level.tensors[0]
    assert clean_video is None and clean_action is None and plan.length == FRAMES * (TOKENS + 2)
    keys = FRAMES * (TOKENS + 2) - 2
    assert metrics["visible_pairs"] == B * plan.length * keys
    assert (level[:, 0] > 0).all() == bool(noised) and (level[:, 1:] > 0).all()
    assert torch.equal(video[:, :, 0], batch["video"][:, :, 0]) == (not noised)
    assert (level[:, 1:] == 1000).all() == bool(marginal) and metrics["video_samples"] == B * (1 - marginal)
    assert (metrics["action_samples"] == B) and loss.isfinite()


def test_refusals_name_the_field():
    config = MODELS["two_experts"]
    model, first, text = made(config), randn(B, C, 1, *GRID), randn(B, 3, 8, seed=1)
    for changes, message in (
        ({"cache": "persistent"}, "cache must be 'last_frame' for a model with full_attention"),
        ({"program": "video_then_action"}, "program must be one in which noisy .* got 'video_then_action'"),
        ({"reuse_keys": True}, "reuse_keys must be False for a model with full_attention"),
    ):
        with pytest.raises(ValueError, match=message):
            RolloutEngine(model, rollout(**changes)).start(first, text)
    levels = torch.zeros(B, FRAMES, dtype=torch.float64)
    video, action = randn(B, C, FRAMES, *GRID), randn(B, FRAMES, 2, 7)
    with pytest.raises(ValueError, match="clean_video must be None for a model with full_attention"):
        model(video, video, action, action, levels, levels, text, attend=lambda *_: None)
    with pytest.raises(ValueError, match=r"frames must be 1 \+ chunk_size .* got frames=5 and chunk_size=2"):
        sample_for(
            GJD, OBJECTIVES["joint"], frames=5, video_tokens=1, action_tokens=1, chunk_size=2, window=4,
            full_attention=True,
        )  # fmt: skip
