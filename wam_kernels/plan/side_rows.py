"""One side of samples, whatever they are made of: rows of tokens and the ranges that each attends to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..masks.programs import STREAMS, VIDEO
from ..masks.ranges import RangeRows, Ranges
from ..masks.visibility import Geometry
from .intervals import NOWHERE, STREAM_OF_SEGMENT, intervals, token_rows
from .placement import Placement, place


class SideRows(NamedTuple):
    """One side of some samples: runs of tokens, and the ranges of the other side's tokens that each has pairs with.

    Sample after sample, in the order of its tokens, which count from the sample's first one.
    """

    of_sample: np.ndarray  # int64 [samples]: rows of each
    is_program: np.ndarray  # bool [samples]: or ranges
    row_set: np.ndarray  # int64 [N]: rows of a sample that are in different ones share no tile
    order: np.ndarray  # int64 [N]: inside (sample, row set), rows next to each other attend to nearly the same
    start: np.ndarray  # int64 [N]: first token
    tokens: np.ndarray  # int64 [N]: how many
    bounds: np.ndarray  # int32 [2, columns, N]: lo and hi; both NOWHERE where a range is empty

    def bounds_by_row(self) -> np.ndarray:
        """lo and hi of every column of a row, ``[N, columns * 2]``."""
        return self.bounds.transpose(2, 1, 0).reshape(self.start.size, -1)


class BatchRows(NamedTuple):
    """Both sides of the samples of a batch, and where the samples lie: what every form of a plan is compiled from."""

    placement: Placement
    queries: SideRows
    keys: SideRows  # without the pairs whose keys get no gradient: dk and dv are all that they are for
    gradient: SideRows  # the queries without those pairs; the queries themselves where there are none
    lengths: tuple[int, int]

    @property
    def visible_pairs(self) -> int:
        """Of the whole batch."""
        return self._pairs(self.queries)

    @property
    def gradient_pairs(self) -> int:
        """Visible pairs of the whole batch through which keys and values get gradients."""
        return self._pairs(self.gradient)

    def _pairs(self, rows: SideRows) -> int:
        lo, hi = rows.bounds
        times = np.bincount(self.placement.which).repeat(rows.of_sample)  # that each row occurs
        return int((times * rows.tokens * (hi - lo).sum(0)).sum())


# (query stream, key stream), by name
StreamPairs = tuple[tuple[str, str], ...]


def batch_rows(
    packed: tuple[tuple[Geometry | Ranges, ...], ...], lengths: tuple[int, int], stop_gradient: StreamPairs = ()
) -> BatchRows:
    """The rows of a batch that is padded to ``lengths`` = (queries, keys), with a stop-gradient for pairs of streams
    of its geometries.
    """
    placement = place(packed, lengths)
    return BatchRows(placement, *side_rows(placement.samples, stop_gradient), lengths)


def side_rows(
    samples: Sequence[Geometry | Ranges], stop_gradient: StreamPairs = ()
) -> tuple[SideRows, SideRows, SideRows]:
    """Query side, key side and ``gradient`` (see :class:`BatchRows`) of samples, geometries before ranges."""
    geometries = [s for s in samples if isinstance(s, Geometry)]
    pieces = [_geometry_sides(geometries, stop_gradient)] if geometries else []
    pieces += [_range_sides(s) for s in samples if isinstance(s, Ranges)]
    if len(pieces) == 1:
        return pieces[0]
    queries, keys, gradient = zip(*pieces, strict=True)
    of_queries = concatenated(queries)
    nothing_stopped = all(g is q for g, q in zip(gradient, queries, strict=True))
    return of_queries, concatenated(keys), of_queries if nothing_stopped else concatenated(gradient)


def stopped_streams(stop_gradient: StreamPairs) -> np.ndarray:
    """bool ``[query stream, key stream]`` of a geometry's streams."""
    stopped = np.zeros((len(STREAMS),) * 2, bool)
    for query, key in stop_gradient:
        stopped[STREAMS.index(query), STREAMS.index(key)] = True
    return stopped


def _geometry_sides(geometries: Sequence[Geometry], stop_gradient: StreamPairs) -> tuple[SideRows, SideRows, SideRows]:
    """Both sides of programs: each token is a query and a key.

    Noisy and clean queries of a chunk attend to almost the same history. As keys they have next to nothing in common:
    noisy ones are attended to by their own chunk alone, clean ones by all that follow. Tiles of both would be half
    empty.
    """
    rows = token_rows(geometries)
    of_queries, of_keys = intervals(rows)
    rest = rows.chunk, rows.start, rows.tokens
    are_programs = np.ones(len(geometries), bool)
    stream = STREAM_OF_SEGMENT.take(rows.segment)
    queries = SideRows(rows.of_geometry, are_programs, stream, *rest, of_queries)
    keys = SideRows(rows.of_geometry, are_programs, rows.segment, *rest, of_keys)
    if not stop_gradient:
        return queries, keys, queries
    stopped, columns = stopped_streams(stop_gradient), np.append(STREAM_OF_SEGMENT, [VIDEO, VIDEO])
    columns = columns[: queries.bounds.shape[1], None]  # those of a prefix come last
    keys.bounds[:, stopped[columns, stream]] = NOWHERE
    bounds = np.where(stopped[stream, columns], NOWHERE, queries.bounds)
    return queries, keys, queries._replace(bounds=bounds)


def _range_sides(sample: Ranges) -> tuple[SideRows, SideRows, SideRows]:
    queries = _range_side(sample.rows)
    gradient = queries if sample.gradient_rows is sample.rows else _range_side(sample.gradient_rows)
    return queries, _range_side(sample.key_rows), gradient


def _range_side(rows: RangeRows) -> SideRows:
    lo, hi = rows.bounds.transpose(2, 1, 0)
    bounds = np.where(lo < hi, (lo, hi), NOWHERE).astype(np.int32)
    of_sample, row_set = np.array([lo.shape[1]]), np.zeros_like(rows.start)
    return SideRows(of_sample, np.zeros(1, bool), row_set, rows.order, rows.start, rows.tokens, bounds)


def concatenated(pieces: Sequence[SideRows]) -> SideRows:
    """The samples of several sides as one side."""
    columns = max(p.bounds.shape[1] for p in pieces)
    bounds = np.full((2, columns, sum(p.start.size for p in pieces)), NOWHERE, np.int32)
    end = 0
    for p in pieces:
        begin, end = end, end + p.start.size
        bounds[:, : p.bounds.shape[1], begin:end] = p.bounds
    rest = [np.concatenate(arrays) for arrays in zip(*(p[:-1] for p in pieces), strict=True)]
    return SideRows(*[*rest, bounds])
