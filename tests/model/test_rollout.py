"""The streaming rollout: equal to packed forwards, sparing, flat over an episode, and without side effects."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from wam_kernels import HISTORIES, Attends, Geometry, StreamingCache, dense_mask
from wam_models import GJD, MODEL_PROGRAMS, OBJECTIVES, RolloutConfig, RolloutEngine, WorldActionModel, golden_config
from wam_models.model.blocks import PackedBlockStack
from wam_models.objectives import geometry_for

from .cases import error

B, C, GRID, ACTION_TOKENS, A = 2, 48, (2, 4), 2, 7
TOKENS = GRID[0] * GRID[1] // 4
SMALL = dataclasses.replace(golden_config(), text_dim=8, freq_dim=16)
ROLLED_OUT = [name for name, row in MODEL_PROGRAMS.items() if row.has_rollout]  # GJD last


@pytest.fixture(autouse=True, scope="module")
def poisoned():
    """Slots that nothing has written hold NaN: whoever reads one shows it."""
    make = StreamingCache.__init__

    def made(self, **sizes):
        make(self, **sizes)
        self.buffer.fill_(float("nan"))

    patch = pytest.MonkeyPatch()
    patch.setattr(StreamingCache, "__init__", made)
    yield
    patch.undo()


def small_model(dtype=torch.float64) -> WorldActionModel:
    """Random weights whose attention matters: that of the recorded ones changes little."""
    torch.manual_seed(0)
    model = WorldActionModel(SMALL).to(dtype).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if "proj_out" in name or "bias" in name or "scale_shift_table" in name:
            p.normal_(std=0.3)
    return model


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def started(program=GJD, dtype=torch.float64, objective="joint", batch=B, **config):
    values = {"chunk_size": 2, "window": 4, "steps": 2}
    engine = RolloutEngine(small_model(dtype), RolloutConfig(program=program, **values | config))
    observation, text = randn(B, C, 1, *GRID, dtype=dtype), randn(B, 3, 8, seed=1, dtype=dtype)
    return engine.start(observation[:batch], text[:batch], objective=objective)


def noises(chunk, seed, dtype=torch.float64, batch=B):
    return {
        "video_noise": randn(B, C, chunk, *GRID, seed=2 * seed + 10, dtype=dtype)[:batch],
        "action_noise": randn(B, chunk, ACTION_TOKENS, A, seed=2 * seed + 11, dtype=dtype)[:batch],
    }


def real(frames, seed, dtype=torch.float64):
    return randn(B, C, frames, *GRID, seed=seed, dtype=dtype), randn(
        B, frames, ACTION_TOKENS, A, seed=seed + 1, dtype=dtype
    )


def request(objective, noise):
    """Arguments of ``propose`` from both streams' noise: what is given instead of denoised is just another tensor."""
    given = dict(noise)
    for stream in ("video", "action"):
        if not getattr(OBJECTIVES[objective], stream):
            given[f"clean_{stream}"] = given.pop(f"{stream}_noise")
    return given


def attend_densely(geometry):
    mask = torch.from_numpy(dense_mask(geometry))

    def attend(layer, q, k, v):
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask)
        return torch.nan_to_num(out).transpose(1, 2)

    return attend


def with_reused_keys(attend, frames, memory, reused):
    """``attend`` where the noisy tokens of the streams in ``reused`` have the keys and values of the call before."""
    rows = {"video": slice(0, frames * TOKENS)}
    rows["action"] = slice(2 * frames * TOKENS, 2 * frames * TOKENS + frames * ACTION_TOKENS)

    def attended(layer, q, *kv):
        kv = tuple(t.clone() for t in kv)
        for stream, own in rows.items():
            for i, t in enumerate(kv):
                if stream in reused:
                    t[:, own] = memory[layer, stream, i]
                memory[layer, stream, i] = t[:, own].clone()
        return attend(layer, q, *kv)

    return attended


def dense_forward(episode, now, clean, levels, clean_level, attend):
    """Flows of the chunk ``now`` at its ``levels``, of one packed forward over the window that ends with it."""
    past_video, past_action = (torch.stack(t) for t in zip(*(episode.accepted(b) for b in range(B)), strict=True))
    chunk = now["video"].shape[2]
    past = min(episode.layout.reach, episode.next_frame[0])
    junk_video, junk_action = real(past, 90)
    text = randn(B, 3, 8, seed=1)
    t = {k: torch.full((B, past + chunk), 500.0, dtype=x.dtype) for k, x in now.items()}
    at_level = torch.zeros_like(t["video"])
    at_level[:, past:] = 1000 * clean_level
    for k, level in levels.items():
        t[k][:, past:] = 1000 * level
    strength = {k: episode.config.guidance_of(i) for i, k in enumerate(now)}
    conditional = episode.objective.conditional
    texts = [torch.zeros_like(text)] if conditional else [text] + [torch.zeros_like(text)] * episode.layout.guided
    both = [
        episode.model(
            torch.cat([junk_video, now["video"]], 2),
            torch.cat([past_video[:, :, -past:], clean["video"]], 2),
            torch.cat([junk_action, now["action"]], 1),
            torch.cat([past_action[:, -past:], clean["action"]], 1),
            t["video"],
            t["action"],
            told,
            clean_video_timesteps=at_level,
            attend=attend,
            frame_start=episode.next_frame[0] - past,
        )
        for told in texts
    ]
    (video, action), (blind_video, blind_action) = both[0], both[-1]
    video = blind_video + strength["video"] * (video - blind_video)
    action = blind_action + strength["action"] * (action - blind_action)
    return {"video": video[:, :, past:], "action": action[:, past:]}


def dense_chunk(episode, video, action, *, update=("video", "action"), committed=None):
    """A chunk denoised by packed forwards with dense masks over window and chunk, written from the spec alone.

    Everything that the chunk must not attend to (noisy copies of history, clean copies of the unresolved) holds junk.
    """
    config, conditional = episode.config, episode.objective.conditional
    chunk, window = (1, 3) if conditional else (config.chunk_size, config.window)
    (next_frame,) = set(episode.next_frame)
    past = min(window // 2 * chunk, next_frame)
    program = "joint" if config.program == GJD else config.program
    geometry = Geometry(
        program=program, video_frames=past + chunk, video_tokens=TOKENS, action_frames=past + chunk,
        action_tokens=ACTION_TOKENS, chunk_size=chunk, window=window, history=config.history, chunk_origin=past,
        startup_action_frames=int(next_frame == past),
        conditional_history="previous_boundary_video_only" if conditional else None,
    )  # fmt: skip
    memory, reused, flows = {}, [], {}
    attend = with_reused_keys(attend_densely(geometry), past + chunk, memory, reused)
    order = {Attends.ACTION_TO_VIDEO: ("video", "action"), Attends.VIDEO_TO_ACTION: ("action", "video")}
    order = order.get(MODEL_PROGRAMS[program].noisy_to_clean)
    stages = [(s,) for s in order] if order else [update]
    clean = {"video": torch.full_like(video, 7.0), "action": torch.full_like(action, 7.0)}
    now, clean_level = {"video": video, "action": action}, 0.0
    paths = {name: config.trajectory(i) for i, name in enumerate(now)}
    levels = {k: path.levels.tolist() for k, path in paths.items()}
    first_noise, held = action.flatten(1, 2), 0 if committed is None else committed.shape[1]

    def hold(level):
        """The first actions are on the line from their noise to what they are committed to be."""
        if held:
            flat = now["action"].flatten(1, 2).clone()
            flat[:, :held] = (1 - level) * committed + level * first_noise[:, :held]
            now["action"] = flat.reshape(now["action"].shape)

    def step(k):
        """A stream's latents after its flow, and what its solver keeps."""
        before = [flows.pop(k), *states[k]]
        rows = paths[k].updates[done[k]].tolist()
        states[k] = [sum(w * x for w, x in zip(row, before, strict=True) if w) for row in rows]
        now[k], done[k] = states[k][0], done[k] + 1
        if k == "action":
            hold(levels[k][done[k]])
            states[k][0] = now[k]

    for k in (k for stage in stages for k in stage):
        start, last = levels[k][0], [episode.accepted(b)[k == "action"] for b in range(B)]
        last = torch.stack([frames[:, -1:] if k == "video" else frames[-1:] for frames in last])
        now[k] = (1 - start) * last + start * now[k]
    hold(levels["action"][0])
    for stage in stages:
        states = {k: [now[k], *[torch.full_like(now[k], torch.nan)] * paths[k].kept] for k in stage}
        done, counts = dict.fromkeys(stage, 0), {k: paths[k].forwards for k in stage}
        most = max(counts.values())
        spread = {k: [j * most // n if config.interleave else j for j in range(n)] for k, n in counts.items()}
        for i in range(most):
            live = [k for k in stage if i in spread[k]]
            for k in [k for k in live if k in flows]:
                step(k)
            idle = [k for k in stage if k not in live and i > (0 if config.interleave else counts[k])]
            reused[:] = idle * config.reuse_keys
            at = {k: levels[k][done[k]] if k in stage else 0.0 for k in now}
            found = dense_forward(episode, now, clean, at, clean_level, attend)
            flows |= {k: found[k] for k in live}
            for k in live if not config.interleave else ():
                step(k)
        for k in [*flows]:
            step(k)
        for k in stage:
            clean[k] = now[k]
            clean_level = paths[k].end if k == "video" else clean_level
    return now["video"], now["action"]


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def assert_candidates(got, want):
    for name in ("video", "action"):
        assert_same(getattr(got, name), getattr(want, name))


# ---- equal to packed forwards over the whole episode: what training saw ----


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_streaming_equals_one_packed_forward_over_the_whole_episode(data):
    """One denoising step from pure noise shows the flow itself; clean copies are what the rollout accepted."""
    program = data.draw(st.sampled_from(ROLLED_OUT), "program")
    objective = data.draw(st.sampled_from(tuple(OBJECTIVES) if program == GJD else ("joint",)), "objective")
    history = data.draw(st.sampled_from(HISTORIES), "history")
    conditional = OBJECTIVES[objective].conditional
    size = 1 if conditional else data.draw(st.integers(1, 4), "chunk")
    window = 3 if conditional else data.draw(st.integers(2, 7), "window")
    chunks = data.draw(st.integers(1, 4 + 4 // size), "chunks")
    ring = data.draw(st.integers(1, 3), "lookahead")
    episode = started(
        program, objective=objective, chunk_size=size, window=window, steps=1, history=history, lookahead=ring
    )
    check_against_one_packed_forward(episode, size, window, chunks)


def check_against_one_packed_forward(episode, size, window, chunks):
    objective, config = episode.objective, episode.config
    noise, clean = [noises(size, i) for i in range(chunks)], []
    for n in noise:
        clean.append(episode.propose(**request(objective.name, n)))
        episode.accept(clean[-1])
    frames = 1 + chunks * size
    first_video, first_action = randn(B, C, 1, *GRID), randn(B, 1, ACTION_TOKENS, A, seed=5)
    noisy_video = torch.cat([first_video, *(n["video_noise"] for n in noise)], 2)
    noisy_action = torch.cat([first_action, *(n["action_noise"] for n in noise)], 1)
    geometry = geometry_for(
        config.program, objective, frames=frames, video_tokens=TOKENS, action_tokens=ACTION_TOKENS, chunk_size=size,
        window=window, history=config.history,
    )  # fmt: skip
    text = randn(B, 3, 8, seed=1)
    flows = episode.model(
        noisy_video,
        torch.cat([first_video, *(c.video for c in clean)], 2),
        noisy_action,
        torch.cat([torch.zeros_like(first_action), *(c.action for c in clean)], 1),
        torch.full((B, frames), 1000.0 * objective.video, dtype=torch.float64),
        torch.full((B, frames), 1000.0 * objective.action, dtype=torch.float64),
        text * (not objective.conditional),
        attend=attend_densely(geometry),
    )
    if objective.video:
        assert_same(noisy_video[:, :, 1:] - torch.cat([c.video for c in clean], 2), flows[0][:, :, 1:])
    if objective.action:
        assert_same(noisy_action[:, 1:] - torch.cat([c.action for c in clean], 1), flows[1][:, 1:])


def test_a_ring_that_forgets_too_early_is_noticed(monkeypatch):
    ranges = StreamingCache.ranges

    def short(self, geometries, starts, history, *rest):
        table = ranges(self, geometries, starts, history, *rest)
        if max(starts) > 0:
            table[:, :, 0] = 0
        return table

    monkeypatch.setattr(StreamingCache, "ranges", short)
    with pytest.raises(AssertionError):
        check_against_one_packed_forward(started("joint", steps=1), 2, 4, 4)


# ---- equal to packed forwards over the window: OpenWAM's rollouts ----

# (chunk, window, chunks): exact window, evictions with an even and an odd window, chunks of one frame
LAYOUTS = [(2, 4, 4), (1, 5, 4), (3, 2, 2)]


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("program", ROLLED_OUT[:-1])
def test_recomputed_history_equals_packed_forwards_over_the_window(program, history):
    for chunk, window, chunks in LAYOUTS:
        episode = started(program, chunk_size=chunk, window=window, history=history, cache="recomputed")
        for i in range(chunks):
            noise = noises(chunk, i)
            candidate = episode.propose(**noise)
            video, action = dense_chunk(episode, *noise.values())
            assert_same(candidate.video, video)
            assert_same(candidate.action, action)
            episode.accept(candidate)


@pytest.mark.parametrize("objective,update", [("forward_dynamics", "video"), ("inverse_dynamics", "action")])
def test_recomputed_conditional_rollouts_equal_packed_forwards(objective, update):
    episode = started(GJD, objective=objective, cache="recomputed")
    for i in range(3):
        noise = noises(1, i)
        candidate = episode.propose(**request(objective, noise))
        video, action = dense_chunk(episode, *noise.values(), update=(update,))
        assert_same(candidate.video, video)
        assert_same(candidate.action, action)
        episode.accept(candidate)


def test_the_two_caches_differ_after_eviction_and_only_then():
    kept, anew = started("joint"), started("joint", cache="recomputed")
    for i in range(4):
        a, b = (e.propose(**noises(2, i)) for e in (kept, anew))
        assert torch.allclose(a.video, b.video, atol=1e-10) == (i <= 1)  # the third chunk does not attend to frame 0
        for e in (kept, anew):
            e.observe(*real(2, 40 + i))


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("program", ROLLED_OUT)
def test_last_frame_makes_every_chunk_the_first_of_an_episode(program, history):
    """Whatever was observed before, and with frames that do not fill a chunk; the window says nothing."""
    options = {"chunk_size": 2, "history": history, "cache": "last_frame"}
    episode = started(program, window=8, **options)
    for i, frames in enumerate((2, 1, 3, 2)):
        video, action = real(frames, 40 + i)
        if i == 2:
            episode.accept(episode.propose(**noises(2, 9)))  # which the observation replaces
        episode.observe(video, action)
        anew = started(program, window=2, **options)
        anew.restart(range(B), video[:, :, -1:], randn(B, 3, 8, seed=1))
        found, first = (e.propose(**noises(2, i)) for e in (episode, anew))
        assert_same(found.video, first.video)
        assert_same(found.action, first.action)
    # and of the frame that a prediction ends with
    episode.accept(found)
    anew.restart(range(B), found.video[:, :, -1:], randn(B, 3, 8, seed=1))
    assert_same(*(e.propose(**noises(2, 7)).action for e in (episode, anew)))


# ---- observations ----


@pytest.mark.parametrize("cache", ["persistent", "recomputed"])
@pytest.mark.parametrize("program", ["joint", "action_then_video"])
def test_observations_replace_predictions_and_the_tail(program, cache):
    imagined, direct = (started(program, chunk_size=3, window=4, cache=cache, lookahead=2) for _ in range(2))
    for executed in (2, 3, 1, 2):  # of chunks of 3: the next chunk starts off the predicted grid
        before = direct.next_frame[0]
        for i in range(2):
            imagined.accept(imagined.propose(**noises(3, executed + i)))
        assert imagined.next_frame == [before + 6] * B and imagined.observed == [before] * B
        video, action = real(executed, 70 + executed)
        for episode in (imagined, direct):
            episode.observe(video, action, first_frame=before)
            assert episode.next_frame == episode.observed == [before + executed] * B
        for b in range(B):
            for got, want in zip(imagined.accepted(b), direct.accepted(b), strict=True):
                assert torch.equal(got, want)
        assert torch.equal(direct.accepted(0)[0][:, -executed:], video[0])
        assert torch.equal(direct.accepted(0)[1][-executed:], action[0])
        a, b = (e.propose(**noises(3, 9)) for e in (imagined, direct))
        assert_candidates(a, b)
        if cache == "recomputed":
            want = dense_chunk(direct, *noises(3, 9).values())
            assert_same(b.video, want[0])
            assert_same(b.action, want[1])


def test_observing_many_frames_at_once_is_observing_chunk_by_chunk():
    at_once, by_chunk = started("joint"), started("joint")
    video, action = real(7, 3)
    at_once.observe(video, action)
    for first in (0, 2, 4, 6):
        by_chunk.observe(video[:, :, first : first + 2], action[:, first : first + 2])
    assert_candidates(at_once.propose(**noises(2, 0)), by_chunk.propose(**noises(2, 0)))


def test_a_prediction_beyond_the_lookahead_cannot_be_taken_back():
    episode = started("joint", lookahead=1)
    episode.observe(*real(6, 3))
    for i in range(2):
        episode.accept(episode.propose(**noises(2, i)))
    with pytest.raises(ValueError, match=r"frame 11, so the history before frame 7 has left.*lookahead, now 1"):
        episode.observe(*real(1, 4))
    episode.accept(episode.propose(**noises(2, 2)))  # imagining on is fine
    episode.restart([0, 1], randn(B, C, 1, *GRID), randn(B, 3, 8, seed=1))
    assert_candidates(episode.propose(**noises(2, 0)), started("joint").propose(**noises(2, 0)))


@pytest.mark.parametrize("cache", ["persistent", "recomputed"])
@pytest.mark.parametrize("program", ["joint", "video_then_action", "decoupled_same_step"])
def test_robots_at_different_frames(program, cache):
    """A batch in which robots execute different numbers of frames and start anew equals robots on their own."""
    together = started(program, chunk_size=3, window=4, cache=cache, lookahead=2)
    alone = [started(program, chunk_size=3, window=4, cache=cache, lookahead=2, batch=1) for _ in range(B)]
    texts = [randn(B, 3, 8, seed=1)[b : b + 1] for b in range(B)]
    observations = [randn(B, C, 1, *GRID)[b : b + 1] for b in range(B)]
    for b, episode in enumerate(alone):
        episode.restart([0], observations[b], texts[b])
    for turn, counts in enumerate([(2, 3), (0, 1), (3, 3), (5, 2), None, (1, 4)]):
        if counts is None:  # the second robot is done and begins another episode
            fresh = randn(1, C, 1, *GRID, seed=33), randn(1, 3, 8, seed=34)
            together.restart([1], *fresh)
            alone[1].restart([0], *fresh)
            continue
        noise = noises(3, turn)
        candidate = together.propose(**noise)
        for b, episode in enumerate(alone):
            single = episode.propose(**{k: v[b : b + 1] for k, v in noise.items()})
            assert_same(candidate.video[b : b + 1], single.video)
            assert_same(candidate.action[b : b + 1], single.action)
            if turn == 1:
                episode.accept(single)
        if turn == 1:
            together.accept(candidate)
        video, action = real(5, 60 + turn)
        together.observe(video, action, frames=counts)
        for b, episode in enumerate(alone):
            if counts[b]:
                episode.observe(video[b : b + 1, :, : counts[b]], action[b : b + 1, : counts[b]])
            assert episode.next_frame == [together.next_frame[b]] and episode.observed == [together.observed[b]]


# ---- no side effects ----


def snapshot(episode):
    """Everything that was accepted: slots, latents, counters. The chunk at work may hold anything."""
    cache = episode.cache
    rings = cache.buffer[:, :, :, : cache.chunk_slots((0,), 1).start].clone()
    frames = [t.clone() for t in episode.ring.latents.values()]
    return rings, *frames, list(episode.next_frame), list(episode.observed)


def assert_unchanged(episode, before):
    for now, then in zip(snapshot(episode), before, strict=True):
        if isinstance(then, list):
            assert now == then
        else:
            assert torch.equal(now.nan_to_num(9e9), then.nan_to_num(9e9))


@pytest.mark.parametrize("program", ROLLED_OUT)
def test_a_candidate_that_is_not_accepted_leaves_no_trace(program):
    episode, other = started(program), started(program)
    for e in (episode, other):
        e.observe(*real(3, 3))
    before = snapshot(episode)
    for i in range(3):
        episode.propose(**noises(2, 20 + i))
    assert_unchanged(episode, before)
    assert_candidates(episode.propose(**noises(2, 0)), other.propose(**noises(2, 0)))


def test_tensors_of_the_caller_stay_the_callers():
    episode = started("video_then_action", torch.float32)
    noise = noises(2, 0, torch.float32)
    kept = {k: v.clone() for k, v in noise.items()}
    first = episode.propose(**noise)
    assert all(torch.equal(noise[k], kept[k]) for k in noise)
    video = first.video.clone()
    episode.propose(**noises(2, 1, torch.float32))
    assert torch.equal(first.video, video)
    observed, done = real(1, 8, torch.float32)
    episode.observe(observed, done)
    observed.zero_()
    history = episode.accepted()[0]
    assert history[:, -1].abs().sum() > 0
    history.zero_()
    assert episode.accepted()[0].abs().sum() > 0


def test_same_noise_same_numbers():
    episode = started(GJD, torch.float32)
    a, b = (episode.propose(generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a.video, b.video) and torch.equal(a.action, b.action)


# ---- sparing ----


def read_by_noisy(program: str) -> Attends:
    return MODEL_PROGRAMS[program].noisy_to_noisy | MODEL_PROGRAMS[program].noisy_to_clean


@pytest.mark.parametrize("program", ROLLED_OUT)
def test_pruned_requests_give_the_same_numbers(program):
    episode = started(program)
    full, video, action = (
        episode.propose(want=want, generator=torch.Generator().manual_seed(5)) for want in ("both", "video", "action")
    )
    assert_same(video.video, full.video)
    assert_same(action.action, full.action)
    assert (video.action is None) == (Attends.VIDEO_TO_ACTION not in read_by_noisy(program))
    assert (action.video is None) == (Attends.ACTION_TO_VIDEO not in read_by_noisy(program))


def counted_rows(model):
    """(video rows, action rows) of every pass through the blocks."""
    rows = []

    def note(module, args):
        rows.append(tuple(0 if s is None else s.x.shape[1] for s in args[0]))

    model.packed_block_stack.register_forward_pre_hook(note)
    return rows


VIDEO, ACTION, BOTH = (2 * TOKENS, 0), (0, 2 * ACTION_TOKENS), (2 * TOKENS, 2 * ACTION_TOKENS)


@pytest.mark.parametrize("program", ROLLED_OUT)
def test_a_step_runs_the_rows_that_change(program):
    steps = 4
    episode = started(program, steps=steps)
    episode.observe(*real(6, 3))
    rows = counted_rows(episode.model)
    candidate = episode.propose(**noises(2, 0))
    row = MODEL_PROGRAMS[program]
    together = Attends.NONE != row.noisy_to_noisy & ~Attends.OWN
    expected = {
        Attends.ACTION_TO_VIDEO: [*[VIDEO] * steps, VIDEO, *[ACTION] * steps],
        Attends.VIDEO_TO_ACTION: [*[ACTION] * steps, ACTION, *[VIDEO] * steps],
        Attends.NONE: [BOTH] * steps if together else [*[VIDEO] * steps, *[ACTION] * steps],
    }[row.noisy_to_clean]
    assert rows == expected
    rows.clear()
    episode.accept(candidate)  # one pass over the clean chunk, and the history is never read again
    assert rows == [BOTH]
    rows.clear()
    episode.propose(want="action", **noises(2, 0))
    alone = Attends.ACTION_TO_VIDEO not in read_by_noisy(program)
    assert rows == ([ACTION] * steps if alone else expected)


def linear_flops(model):
    """Counts multiplications and additions of every linear map by the first parts of its name."""
    count = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def note(module, args, out, name=name):
                count[name] = count.get(name, 0) + 2 * args[0].numel() * module.out_features

            module.register_forward_hook(note)
    return count


@pytest.mark.parametrize(
    "program,objective,updated",
    [("joint", "joint", (0, 1)), ("video_then_action", "joint", None), (GJD, "inverse_dynamics", (1,))],
)
def test_flops_of_a_step(program, objective, updated):
    """No linear map of history or text, a finished stream, a head that is not asked for, or after the last use."""
    episode = started(program, objective=objective, steps=1, window=8)
    size = episode.chunk_size
    for i in range(3):
        episode.observe(*real(size, 3 + i))
    count = linear_flops(episode.model)
    episode.propose(**request(objective, noises(size, 0)))
    c = SMALL
    rows = (B * size * TOKENS, B * size * ACTION_TOKENS)
    width, ffn = (c.hidden, c.action_hidden), (c.ffn, c.action_ffn)
    if updated is None:  # ordered: video denoised, its clean copy read once more, then action
        runs = [((0,), (0,)), ((0,), ()), ((1,), (1,))]
    else:
        runs = [((0, 1), updated)]
    expected = 0
    for streams, wanted in runs:
        for s in streams:
            inner = c.heads * c.head_dim
            keys = 3 * width[s] * inner
            rest = inner * width[s] + 2 * width[s] * inner + 2 * width[s] * ffn[s]
            per_row = c.layers * keys + (c.layers - (s not in wanted)) * rest
            data = (c.patch_width, c.action_dim)[s]
            per_row += data * width[s] * (1 + (s in wanted))  # embedding, and the head where asked for
            time = c.freq_dim * width[s] + 7 * width[s] ** 2
            expected += 2 * (rows[s] * per_row + B * size * time)
    assert sum(count.values()) == expected
    assert not any(part in name for name in count for part in ("attn2.to_k", "attn2.to_v", "text_proj", "context_proj"))


class Launches(TorchDispatchMode):
    """Names of the operators that run, and the bytes that they return."""

    def __init__(self):
        super().__init__()
        self.names, self.bytes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        outs = out if isinstance(out, (tuple, list)) else (out,)
        self.bytes += sum(t.numel() * t.element_size() for t in outs if isinstance(t, torch.Tensor))
        return out


@pytest.mark.parametrize("program", ROLLED_OUT)
def test_a_chunk_can_be_captured(program):
    """What a CUDA graph cannot hold: values read by the host, and tensors made from the host's numbers."""
    episode = started(program, torch.float32, guidance=2.0)
    episode.propose(**noises(2, 0, torch.float32))
    forbidden = (
        "_local_scalar_dense",
        "nonzero",
        "lift_fresh",
        "unique",
        "masked_select",
        "is_nonzero",
        "repeat_interleave",
    )
    for chunk in episode.solver.chunks.values():
        with Launches() as launches, torch.no_grad():
            chunk()
        assert len(launches.names) > 20 and any("cached_attention" in n for n in launches.names)
        assert not [n for n in launches.names if any(f in n for f in forbidden)]


def test_flat_over_500_chunks():
    """Memory and work of a chunk do not grow with the episode: same buffers, same rows, same operators."""
    episode = started("joint", torch.float32, batch=1, steps=1)
    rows = counted_rows(episode.model)
    noise = noises(2, 0, torch.float32, batch=1)
    place = episode.cache.buffer.data_ptr()
    period = 6  # chunks after which the rings (3 chunks) and the alternation below (2) are where they were
    counted = {**dict.fromkeys(range(period, 2 * period)), **dict.fromkeys(range(492, 492 + period))}
    for i in range(500):
        rows.clear()
        with Launches() if i in counted else contextlib.nullcontext() as launches:
            candidate = episode.propose(**noise)
            if i % 2:
                episode.accept(candidate)  # predicted at first, then observed
            episode.observe(candidate.video, candidate.action)
        if i in counted:
            counted[i] = launches.names, launches.bytes, tuple(rows)
    assert episode.next_frame == [1001] and episode.cache.buffer.data_ptr() == place
    assert len(episode.forward.buffers) == 2 and len(episode.solver.chunks) == 1
    early, late = (list(counted.values())[i : i + period] for i in (0, period))
    assert early == late and None not in early


# ---- guidance, precision, faults ----


def test_guidance_mixes_the_flows_with_and_without_text():
    g = 3.0
    guided, plain, blind = started("joint", guidance=g, steps=1), started("joint", steps=1), started("joint", steps=1)
    text, nothing = randn(B, 3, 8, seed=1), torch.zeros(B, 3, 8, dtype=torch.float64)
    blind.restart([0, 1], randn(B, C, 1, *GRID), nothing)
    for i in range(4):
        noise = noises(2, i)
        got, with_text, without = (e.propose(**noise) for e in (guided, plain, blind))
        for name in ("video", "action"):
            a, b = getattr(with_text, name), getattr(without, name)
            assert_same(getattr(got, name), b + g * (a - b))
        for e in (guided, plain, blind):
            e.observe(*real(2, 40 + i))
    guided.restart([1], randn(1, C, 1, *GRID, seed=9), text[:1])
    plain.restart([1], randn(1, C, 1, *GRID, seed=9), text[:1])
    blind.restart([1], randn(1, C, 1, *GRID, seed=9), nothing[:1])
    got, with_text, without = (e.propose(**noises(2, 7)) for e in (guided, plain, blind))
    assert_same(got.video, without.video + g * (with_text.video - without.video))


@pytest.mark.parametrize("whose", ["video", "action"])
def test_a_stream_has_a_guidance_of_its_own(whose):
    g, other = 3.0, {"video": "action", "action": "video"}[whose]
    guided = started("joint", steps=1, **{whose: {"guidance": g}})
    plain, blind = started("joint", steps=1), started("joint", steps=1)
    blind.restart([0, 1], randn(B, C, 1, *GRID), torch.zeros(B, 3, 8, dtype=torch.float64))
    got, with_text, without = (e.propose(**noises(2, 0)) for e in (guided, plain, blind))
    a, b = getattr(with_text, whose), getattr(without, whose)
    assert_same(getattr(got, whose), b + g * (a - b))
    assert_same(getattr(got, other), getattr(with_text, other))
    # one that every stream turns off costs nothing
    assert not started("joint", guidance=g, video={"guidance": 1}, action={"guidance": 1}).layout.guided


def test_samples_of_a_batch_do_not_mix():
    together, alone = started("joint"), started("joint", batch=1)
    for i in range(3):
        a, b = together.propose(**noises(2, i)), alone.propose(**noises(2, i, batch=1))
        assert_same(a.video[:1], b.video)
        together.accept(a)
        alone.accept(b)


def test_faults_are_refused_and_leave_the_accepted_state_usable():
    dtype = torch.float32
    episode, twin = started(GJD, dtype), started(GJD, dtype)
    for e in (episode, twin):
        e.observe(*real(3, 3, dtype))
    good = noises(2, 0, dtype)
    video, action = real(1, 5, dtype)
    before = snapshot(episode)
    engine = RolloutEngine(episode.model, episode.config)
    fixed = RolloutEngine(episode.model, RolloutConfig(program="joint"))
    forward, inverse = (started(GJD, dtype, objective=o) for o in ("forward_dynamics", "inverse_dynamics"))
    refused = [
        (lambda: engine.start(video, randn(B, 3, 8), objective="dream"), "objective must be one of"),
        (lambda: fixed.start(video, randn(B, 3, 8), objective="inverse_dynamics"), "objective must be one of"),
        (lambda: engine.start(video[:, :, :0], randn(B, 3, 8)), "observation must be"),
        (lambda: engine.start(video, randn(B, 3, 2)), "text must have shape"),
        (lambda: episode.propose(want="words", **good), "want must be one of"),
        (lambda: episode.propose(), "video_noise must be a tensor"),
        (lambda: episode.propose(**good | {"video_noise": good["video_noise"][:, :, :1]}), "video_noise must have"),
        (lambda: episode.propose(**good | {"action_noise": good["action_noise"][0]}), "action_noise must have shape"),
        (lambda: episode.propose(clean_video=video, **good), "clean_video must be None"),
        (lambda: forward.propose(**noises(1, 0, dtype)), "clean_action must be a tensor"),
        (lambda: inverse.propose(clean_video=video, want="video"), "want must be 'both'"),
        # wrongly shaped, missing, late, partial, repeated
        (lambda: episode.observe(video[:, :5], action), "observe: video must have shape"),
        (lambda: episode.observe(video[:, 0], action), "observe: video must have shape"),
        (lambda: episode.observe(video, action[:, :0]), "observe: action must have shape"),
        (lambda: episode.observe(video[:, :, :0], action[:, :0]), "at least 1 frame"),
        (lambda: episode.observe(video, action, first_frame=5), r"first_frame\[0\] must be 4.*gap before"),
        (lambda: episode.observe(video, action, first_frame=[4, 3]), r"first_frame\[1\] must be 4.*observed already"),
        (lambda: episode.observe(video, action, first_frame=[4]), "first_frame must be a number or 2 of them"),
        (lambda: episode.observe(video, action, frames=[1]), "frames must be a number or 2 of them"),
        (lambda: episode.observe(video, action, frames=[2, 0]), "frames must be numbers from 0 to K=1"),
        (lambda: episode.observe(video, action, frames=[0, 0]), "not all 0"),
        (lambda: episode.observe(video, action, frames=[1.0, 1]), r"frames\[0\] must be a whole number"),
        (lambda: episode.observe(video, action, frames="11"), "frames must be a sequence"),
        (lambda: episode.observe(video, action, first_frame=4.0), "first_frame must be a whole number"),
        (lambda: episode.observe(video, action, first_frame=True), "first_frame must be a whole number"),
        (lambda: episode.restart(0, video[:1], randn(1, 3, 8)), "rollouts must be a sequence"),
        (lambda: episode.restart([0.0], video[:1], randn(1, 3, 8)), r"rollouts\[0\] must be a whole number"),
        (lambda: episode.accepted(2), "rollout must be a whole number from 0 to 1"),
        (lambda: episode.restart([2], video[:1], randn(1, 3, 8)), "different numbers from 0 to 1"),
        (lambda: episode.restart([0, 0], video, randn(B, 3, 8)), "different numbers"),
        (lambda: episode.restart([0], video, randn(1, 3, 8)), "observation must have shape"),
        (lambda: episode.restart([0], video[:1], randn(1, 4, 8)), "text must have shape"),
        (lambda: episode.accept(twin.propose(**good)), "candidate must continue the episode as it is now.* another"),
        (lambda: RolloutConfig(window=1), "window must be a whole number of at least 2"),
        (lambda: RolloutConfig(history="none"), "history must be one of"),
        (lambda: RolloutConfig(program="none"), "program must be one of"),
        (lambda: RolloutConfig(cache="none"), "cache must be one of"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()
        assert_unchanged(episode, before)
    decoupled = started("decoupled_same_step", dtype)
    with pytest.raises(ValueError, match="no video.*observe"):
        decoupled.accept(decoupled.propose(want="action", **good))
    candidate = episode.propose(**good)
    episode.observe(video, action)
    with pytest.raises(ValueError, match="earlier moment"):
        episode.accept(candidate)
    twin.observe(video, action)
    assert_candidates(episode.propose(**good), twin.propose(**good))


@pytest.mark.parametrize("whole", [np.int64, torch.tensor], ids=["numpy", "torch"])
def test_integers_of_numpy_and_torch_are_integers(whole):
    plain, other = (started(dtype=torch.float32) for _ in range(2))
    video, action = real(2, 3, torch.float32)
    plain.observe(video, action, frames=[1, 2], first_frame=1)
    other.observe(video, action, frames=whole([1, 2]), first_frame=whole(1))
    plain.observe(video, action, frames=[0, 2], first_frame=[2, 3])
    other.observe(video, action, frames=[whole(0), whole(2)], first_frame=whole([2, 3]))
    for e, rollout in ((plain, 1), (other, whole(1))):
        e.restart([rollout], video[:1, :, :1], randn(1, 3, 8, dtype=torch.float32))
    assert plain.next_frame == other.next_frame == [2, 1] and all(type(f) is int for f in other.next_frame)
    noise = noises(2, 0, torch.float32)
    assert torch.equal(plain.propose(**noise).action, other.propose(**noise).action)


def test_a_model_that_fails_leaves_the_accepted_state_usable(monkeypatch):
    episode, twin = started("joint"), started("joint")
    for e in (episode, twin):
        e.accept(e.propose(**noises(2, 5)))
    candidate = episode.propose(**noises(2, 0))
    right = PackedBlockStack.forward

    def broken(*args):
        right(*args)
        raise RuntimeError("out of memory")

    before = snapshot(episode)
    monkeypatch.setattr(PackedBlockStack, "forward", broken)
    for call in (
        lambda: episode.observe(*real(2, 40)),
        lambda: episode.accept(candidate),
        lambda: episode.propose(**noises(2, 1)),
    ):
        with pytest.raises(RuntimeError, match="out of memory"):
            call()
    monkeypatch.setattr(PackedBlockStack, "forward", right)
    assert_unchanged(episode, before)
    episode.accept(candidate)
    twin.accept(twin.propose(**noises(2, 0)))
    assert_candidates(episode.propose(**noises(2, 1)), twin.propose(**noises(2, 1)))


def test_bfloat16_model_keeps_float32_latents():
    rough, exact = started("video_then_action", torch.bfloat16), started("video_then_action", torch.float32)
    rough.restart([0, 1], randn(B, C, 1, *GRID, dtype=torch.float32), randn(B, 3, 8, seed=1, dtype=torch.float32))
    for i in range(2):
        noise = noises(2, i, torch.float32)
        got, want = rough.propose(**noise), exact.propose(**noise)
        assert got.video.dtype == got.action.dtype == torch.float32
        assert error(got.video, want.video) < 0.1 and error(got.action, want.action) < 0.1
        for e in (rough, exact):
            e.observe(*real(2, 40 + i, torch.float32))
