"""The named programs of other systems, against masks painted block by block from each rule in words."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan.test_plan import mask_of_side
from wam_kernels import RULE_PROGRAMS, TileShape, compile_plan
from wam_kernels.masks.systems import VIDEO_MODES

few, some = st.integers(0, 4), st.integers(1, 5)


def paint_video(mask: np.ndarray, at: int, frames: int, tokens: int, mode: str) -> None:
    """One copy of the video at token ``at`` attends to itself, frame by frame."""
    for f in range(frames):
        last = {"first_frame_causal": frames if f else 1, "per_frame_causal": f + 1, "bidirectional": frames}[mode]
        mask[at + f * tokens : at + (f + 1) * tokens, at : at + last * tokens] = True


def fast_wam(name: str, video_frames: int, video_tokens: int, actions: int, video_mode: str) -> np.ndarray:
    video = video_frames * video_tokens
    copies = 2 if name == "fast_wam_idm" else 1
    begin = copies * video
    mask = np.zeros((begin + actions,) * 2, bool)
    for copy in range(copies):
        paint_video(mask, copy * video, video_frames, video_tokens, video_mode)
    mask[begin:, begin:] = True
    seen = {
        "fast_wam_uncond": (0, min(video_tokens, video)),
        "fast_wam_joint": (0, video),
        "fast_wam_idm": (video, begin),
    }
    mask[begin:, slice(*seen[name])] = True
    return mask


def lingbot_va_train(
    samples, video_frames, video_tokens, action_frames, action_tokens, chunk_size, window, padding
) -> np.ndarray:
    tokens = []  # (sample, number, clean) of every token, in order
    for action in (0, 1):
        frames, each = (action_frames, action_tokens) if action else (video_frames, video_tokens)
        for clean in (0, 1):
            for sample in range(samples):
                for f in range(frames):
                    tokens += [(sample, f // chunk_size * 2 + action, clean)] * each
    n = len(tokens) + padding
    mask = np.zeros((n, n), bool)
    for i, (q_sample, q, q_clean) in enumerate(tokens):
        for j, (k_sample, k, k_clean) in enumerate(tokens):
            if q_sample != k_sample or abs(q - k) > window:
                continue
            if q_clean and k_clean:
                mask[i, j] = k <= q
            elif k_clean:
                mask[i, j] = k < q
            elif not q_clean:
                mask[i, j] = k == q
    return mask


def lingbot_va_text(samples, video, actions, text_tokens, padding) -> np.ndarray:
    mask = np.zeros((2 * samples * (video + actions) + padding, samples * text_tokens), bool)
    at = 0
    for each in (video, video, actions, actions):
        for sample in range(samples):
            mask[at : at + each, sample * text_tokens : (sample + 1) * text_tokens] = True
            at += each
    return mask


def dreamzero_train(video_frames, video_tokens, frames_per_block, action_tokens, state_tokens, window) -> np.ndarray:
    half = video_frames * video_tokens
    blocks = (video_frames - 1) // frames_per_block
    actions, states = 2 * half, 2 * half + blocks * action_tokens
    mask = np.zeros((states + blocks * state_tokens,) * 2, bool)
    first = slice(0, video_tokens)
    mask[first, first] = True
    mask[half : half + video_tokens, half : half + video_tokens] = True
    for i in range(blocks):
        begin, end = 1 + i * frames_per_block, 1 + (i + 1) * frames_per_block
        clean, noisy = (
            slice(begin * video_tokens, end * video_tokens),
            slice(half + begin * video_tokens, half + end * video_tokens),
        )
        action = slice(actions + i * action_tokens, actions + (i + 1) * action_tokens)
        state = slice(states + i * state_tokens, states + (i + 1) * state_tokens)
        mask[clean, first] = True
        mask[clean, max(1, end - window) * video_tokens : end * video_tokens] = True
        for query in (noisy, action):
            for key in (slice(0, begin * video_tokens), noisy, action, state):
                mask[query, key] = True
        mask[state, state] = True
    return mask


def prefix_suffix(prefix, actions, states, padding) -> np.ndarray:
    mask = np.zeros((prefix + states + actions,) * 2, bool)
    mask[:prefix, :prefix] = True
    mask[prefix : prefix + states, : prefix + states] = True
    mask[prefix + states :, :] = True
    for begin, end in padding:
        mask[begin:end, :] = False
        mask[:, begin:end] = False
    return mask


def giga_world_policy(states, actions, reference, future) -> np.ndarray:
    state = slice(0, states)
    action = slice(states, states + actions)
    ref = slice(states + actions, states + actions + reference)
    n = ref.stop + future
    mask = np.zeros((n, n), bool)
    for query, keys in ((state, (state, ref)), (ref, (state, ref)), (action, (state, ref, action))):
        for key in keys:
            mask[query, key] = True
    mask[ref.stop :] = True
    return mask


def one_way(main, depth) -> np.ndarray:
    mask = np.ones((main + depth,) * 2, bool)
    mask[:main, main:] = False
    return mask


def two_branches(context, latents, actions) -> np.ndarray:
    """Of each branch the mask of a prefix, laid over the same context."""
    n = latents + actions
    mask = np.zeros((context + 2 * n,) * 2, bool)
    mask[:, :context] = True
    for first in (context, context + n):
        mask[first : first + n, first : first + n] = True
        mask[first : first + latents, first + latents : first + n] = False
    return mask


def read_out(steps, context, kinds, own, actions) -> np.ndarray:
    """``kinds`` of queries after the context of every step, then action queries."""
    each = context + sum(kinds) + actions
    mask = np.zeros((steps * each,) * 2, bool)
    for q in range(steps):
        for k in range(q + 1):
            mask[q * each : (q + 1) * each, k * each : k * each + context] = True
        at = q * each + context
        queries_end = at + sum(kinds)
        mask[queries_end : (q + 1) * each, at:queries_end] = True
        for count, attends in zip(kinds, own, strict=True):
            if attends:
                mask[at : at + count, at : at + count] = True
            at += count
    return mask


fast_wam_sizes = st.fixed_dictionaries(
    {"video_frames": few, "video_tokens": some, "actions": few, "video_mode": st.sampled_from(VIDEO_MODES)}
)
dreamzero_sizes = st.builds(
    lambda blocks, each, **sizes: sizes | {"video_frames": 1 + blocks * each, "frames_per_block": each},
    blocks=few, each=st.integers(1, 3), video_tokens=some, action_tokens=some, state_tokens=few,
    window=st.integers(0, 9),
)  # fmt: skip
padding = st.sampled_from([(), ((2, 4),), ((0, 1), (3, 6)), ((6, 6),)])


def all_but_startup(video, actions, understanding, startup):
    keys = [True] * video + [i >= startup for i in range(actions)] + [True] * understanding
    return np.array([keys] * len(keys), bool).reshape(len(keys), len(keys))


# name -> (sizes, mask in words)
RULES = {
    name: (fast_wam_sizes, lambda name=name, **sizes: fast_wam(name, **sizes))
    for name in ("fast_wam_uncond", "fast_wam_joint", "fast_wam_idm")
} | {
    "lingbot_va_train": (
        st.fixed_dictionaries(
            {"samples": st.integers(1, 3), "video_frames": few, "video_tokens": some, "action_frames": few}
            | {"action_tokens": some, "chunk_size": st.integers(1, 3), "window": st.integers(0, 7), "padding": few}
        ),
        lingbot_va_train,
    ),
    "lingbot_va_text": (
        st.fixed_dictionaries({"samples": some, "video": few, "actions": few, "text_tokens": few, "padding": few}),
        lingbot_va_text,
    ),
    "dreamzero_train": (dreamzero_sizes, dreamzero_train),
    "dreamzero_cached": (
        st.fixed_dictionaries({"cached": few, "video": few, "actions": few, "states": few}),
        lambda cached, video, actions, states: np.ones(
            (video + actions + states, cached + video + actions + states), bool
        ),
    ),
    "cosmos_policy": (
        st.fixed_dictionaries({"frames": few, "tokens": some}),
        lambda frames, tokens: np.ones((frames * tokens,) * 2, bool),
    ),
    "prefix_suffix": (
        st.fixed_dictionaries({"prefix": st.integers(6, 9), "actions": few, "states": few, "padding": padding}),
        prefix_suffix,
    ),
    "tri_tower": (
        st.fixed_dictionaries(
            {"video": few, "actions": st.integers(2, 4), "understanding": few, "startup": st.integers(0, 2)}
        ),
        all_but_startup,
    ),
    "giga_world_policy": (
        st.fixed_dictionaries({"states": few, "actions": few, "reference": few, "future": few}),
        giga_world_policy,
    ),
    "seer": (
        st.fixed_dictionaries({"steps": few, "context": few, "foresight": few, "actions": few}),
        lambda steps, context, foresight, actions: read_out(steps, context, [foresight], [False], actions),
    ),
    "dream_vla": (
        st.fixed_dictionaries(
            {"steps": st.integers(0, 3), "context": few, "frames": few}
            | {"depth": few, "trajectories": few, "actions": few}
        ),
        lambda steps, context, frames, depth, trajectories, actions: read_out(
            steps, context, [frames, depth, trajectories], [False, True, True], actions
        ),
    ),
    "x_wam": (st.fixed_dictionaries({"main": few, "depth": few}), one_way),
    "being_h": (st.fixed_dictionaries({"context": few, "latents": few, "actions": few}), two_branches),
}


def test_every_named_program_has_a_rule_here():
    assert set(RULES) == set(RULE_PROGRAMS)


@pytest.mark.parametrize("name", RULES)
def test_predicate_ranges_and_plan_match_the_rule_in_words(name):
    sizes_of, rule = RULES[name]

    @settings(max_examples=60, deadline=None)
    @given(sizes_of)
    def check(sizes):
        expected = rule(**sizes)
        program = RULE_PROGRAMS[name](**sizes)
        assert expected.shape == (program.length, program.key_length)
        np.testing.assert_array_equal(program.dense_mask(), expected)
        np.testing.assert_array_equal(program.ranges.dense_mask(), expected)
        if expected.size:
            plan = compile_plan(program, tile=TileShape(8, 8))
            assert plan.visible_pairs == expected.sum()
            np.testing.assert_array_equal(mask_of_side(plan.queries, 1, *expected.shape)[0], expected)
            np.testing.assert_array_equal(mask_of_side(plan.keys, 1, *expected.shape[::-1])[0], expected.T)

    check()


def test_programs_are_cached_by_their_sizes():
    sizes = {"video_frames": 3, "video_tokens": 4, "actions": 2}
    joint = RULE_PROGRAMS["fast_wam_joint"]
    assert joint(**sizes) is joint(**sizes)
    assert compile_plan(joint(**sizes)) is compile_plan(joint(**sizes))


# The sizes that the systems run at, and the least visible / computed pairs of either side; counted, not measured.
TYPICAL = [
    ("fast_wam_uncond", dict(video_frames=3, video_tokens=98, actions=32), 0.79),
    ("fast_wam_joint", dict(video_frames=3, video_tokens=98, actions=32), 0.81),
    ("fast_wam_idm", dict(video_frames=3, video_tokens=98, actions=32), 0.80),
    (
        "lingbot_va_train",
        dict(samples=1, video_frames=26, video_tokens=120, action_frames=26, action_tokens=16, chunk_size=2, window=64),
        0.91,
    ),
    (
        "lingbot_va_train",
        dict(samples=4, video_frames=20, video_tokens=32, action_frames=20, action_tokens=16, chunk_size=1, window=8),
        0.87,
    ),
    ("lingbot_va_text", dict(samples=4, video=640, actions=320), 0.99),
    (
        "dreamzero_train",
        dict(video_frames=9, video_tokens=880, frames_per_block=2, action_tokens=24, state_tokens=1, window=9),
        0.98,
    ),
    ("dreamzero_cached", dict(cached=3520, video=1760, actions=24, states=1), 0.98),
    ("cosmos_policy", dict(frames=9, tokens=196), 0.96),
    ("prefix_suffix", dict(prefix=968, actions=50), 0.94),
    ("tri_tower", dict(video=1200, actions=50, understanding=100), 0.94),
    ("giga_world_policy", dict(states=1, actions=48, reference=880, future=1760), 0.9),
    ("seer", dict(steps=10, context=22, foresight=20, actions=3), 0.3),
]


@pytest.mark.parametrize("name, sizes, least", TYPICAL, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(TYPICAL)])
def test_efficiency_at_typical_sizes(name, sizes, least):
    plan = compile_plan(RULE_PROGRAMS[name](**sizes))
    sides = [plan.visible_pairs / side.computed_pairs for side in (plan.queries, plan.keys)]
    print(name, plan, [round(s, 3) for s in sides])
    assert min(sides) >= least


def test_a_name_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(KeyError, match="one of .*tri_tower.*got 'fastwam_joint'; did you mean 'fast_wam_joint'"):
        RULE_PROGRAMS["fastwam_joint"]
    assert RULE_PROGRAMS.get("fastwam_joint") is None and "fastwam_joint" not in RULE_PROGRAMS


def test_sizes_are_checked_before_the_cache_that_takes_2_for_2_0():
    policy = RULE_PROGRAMS["cosmos_policy"]
    assert policy(tokens=np.int64(1), frames=np.uint8(2)) is policy(frames=2, tokens=1)
    for sizes in ({"frames": 2.0, "tokens": 1}, {"frames": 2, "tokens": True}):
        with pytest.raises(ValueError, match="cosmos_policy: .* must be an int, got"):
            policy(**sizes)


@pytest.mark.parametrize("window", [10**9, sys.maxsize, 2**63])
def test_a_window_without_a_limit(window):
    for name in ("dreamzero_train", "lingbot_va_train"):
        sizes = next(sizes for typical, sizes, _ in TYPICAL if typical == name)
        program, wide = (RULE_PROGRAMS[name](**sizes | {"window": w}) for w in (window, 1000))
        assert program.ranges == wide.ranges


@pytest.mark.parametrize(
    "name, sizes, message",
    [
        ("fast_wam_joint", dict(video_frames=-1, video_tokens=2, actions=2), "fast_wam_joint: video_frames must be"),
        (
            "fast_wam_idm",
            dict(video_frames=1, video_tokens=2, actions=2, video_mode="causal"),
            "video_mode must be one of",
        ),
        (
            "dreamzero_train",
            dict(video_frames=4, video_tokens=2, frames_per_block=2, action_tokens=1, state_tokens=1, window=3),
            "video_frames must be 1 \\+ a multiple of frames_per_block=2, got 4",
        ),
        (
            "prefix_suffix",
            dict(prefix=4, actions=1, padding=((2, 5),)),
            "padding must hold ranges in order inside prefix=4",
        ),
        ("prefix_suffix", dict(prefix=4, actions=1, padding=[(1.0, 2)]), "prefix_suffix: padding must be integers"),
        ("cosmos_policy", dict(frames=2.5, tokens=2), "cosmos_policy: frames must be an int, got 2.5"),
    ],
)
def test_refusals(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        RULE_PROGRAMS[name](**sizes)
