"""The visibility predicate as intervals: for every row of tokens, which contiguous token ranges it sees.

All tokens of one chunk of one segment see the same keys, and inside one key *column* (a segment, its external
prefix apart) those keys are contiguous. So a sample is described by ``[columns, rows]`` integers, whatever the number
of tokens, and the mask of a row is ``any_c(lo[c] <= key < hi[c])``. The backward needs the transposed relation (which
queries see this key); it is intervals again.

What a program allows inside a chunk and in the history is read off ``visibility.visible``; this file only adds
the arithmetic of frames, chunks, windows and cuts, for all samples and columns at once. Tests compare it with the
predicate on random geometries.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .ranges import RangeRows, Ranges, expand, starts
from .visibility import ACTION, SEGMENTS, VIDEO, Geometry, Tokens, visible

# What has no token: stays below zero whatever first token is added to it.
NOWHERE = np.iinfo(np.int32).min
# The singleton frame of a geometry without one.
NEVER = np.iinfo(np.int32).max

STREAM_OF_SEGMENT = np.array([stream for stream, _ in SEGMENTS])
# The segments as [stream, noise], so that what is the same for both noises of a stream broadcasts.
STREAMS = (len(SEGMENTS) // 2, 2)


class SideRows(NamedTuple):
    """One side of some samples: runs of tokens, and the ranges of the other side's tokens that each of them meets.

    Sample after sample, in the order of its tokens, which count from the sample's first one.
    """

    begin: np.ndarray  # int64 [samples + 1]: the rows of sample i are begin[i] .. begin[i + 1]
    stream: np.ndarray  # int64 [N]
    order: np.ndarray  # int64 [N]: inside (sample, stream), rows next to each other see nearly the same
    start: np.ndarray  # int64 [N]: first token
    count: np.ndarray  # int64 [N]: tokens
    bounds: np.ndarray  # int32 [2, columns, N]: lo and hi; both NOWHERE where a range is empty


def side_rows(samples: Sequence[Geometry | Ranges]) -> tuple[SideRows, SideRows]:
    """Query side and key side of samples, geometries before ranges.

    If all are geometries, the sides share every array but ``bounds``: each token is a query and a key.
    """
    geometries = [s for s in samples if isinstance(s, Geometry)]
    pieces = [_geometry_sides(geometries)] if geometries else []
    pieces += [(_range_side(r.rows), _range_side(r.key_rows)) for r in samples[len(geometries) :]]
    return pieces[0] if len(pieces) == 1 else tuple(_concatenate(side) for side in zip(*pieces, strict=True))


def _geometry_sides(geometries: Sequence[Geometry]) -> tuple[SideRows, SideRows]:
    rows = token_rows(geometries)
    shared = (rows.begin, STREAM_OF_SEGMENT[rows.segment], rows.chunk, rows.start, rows.count)
    return SideRows(*shared, intervals(rows)), SideRows(*shared, intervals(rows, transposed=True))


def _range_side(rows: RangeRows) -> SideRows:
    lo, hi = rows.bounds.transpose(2, 1, 0)
    bounds = np.where(lo < hi, (lo, hi), NOWHERE).astype(np.int32)
    return SideRows(
        np.array([0, rows.start.size]), np.zeros_like(rows.start), rows.order, rows.start, rows.count, bounds
    )


def _concatenate(pieces: Sequence[SideRows]) -> SideRows:
    columns = max(p.bounds.shape[1] for p in pieces)
    bounds = [
        np.pad(p.bounds, ((0, 0), (0, columns - p.bounds.shape[1]), (0, 0)), constant_values=NOWHERE) for p in pieces
    ]
    begin = np.concatenate([np.diff(p.begin) for p in pieces]).cumsum()
    rest = (np.concatenate(arrays) for arrays in zip(*(p[1:-1] for p in pieces), strict=True))
    return SideRows(np.concatenate([[0], begin]), *rest, np.concatenate(bounds, -1))


class Rules(NamedTuple):
    """The numbers of a geometry that its rows follow from; int64 ``[n]`` each, of n geometries or of n rows."""

    window: np.ndarray
    size: np.ndarray
    origin: np.ndarray  # chunk c of the target frames begins at frame origin + c * size
    singleton: np.ndarray  # or NEVER
    singleton_chunk: np.ndarray
    startup: np.ndarray
    conditional: np.ndarray  # 0 or 1
    video_rank: np.ndarray
    prefix: np.ndarray
    prefix_frame: np.ndarray  # the number that all prefix frames share, and its chunk
    prefix_chunk: np.ndarray
    video_frames: np.ndarray  # without the prefix
    action_frames: np.ndarray
    video_tokens: np.ndarray
    action_tokens: np.ndarray

    @classmethod
    def of(cls, g: Geometry) -> Rules:
        """The numbers of one geometry."""
        origin = g.chunk_origin - bool(g.prefix_frames) * g.chunk_size
        s = g.singleton_frame
        return cls(
            window=g.window,
            size=g.chunk_size,
            origin=origin,
            singleton=NEVER if s is None else s,
            singleton_chunk=NEVER if s is None else (s - origin) // g.chunk_size,
            startup=g.startup_action_frames,
            conditional=int(g.conditional_history is not None),
            video_rank=g.video_rank(),
            prefix=g.prefix_frames,
            prefix_frame=-1 if s is None else s - 1,
            prefix_chunk=0 if s is None else g.chunk_of(max(0, s - 1)),
            video_frames=g.video_frames - g.prefix_frames,
            action_frames=g.action_frames,
            video_tokens=g.video_tokens,
            action_tokens=g.action_tokens,
        )

    def chunk_of(self, frame: np.ndarray) -> np.ndarray:
        """Chunk of a target frame; one before the singleton that would share its chunk moves to the chunk before."""
        chunk = (frame - self.origin) // self.size
        return chunk - ((frame < self.singleton) & (chunk == self.singleton_chunk))

    def chunk_start(self, chunk: np.ndarray) -> np.ndarray:
        """First target frame of a chunk; the frames before a singleton left its chunk."""
        return np.where(chunk == self.singleton_chunk, self.singleton, self.origin + chunk * self.size)

    def rank(self) -> np.ndarray:
        """Of each stream: ``[streams, 1, n]``."""
        return np.stack([self.video_rank, 1 - self.video_rank])[:, None]

    def per_frame(self) -> np.ndarray:
        """Tokens of a frame of each stream: ``[streams, 1, n]``."""
        return np.stack([self.video_tokens, self.action_tokens])[:, None]

    def frames(self) -> np.ndarray:
        """Frames of each stream, the prefix apart: ``[streams, 1, n]``."""
        return np.stack([self.video_frames, self.action_frames])[:, None]


class Rows(NamedTuple):
    """Runs of tokens with one visibility: a chunk of a segment of a geometry; int64 ``[N]`` each.

    A conditional history looks at single frames, and start-up frames are no keys: there a row is one frame.
    """

    begin: np.ndarray  # int64 [geometries + 1]: the rows of geometry i are begin[i] .. begin[i + 1]
    segment: np.ndarray  # index into SEGMENTS
    frame: np.ndarray  # the first one
    chunk: np.ndarray
    block: np.ndarray
    is_key: np.ndarray  # bool
    start: np.ndarray  # first token, counted from the geometry's own
    count: np.ndarray  # tokens
    rules: Rules
    segment_start: np.ndarray  # [streams, noises, N]: first token of every segment of the row's geometry
    allowed: np.ndarray  # bool [as a key, own chunk or earlier, streams, noises, N]: with every segment, by the program


def token_rows(geometries: Sequence[Geometry]) -> Rows:
    """List the rows of geometries, one after another."""
    table = np.array([Rules.of(g) for g in geometries]).T  # [fields, geometries]

    # every frame of both streams of every geometry
    frames = np.array([(g.video_frames, g.action_frames) for g in geometries]).ravel()
    run = np.repeat(np.arange(frames.size), frames)
    rules, is_video = Rules(*table.take(run // 2, axis=1)), run % 2 == VIDEO
    place = expand(np.zeros_like(frames), frames)
    frame = place - is_video * rules.prefix
    in_prefix = frame < 0
    frame = np.where(in_prefix, rules.prefix_frame, frame)
    chunk = np.where(in_prefix, rules.prefix_chunk, rules.chunk_of(frame))
    block = 2 * chunk + np.where(is_video, rules.video_rank, 1 - rules.video_rank)
    is_key = is_video | (frame >= rules.startup)

    # like frames that follow each other are a row; under a conditional history every frame sees another boundary
    new = np.ones(run.size, bool)
    alike = np.stack([run, chunk, in_prefix, is_key])
    new[1:] = (alike[:, 1:] != alike[:, :-1]).any(0) | (rules.conditional[1:] > 0)
    first = np.flatnonzero(new)
    frames_of_row = np.diff(first, append=run.size)

    # the rows of a stream stand in both of its segments
    rows_of_run = np.bincount(run[first], minlength=frames.size)
    run_of_segment = (2 * np.arange(len(geometries))[:, None] + STREAM_OF_SEGMENT).ravel()
    counts = rows_of_run[run_of_segment]
    row = expand(starts(rows_of_run)[run_of_segment], counts)
    pick = first[row]
    segment = np.repeat(np.arange(counts.size), counts)  # over all geometries
    geometry = segment // len(SEGMENTS)
    rules = Rules(*table.take(geometry, axis=1))
    per_frame = np.where(is_video[pick], rules.video_tokens, rules.action_tokens)
    lengths = np.array([g.segment_lengths for g in geometries])
    segment_start = lengths.cumsum(1) - lengths
    allowed = [
        _allowed(g.program, g.history, g.prefix_frames > 0, g.conditional_history is not None) for g in geometries
    ]
    return Rows(
        begin=np.append(0, counts.reshape(-1, len(SEGMENTS)).sum(1).cumsum()),
        segment=segment % len(SEGMENTS),
        frame=frame[pick],
        chunk=chunk[pick],
        block=block[pick],
        is_key=is_key[pick],
        start=segment_start.ravel()[segment] + place[pick] * per_frame,
        count=frames_of_row[row] * per_frame,
        rules=rules,
        segment_start=segment_start.T.take(geometry, axis=1).reshape(*STREAMS, -1),
        allowed=np.concatenate(allowed, -1).take(segment, axis=-1).reshape(2, 2, *STREAMS, -1),
    )


@lru_cache
def _allowed(program: str, history: str, prefixed: bool, conditional: bool) -> np.ndarray:
    """What the predicate allows between segments, bool ``[as a key, own chunk or earlier, other segment, segment]``."""
    probe = Geometry(
        program=program,
        video_frames=1,
        video_tokens=1,
        action_frames=1,
        action_tokens=1,
        chunk_size=1,
        window=8,
        history=history,
        prefix_frames=int(prefixed),
        conditional_history="previous_boundary_video_only" if conditional else None,
    )

    def segments(chunk: int) -> Tokens:
        stream, noise = np.array(SEGMENTS).T
        rank = (stream == ACTION) ^ bool(probe.video_rank())
        # the boundary frame of chunk 1, so that a conditional history is probed where it can be true
        frame = np.full(4, probe.boundary_frame(1))
        chunks = np.full(4, chunk)
        return Tokens(stream, noise, frame, chunks, 2 * chunks + rank, np.ones(4, bool))

    query = segments(1)[:, None]
    seen = np.stack([visible(probe, query, segments(chunk)[None, :]) for chunk in (1, 0)])  # [.., query, key]
    return np.stack([seen.swapaxes(-1, -2), seen])


def intervals(rows: Rows, transposed: bool = False) -> np.ndarray:
    """Visible token ranges of every row, int32 ``[lo or hi, columns, N]``; empty ones are ``NOWHERE``.

    The columns are the segments and, if a geometry has a prefix, the prefixes of both video segments: prefix frames
    share one chunk number that need not be below their successors'. ``transposed`` reads rows as keys and columns as
    the queries that see them.
    """
    rules = rows.rules
    per_frame, first = rules.per_frame(), rows.segment_start
    first_target = first + np.stack([rules.prefix, 0 * rules.prefix])[:, None] * per_frame
    columns = [_token_ranges(rows, transposed, first_target, per_frame, *_target_frames(rows, transposed))]
    if rules.prefix.any():
        frames = _prefix_frames(rows, transposed)
        columns.append(_token_ranges(rows, transposed, first[VIDEO], per_frame[VIDEO], np.zeros_like(frames), frames))
    return np.concatenate(columns, axis=1)


def _token_ranges(
    rows: Rows, transposed: bool, first: np.ndarray, per_frame: np.ndarray, lo: np.ndarray, hi: np.ndarray
) -> np.ndarray:
    """Tokens of frames ``lo .. hi`` that begin at token ``first``."""
    some = lo < hi
    if transposed:
        some &= rows.is_key  # nobody sees a start-up slot
    ranges = np.where(some, (first + lo * per_frame, first + hi * per_frame), NOWHERE)
    return ranges.astype(np.int32).reshape(2, -1, rows.start.size)


def _target_frames(rows: Rows, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Frames ``[lo, hi)`` of each segment, its prefix apart, that a row sees or is seen from: ``[streams, noises, N]``.

    Each optional rule (conditional history, singleton) is only computed if a geometry has it.
    """
    rules, chunk = rows.rules, rows.chunk
    own, earlier = rows.allowed[int(transposed)]
    conditional = rules.conditional.any()
    # first and last chunk inside the window: a ceiling and a floor
    least = -((rules.window + rules.rank() - rows.block) // 2)
    most = (rows.block + rules.window - rules.rank()) // 2
    if transposed:
        first, last = np.where(own, chunk, chunk + 1), np.where(earlier, most, chunk)
        if conditional:  # only the chunk that begins right after this frame looks back at it
            next_frame = rows.frame + 1 - rules.origin
            reader = next_frame // rules.size
            read = earlier & (next_frame % rules.size == 0) & (reader > chunk) & (reader <= most)
            last = np.where(rules.conditional, np.where(read, reader, chunk - ~own), last)
            first = np.where((rules.conditional > 0) & ~own, np.where(read, reader, chunk + 1), first)
    else:
        first, last = np.where(earlier, least, chunk), np.where(own, chunk, chunk - 1)
    lo = rules.chunk_start(np.maximum(first, least))
    hi = rules.chunk_start(np.minimum(last, most) + 1)
    if conditional and not transposed:  # the history is the one frame before the chunk
        boundary = rules.origin + chunk * rules.size - 1
        boundary_chunk = rules.chunk_of(boundary)
        read = earlier & (boundary >= 0) & (boundary_chunk < chunk) & (boundary_chunk >= least)
        own_lo = rules.chunk_start(chunk)
        own_hi = np.where(own, rules.chunk_start(chunk + 1), own_lo)
        lo = np.where(rules.conditional, np.where(read, boundary, own_lo), lo)
        hi = np.where(rules.conditional, np.where(read & ~own, boundary + 1, own_hi), hi)
    if (rules.singleton != NEVER).any():  # queries at or after the singleton see no key before it
        if transposed:
            hi = np.where(rows.frame < rules.singleton, np.minimum(hi, rules.singleton), hi)
        else:
            lo = np.where(rows.frame >= rules.singleton, np.maximum(lo, rules.singleton), lo)
    np.maximum(lo, 0, out=lo)
    np.minimum(hi, rules.frames(), out=hi)
    if not transposed:
        np.maximum(lo[ACTION], rules.startup, out=lo[ACTION])  # start-up slots are never keys
    return lo, hi


def _prefix_frames(rows: Rows, transposed: bool) -> np.ndarray:
    """Frames of the prefix of each video segment that a row sees or is seen from, all or none: ``[noises, N]``."""
    rules = rows.rules
    own, earlier = rows.allowed[int(transposed), :, VIDEO]
    key_chunk, query_chunk = rules.prefix_chunk, rows.chunk
    key_frame, query_frame = rules.prefix_frame, rows.frame
    if transposed:
        key_chunk, query_chunk, key_frame, query_frame = query_chunk, key_chunk, query_frame, key_frame
    boundary = rules.origin + query_chunk * rules.size - 1
    earlier = earlier & (key_chunk < query_chunk) & ((rules.conditional == 0) | (key_frame == boundary))
    seen = (own & (key_chunk == query_chunk)) | earlier
    seen &= abs(rows.block - (2 * rules.prefix_chunk + rules.video_rank)) <= rules.window
    seen &= ~((query_frame >= rules.singleton) & (key_frame < rules.singleton))
    return np.where(seen, rules.prefix, 0)
