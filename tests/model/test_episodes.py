"""Episodes as objects: copies and branches, calls in any grad mode, and numbers that are not finite."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from wam_models import RolloutConfig, RolloutEngine, training_step
from wam_models.rollout import episode as episode_module
from wam_models.rollout import requests

from .test_rollout import GRID, B, C, noises, poisoned, randn, real, small_model, started  # noqa: F401
from .test_training import batch, generator
from .test_wrappers import CONFIG, mesh  # noqa: F401

NAN = float("nan")


def equal(a, b):
    return torch.equal(a.video, b.video) and torch.equal(a.action, b.action)


def reloaded(episode):
    return pickle.loads(pickle.dumps(episode))


# ---- copies ----


@pytest.mark.parametrize(
    "again,options", [(copy.deepcopy, {}), (reloaded, {"cache": "recomputed", "guidance": 2.0})], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_like_the_original_and_apart_from_it(again, options):
    episode, twin = (started("video_then_action", torch.float32, **options) for _ in range(2))
    for e in (episode, twin):
        e.accept(e.propose(**noises(2, 0, torch.float32)))
    before = episode.propose(**noises(2, 1, torch.float32))
    branch = again(episode)
    assert (branch.model is episode.model) == (again is copy.deepcopy)
    # the copy changes course; the original does not notice
    branch.accept(before)
    branch.observe(*real(2, 50, torch.float32))
    branch.restart([1], randn(1, C, 1, *GRID, seed=9, dtype=torch.float32), randn(1, 3, 8, seed=9, dtype=torch.float32))
    branch.propose(**noises(2, 3, torch.float32))
    twin.accept(twin.propose(**noises(2, 1, torch.float32)))
    episode.accept(before)
    for i in range(2, 4):
        for e in (episode, twin):
            e.observe(*real(2, 60 + i, torch.float32))
        assert equal(*(e.propose(**noises(2, i, torch.float32)) for e in (episode, twin)))
    # nor a copy the original
    branch = again(episode)
    episode.observe(*real(2, 70, torch.float32))
    assert equal(*(e.propose(**noises(2, 5, torch.float32)) for e in (branch, twin)))


def test_a_candidate_continues_every_copy_of_its_moment_and_no_other():
    episode = started("joint")
    candidates = [episode.propose(**noises(2, i)) for i in range(3)]
    branches = [copy.deepcopy(episode) for _ in candidates]
    for branch, candidate in zip(branches, candidates, strict=True):
        branch.accept(candidate)
        assert torch.equal(branch.accepted()[1][-2:], candidate.action[0])
    for other in (episode, branches[1], copy.deepcopy(branches[1])):
        with pytest.raises(ValueError, match="candidate must continue the episode as it is now"):
            other.accept(branches[0].propose(**noises(2, 4)))
    again = pickle.loads(pickle.dumps(candidates[2]))
    episode.accept(replace(again, action=again.action.clamp(-1, 1)))
    with pytest.raises(ValueError, match="accept: candidate.action must have shape"):
        branches[0].accept(replace(branches[0].propose(**noises(2, 5)), action=again.action[:, :1]))


def test_what_a_copy_shares():
    episode = started("joint")
    with pytest.raises(TypeError, match="use copy.deepcopy"):
        copy.copy(episode)
    model, branch = copy.deepcopy((episode.model, episode))
    assert branch.model is model and model is not episode.model


def test_models_that_an_engine_cannot_run(mesh):  # noqa: F811
    model = small_model(torch.float32)
    with pytest.raises(TypeError, match="must be a WorldActionModel, got DataParallel; give its .module"):
        RolloutEngine(torch.nn.DataParallel(model), RolloutConfig())
    with pytest.raises(ValueError, match="must not be sharded"):
        RolloutEngine(fully_shard(model, mesh=mesh), RolloutConfig())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_model_that_was_cast_goes_on_with_no_episode(dtype):
    episode = started("joint", torch.float32)
    candidate, observed = episode.propose(**noises(2, 0, torch.float32)), real(2, 50, torch.float32)
    start = randn(1, C, 1, *GRID, dtype=torch.float32), randn(1, 3, 8, dtype=torch.float32)
    episode.model.to(dtype)
    calls = {
        "propose": episode.propose,
        "accept": lambda: episode.accept(candidate),
        "observe": lambda: episode.observe(*observed),
        "restart": lambda: episode.restart([0], *start),
    }
    for name, call in calls.items():
        with pytest.raises(
            ValueError, match=f"{name}: model must be torch.float32 on cpu.*got {dtype} on cpu; start an"
        ):
            call()
    episode.model.float()
    episode.accept(candidate)
    episode.observe(*observed)


# ---- modes ----


@pytest.mark.parametrize(
    "first,later",
    [
        (torch.inference_mode, torch.enable_grad),
        (torch.inference_mode, torch.no_grad),
        (torch.enable_grad, torch.inference_mode),
    ],
)
def test_an_episode_goes_on_in_any_mode(first, later):
    """Each call in another mode than the one before; then a training step, on what the episode gave."""
    made = [started("video_then_action", torch.float32, cache="recomputed")]
    with first():
        made.append(started("video_then_action", torch.float32, cache="recomputed"))
    results = []
    for episode, modes in zip(made, ((torch.no_grad, torch.no_grad), (later, first)), strict=True):
        with modes[0]():
            episode.accept(episode.propose(**noises(2, 0, torch.float32)))
        with modes[1]():
            episode.observe(*real(2, 40, torch.float32))
            proposed = episode.propose(**noises(2, 1, torch.float32))
        with modes[0]():
            episode.restart([1], *(randn(1, *s, seed=9, dtype=torch.float32) for s in ((C, 1, *GRID), (3, 8))))
            results.append((proposed, episode.propose(**noises(2, 2, torch.float32)), episode.accepted()[0]))
    assert all(equal(a, b) for a, b in zip(results[0][:2], results[1][:2], strict=True))
    weight = torch.ones(7, requires_grad=True)
    (results[1][1].action * weight).sum().backward()
    training_step(small_model(torch.float32).requires_grad_(), batch(), generator(), CONFIG)[0].backward()


def test_a_copy_made_in_inference_mode_goes_on_outside_of_it():
    episode = started("joint", torch.float32)
    stored = pickle.dumps(episode)
    with torch.inference_mode():
        copies = copy.deepcopy(episode), pickle.loads(stored)
    for e in (episode, *copies):
        e.accept(e.propose(**noises(2, 0, torch.float32)))
    assert all(torch.equal(e.accepted()[0], episode.accepted()[0]) for e in copies)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_neither_a_rollout_nor_a_step(dtype):
    episode, model, data = started("joint", torch.float32), small_model(torch.float32), batch()
    want = episode.propose(generator=generator()), training_step(model, data, generator())[0]
    started_with = randn(B, C, 1, *GRID, dtype=torch.float32), randn(B, 3, 8, seed=1, dtype=torch.float32)
    torch.set_default_dtype(dtype)
    try:
        got = RolloutEngine(episode.model, episode.config).start(*started_with).propose(generator=generator())
        assert equal(got, want[0]) and torch.equal(training_step(model, data, generator())[0], want[1])
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_rollout_computes_in_the_models_dtype_under_autocast():
    want = started("joint", torch.float32).propose(**noises(2, 0, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(started("joint", torch.float32).propose(**noises(2, 0, torch.float32)), want)


@pytest.mark.parametrize("program", ["joint", "action_then_video"])
def test_compiled_blocks_roll_out_as_they_are(program):
    """Without a graph break: they write keys and values into the cache, in other slots for noisy and clean tokens."""
    plain, compiled = (started(program, torch.float32, steps=1) for _ in range(2))
    for block in compiled.model.packed_block_stack.packed_blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for i in range(2):
        candidates = [e.propose(**noises(2, i, torch.float32)) for e in (plain, compiled)]
        # in a graph small norms are not PyTorch's own ops
        for stream in ("video", "action"):
            a, b = (getattr(candidate, stream) for candidate in candidates)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        for e, candidate in zip((plain, compiled), candidates, strict=True):
            e.accept(candidate)


# ---- numbers that are not finite ----


def test_numbers_that_are_not_finite_are_refused_on_their_way_in_and_out():
    episode, twin = started("joint", torch.float32), started("joint", torch.float32)
    observation, text = randn(B, C, 1, *GRID, dtype=torch.float32), randn(B, 3, 8, dtype=torch.float32)
    engine = RolloutEngine(episode.model, episode.config)
    video, action = real(2, 3, torch.float32)
    noise, dynamics = noises(2, 0, torch.float32), started(objective="inverse_dynamics", dtype=torch.float32)

    def bad(tensor, value=NAN):
        tensor = tensor.clone()
        tensor[1, ..., -1] = value
        return tensor

    for call, name in (
        (lambda: engine.start(bad(observation), text), "observation"),
        (lambda: engine.start(observation, bad(text, -torch.inf)), "text"),
        (lambda: episode.observe(bad(video), action), "observe: video"),
        (lambda: episode.observe(video, bad(action, torch.inf)), "observe: action"),
        (lambda: episode.propose(**noise | {"action_noise": bad(noise["action_noise"])}), "propose: action_noise"),
        (lambda: dynamics.propose(clean_video=bad(video[:, :, :1]), generator=generator()), "propose: clean_video"),
        (lambda: episode.accept(replace(c := episode.propose(**noise), video=bad(c.video))), "accept: candidate.video"),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be finite, got NaN or infinity in samples \[1\]"):
            call()
    # frames that a robot does not bring may hold anything
    junk_video, junk_action = video.clone(), action.clone()
    junk_video[1, :, 1:] = junk_action[1, 1:] = NAN
    episode.observe(junk_video, junk_action, frames=[2, 1])
    twin.observe(video, action, frames=[2, 1])
    assert equal(episode.propose(**noise), twin.propose(**noise))
    episode.model.action_expert.action_proj_out.weight[0, 0] = NAN
    with pytest.raises(ValueError, match=r"propose: \w+ of the chunk at frames \[3, 2\] must be finite.*weights"):
        episode.propose(**noise)


@pytest.mark.parametrize("program,cache", [("joint", "persistent"), ("action_then_video", "recomputed")])
def test_what_is_not_finite_stays_in_its_rollout(program, cache, monkeypatch):
    """On a GPU nobody looks; the other robots of the batch do not notice."""
    for module in (episode_module, requests):
        monkeypatch.setattr(module, "check_finite", lambda *args, **options: None)
    episode, twin = (started(program, torch.float32, cache=cache, window=4) for _ in range(2))
    for i in range(5):
        a, b = (e.propose(**noises(2, i, torch.float32)) for e in (episode, twin))
        assert torch.equal(a.video[1], b.video[1]) and torch.equal(a.action[1], b.action[1])
        # two chunks of history are attended to, and without a recomputation what was computed from them too
        assert bool(a.action[0].isfinite().all()) == (i == 0 or (i > 2 and cache == "recomputed"))
        video, action = real(2, 40 + i, torch.float32)
        twin.observe(video, action)
        if i == 0:
            video[0] = NAN
        episode.observe(video, action)
    fresh = randn(1, C, 1, *GRID, seed=9, dtype=torch.float32), randn(1, 3, 8, seed=9, dtype=torch.float32)
    for e in (episode, twin):
        e.restart([0], *fresh)
    assert equal(*(e.propose(**noises(2, 9, torch.float32)) for e in (episode, twin)))
