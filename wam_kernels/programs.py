"""Who sees whom in other world-action models, as named programs of the same plan language.

A :class:`Program` lists runs of tokens with integer attributes and has one predicate on them; ``compile_plan`` takes it
like a Geometry. The predicate is read once per pair of runs (a frame, a chunk, a segment), never per pair of tokens, so
a program costs runs x runs and a plan what its ranges cost. Each function below is one rule in words, then in code.

    fast_wam_uncond, fast_wam_joint, fast_wam_idm     Fast-WAM
    lingbot_va_train, lingbot_va_text                 LingBot-VA
    dreamzero_train, dreamzero_cached                 DreamZero
    cosmos_policy, prefix_suffix, tri_tower           Cosmos Policy; pi-0 and pi-0.5; Motus
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import cached_property, lru_cache, wraps
from inspect import signature
from types import MappingProxyType

import numpy as np

from ._checks import MAX_INT, int_pairs, integer
from .ranges import Ranges


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of tokens, int64 ``[N]`` each; what an attribute counts is the program's business. Indexing indexes all."""

    count: np.ndarray  # tokens
    segment: np.ndarray  # index into the program's segments
    frame: np.ndarray
    block: np.ndarray
    sample: np.ndarray

    def __getitem__(self, index) -> Runs:
        return Runs(*(getattr(self, field.name)[index] for field in fields(self)))

    @property
    def length(self) -> int:
        return int(self.count.sum())

    def tokens(self) -> Runs:
        """One run for every token."""
        each = self[np.repeat(np.arange(self.count.size), self.count)]
        return Runs(np.ones_like(each.count), *(getattr(each, field.name) for field in fields(self)[1:]))


Rule = Callable[[Runs, Runs], np.ndarray]


@dataclass(frozen=True, eq=False)
class Program:
    """A named visibility rule with its sizes.

    Attributes:
        name: Of the rule.
        segments: Names of the segments that ``Runs.segment`` counts.
        queries, keys: The tokens; the same object where every token is both.
        visible: May query ``q`` see key ``k``? Broadcasts over the attributes of runs or of tokens; returns bool.
        sizes: Arguments of the function of ``NAMED_PROGRAMS`` that made it, which is how it is pickled; None for a
            program of your own.
    """

    name: str
    segments: tuple[str, ...]
    queries: Runs
    keys: Runs
    visible: Rule
    sizes: Mapping[str, object] | None = None

    @property
    def length(self) -> int:
        """Query tokens."""
        return self.queries.length

    @property
    def key_length(self) -> int:
        return self.keys.length

    def dense_mask(self) -> np.ndarray:
        """The predicate on every pair of tokens, bool ``[length, key_length]``: for tests and pictures."""
        q, k = self.queries.tokens(), self.keys.tokens()
        seen = self.visible(q[:, None], k[None, :])
        return np.broadcast_to(seen, (self.length, self.key_length)).copy()

    @cached_property
    def ranges(self) -> Ranges:
        """The predicate on every pair of runs, as ranges."""
        shape = (self.queries.count.size, self.keys.count.size)
        seen = np.broadcast_to(self.visible(self.queries[:, None], self.keys[None, :]), shape)
        change = np.diff(np.pad(seen.astype(np.int8), ((0, 0), (1, 1))), axis=1)
        (row, begin), (_, end) = np.nonzero(change == 1), np.nonzero(change == -1)
        q, k = (np.concatenate([[0], runs.count.cumsum()]) for runs in (self.queries, self.keys))
        q_ranges, k_ranges = np.stack([q[row], q[row + 1]], 1), np.stack([k[begin], k[end]], 1)
        return Ranges(q_ranges, k_ranges, self.length, self.key_length)

    def __reduce__(self) -> tuple:
        if self.sizes is not None:
            return _made_again, (self.name, dict(self.sizes))
        return Program, (self.name, self.segments, self.queries, self.keys, self.visible)

    def __repr__(self) -> str:
        return f"Program({self.name}, length={self.length}, key_length={self.key_length})"


def _segment(index: int, frames: int, tokens: int, frame=None, block=None, sample: int = 0) -> Runs:
    """``frames`` runs of ``tokens`` tokens; frame counts them unless given."""
    every = np.ones(frames, np.int64)
    frame = np.arange(frames) if frame is None else every * frame
    block = every * 0 if block is None else every * block
    return Runs(every * tokens, every * index, frame, block, every * sample)


def _join(parts: Sequence[Runs]) -> Runs:
    return Runs(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Runs)))


def _square(name: str, segments: tuple[str, ...], parts: Sequence[Runs], visible: Rule) -> Program:
    runs = _join(parts)
    return Program(name, segments, runs, runs, visible)


def _all(q: Runs, k: Runs) -> np.ndarray:
    return (q.segment >= 0) & (k.segment >= 0)


def _require(name: str, least: int = 0, **values: int) -> None:
    for argument, value in values.items():
        integer(name, argument, value, least)


class _Programs(dict):
    """The named programs; a name that is not there is answered with those that are."""

    def __missing__(self, name: object) -> Callable[..., Program]:
        near = get_close_matches(str(name), self, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise KeyError(f"NAMED_PROGRAMS: name must be one of {tuple(self)}, got {name!r}{hint}")


NAMED_PROGRAMS: dict[str, Callable[..., Program]] = _Programs()


def _named(rule: Callable[..., Program]) -> Callable[..., Program]:
    """Puts a rule into ``NAMED_PROGRAMS``. The same sizes give the same object."""
    name, types = rule.__name__, {p.name: p.annotation for p in signature(rule).parameters.values()}

    @lru_cache
    def make(*sizes: tuple[str, object]) -> Program:
        return replace(rule(**dict(sizes)), sizes=MappingProxyType(dict(sizes)))

    @wraps(rule)
    def program(**sizes) -> Program:
        # before the cache, to which 2.0 and True are 2 and 1
        for size, value in sizes.items():
            if types.get(size) == "int":
                value = integer(name, size, value, -MAX_INT, most=None)
                # beyond all tokens a window makes no difference
                sizes[size] = min(value, MAX_INT) if size == "window" else value
            elif types.get(size, "").startswith("tuple"):
                sizes[size] = tuple(map(tuple, int_pairs(name, size, value).tolist()))
        return make(*sorted(sizes.items()))

    NAMED_PROGRAMS[name] = program
    return program


def _made_again(name: str, sizes: dict[str, object]) -> Program:
    return NAMED_PROGRAMS[name](**sizes)


# --- Fast-WAM: [video | action] ---------------------------------------------------------------------------------------

VIDEO_MODES = ("first_frame_causal", "per_frame_causal", "bidirectional")


def _video_sees(q: Runs, k: Runs, mode: str) -> np.ndarray:
    """Fast-WAM's three ways in which video frames see each other."""
    if mode == "first_frame_causal":
        return (q.frame > 0) | (k.frame == 0)
    if mode == "per_frame_causal":
        return k.frame <= q.frame
    return _all(q, k)


def _fast_wam(name: str, video_frames: int, video_tokens: int, actions: int, video_mode: str, rule: Rule) -> Program:
    _require(name, video_frames=video_frames, video_tokens=video_tokens, actions=actions)
    if video_mode not in VIDEO_MODES:
        raise ValueError(f"{name}: video_mode must be one of {VIDEO_MODES}, got {video_mode!r}")

    def visible(q: Runs, k: Runs) -> np.ndarray:
        q_video, k_video = q.segment == 0, k.segment == 0
        return np.where(q_video, k_video & _video_sees(q, k, video_mode), ~k_video | rule(q, k))

    parts = _segment(0, video_frames, video_tokens), _segment(1, 1, actions)
    return _square(name, ("video", "action"), parts, visible)


@_named
def fast_wam_uncond(
    *, video_frames: int, video_tokens: int, actions: int, video_mode: str = "first_frame_causal"
) -> Program:
    """Frame 0 sees itself, later frames all video, video never actions; actions see frame 0 and all actions."""
    return _fast_wam("fast_wam_uncond", video_frames, video_tokens, actions, video_mode, lambda q, k: k.frame == 0)


@_named
def fast_wam_joint(
    *, video_frames: int, video_tokens: int, actions: int, video_mode: str = "first_frame_causal"
) -> Program:
    """As :func:`fast_wam_uncond`, but actions see all video."""
    return _fast_wam("fast_wam_joint", video_frames, video_tokens, actions, video_mode, _all)


@_named
def fast_wam_idm(
    *, video_frames: int, video_tokens: int, actions: int, video_mode: str = "first_frame_causal"
) -> Program:
    """[noisy video | clean video | action]: a video copy sees itself; actions see the clean copy and all actions."""
    name = "fast_wam_idm"
    _require(name, video_frames=video_frames, video_tokens=video_tokens, actions=actions)
    if video_mode not in VIDEO_MODES:
        raise ValueError(f"{name}: video_mode must be one of {VIDEO_MODES}, got {video_mode!r}")

    def visible(q: Runs, k: Runs) -> np.ndarray:
        own = (q.segment == k.segment) & ((q.segment == 2) | _video_sees(q, k, video_mode))
        return own | ((q.segment == 2) & (k.segment == 1))

    video = [_segment(index, video_frames, video_tokens) for index in (0, 1)]
    return _square(name, ("noisy video", "clean video", "action"), [*video, _segment(2, 1, actions)], visible)


# --- LingBot-VA: [noisy video | clean video | noisy action | clean action | padding], samples inside each segment ---

LINGBOT_SEGMENTS = ("noisy video", "clean video", "noisy action", "clean action", "padding")


@_named
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
) -> Program:
    """Chunks in the order video 0, action 0, video 1, ...: number 2 (frame // chunk_size), actions one more.

    Inside a sample and within ``window`` numbers: clean sees clean of its own number and before, noisy sees clean of
    strictly before, and noisy sees noisy of its own number. Padding sees nothing and is not seen.
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


@_named
def lingbot_va_text(*, samples: int, video: int, actions: int, text_tokens: int = 512, padding: int = 0) -> Program:
    """Cross-attention of :func:`lingbot_va_train`: the tokens of a sample see that sample's text, padding nothing.

    ``video`` and ``actions`` count one sample's tokens of one segment.
    """
    name = "lingbot_va_text"
    _require(name, video=video, actions=actions, text_tokens=text_tokens, padding=padding)
    _require(name, 1, samples=samples)
    queries = [_segment(s, 1, video if s < 2 else actions, sample=b) for s in range(4) for b in range(samples)]
    queries.append(_segment(4, 1, padding, sample=-1))
    keys = [_segment(5, 1, text_tokens, sample=b) for b in range(samples)]
    segments = (*LINGBOT_SEGMENTS, "text")
    return Program(name, segments, _join(queries), _join(keys), lambda q, k: q.sample == k.sample)


# --- DreamZero: [clean video | noisy video | action | state] ---------------------------------------------------------


@_named
def dreamzero_train(
    *,
    video_frames: int,
    video_tokens: int,
    frames_per_block: int,
    action_tokens: int,
    state_tokens: int,
    window: int,
) -> Program:
    """Frame 0 is a block of its own, then come blocks of ``frames_per_block`` frames, each with its actions and state.

    Clean frame 0 sees itself; clean block i sees clean frame 0 and the last ``window`` frames up to its own end.
    Noisy frame 0 sees itself; noisy block i sees all clean frames before block i, itself, and action and state block
    i; action block i sees the same; state block i sees itself.
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


@_named
def dreamzero_cached(*, cached: int, video: int, actions: int, states: int) -> Program:
    """Inference: [video | action | state] queries all see [cache | video | action | state], the state too."""
    name = "dreamzero_cached"
    _require(name, cached=cached, video=video, actions=actions, states=states)
    own = [_segment(index, 1, n) for index, n in ((1, video), (2, actions), (3, states))]
    segments = ("cache", "video", "action", "state")
    return Program(name, segments, _join(own), _join([_segment(0, 1, cached), *own]), _all)


# --- Dense ones, and the prefix that is blind to what follows --------------------------------------------------------


@_named
def cosmos_policy(*, frames: int, tokens: int) -> Program:
    """Dense over all latent frames; actions and states are frames, and conditioning replaces frames."""
    _require("cosmos_policy", frames=frames, tokens=tokens)
    return _square("cosmos_policy", ("frames",), [_segment(0, frames, tokens)], _all)


@_named
def prefix_suffix(*, prefix: int, actions: int, states: int = 0, padding: tuple[tuple[int, int], ...] = ()) -> Program:
    """pi-0 and pi-0.5: the prefix sees itself; state tokens (pi-0) see prefix and state; actions see everything.

    Args:
        prefix: Image and text tokens.
        actions: Tokens of the action block, which see each other both ways.
        states: Tokens of the state block before it: 1 in pi-0, 0 in pi-0.5.
        padding: Ranges [begin, end) of the prefix, in order, that are padding: they see nothing and are not seen.
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


@_named
def tri_tower(*, video: int, actions: int, understanding: int) -> Program:
    """Motus: three experts share one attention, [video | state, actions and registers | understanding], all see all."""
    _require("tri_tower", video=video, actions=actions, understanding=understanding)
    parts = [_segment(index, 1, n) for index, n in enumerate((video, actions, understanding))]
    return _square("tri_tower", ("video", "action", "understanding"), parts, _all)
