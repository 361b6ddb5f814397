"""Who attends to whom in other world-action models: programs of the same plan language.

Each function is one rule in words, then in code; a :class:`wam_kernels.masks.rules.RuleProgram` in ``RULE_PROGRAMS``.

    fast_wam_uncond, fast_wam_joint, fast_wam_idm     Fast-WAM
    lingbot_va_train, lingbot_va_text                 LingBot-VA
    dreamzero_train, dreamzero_cached                 DreamZero
    cosmos_policy, prefix_suffix, tri_tower           Cosmos Policy; pi-0 and pi-0.5; Motus
    giga_world_policy                                 GigaWorld-Policy
    seer, dream_vla                                   read-out tokens: Seer, DreamVLA
    x_wam, being_h                                    a branch beside the main tokens: X-WAM, Being-H0.7
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from ..runtime.checks import integer
from .registry import register_program
from .rules import Rule, RuleGeometry, Runs


def _segment(index: int, frames: int, tokens: int | np.ndarray, frame=None, block=None, sample: int = 0) -> Runs:
    """``frames`` runs of ``tokens`` tokens; frame counts them unless given."""
    every = np.ones(frames, np.int64)
    frame = np.arange(frames) if frame is None else every * frame
    block = every * 0 if block is None else every * block
    return Runs(every * tokens, every * index, frame, block, every * sample)


def _join(parts: Sequence[Runs]) -> Runs:
    return Runs(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Runs)))


def _square(name: str, segments: tuple[str, ...], parts: Sequence[Runs], visible: Rule) -> RuleGeometry:
    runs = _join(parts)
    return RuleGeometry(name, segments, runs, runs, visible)


def _all(q: Runs, k: Runs) -> np.ndarray:
    return (q.segment >= 0) & (k.segment >= 0)


def _require(name: str, least: int = 0, **values: int) -> None:
    for argument, value in values.items():
        integer(name, argument, value, least)


# --- Fast-WAM: [video | action] ---------------------------------------------------------------------------------------

VIDEO_MODES = ("first_frame_causal", "per_frame_causal", "bidirectional")


def _video_attends(q: Runs, k: Runs, mode: str) -> np.ndarray:
    """Fast-WAM's three ways in which video frames attend to each other."""
    if mode == "first_frame_causal":
        return (q.frame > 0) | (k.frame == 0)
    if mode == "per_frame_causal":
        return k.frame <= q.frame
    return _all(q, k)


def _fast_wam(
    name: str, video_frames: int, video_tokens: int, actions: int, video_mode: str, rule: Rule
) -> RuleGeometry:
    _require(name, video_frames=video_frames, video_tokens=video_tokens, actions=actions)
    if video_mode not in VIDEO_MODES:
        raise ValueError(f"{name}: video_mode must be one of {VIDEO_MODES}, got {video_mode!r}")

    def visible(q: Runs, k: Runs) -> np.ndarray:
        q_video, k_video = q.segment == 0, k.segment == 0
        return np.where(q_video, k_video & _video_attends(q, k, video_mode), ~k_video | rule(q, k))

    parts = _segment(0, video_frames, video_tokens), _segment(1, 1, actions)
    return _square(name, ("video", "action"), parts, visible)


@register_program
def fast_wam_uncond(
    *, video_frames: int, video_tokens: int, actions: int, video_mode: str = "first_frame_causal"
) -> RuleGeometry:
    """Frame 0 attends to itself, later frames to all video, never to actions; actions to frame 0 and all actions."""
    return _fast_wam("fast_wam_uncond", video_frames, video_tokens, actions, video_mode, lambda q, k: k.frame == 0)


@register_program
def fast_wam_joint(
    *, video_frames: int, video_tokens: int, actions: int, video_mode: str = "first_frame_causal"
) -> RuleGeometry:
    """As :func:`fast_wam_uncond`, but actions attend to all video."""
    return _fast_wam("fast_wam_joint", video_frames, video_tokens, actions, video_mode, _all)


@register_program
def fast_wam_idm(
    *, video_frames: int, video_tokens: int, actions: int, video_mode: str = "first_frame_causal"
) -> RuleGeometry:
    """[noisy video | clean video | action]: a video copy attends to itself; actions to clean video and actions."""
    name = "fast_wam_idm"
    _require(name, video_frames=video_frames, video_tokens=video_tokens, actions=actions)
    if video_mode not in VIDEO_MODES:
        raise ValueError(f"{name}: video_mode must be one of {VIDEO_MODES}, got {video_mode!r}")

    def visible(q: Runs, k: Runs) -> np.ndarray:
        own = (q.segment == k.segment) & ((q.segment == 2) | _video_attends(q, k, video_mode))
        return own | ((q.segment == 2) & (k.segment == 1))

    video = [_segment(index, video_frames, video_tokens) for index in (0, 1)]
    return _square(name, ("noisy video", "clean video", "action"), [*video, _segment(2, 1, actions)], visible)


# --- LingBot-VA: [noisy video | clean video | noisy action | clean action | padding], samples inside each segment ---

LINGBOT_SEGMENTS = ("noisy video", "clean video", "noisy action", "clean action", "padding")


@register_program
def lingbot_va_train(
    *,
    samples: int,
    video_frames: int,
    video_tokens: int,
    action_frames: int,
    action_tokens: int,
    chunk_size: int,
    window: int,
    padding: int = 0,
) -> RuleGeometry:
    """Chunks in the order video 0, action 0, video 1, ...: number 2 (frame // chunk_size), actions one more.

    Inside a sample and within ``window`` numbers: clean attends to clean of its own number and before, noisy to
    clean of strictly before, and to noisy of its own number. Padding neither attends nor is attended to.
    """
    name = "lingbot_va_train"
    sizes = {"video_frames": video_frames, "video_tokens": video_tokens, "action_frames": action_frames}
    _require(name, action_tokens=action_tokens, window=window, padding=padding, **sizes)
    _require(name, 1, samples=samples, chunk_size=chunk_size)

    def visible(q: Runs, k: Runs) -> np.ndarray:
        q_clean, k_clean = q.segment % 2 == 1, k.segment % 2 == 1
        history = k_clean & np.where(q_clean, k.block <= q.block, k.block < q.block)
        own = ~q_clean & ~k_clean & (k.block == q.block)
        valid = (q.segment < 4) & (k.segment < 4)
        return (history | own) & valid & (q.sample == k.sample) & (abs(q.block - k.block) <= window)

    parts = []
    for segment in range(4):
        frames, tokens = (video_frames, video_tokens) if segment < 2 else (action_frames, action_tokens)
        first = np.arange(0, frames, chunk_size)
        count = np.minimum(chunk_size, frames - first) * tokens  # the last chunk may be short
        for sample in range(samples):
            chunk = _segment(segment, first.size, count, first, 2 * (first // chunk_size) + segment // 2, sample)
            parts.append(chunk)
    return _square(name, LINGBOT_SEGMENTS, [*parts, _segment(4, 1, padding, sample=-1)], visible)


@register_program
def lingbot_va_text(
    *, samples: int, video: int, actions: int, text_tokens: int = 512, padding: int = 0
) -> RuleGeometry:
    """Cross-attention of :func:`lingbot_va_train`: the tokens of a sample attend to its text, padding to nothing.

    ``video`` and ``actions`` count one sample's tokens of one segment.
    """
    name = "lingbot_va_text"
    _require(name, video=video, actions=actions, text_tokens=text_tokens, padding=padding)
    _require(name, 1, samples=samples)
    queries = [_segment(s, 1, video if s < 2 else actions, sample=b) for s in range(4) for b in range(samples)]
    queries.append(_segment(4, 1, padding, sample=-1))
    keys = [_segment(5, 1, text_tokens, sample=b) for b in range(samples)]
    segments = (*LINGBOT_SEGMENTS, "text")
    return RuleGeometry(name, segments, _join(queries), _join(keys), lambda q, k: q.sample == k.sample)


# --- DreamZero: [clean video | noisy video | action | state] ---------------------------------------------------------


@register_program
def dreamzero_train(
    *,
    video_frames: int,
    video_tokens: int,
    frames_per_block: int,
    action_tokens: int,
    state_tokens: int,
    window: int,
) -> RuleGeometry:
    """Frame 0 is a block of its own, then come blocks of ``frames_per_block`` frames, each with its actions and state.

    Clean frame 0 attends to itself; clean block i to clean frame 0 and the last ``window`` frames up to its own end.
    Noisy frame 0 attends to itself; noisy block i to all clean frames before block i, itself, and action and state
    block i; action block i to the same; state block i to itself.
    """
    name = "dreamzero_train"
    sizes = {"video_tokens": video_tokens, "action_tokens": action_tokens, "state_tokens": state_tokens}
    _require(name, window=window, **sizes)
    _require(name, 1, video_frames=video_frames, frames_per_block=frames_per_block)
    if (video_frames - 1) % frames_per_block:
        raise ValueError(
            f"{name}: video_frames must be 1 + a multiple of frames_per_block={frames_per_block}, got {video_frames}"
        )

    def visible(q: Runs, k: Runs) -> np.ndarray:
        clean, noisy, action, state = ((q.segment == i, k.segment == i) for i in range(4))
        same = q.block == k.block
        end = q.block * frames_per_block + 1  # first frame behind the query's block
        recent = (k.frame < end) & (k.frame >= end - window)
        by_clean = clean[1] & np.where(q.block == 0, k.block == 0, (k.frame == 0) | recent)
        history = clean[1] & (q.block > 0) & (k.block < q.block)
        by_noisy = history | (same & (noisy[1] | action[1] | state[1]))
        return (clean[0] & by_clean) | ((noisy[0] | action[0]) & by_noisy) | (state[0] & state[1] & same)

    blocks = (video_frames - 1) // frames_per_block
    frame, number = np.arange(video_frames), np.arange(1, blocks + 1)
    of_frame = (frame - 1) // frames_per_block + 1
    parts = [_segment(index, video_frames, video_tokens, frame, of_frame) for index in (0, 1)]
    parts += [_segment(2, blocks, action_tokens, 0, number), _segment(3, blocks, state_tokens, 0, number)]
    return _square(name, ("clean video", "noisy video", "action", "state"), parts, visible)


@register_program
def dreamzero_cached(*, cached: int, video: int, actions: int, states: int) -> RuleGeometry:
    """Inference: [video | action | state] queries all attend to [cache | video | action | state], the state too."""
    name = "dreamzero_cached"
    _require(name, cached=cached, video=video, actions=actions, states=states)
    own = [_segment(index, 1, n) for index, n in ((1, video), (2, actions), (3, states))]
    segments = ("cache", "video", "action", "state")
    return RuleGeometry(name, segments, _join(own), _join([_segment(0, 1, cached), *own]), _all)


# --- Dense ones, and the prefix that is blind to what follows --------------------------------------------------------


@register_program
def cosmos_policy(*, frames: int, tokens: int) -> RuleGeometry:
    """Dense over all latent frames; actions and states are frames, and conditioning replaces frames."""
    _require("cosmos_policy", frames=frames, tokens=tokens)
    return _square("cosmos_policy", ("frames",), [_segment(0, frames, tokens)], _all)


@register_program
def prefix_suffix(
    *, prefix: int, actions: int, states: int = 0, padding: tuple[tuple[int, int], ...] = ()
) -> RuleGeometry:
    """pi-0 and pi-0.5: the prefix attends to itself; state tokens (pi-0) to prefix and state; actions to everything.

    Args:
        prefix: Image and text tokens.
        actions: Tokens of the action block, which attend to each other both ways.
        states: Tokens of the state block before it: 1 in pi-0, 0 in pi-0.5.
        padding: Ranges [begin, end) of the prefix, in order, that are padding: they neither attend nor are attended to.
    """
    name = "prefix_suffix"
    _require(name, prefix=prefix, actions=actions, states=states)
    parts, at = [], 0
    for begin, end in padding:
        if not at <= begin <= end <= prefix:
            raise ValueError(f"{name}: padding must hold ranges in order inside prefix={prefix}, got {padding}")
        parts += [_segment(0, 1, begin - at), _segment(3, 1, end - begin)]
        at = end
    parts += [_segment(0, 1, prefix - at), _segment(1, 1, states), _segment(2, 1, actions)]

    def visible(q: Runs, k: Runs) -> np.ndarray:
        return (k.segment <= q.segment) & (q.segment < 3) & (k.segment < 3)

    return _square(name, ("prefix", "state", "action", "padding"), parts, visible)


@register_program
def tri_tower(*, video: int, actions: int, understanding: int, startup: int = 0) -> RuleGeometry:
    """Motus: three experts share one attention, [video | state, actions and registers | understanding], all to all.

    The first ``startup`` of the action tokens query but are never keys: those of the observed frame, to which no action
    leads, in a model with ``full_attention``.
    """
    name = "tri_tower"
    _require(name, video=video, actions=actions, understanding=understanding, startup=startup)
    if startup > actions:
        raise ValueError(f"{name}: startup must be at most actions={actions}, got {startup}")
    sizes = (0, video, 0), (1, startup, 1), (1, actions - startup, 0), (2, understanding, 0)
    parts = [_segment(index, 1, n, block=block) for index, n, block in sizes]
    return _square(name, ("video", "action", "understanding"), parts, lambda q, k: _all(q, k) & (k.block == 0))


# --- GigaWorld-Policy: [state | action | reference video | future video] ---------------------------------------------


@register_program
def giga_world_policy(*, states: int, actions: int, reference: int, future: int) -> RuleGeometry:
    """State and reference video attend to each other, actions to these and themselves, the future video to everything.

    Actions never attend to the future, so a policy runs without it, and what comes before the actions is cached.
    """
    name = "giga_world_policy"
    _require(name, states=states, actions=actions, reference=reference, future=future)

    def visible(q: Runs, k: Runs) -> np.ndarray:
        known = (k.segment == 0) | (k.segment == 2)
        return known | ((q.segment == 1) & (k.segment == 1)) | (q.segment == 3)

    parts = [_segment(index, 1, n) for index, n in enumerate((states, actions, reference, future))]
    return _square(name, ("state", "action", "reference video", "future video"), parts, visible)


# --- Read-out tokens: every time step is [context | queries of what is to come | action queries] ---------------------


def _read_out(name: str, steps: int, context: int, foresight: Sequence[int], own: Sequence[bool], actions: int, names):
    """Queries of a kind attend to each other where ``own`` says so; a step's action queries to its other queries."""

    def visible(q: Runs, k: Runs) -> np.ndarray:
        history = (k.segment == 0) & (k.frame <= q.frame)
        same_step = k.frame == q.frame
        itself = (k.segment == q.segment) & np.isin(q.segment, 1 + np.flatnonzero(own))
        by_action = (q.segment == last) & (k.segment > 0) & (k.segment < last)
        return history | (same_step & (itself | by_action))

    sizes, last = (context, *foresight, actions), 1 + len(foresight)
    parts = [_segment(index, 1, n, step) for step in range(steps) for index, n in enumerate(sizes)]
    return _square(name, names, parts or [_segment(0, 0, 0)], visible)


@register_program
def seer(*, steps: int, context: int, foresight: int, actions: int) -> RuleGeometry:
    """Of each of ``steps`` time steps: text, state and image tokens, foresight queries, action queries.

    Everything attends to the context of its own step and before. No query is attended to, not even by itself, but for
    the foresight queries of a step by its action queries: inverse dynamics of the predicted frame.
    """
    _require("seer", steps=steps, context=context, foresight=foresight, actions=actions)
    names = "context", "foresight", "action"
    return _read_out("seer", steps, context, [foresight], [False], actions, names)


@register_program
def dream_vla(*, steps: int, context: int, frames: int, depth: int, trajectories: int, actions: int) -> RuleGeometry:
    """As :func:`seer` with three kinds of queries, blind to each other: of frames, of depth, of trajectories.

    Those of depth and of trajectories attend to their own kind; action queries to all three.
    """
    name = "dream_vla"
    kinds = {"frames": frames, "depth": depth, "trajectories": trajectories}
    _require(name, steps=steps, context=context, actions=actions, **kinds)
    names = "context", *kinds, "action"
    return _read_out(name, steps, context, list(kinds.values()), [False, True, True], actions, names)


# --- A branch that reads the main tokens one way ----------------------------------------------------------------------


@register_program
def x_wam(*, main: int, depth: int) -> RuleGeometry:
    """Main tokens (video, state, actions) attend to each other, tokens of the depth branch to everything."""
    _require("x_wam", main=main, depth=depth)
    parts = [_segment(index, 1, n) for index, n in enumerate((main, depth))]
    return _square("x_wam", ("main", "depth"), parts, lambda q, k: k.segment <= q.segment)


@register_program
def being_h(*, context: int, latents: int, actions: int) -> RuleGeometry:
    """Being-H0.7 in training, two branches behind one context: learned queries, or as many embeddings of the future.

    The context attends to itself; the latents of a branch to it and to each other, its actions to these and each other.
    Branches do not attend to each other. A policy runs the first branch alone: :func:`prefix_suffix` with ``states``.
    """
    _require("being_h", context=context, latents=latents, actions=actions)

    def visible(q: Runs, k: Runs) -> np.ndarray:
        return (k.segment == 0) | ((k.block == q.block) & (k.segment <= q.segment) & (q.segment > 0))

    names = "context", "queries", "actions", "future", "actions of the future"
    sizes = (context, 0), (latents, 1), (actions, 1), (latents, 2), (actions, 2)
    parts = [_segment(index, 1, n, block=branch) for index, (n, branch) in enumerate(sizes)]
    return _square("being_h", names, parts, visible)
