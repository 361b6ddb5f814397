"""Schedules, solvers, candidates and forwards that are left out."""

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from wam_models import GJD, Schedule
from wam_models.rollout import best
from wam_models.rollout.schedule import trajectory

from .test_rollout import (
    ACTION,
    BOTH,
    ROLLED_OUT,
    VIDEO,
    assert_same,
    assert_unchanged,
    counted_rows,
    dense_chunk,
    noises,
    poisoned,  # noqa: F401
    randn,
    real,
    snapshot,
    started,
)

# ---- solvers ----


def field(x, sigma):
    """A flow that bends."""
    return torch.tanh(1.7 * x + sigma) * (1 + sigma) - 0.3 * x


def solved(path, x):
    state = [x, *[torch.full_like(x, torch.nan)] * path.kept]
    for level, update in zip(path.levels.double().tolist(), path.updates.tolist(), strict=False):
        before = [field(state[0], level), *state]
        state = [sum(w * t for w, t in zip(row, before, strict=True) if w) for row in update]
    return state[0]


def by_diffusers(solver, levels, forwards, x):
    """The same levels through diffusers' scheduler; ``levels`` end with 0."""
    steps, levels = len(levels) - 1, levels.double()
    if solver == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler()
    elif solver == "heun":
        scheduler = FlowMatchHeunDiscreteScheduler()
        levels = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
    else:
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2)
    scheduler.set_timesteps(steps)
    scheduler.sigmas, told = levels.clone(), levels[:-1].tolist()
    if solver == "unipc":
        scheduler.sigmas[0] = min(levels[0].item(), 1 - 1e-6)
    else:
        scheduler.timesteps = 1000 * levels[:-1]
    for level, t in list(zip(told, scheduler.timesteps, strict=True))[:forwards]:
        x = scheduler.step(field(x, level), t, x).prev_sample
    return x


@pytest.mark.parametrize("steps,shift,start", [(1, 1.0, 1.0), (2, 5.0, 1.0), (7, 3.0, 1.0), (4, 5.0, 0.6)])
@pytest.mark.parametrize("solver", ["euler", "heun", "unipc"])
def test_solvers_are_those_of_diffusers(solver, steps, shift, start):
    x = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    path = trajectory(Schedule(solver=solver, start=start), steps, shift)
    assert path.forwards == (2 * steps - 1 if solver == "heun" else steps) and path.end == 0
    levels = trajectory(Schedule(start=start), steps, shift).levels
    close = {"rtol": 0, "atol": 3e-6 if solver != "unipc" else 1e-12}  # theirs compute in float32, but for UniPC
    torch.testing.assert_close(solved(path, x), by_diffusers(solver, levels, None, x), **close)
    # to stop early is to leave out the last step of one more
    longer = trajectory(Schedule(start=start), steps + 1, shift).levels
    path = trajectory(Schedule(solver=solver, start=start, stop=longer[-2].item()), steps, shift)
    assert path.end == pytest.approx(longer[-2].item()) and path.forwards == (2 if solver == "heun" else 1) * steps
    torch.testing.assert_close(solved(path, x), by_diffusers(solver, longer, path.forwards, x), rtol=0, atol=2e-5)


def test_solvers_of_higher_order_are_nearer():
    x = torch.randn(1, 3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = solved(trajectory(Schedule(), 1000, 1.0), x)
    wrong = {s: (solved(trajectory(Schedule(solver=s), 8, 1.0), x) - truth).norm() for s in ("euler", "heun", "unipc")}
    assert wrong["heun"] < wrong["euler"] / 4 and wrong["unipc"] < wrong["euler"] / 2


# ---- any combination equals packed forwards ----


@st.composite
def schedules(draw, to_the_end=False):
    steps = draw(st.integers(int(to_the_end), 3))
    stop = 0.0 if to_the_end or not steps else draw(st.sampled_from((0.0, 0.3)))
    return Schedule(
        steps=steps, solver=draw(st.sampled_from(("euler", "heun", "unipc"))), start=draw(st.sampled_from((1.0, 0.7))),
        stop=stop, guidance=draw(st.sampled_from((None, 2.5))),
    )  # fmt: skip


def assert_dense(episode, found, noise, committed=None):
    """Each of these candidates is what packed forwards over what the episode holds give."""
    for n, candidate in zip(noise, found, strict=True):
        video, action = dense_chunk(episode, *n.values(), committed=committed)
        assert_same(candidate.action, action)
        if candidate.video is not None:
            assert_same(candidate.video, video)


@pytest.mark.parametrize("past", ["observed", "predicted", "late", "fork"])
@settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)  # fmt: skip
@given(data=st.data())
def test_any_schedules_equal_packed_forwards(past, data):
    """Every approximation off: a chunk and each of many candidates is what packed forwards over the window give.

    After observations alone, a prediction that is kept or that a late observation replaces, in a fork and after it.
    """
    program = data.draw(st.sampled_from([p for p in ROLLED_OUT if p != GJD]), "program")
    # what was not denoised to the end is no history
    config = {"video": data.draw(schedules(to_the_end=past != "observed"), "video")}
    config |= {"action": data.draw(schedules(to_the_end=True), "action")}
    config |= {"history": data.draw(st.sampled_from(("full", "video_only")), "history"), "chunk_size": 2}
    config |= {"cache": data.draw(st.sampled_from(("recomputed", "persistent")), "cache"), "lookahead": 2}
    # keys that are kept are those of packed forwards until they leave the window, and in whole chunks
    kept = config["cache"] == "persistent"
    config |= {"window": 8 if kept else data.draw(st.integers(2, 5), "window")}
    config |= {"interleave": data.draw(st.booleans(), "interleave")}
    config |= {f"{s}_shift": data.draw(st.sampled_from((5.0, 2.0)), f"{s} shift") for s in ("video", "action")}
    want = data.draw(st.sampled_from(("both", "action")), "want")
    count = data.draw(st.sampled_from((1, 2)), "candidates")
    episode = started(program, candidates=count, **config)
    episode.observe(*real(data.draw(st.sampled_from((2, 4) if kept else (1, 2, 3, 4)), "frames"), 3))
    before = episode.next_frame[0]
    ahead = episode.propose(**noises(2, 7))
    if past in ("predicted", "late"):
        episode.accept(ahead)
    if past == "late":
        video, action = real(2 if kept else data.draw(st.integers(1, 3), "late"), 8)
        episode.observe(video, action, first_frame=before)
        assert torch.equal(episode.accepted(0)[0][:, -video.shape[2] :], video[0])
        assert torch.equal(episode.accepted(0)[1][-video.shape[2] :], action[0])
    if past == "fork":
        with episode.fork():
            episode.accept(ahead)
            assert_dense(episode, [episode.propose(**noises(2, 6))], [noises(2, 6)])
    assert past in ("predicted", "late") or episode.next_frame[0] == before
    assert past == "predicted" or episode.next_frame == episode.observed
    noise = [noises(2, i) for i in range(count)]
    held = data.draw(st.integers(0, 4), "committed") if count == 1 else 0
    committed = real(2, 5)[1].flatten(1, 2)[:, :held] if held else None
    if count == 1:
        found = [episode.propose(want=want, committed=committed, **noise[0])]
    else:
        found = episode.propose_many(want=want, **{k: [n[k] for n in noise] for k in noise[0]})
    assert_dense(episode, found, noise, committed)
    for candidate in found:
        if held:
            assert torch.equal(candidate.action.flatten(1, 2)[:, :held], committed)
        if want == "both":
            assert (candidate.video is None) == (config["video"].steps == 0)
        if candidate.video is not None:
            assert candidate.video_level == pytest.approx(config["video"].stop)


def test_actions_that_are_committed():
    """As many as each rollout has; the others follow from them, and nothing else of the episode does."""
    episode = started("joint", chunk_size=2)
    free, committed = episode.propose(**noises(2, 0)), real(2, 5)[1].flatten(1, 2)
    junk = torch.cat([committed[:, :3], torch.full_like(committed[:, :1], torch.nan)], 1)
    found = episode.propose(**noises(2, 0), committed=junk, committed_tokens=[0, 3]).action.flatten(1, 2)
    assert torch.equal(found[1, :3], committed[1, :3])
    assert_same(found[0], free.action.flatten(1, 2)[0])
    assert (found[1, 3] - free.action.flatten(1, 2)[1, 3]).abs().max() > 1e-6
    assert_same(episode.propose(**noises(2, 0)).action, free.action)  # and the next proposal is free again
    every = episode.propose(**noises(2, 0), committed=committed)
    assert torch.equal(every.action.flatten(1, 2), committed)
    assert (every.video - free.video).abs().max() > 1e-6
    for wrong, message in (
        ({"committed": committed[:1]}, r"committed must be \[2, 1 to 4, 7\], got \[1, 4, 7\]"),
        ({"committed": committed[:, :0]}, "1 to 4"),
        ({"committed": committed[..., :2]}, "committed must be"),
        ({"committed": committed, "committed_tokens": 5}, "committed_tokens must be at most 4"),
        ({"committed": committed, "committed_tokens": [1]}, "a number or 2 of them"),
        ({"committed": torch.full_like(committed, torch.inf)}, "committed must be finite.* samples \\[0, 1\\]"),
        ({"committed_tokens": 1}, "committed_tokens must be None without committed"),
    ):
        with pytest.raises(ValueError, match=message):
            episode.propose(**noises(2, 0), **wrong)
    given = started(GJD, objective="forward_dynamics")
    with pytest.raises(ValueError, match="committed must be None where no actions are denoised"):
        given.propose(committed=committed, video_noise=noises(1, 0)["video_noise"], clean_action=real(1, 5)[1])


@pytest.mark.parametrize("program", ["joint", "video_noisy_to_action"])
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("video,action", [(2, 5), (5, 2)], ids=str)
def test_keys_that_are_used_again_are_those_of_the_last_forward(program, interleave, video, action):
    """Packed forwards in which a stream between its steps has the keys and values that it had, which changes nothing
    where it attends to itself alone; without, packed forwards at the same noise levels."""
    steps = {"video": Schedule(steps=video, solver="heun"), "action": Schedule(steps=action)}
    options = steps | {"cache": "recomputed", "interleave": interleave}
    exact, reused = (started(program, reuse_keys=r, **options) for r in (False, True))
    for e in (exact, reused):
        e.observe(*real(3, 3))
    noise = noises(2, 0)
    full, found = exact.propose(**noise), reused.propose(**noise)
    for episode, candidate in ((exact, full), (reused, found)):
        wanted_video, wanted_action = dense_chunk(episode, *noise.values())
        assert_same(candidate.video, wanted_video)
        assert_same(candidate.action, wanted_action)
    same = [torch.allclose(getattr(found, s), getattr(full, s), atol=1e-10) for s in ("video", "action")]
    assert all(same) == (program != "joint")
    again = reused.propose(full=True, **noise)
    assert_same(again.action, full.action)
    assert_same(again.video, full.video)


def test_a_forward_whose_keys_are_used_again_is_not_left_out():
    """Of 3 video steps and 4 of actions all run: the last of video leaves keys to the actions' own forward."""
    steps = {"video": Schedule(steps=3), "action": Schedule(steps=4), "reuse_flow": -1.0}
    episode = started("joint", interleave=True, reuse_keys=True, **steps)
    rows = counted_rows(episode.model)
    assert episode.propose(**noises(2, 0)).forwards == (4, 4) and rows == [BOTH, BOTH, BOTH, ACTION]


INTERLEAVE, REUSE = {"interleave": True}, {"reuse_keys": True}


@pytest.mark.parametrize(
    "program,video,action,want,options,expected",
    [
        # video is done first: what attends to it reads its keys where they are, unless it attends to what goes on
        ("video_noisy_to_action", 1, 3, "both", {}, [BOTH, BOTH, ACTION]),
        ("video_noisy_to_action", 0, 3, "action", {}, [BOTH, ACTION, ACTION]),
        ("joint", 1, 3, "both", {}, [BOTH, BOTH, BOTH]),
        ("joint", 1, 3, "both", REUSE, [BOTH, BOTH, ACTION]),
        ("joint", 0, 3, "action", REUSE, [BOTH, ACTION, ACTION]),
        ("action_noisy_to_video", 1, 3, "both", {}, [BOTH, ACTION, ACTION]),
        # actions are done first, and that is all that was asked for
        ("joint", 4, 2, "action", {}, [BOTH, BOTH]),
        ("video_then_action", 0, 2, "action", {}, [VIDEO, ACTION, ACTION]),
        ("decoupled_same_step", 4, 2, "action", {}, [ACTION, ACTION]),
        # interleaved: a step ends where the next one begins, so its keys need no second forward
        ("video_noisy_to_action", 2, 5, "both", INTERLEAVE, [BOTH, ACTION, BOTH, ACTION, ACTION]),
        ("joint", 2, 5, "both", INTERLEAVE, [BOTH] * 5),
        ("joint", 2, 5, "both", INTERLEAVE | REUSE, [BOTH, ACTION, BOTH, ACTION, ACTION]),
        ("joint", 4, 2, "both", INTERLEAVE | REUSE, [BOTH, VIDEO, BOTH, VIDEO]),
        ("joint", 4, 2, "action", INTERLEAVE | REUSE, [BOTH, VIDEO, BOTH]),
        ("joint", 0, 2, "action", INTERLEAVE | REUSE, [BOTH, ACTION]),
        ("video_then_action", 1, 2, "both", INTERLEAVE | REUSE, [VIDEO, VIDEO, ACTION, ACTION]),
    ],
)
def test_a_stream_that_takes_no_step_runs_where_it_must(program, video, action, want, options, expected):
    episode = started(program, video=Schedule(steps=video), action=Schedule(steps=action), **options)
    rows = counted_rows(episode.model)
    candidate = episode.propose(want=want, **noises(2, 0))
    clean = program == "video_then_action"  # one forward that makes the video clean
    assert rows == expected and candidate.forwards == (len(expected) - clean,) * 2


def test_what_was_not_denoised_to_the_end_is_no_history():
    stopped = started("joint", video=Schedule(stop=0.25))
    with pytest.raises(ValueError, match=r"candidate.video must be denoised to the end.*noise level 0.25"):
        stopped.accept(stopped.propose(**noises(2, 0)))
    left = started("joint", video=Schedule(steps=4))
    assert left.propose(want="action", **noises(2, 0)).video is None
    features = started("joint", video=Schedule(steps=0, start=0.5))
    with pytest.raises(ValueError, match="want must not ask for video alone where RolloutConfig.video.steps is 0"):
        features.propose(want="video", **noises(2, 0))
    for bad, message in (
        ({"action": Schedule(stop=0.5)}, "action must have stop=0"),
        ({"action": Schedule(steps=0)}, "action must have stop=0 and at least 1 step"),
        ({"video": {"solver": "rk4"}}, "solver must be one of"),
        ({"video": {"speed": 1}}, "unknown fields"),
        ({"video": 5}, "video must be a Schedule, got 5"),
        ({"video": {"start": 0.2, "stop": 0.3}}, "stop must be below start=0.2"),
        ({"video": {"steps": 0, "stop": 0.3}}, "stop must be 0 where no step is taken"),
        ({"reuse_flow": 2.0}, "reuse_flow must be a number from -1 to 1"),
        ({"reuse_chunk": 0.1, "candidates": 2}, "reuse_chunk must be None with candidates=2"),
        ({"candidates": 0}, "candidates must be a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            started("joint", **bad)


# ---- candidates ----


@pytest.mark.parametrize(
    "program,options",
    [("joint", {"guidance": 2.0}), ("joint", {"cache": "recomputed"}), ("action_then_video", {"guidance": 2.0})],
    ids=str,
)
def test_candidates_are_proposals_on_end_and_leave_no_trace(program, options):
    episode = started(program, torch.float32, candidates=3, **options)
    twin = started(program, torch.float32, **options)
    for e in (episode, twin):
        e.observe(*real(3, 3, torch.float32))
    episode.propose(**noises(2, 9, torch.float32))  # where the history is recomputed, it is now
    before = snapshot(episode)
    many = episode.propose_many(generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    for candidate in many:
        alone = twin.propose(generator=generator)
        for name in ("video", "action"):
            torch.testing.assert_close(getattr(candidate, name), getattr(alone, name), rtol=1e-4, atol=1e-5)
    assert_unchanged(episode, before)
    # the second rollout takes another than the first
    worth = iter([torch.tensor([0.0, 1.0]), torch.tensor([2.0, 0.0]), torch.tensor([1.0, 2.0])])
    chosen = best(many, lambda candidate: next(worth))
    assert torch.equal(chosen.video, torch.stack([many[1].video[0], many[2].video[1]]))
    assert torch.equal(chosen.action, torch.stack([many[1].action[0], many[2].action[1]]))
    twin = copy.deepcopy(episode)
    for e in (episode, twin):
        e.accept(chosen)
    again = (e.propose_many(generator=torch.Generator().manual_seed(6))[1] for e in (episode, twin))
    a, b = again
    assert torch.equal(a.video, b.video) and torch.equal(a.action, b.action)
    with pytest.raises(ValueError, match="video_noise must be 3 tensors"):
        episode.propose_many(video_noise=[noises(2, 0, torch.float32)["video_noise"]])
    with pytest.raises(ValueError, match="best: value must give 2 numbers, one for each rollout"):
        best(many, lambda candidate: torch.zeros(3))
    with pytest.raises(ValueError, match="best: candidates must continue one episode"):
        best([many[0], a], lambda candidate: torch.zeros(2))


def held_bytes(episode):
    """Of all tensors that an episode keeps, but for its model."""
    seen, found, todo = set(), {}, [vars(episode)]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or thing is episode.model or callable(thing) and not hasattr(thing, "__dict__"):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, list | tuple | set):
            todo += thing
        elif hasattr(thing, "__dict__") and type(thing).__module__.startswith("wam_"):
            todo.append(vars(thing))
    return sum(found.values())


@pytest.mark.parametrize("program", ["joint", "video_then_action"])
def test_sixteen_candidates_hold_sixteen_chunks_more(program):
    plain, many = (started(program, torch.float32, candidates=k, window=8) for k in (1, 16))
    for e in (plain, many):
        e.propose(**noises(2, 0, torch.float32))
    many.propose_many(generator=torch.Generator().manual_seed(0))
    cache, copies = plain.cache, 1 + (program == "video_then_action")
    tokens = sum(cache.rows((0, 1)))
    keys = cache.buffer[:, :, :, :tokens].numel() * 4 * copies
    latents = sum(t.numel() for t in plain.chunk.values()) * 4
    tables = 2 * sum(t.numel() * t.element_size() for b in plain.forward.buffers.values() for t in b.rope.values())
    assert many.cache.buffer.numel() * 4 == cache.buffer.numel() * 4 + 16 * keys
    assert held_bytes(many) - held_bytes(plain) <= 16 * (keys + latents + tables)


# ---- forwards that are left out ----


def test_flows_that_agree_are_used_again():
    full, never, always = (started("joint", steps=6, reuse_flow=c) for c in (None, 1.0, -1.0))
    a, b, c = (e.propose(**noises(2, 0)) for e in (full, never, always))
    assert a.forwards == b.forwards == (6, 6) and torch.equal(a.action, b.action)
    assert c.forwards == (4, 4)  # two to compare, one left out, one run, ...
    assert not torch.equal(a.action, c.action)
    assert_same(always.propose(full=True, **noises(2, 0)).action, a.action)
    by_hand = started("joint", steps=6)
    flows, runs = by_hand.forward.flows, []

    def reused(*args):
        runs.append(flows(*args) if len(runs) not in (2, 4) else runs[-1])
        return runs[-1]

    by_hand.forward.flows = reused
    assert_same(by_hand.propose(**noises(2, 0)).action, c.action)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_residuals_of_the_last_chunk_are_used_again(guidance):
    options = {"steps": 4, "guidance": guidance, "window": 2}
    full, near, exact = (started("joint", reuse_chunk=c, **options) for c in (None, 1e9, 0.0))
    first = [e.propose(**noises(2, 0)) for e in (full, near, exact)]
    assert [c.forwards for c in first] == [(4, 4)] * 3
    again = near.propose(**noises(2, 0))
    assert again.forwards == (4, 4) and torch.equal(again.video, first[1].video)  # not history: it leaves no trace
    for e in (full, near, exact):
        e.observe(*real(2, 40))
    second = [e.propose(**noises(2, 1)) for e in (full, near, exact)]
    assert [c.forwards for c in second] == [(4, 4), (1, 1), (4, 4)]
    assert_same(second[2].video, second[0].video)
    assert not torch.allclose(second[1].video, second[0].video)
    near.restart([1], randn(1, 48, 1, 2, 4, seed=9), randn(1, 3, 8, seed=8))
    assert near.propose(**noises(2, 1)).forwards == (1, 4)


def test_a_rollout_leaves_out_the_same_forwards_in_a_batch_and_alone():
    options = {"steps": 6, "reuse_flow": 0.957, "reuse_chunk": 0.6, "window": 2}
    together, alone = started("joint", **options), started("joint", batch=1, **options)
    counts = []
    for i in range(3):
        noise = noises(2, 0)
        noise["action_noise"][1] *= 5
        a = together.propose(**noise)
        b = alone.propose(**{k: v[:1] for k, v in noise.items()})
        assert a.forwards[:1] == b.forwards
        assert_same(a.video[:1], b.video)
        counts += a.forwards
        together.observe(*real(2, 40 + i))
        alone.observe(*(t[:1] for t in real(2, 40 + i)))
    assert len(set(counts)) > 1 and min(counts) < 5, counts
