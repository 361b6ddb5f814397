"""The rollout engine: equal to packed forwards, sparing, and without side effects."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from wam_kernels import HISTORIES, PROGRAMS, Geometry, dense_mask
from wam_models import GJD, MODEL_PROGRAMS, RolloutConfig, RolloutEngine, WorldActionModel, golden_config
from wam_models.flow import sigmas

from .cases import error

B, C, GRID, SLOTS, A = 2, 48, (2, 4), 2, 7
SMALL = dataclasses.replace(golden_config(), text_dim=8, freq_dim=16)


def small_model(dtype=torch.float64) -> WorldActionModel:
    """Random weights whose attention matters: the recorded ones hardly look around."""
    torch.manual_seed(0)
    model = WorldActionModel(SMALL).to(dtype).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if "proj_out" in name or "bias" in name or "scale_shift_table" in name:
            p.normal_(std=0.3)
    return model


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def engine_and_state(program=GJD, dtype=torch.float64, **config):
    values = {"chunk_size": 2, "window": 4, "steps": 2}
    engine = RolloutEngine(small_model(dtype), RolloutConfig(program=program, **values | config))
    return engine, engine.start(randn(B, C, 1, *GRID, dtype=dtype), randn(B, 3, 8, seed=1, dtype=dtype))


def noises(chunk, seed, dtype=torch.float64):
    return {
        "video_noise": randn(B, C, chunk, *GRID, seed=2 * seed + 10, dtype=dtype),
        "action_noise": randn(B, chunk, SLOTS, A, seed=2 * seed + 11, dtype=dtype),
    }


def dense_chunk(model, state, config, video, action, *, update=("video", "action"), conditional=False):
    """A chunk denoised by packed forwards with dense masks over window and chunk, written from the spec alone.

    Everything that the chunk must not read (noisy slots of history, clean copies of the unresolved) holds junk.
    """
    chunk, window = (1, 3) if conditional else (config.chunk_size, config.window)
    seen = min(window // 2 * chunk, state.next_frame)
    start = state.next_frame - seen
    program = "joint" if config.program == GJD else config.program
    geometry = Geometry(
        program=program,
        video_frames=seen + chunk,
        video_tokens=GRID[0] * GRID[1] // 4,
        action_frames=seen + chunk,
        action_tokens=SLOTS,
        chunk_size=chunk,
        window=window,
        history=config.history,
        chunk_origin=seen,
        startup_action_frames=int(start == 0),
        conditional_history="previous_boundary_video_only" if conditional else None,
    )
    mask = torch.from_numpy(dense_mask(geometry))

    def attend(layer, q, k, v):
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask)
        return torch.nan_to_num(out).transpose(1, 2)

    junk_video, junk_action = randn(B, C, seen, *GRID, seed=90), randn(B, seen, SLOTS, A, seed=91)
    text = torch.zeros_like(state.text) if conditional else state.text
    order = {"video_then_action": ("video", "action"), "action_then_video": ("action", "video")}
    stages = [(s,) for s in order[program]] if program in order else [update]
    clean = {"video": torch.full_like(video, 7.0), "action": torch.full_like(action, 7.0)}
    now = {"video": video, "action": action}
    shifts = {"video": config.video_shift, "action": config.action_shift}
    for stage in stages:
        for i in range(config.steps):
            s, after = {}, {}
            for stream in ("video", "action"):
                grid = [*sigmas(config.steps, shifts[stream]).tolist(), 0.0]
                s[stream], after[stream] = (grid[i], grid[i + 1]) if stream in stage else (0.0, 0.0)
            t = {k: torch.full((B, seen + chunk), 500.0, dtype=video.dtype) for k in s}
            for k in s:
                t[k][:, seen:] = 1000 * s[k]
            flow_video, flow_action = model(
                torch.cat([junk_video, now["video"]], 2),
                torch.cat([state.video[:, :, -seen:], clean["video"]], 2),
                torch.cat([junk_action, now["action"]], 1),
                torch.cat([state.action[:, -seen:], clean["action"]], 1),
                t["video"],
                t["action"],
                text,
                attend=attend,
                frame_start=start,
            )
            flows = {"video": flow_video[:, :, seen:], "action": flow_action[:, seen:]}
            for k in stage:
                now[k] = now[k] + flows[k] * (after[k] - s[k])
        for k in stage:
            clean[k] = now[k]
    return now["video"], now["action"]


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


# (chunk, window, chunks): exact window, evictions with an even and an odd window, chunks of one frame
LAYOUTS = [(2, 4, 4), (1, 5, 4), (3, 2, 2)]


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_rollout_equals_packed_forwards_over_the_window(program, history):
    for chunk, window, chunks in LAYOUTS:
        engine, state = engine_and_state(program, chunk_size=chunk, window=window, history=history)
        for i in range(chunks):
            noise = noises(chunk, i)
            candidate = engine.propose(state, **noise)
            video, action = dense_chunk(engine.model, state, engine.config, *noise.values())
            assert_same(candidate.video, video)
            assert_same(candidate.action, action)
            state = engine.commit(state, candidate)


def test_conditional_rollouts_equal_packed_forwards():
    engine, state = engine_and_state(GJD)
    for i in range(3):
        noise = noises(1, i)
        given = randn(B, 1, SLOTS, A, seed=50 + i)
        forward = engine.propose(
            state, objective="forward_dynamics", clean_action=given, video_noise=noise["video_noise"]
        )
        video, action = dense_chunk(
            engine.model, state, engine.config, noise["video_noise"], given, update=("video",), conditional=True
        )
        assert_same(forward.video, video)
        assert torch.equal(forward.action, given)
        inverse = engine.propose(
            state, objective="inverse_dynamics", clean_video=forward.video, action_noise=noise["action_noise"]
        )
        _, action = dense_chunk(
            engine.model,
            state,
            engine.config,
            forward.video,
            noise["action_noise"],
            update=("action",),
            conditional=True,
        )
        assert_same(inverse.action, action)
        state = engine.commit(state, forward)


@pytest.mark.parametrize("program", ["joint", "action_then_video"])
def test_observations_replace_predictions_and_the_tail(program):
    engine, state = engine_and_state(program, chunk_size=3, window=4)
    for executed in (2, 3, 1, 2):  # of chunks of 3: the next chunk starts off the predicted grid
        imagined = engine.commit(state, engine.propose(state, **noises(3, executed)))
        imagined = engine.commit(imagined, engine.propose(imagined, **noises(3, executed + 1)))
        video, action = randn(B, C, executed, *GRID, seed=70), randn(B, executed, SLOTS, A, seed=71)
        after, direct = (engine.observe(s, video, action) for s in (imagined, state))
        for name in ("video", "action", "text"):
            assert torch.equal(getattr(after, name), getattr(direct, name))
        assert (after.first_frame, after.observed) == (direct.first_frame, direct.observed)
        assert after.next_frame == after.observed == state.next_frame + executed
        assert torch.equal(after.video[:, :, -executed:], video)
        assert torch.equal(after.action[:, -executed:], action)
        state = after
        noise = noises(3, 9)
        candidate = engine.propose(state, **noise)
        for got, want in zip(
            (candidate.video, candidate.action),
            dense_chunk(engine.model, state, engine.config, *noise.values()),
            strict=True,
        ):
            assert_same(got, want)


def test_a_state_keeps_what_observation_brings_back():
    # open loop past the window, then the truth: the window before the first real frame must still be there
    engine, state = engine_and_state("joint", chunk_size=2, window=4)
    video, action = randn(B, C, 6, *GRID, seed=3), randn(B, 6, SLOTS, A, seed=4)
    state = engine.observe(state, video, action)
    assert (state.first_frame, state.next_frame) == (3, 7) and state.video.shape[2] == 4
    far = state
    for i in range(4):
        far = engine.commit(far, engine.propose(far, **noises(2, i)))
    assert far.first_frame == 3 and far.next_frame == 15
    a, b = (engine.observe(s, video[:, :, :1], action[:, :1]) for s in (far, state))
    assert torch.equal(a.video, b.video) and a.first_frame == b.first_frame == 4


def snapshot(state):
    return {
        f.name: v.clone() if isinstance(v := getattr(state, f.name), torch.Tensor) else v
        for f in dataclasses.fields(state)
    }


def assert_unchanged(state, before):
    for name, value in before.items():
        now = getattr(state, name)
        assert torch.equal(now, value) if isinstance(value, torch.Tensor) else now == value


def test_nothing_changes_a_state():
    engine, state = engine_and_state("video_then_action", torch.float32)
    observation = randn(B, C, 1, *GRID, dtype=torch.float32)
    started = engine.start(observation, state.text)
    observation.zero_()
    assert started.video.abs().sum() > 0
    before = snapshot(state)
    noise = noises(2, 0, torch.float32)
    kept = {k: v.clone() for k, v in noise.items()}
    candidate = engine.propose(state, **noise)
    assert all(torch.equal(noise[k], kept[k]) for k in noise)
    assert_unchanged(state, before)
    after = engine.commit(state, candidate)
    candidate.video.zero_()
    assert after.video[:, :, -2:].abs().sum() > 0
    video, action = randn(B, C, 1, *GRID, dtype=torch.float32), randn(B, 1, SLOTS, A, dtype=torch.float32)
    real = engine.observe(after, video, action)
    video.zero_()
    assert real.video[:, :, -1:].abs().sum() > 0
    real.video.zero_()
    assert_unchanged(state, before)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.observed = 3


@pytest.mark.parametrize("program", MODEL_PROGRAMS)
def test_pruned_requests_give_the_same_numbers(program):
    engine, state = engine_and_state(program)
    full, video, action = (
        engine.propose(state, want=want, generator=torch.Generator().manual_seed(5))
        for want in ("both", "video", "action")
    )
    assert_same(video.video, full.video)
    assert_same(action.action, full.action)
    lone = program in ("video_then_action", "decoupled_same_step", "video_noisy_to_action")
    assert (video.action is None) == lone
    assert (action.video is None) == (program in ("action_then_video", "decoupled_same_step", "action_noisy_to_video"))


def counted_rows(engine):
    """(video rows, action rows) of every pass through the blocks."""
    rows = []

    def note(module, args):
        rows.append(tuple(0 if s is None else s.x.shape[1] for s in args[0]))

    engine.model.packed_block_stack.register_forward_pre_hook(note)
    return rows


@pytest.mark.parametrize("program", MODEL_PROGRAMS)
def test_history_is_read_once_a_chunk(program):
    steps = 4
    engine, state = engine_and_state(program, steps=steps)
    state = engine.observe(state, randn(B, C, 6, *GRID), randn(B, 6, SLOTS, A))
    rows = counted_rows(engine)
    tokens = GRID[0] * GRID[1] // 4
    history, video, action = (4 * tokens, 4 * SLOTS), (2 * tokens, 0), (0, 2 * SLOTS)
    both = (2 * tokens, 2 * SLOTS)
    expected = {
        "video_then_action": [history, *[video] * steps, video, *[action] * steps],
        "action_then_video": [history, *[action] * steps, action, *[video] * steps],
        "decoupled_same_step": [history, *[video] * steps, *[action] * steps],
    }.get(program, [history, *[both] * steps])
    engine.propose(state, **noises(2, 0))
    assert rows == expected
    rows.clear()
    engine.propose(state, want="action", **noises(2, 0))
    pruned = {
        "action_then_video": [history, *[action] * steps],
        "decoupled_same_step": [history, *[action] * steps],
        "action_noisy_to_video": [history, *[action] * steps],
    }
    assert rows == pruned.get(program, expected)


def test_history_rows_do_not_grow_with_the_episode():
    engine, state = engine_and_state("joint", window=4)
    rows = counted_rows(engine)
    for i in range(5):
        state = engine.commit(state, engine.propose(state, **noises(2, i)))
    assert max(r[0] for r in rows) == 4 * 2  # four frames of two tokens


def test_samples_of_a_batch_do_not_mix():
    engine, state = engine_and_state("joint")
    noise = noises(2, 0)
    together = engine.propose(state, **noise)
    for i in range(B):
        alone = engine.start(state.video[i : i + 1], state.text[i : i + 1])
        single = engine.propose(alone, **{k: v[i : i + 1] for k, v in noise.items()})
        assert_same(single.video, together.video[i : i + 1])
        assert_same(single.action, together.action[i : i + 1])


def test_bad_requests_are_refused_and_leave_the_state_usable():
    engine, state = engine_and_state(GJD, torch.float32)
    fixed, fixed_state = engine_and_state("joint", torch.float32)
    good = noises(2, 0, torch.float32)
    frame, act = randn(B, C, 1, *GRID), randn(B, 1, SLOTS, A)
    before = snapshot(state)
    refused = [
        (lambda: engine.propose(state, objective="dream", **good), "objective must be one of"),
        (
            lambda: fixed.propose(fixed_state, objective="forward_dynamics", clean_action=act),
            "objective must be one of",
        ),
        (lambda: engine.propose(state, want="words", **good), "want must be one of"),
        (lambda: engine.propose(state), "video_noise must be a tensor"),
        (
            lambda: engine.propose(state, **good | {"video_noise": good["video_noise"][:, :, :1]}),
            "video_noise must have shape",
        ),
        (
            lambda: engine.propose(state, **good | {"action_noise": good["action_noise"][0]}),
            "action_noise must have shape",
        ),
        (lambda: engine.propose(state, clean_video=frame, **good), "clean_video must be None"),
        (lambda: engine.propose(state, objective="forward_dynamics", **good), "clean_action must be a tensor"),
        (
            lambda: engine.propose(state, objective="inverse_dynamics", clean_video=frame, want="video", **good),
            "want must be 'both'",
        ),
        (lambda: engine.observe(state, frame[:, :5], act), "video must have shape"),
        (lambda: engine.observe(state, frame, act[:, :0]), "action must have shape"),
        (lambda: engine.observe(state, frame[:, :, :0], act[:, :0]), "at least 1 frame"),
        (lambda: engine.start(frame[:, :, :0], state.text), "observation must be"),
        (lambda: engine.start(frame, state.text[..., :2]), "text must be"),
        (lambda: RolloutConfig(window=1), "window must be at least 2"),
        (lambda: RolloutConfig(history="none"), "history must be one of"),
        (lambda: RolloutConfig(program="none"), "program must be one of"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()
    decoupled, start = engine_and_state("decoupled_same_step", torch.float32)
    with pytest.raises(ValueError, match="no video.*observe"):
        decoupled.commit(start, decoupled.propose(start, want="action", **good))
    candidate = engine.propose(state, **good)
    moved = engine.observe(state, frame, act)
    with pytest.raises(ValueError, match="another state"):
        engine.commit(moved, candidate)
    assert_unchanged(state, before)
    engine.commit(state, candidate)


def test_bfloat16_model_keeps_float32_states():
    engine, state = engine_and_state("video_then_action", torch.bfloat16)
    exact, start = engine_and_state("video_then_action", torch.float32)
    noise = noises(2, 0, torch.float32)
    got, want = engine.propose(state, **noise), exact.propose(start, **noise)
    assert got.video.dtype == got.action.dtype == state.video.dtype == torch.float32
    assert error(got.video, want.video) < 0.1 and error(got.action, want.action) < 0.1
