"""The visibility predicate as intervals: for every row of tokens, the contiguous token ranges that it attends to.

All tokens of one chunk of one segment attend to the same keys, and inside one key *column* (a segment, its external
prefix apart) those keys are contiguous. So a sample is described by ``[columns, rows]`` integers, whatever the number
of tokens, and the mask of a row is ``any_c(lo[c] <= key < hi[c])``. The backward needs the transposed relation (which
queries attend to this key); it is intervals again.

What a program allows inside a chunk and in the history is read off ``visibility.visible``; this file only adds
the arithmetic of frames, chunks, windows and cuts, for all samples and columns at once. Tests compare it with the
predicate on random geometries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from ..masks.visibility import ACTION, SEGMENTS, VIDEO, Geometry, Tokens, visible
from ..runtime.arrays import expand, members

# What has no token: stays below zero whatever first token is added to it.
NOWHERE = np.iinfo(np.int32).min
# The singleton frame of a geometry without one.
NEVER = np.iinfo(np.int64).max

STREAM_OF_SEGMENT = np.array([stream for stream, _ in SEGMENTS])
# The segments as [stream, noise], so that what is the same for both noises of a stream broadcasts.
STREAMS = (len(SEGMENTS) // 2, 2)


class Rules(NamedTuple):
    """The numbers of a geometry that its rows follow from; int64 ``[n]`` each, of n geometries or of n rows."""

    window: np.ndarray
    size: np.ndarray
    origin: np.ndarray  # chunk c of the target frames begins at frame origin + c * size
    singleton: np.ndarray  # or NEVER
    singleton_chunk: np.ndarray
    startup: np.ndarray
    conditional: np.ndarray  # 0 or 1
    prefix: np.ndarray
    prefix_frame: np.ndarray  # the number that all prefix frames share, and its chunk
    prefix_chunk: np.ndarray

    @classmethod
    def of(cls, g: Geometry) -> list[int]:
        """The numbers of one geometry, in the order of the fields."""
        origin = g.chunk_origin - bool(g.prefix_frames) * g.chunk_size
        s = g.singleton_frame
        numbers = dict(
            window=g.window,
            size=g.chunk_size,
            origin=origin,
            singleton=NEVER if s is None else s,
            singleton_chunk=NEVER if s is None else (s - origin) // g.chunk_size,
            startup=g.startup_action_frames,
            conditional=int(g.conditional_history is not None),
            prefix=g.prefix_frames,
            prefix_frame=-1 if s is None else s - 1,
            prefix_chunk=0 if s is None else g.chunk_of(max(0, s - 1)),
        )
        return [numbers[name] for name in cls._fields]

    def chunk_of(self, frame: np.ndarray) -> np.ndarray:
        """Chunk of a target frame; one before the singleton that would share its chunk moves to the chunk before."""
        chunk = (frame - self.origin) // self.size
        return chunk - ((frame < self.singleton) & (chunk == self.singleton_chunk))

    def chunk_start(self, chunk: np.ndarray) -> np.ndarray:
        """First target frame of a chunk; the frames before a singleton left its chunk."""
        first = chunk * self.size
        first += self.origin
        if self.has_singleton:
            first = np.where(chunk == self.singleton_chunk, self.singleton, first)
        return first

    @property
    def has_singleton(self) -> bool:
        return bool((self.singleton != NEVER).any())


class Streams(NamedTuple):
    """The numbers of the streams of a geometry; int64."""

    rank: np.ndarray  # of its order blocks inside a chunk
    frames: np.ndarray
    targets: np.ndarray  # frames after the prefix
    per_frame: np.ndarray  # tokens

    @classmethod
    def of(cls, g: Geometry) -> list[tuple[int, int]]:
        """Video and action of one geometry, in the order of the fields."""
        numbers = dict(
            rank=g.interaction.rank,
            frames=(g.video_frames, g.action_frames),
            targets=(g.video_frames - g.prefix_frames, g.action_frames),
            per_frame=(g.video_tokens, g.action_tokens),
        )
        return [numbers[name] for name in cls._fields]


class Rows(NamedTuple):
    """Runs of tokens with one visibility: a chunk of a segment of a geometry; int64 ``[N]`` each.

    A conditional history looks at single frames, and start-up frames are no keys: there a row is one frame.
    """

    of_geometry: np.ndarray  # int64 [geometries]: rows of each
    segment: np.ndarray  # index into SEGMENTS
    frame: np.ndarray  # the first one
    chunk: np.ndarray
    block: np.ndarray
    is_key: np.ndarray  # bool
    start: np.ndarray  # first token, counted from the geometry's own
    tokens: np.ndarray  # how many
    rules: Rules
    # what a row has with every segment, whichever of its sides is asked for
    streams: Streams  # [streams, 1, N] each
    first: np.ndarray  # [streams, noises, N]: first token, the prefix apart
    least: np.ndarray  # [streams, 1, N]: first and last chunk inside the window
    most: np.ndarray
    allowed: np.ndarray  # bool [as a key, own chunk or earlier, streams, noises, N]: by the program


def token_rows(geometries: Sequence[Geometry]) -> Rows:
    """List the rows of geometries, one after another."""
    of_geometry = np.array([Rules.of(g) for g in geometries]).T  # [fields, geometries]
    of_stream = np.array([Streams.of(g) for g in geometries]).swapaxes(0, 1)  # [fields, geometries, streams]
    runs = Streams(*of_stream.reshape(len(of_stream), -1))
    stream_rows = _stream_rows(of_geometry, runs)

    # the rows of a stream stand in both of its segments
    rows_of_run = np.bincount(stream_rows[0], minlength=runs.frames.size)
    run_of_segment = (STREAMS[0] * np.arange(len(geometries))[:, None] + STREAM_OF_SEGMENT).ravel()
    row, rows_of_segment = members(rows_of_run, run_of_segment)
    run, chunk, is_key, frame, place, frames = stream_rows.take(row, axis=1)
    per_frame, block = runs.per_frame.take(run), 2 * chunk + runs.rank.take(run)
    segment = np.arange(rows_of_segment.size).repeat(rows_of_segment)  # counted over all geometries
    geometry = run // STREAMS[0]
    segment_start = np.array([[*accumulate(g.segment_lengths[:-1], initial=0)] for g in geometries])

    rules = Rules(*of_geometry.take(geometry, axis=1))
    streams = Streams(*of_stream.swapaxes(1, 2).take(geometry, axis=2)[:, :, None])
    first = segment_start.T.take(geometry, axis=1).reshape(*STREAMS, -1)
    first[VIDEO] += rules.prefix * streams.per_frame[VIDEO]
    kinds = [(g.program, g.history, g.prefix_frames > 0, g.conditional_history is not None) for g in geometries]
    allowed = np.concatenate([_allowed(*kind) for kind in kinds], -1).take(segment, axis=-1)
    ahead = block - streams.rank
    return Rows(
        of_geometry=rows_of_segment.reshape(-1, len(SEGMENTS)).sum(1),
        segment=segment % len(SEGMENTS),
        frame=frame,
        chunk=chunk,
        block=block,
        is_key=is_key > 0,
        start=segment_start.ravel().take(segment) + place * per_frame,
        tokens=frames * per_frame,
        rules=rules,
        streams=streams,
        first=first,
        least=-((rules.window - ahead) // 2),  # rounded up and rounded down
        most=(rules.window + ahead) // 2,
        allowed=allowed.reshape(2, 2, *STREAMS, -1),
    )


def _stream_rows(of_geometry: np.ndarray, runs: Streams) -> np.ndarray:
    """Rows of one copy of each stream, int64 ``[run, chunk, is_key, frame, place, frames]`` by row.

    ``runs`` are the streams of all geometries, video and action in turn; a row begins ``place`` frames into its run.
    """
    run = np.arange(runs.frames.size).repeat(runs.frames)
    rules, is_video = Rules(*of_geometry.take(run // 2, axis=1)), run % 2 == VIDEO
    place = expand(np.zeros_like(runs.frames), runs.frames)
    frame = place - is_video * rules.prefix
    in_prefix = frame < 0
    frame = np.where(in_prefix, rules.prefix_frame, frame)
    chunk = np.where(in_prefix, rules.prefix_chunk, rules.chunk_of(frame))
    is_key = is_video | (frame >= rules.startup)

    # like frames that follow each other are a row; under a conditional history every frame has another boundary
    frames = np.array([run, chunk, is_key, frame, place])
    alike = np.array([run, chunk, is_key, in_prefix])
    new = np.ones(run.size + 1, bool)  # the last one is the end of the last row
    new[1:-1] = (alike[:, 1:] != alike[:, :-1]).any(0) | (rules.conditional[1:] > 0)
    edges = np.flatnonzero(new)
    return np.concatenate([frames.take(edges[:-1], axis=1), [edges[1:] - edges[:-1]]])


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
        rank = np.array(probe.interaction.rank)[stream]
        # the boundary frame of chunk 1, so that a conditional history is probed where it can be true
        frame = np.full(4, probe.boundary_frame(1))
        chunks = np.full(4, chunk)
        return Tokens(stream, noise, frame, chunks, 2 * chunks + rank, np.ones(4, bool))

    query = segments(1)[:, None]
    pairs = np.stack([visible(probe, query, segments(chunk)[None, :]) for chunk in (1, 0)])  # [.., query, key]
    return np.stack([pairs.swapaxes(-1, -2), pairs])


def intervals(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Token ranges that every row attends to, and those that attend to it: int32 ``[lo or hi, columns, N]`` each.

    Empty ones are ``NOWHERE``. The columns are the segments and, if a geometry has a prefix, the prefixes of both video
    segments: prefix frames share one chunk number that need not be below their successors'.
    """
    first, per_frame = rows.first[:, :, None], rows.streams.per_frame[:, :, None]
    columns = [_token_ranges(rows, first, per_frame, _target_frames(rows))]
    prefix = rows.rules.prefix
    if prefix.any():
        hi = np.stack([_prefix_frames(rows, transposed) for transposed in (False, True)], axis=1)
        first = first[VIDEO] - prefix * per_frame[VIDEO]
        columns.append(_token_ranges(rows, first, per_frame[VIDEO], np.stack([np.zeros_like(hi), hi])))
    bounds = np.concatenate(columns, axis=1)
    return bounds[:, :, 0], bounds[:, :, 1]


def _token_ranges(rows: Rows, first: np.ndarray, per_frame: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Tokens of ``frames`` ``[lo or hi, .., query or key, N]``, which begin at token ``first``; int32
    ``[lo or hi, columns, query or key, N]``. ``frames`` are overwritten.
    """
    none = frames[0] >= frames[1]
    none[..., 1, :] |= ~rows.is_key  # no query attends to a start-up token
    frames *= per_frame
    frames += first
    tokens = frames.astype(np.int32)
    np.copyto(tokens, NOWHERE, where=none)
    return tokens.reshape(2, math.prod(none.shape[:-2]), *none.shape[-2:])


def _target_frames(rows: Rows) -> np.ndarray:
    """Frames of each segment, its prefix apart, that a row has pairs with as a query and as a key: from lo to hi,
    ``[lo or hi, streams, noises, query or key, N]``.

    Each optional rule (conditional history, singleton) is only computed if a geometry has it.
    """
    rules, chunk = rows.rules, rows.chunk
    (own, earlier), (own_key, earlier_key) = rows.allowed
    # the smallest window, one order block, reaches both streams of the own chunk
    chunks = np.empty((2, *STREAMS, 2, chunk.size), np.int64)
    chunks[0, ..., 0, :], chunks[1, ..., 0, :] = np.where(earlier, rows.least, chunk), chunk + own
    chunks[0, ..., 1, :], chunks[1, ..., 1, :] = chunk + ~own_key, np.where(earlier_key, rows.most, chunk) + 1
    conditional = rules.conditional.any()
    if conditional:  # only the chunk that begins right after this frame looks back at it
        next_frame = rows.frame + 1 - rules.origin
        reader = next_frame // rules.size
        read = earlier_key & (next_frame % rules.size == 0) & (reader > chunk) & (reader <= rows.most)
        first, end = chunks[..., 1, :]
        end[...] = np.where(rules.conditional, np.where(read, reader + 1, chunk + own_key), end)
        first[...] = np.where((rules.conditional > 0) & ~own_key, np.where(read, reader, chunk + 1), first)
    frames = rules.chunk_start(chunks)
    (lo, hi), (_, hi_key) = frames.transpose(3, 0, 1, 2, 4)
    if conditional:  # the history is the one frame before the chunk
        boundary = rules.origin + chunk * rules.size - 1
        boundary_chunk = rules.chunk_of(boundary)
        read = earlier & (boundary >= 0) & (boundary_chunk < chunk) & (boundary_chunk >= rows.least)
        own_lo = rules.chunk_start(chunk)
        own_hi = np.where(own, rules.chunk_start(chunk + 1), own_lo)
        lo[...] = np.where(rules.conditional, np.where(read, boundary, own_lo), lo)
        hi[...] = np.where(rules.conditional, np.where(read & ~own, boundary + 1, own_hi), hi)
    if rules.has_singleton:  # queries at or after the singleton attend to no key before it
        np.maximum(lo, rules.singleton, out=lo, where=rows.frame >= rules.singleton)
        np.minimum(hi_key, rules.singleton, out=hi_key, where=rows.frame < rules.singleton)
    np.maximum(frames[0], 0, out=frames[0])
    np.minimum(frames[1], rows.streams.targets[:, :, None], out=frames[1])
    np.maximum(lo[ACTION], rules.startup, out=lo[ACTION])  # start-up tokens are never keys
    return frames


def _prefix_frames(rows: Rows, transposed: bool) -> np.ndarray:
    """Frames of the prefix of each video segment that a row has pairs with, all or none: ``[noises, N]``."""
    rules = rows.rules
    own, earlier = rows.allowed[int(transposed), :, VIDEO]
    key_chunk, query_chunk = rules.prefix_chunk, rows.chunk
    key_frame, query_frame = rules.prefix_frame, rows.frame
    if transposed:
        key_chunk, query_chunk, key_frame, query_frame = query_chunk, key_chunk, query_frame, key_frame
    boundary = rules.origin + query_chunk * rules.size - 1
    earlier = earlier & (key_chunk < query_chunk) & ((rules.conditional == 0) | (key_frame == boundary))
    attended = (own & (key_chunk == query_chunk)) | earlier
    attended &= abs(rows.block - (2 * rules.prefix_chunk + rows.streams.rank[VIDEO])) <= rules.window
    attended &= ~((query_frame >= rules.singleton) & (key_frame < rules.singleton))
    return np.where(attended, rules.prefix, 0)
