"""The visibility predicate as intervals: for every row of tokens, which contiguous token ranges it sees.

All tokens of one chunk of one segment see the same keys, and inside one key *column* (a segment, its external
prefix apart) those keys are contiguous. So a whole batch is described by ``[rows, columns, 2]`` integers, whatever
the number of tokens, and the mask of a row is ``any_c(lo[c] <= key < hi[c])``. The backward needs the transposed
relation (which queries see this key); it is intervals again.

What a program allows inside a chunk and in the history is read off ``visibility.visible``; this file only adds
the arithmetic of chunks, windows and cuts. Tests compare it with the predicate on random geometries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np

from .ranges import Ranges
from .visibility import ACTION, SEGMENTS, VIDEO, Geometry, Tokens, visible

# Key columns of a sample. Prefix frames share one chunk number that need not be below their successors', so they
# are columns of their own; batches without a prefix only use the first four.
COLUMNS = tuple((segment, False) for segment in range(4)) + tuple((segment, True) for segment in range(2))


@dataclass(frozen=True, eq=False)
class Rows:
    """Runs of tokens with one visibility: a chunk of a segment of a sample, or padding; int64 ``[N]`` each.

    A conditional history looks at single frames, and start-up frames are no keys: there a row is one frame.
    """

    batch: np.ndarray
    sample: np.ndarray  # counts over the whole batch, in order
    segment: np.ndarray  # index into SEGMENTS; -1: padding
    prefix: np.ndarray  # bool
    frame: np.ndarray  # the first one
    chunk: np.ndarray
    block: np.ndarray
    is_key: np.ndarray  # bool
    start: np.ndarray  # first token, inside the batch element
    count: np.ndarray  # tokens
    geometries: tuple[Geometry, ...]  # by sample
    segment_starts: tuple[tuple[int, ...], ...]  # by sample: first token of each segment

    @property
    def columns(self) -> int:
        return 6 if self.prefix.any() else 4

    @cached_property
    def rules(self) -> _Rules:
        return _Rules(self)


def _stream_rows(geometry: Geometry, stream: int) -> np.ndarray:
    """Rows of one copy of a stream, ``[prefix, frame, chunk, block, is_key, first frame, frames]`` by row."""
    frame, chunk, block = geometry.frames(stream)
    prefix = np.arange(frame.size) < (geometry.prefix_frames if stream == VIDEO else 0)
    is_key = (stream == VIDEO) | (frame >= geometry.startup_action_frames)
    first = np.arange(frame.size)
    if geometry.conditional_history is None:  # else every frame sees another boundary, or might
        alike = (2 * chunk + prefix) * 2 + is_key
        first = np.flatnonzero(np.diff(alike, prepend=alike[:1] - 1))
    frames = np.diff(first, append=frame.size)
    return np.stack([*(a[first] for a in (prefix, frame, chunk, block, is_key)), first, frames])


def token_rows(batch: tuple[tuple[Geometry, ...], ...], length: int) -> Rows:
    """List the rows of ``batch[b] = (sample, sample, ...)``, samples one after another, padded to ``length``."""
    of_stream = {g: {s: _stream_rows(g, s) for s in (VIDEO, ACTION)} for g in set(chain(*batch))}
    parts, origins, geometries, segment_starts = [], [], [], []
    for b, samples in enumerate(batch):
        start = 0
        for geometry in samples:
            starts = []
            for segment, (stream, _) in enumerate(SEGMENTS):
                rows = of_stream[geometry][stream]
                per_frame = geometry.action_tokens if stream == ACTION else geometry.video_tokens
                parts.append(rows)
                origins.append((b, len(geometries), segment, start, per_frame, rows.shape[1]))
                starts.append(start)
                start += geometry.segment_lengths[segment]
            geometries.append(geometry)
            segment_starts.append(tuple(starts))
        if start < length:  # padding: rows that see nothing and that nobody sees
            parts.append(np.array([[0, 0, 0, 0, 0, 0, 1]]).T)
            origins.append((b, -1, -1, start, length - start, 1))
    prefix, frame, chunk, block, is_key, first, frames = np.concatenate(parts, 1)
    *origin, counts = np.array(origins).T
    b, sample, segment, start, per_frame = (np.repeat(column, counts) for column in origin)
    attributes = (prefix.astype(bool), frame, chunk, block, is_key.astype(bool))
    places = (start + first * per_frame, frames * per_frame)
    return Rows(b, sample, segment, *attributes, *places, tuple(geometries), tuple(segment_starts))


@lru_cache
def _allowed(program: str, history: str, prefixed: bool, conditional: bool) -> tuple[np.ndarray, np.ndarray]:
    """What the predicate allows between segments: inside one chunk, and from an earlier chunk. bool ``[4, 4]``."""
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

    q = segments(1)[:, None]
    return visible(probe, q, segments(1)[None, :]), visible(probe, q, segments(0)[None, :])


def intervals(rows: Rows, transposed: bool = False) -> np.ndarray:
    """Visible token ranges ``[lo, hi)`` of every row, int64 ``[N, columns, 2]``; empty ones are ``[0, 0)``.

    ``transposed`` reads rows as keys and columns as the queries that see them.
    """
    rules = rows.rules
    out = np.zeros((rows.segment.size, rows.columns, 2), np.int64)
    for column, (segment, prefix) in enumerate(COLUMNS[: rows.columns]):
        find = rules.prefix_column if prefix else rules.target_column
        lo, hi = find(segment, transposed)
        if SEGMENTS[segment][0] == ACTION and not transposed:
            lo = np.maximum(lo, rules.startup)  # start-up slots are never keys ...
        some = (lo < hi) & (rows.segment >= 0)
        if transposed:
            some &= rows.is_key  # ... so nobody sees them
        per_frame, first = rules.tokens_of(segment)
        if not prefix and SEGMENTS[segment][0] == VIDEO:
            first = first + rules.prefix * per_frame
        out[:, column, 0] = np.where(some, first + lo * per_frame, 0)
        out[:, column, 1] = np.where(some, first + hi * per_frame, 0)
    return out


class _Rules:
    """Per-row rule parameters, gathered once, and the chunk arithmetic on them."""

    def __init__(self, rows: Rows) -> None:
        none = replace(rows.geometries[0], prefix_frames=0, singleton_frame=None) if rows.geometries else None
        geometries = (*rows.geometries, none)  # padding rows have sample -1 and read this one; masked out later
        self.rows = rows
        big = np.iinfo(np.int32).max

        def gather(value) -> np.ndarray:
            return np.array([value(g) for g in geometries])[rows.sample]

        self.window = gather(lambda g: g.window)
        self.size = gather(lambda g: g.chunk_size)
        self.prefix = gather(lambda g: g.prefix_frames)
        # chunk c of the target frames begins at frame origin + c * size
        self.origin = gather(lambda g: g.chunk_origin - bool(g.prefix_frames) * g.chunk_size)
        self.singleton = gather(lambda g: big if g.singleton_frame is None else g.singleton_frame)
        self.startup = gather(lambda g: g.startup_action_frames)
        self.conditional = gather(lambda g: g.conditional_history is not None)
        self.video_rank = gather(lambda g: g.video_rank())
        self.video_frames = gather(lambda g: g.video_frames - g.prefix_frames)
        self.action_frames = gather(lambda g: g.action_frames)
        prefixes = [g.frames(VIDEO) if g.prefix_frames else [np.zeros(1, np.int64)] * 3 for g in geometries]
        self.prefix_frame, self.prefix_chunk, self.prefix_block = (
            np.array([p[i][0] for p in prefixes])[rows.sample] for i in range(3)
        )
        self.video_tokens, self.action_tokens = gather(lambda g: g.video_tokens), gather(lambda g: g.action_tokens)
        self.segment_start = np.array((*rows.segment_starts, (0, 0, 0, 0)))[rows.sample]
        keys = [(g.program, g.history, g.prefix_frames > 0, g.conditional_history is not None) for g in geometries]
        tables = [_allowed(*key) for key in keys]
        self.own_chunk = np.array([t[0] for t in tables])[rows.sample]
        self.earlier = np.array([t[1] for t in tables])[rows.sample]

    def tokens_of(self, segment: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens per frame of a segment, and its first token."""
        per_frame = self.video_tokens if SEGMENTS[segment][0] == VIDEO else self.action_tokens
        return per_frame, self.segment_start[:, segment]

    def rank(self, segment: int) -> np.ndarray:
        return self.video_rank if SEGMENTS[segment][0] == VIDEO else 1 - self.video_rank

    def flags(self, segment: int, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
        """(own chunk allowed, earlier chunk allowed) between each row and a column's segment."""
        index = np.arange(self.rows.segment.size)
        pick = (index, segment, self.rows.segment) if transposed else (index, self.rows.segment, segment)
        return self.own_chunk[pick], self.earlier[pick]

    def chunk_of(self, frame: np.ndarray) -> np.ndarray:
        chunk = (frame - self.origin) // self.size
        return chunk - ((frame < self.singleton) & (chunk == self.singleton_chunk))

    @property
    def singleton_chunk(self) -> np.ndarray:
        return (self.singleton - self.origin) // self.size

    def chunk_start(self, chunk: np.ndarray) -> np.ndarray:
        """First target frame of a chunk; the frames before a singleton left its chunk."""
        return np.where(chunk == self.singleton_chunk, self.singleton, self.origin + chunk * self.size)

    def target_column(self, segment: int, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
        """Frames ``[lo, hi)`` of the (non-prefix) column that each row sees, or is seen from."""
        rows, rank = self.rows, self.rank(segment)
        own, earlier = self.flags(segment, transposed)
        # first and last chunk inside the window: a ceiling and a floor
        least, most = -((self.window + rank - rows.block) // 2), (rows.block + self.window - rank) // 2
        if transposed:
            hi_chunk = np.where(earlier, most, rows.chunk)
            lo_chunk = np.where(own, rows.chunk, rows.chunk + 1)
            # conditional: only the chunk that begins right after this frame looks back at it
            reader = (rows.frame + 1 - self.origin) // self.size
            starts = (rows.frame + 1 - self.origin) % self.size == 0
            read = earlier & starts & (reader > rows.chunk) & (reader <= most)
            hi_chunk = np.where(self.conditional, np.where(read, reader, rows.chunk - ~own), hi_chunk)
            lo_chunk = np.where(self.conditional & ~own, np.where(read, reader, rows.chunk + 1), lo_chunk)
        else:
            lo_chunk = np.where(earlier, least, rows.chunk)
            hi_chunk = np.where(own, rows.chunk, rows.chunk - 1)
        lo_chunk, hi_chunk = np.maximum(lo_chunk, least), np.minimum(hi_chunk, most)
        lo, hi = self.chunk_start(lo_chunk), self.chunk_start(hi_chunk + 1)
        if not transposed:  # conditional: the history is the one frame before the chunk
            boundary = self.origin + rows.chunk * self.size - 1
            chunk = self.chunk_of(boundary)
            read = earlier & (boundary >= 0) & (chunk < rows.chunk) & (chunk >= least)
            own_lo = self.chunk_start(rows.chunk)
            own_hi = np.where(own, self.chunk_start(rows.chunk + 1), own_lo)
            lo = np.where(self.conditional, np.where(read, boundary, own_lo), lo)
            hi = np.where(self.conditional, np.where(read & ~own, boundary + 1, own_hi), hi)
        # queries at or after the singleton see no key before it
        if transposed:
            hi = np.where(rows.frame < self.singleton, np.minimum(hi, self.singleton), hi)
        else:
            lo = np.where(rows.frame >= self.singleton, np.maximum(lo, self.singleton), lo)
        frames = self.video_frames if SEGMENTS[segment][0] == VIDEO else self.action_frames
        return np.clip(lo, 0, frames), np.clip(hi, 0, frames)

    def prefix_column(self, segment: int, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
        """The same for a prefix: all of its frames or none."""
        rows = self.rows
        own, earlier = self.flags(segment, transposed)
        key_chunk, query_chunk = self.prefix_chunk, rows.chunk
        key_frame, query_frame = self.prefix_frame, rows.frame
        if transposed:
            key_chunk, query_chunk, key_frame, query_frame = query_chunk, key_chunk, query_frame, key_frame
        boundary = self.origin + query_chunk * self.size - 1
        earlier = earlier & (key_chunk < query_chunk) & (~self.conditional | (key_frame == boundary))
        seen = (own & (key_chunk == query_chunk)) | earlier
        seen &= abs(rows.block - self.prefix_block) <= self.window
        seen &= ~((query_frame >= self.singleton) & (key_frame < self.singleton))
        return np.zeros_like(self.prefix), np.where(seen, self.prefix, 0)


class SideRows(NamedTuple):
    """Rows of one side of a batch and the ranges of the other side's tokens that each of them meets."""

    batch: np.ndarray  # int64 [N]; -1 in sample and segment: padding
    sample: np.ndarray
    segment: np.ndarray
    order: np.ndarray  # inside (batch, sample, stream): rows next to each other see nearly the same
    start: np.ndarray
    count: np.ndarray
    bounds: np.ndarray  # int64 [N, columns, 2]


def side_rows(batch: tuple[tuple[Geometry | Ranges, ...], ...], lengths: tuple[int, int]) -> tuple[SideRows, SideRows]:
    """Query side and key side of ``batch[b] = (sample, sample, ...)``, padded to ``lengths`` = (queries, keys)."""
    if lengths[0] == lengths[1] and all(isinstance(s, Geometry) for samples in batch for s in samples):
        rows = token_rows(batch, lengths[0])
        shared = (rows.batch, rows.sample, rows.segment, rows.chunk, rows.start, rows.count)
        return SideRows(*shared, intervals(rows)), SideRows(*shared, intervals(rows, transposed=True))
    parts: tuple[list[SideRows], list[SideRows]] = ([], [])
    number = 0
    for b, samples in enumerate(batch):
        starts = [0, 0]
        for sample in samples:
            for side, piece in enumerate(_sample_rows(sample)):
                bounds = np.where(piece.bounds[..., :1] < piece.bounds[..., 1:], piece.bounds + starts[1 - side], 0)
                ids = {"batch": piece.batch + b, "sample": piece.sample + number}
                parts[side].append(piece._replace(**ids, start=piece.start + starts[side], bounds=bounds))
            starts[0] += sample.length
            starts[1] += sample.key_length
            number += 1
        for side, start in enumerate(starts):
            if start < lengths[side]:
                one, zero = np.ones(1, np.int64), np.zeros(1, np.int64)
                ids = (one * b, -one, -one, zero, one * start, one * (lengths[side] - start))
                parts[side].append(SideRows(*ids, np.zeros((1, 1, 2), np.int64)))
    return tuple(_concatenate(pieces) for pieces in parts)


def _sample_rows(sample: Geometry | Ranges) -> tuple[SideRows, SideRows]:
    """Both sides of one sample that begins at token 0 of batch element 0."""
    if isinstance(sample, Geometry):
        return side_rows(((sample,),), (sample.length, sample.length))
    sides = []
    for rows in (sample.rows, sample.key_rows):
        zero = np.zeros(rows.start.size, np.int64)
        sides.append(SideRows(zero, zero, zero, rows.order, rows.start, rows.count, rows.bounds))
    return tuple(sides)


def _concatenate(pieces: list[SideRows]) -> SideRows:
    columns = max(piece.bounds.shape[1] for piece in pieces)
    bounds = [np.pad(p.bounds, ((0, 0), (0, columns - p.bounds.shape[1]), (0, 0))) for p in pieces]
    return SideRows(*(np.concatenate(a) for a in zip(*(p[:-1] for p in pieces), strict=True)), np.concatenate(bounds))
