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
    frozen: np.ndarray  # bool [N]: queries that get no gradient; of keys none, theirs have no pairs
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
    def pairs(self) -> tuple[int, int, int, int]:
        """Visible pairs of the whole batch, and those of them through which queries get gradients, keys and values do,
        and any of the three.
        """
        visible = self.visible_pairs
        if not self.stops_something:
            return visible, visible, visible, visible
        frozen = self.queries.frozen
        of_queries = self._pairs(self.queries, ~frozen)
        return visible, of_queries, self._pairs(self.gradient), of_queries + self._pairs(self.gradient, frozen)

    @property
    def stops_something(self) -> bool:
        """Is there a visible pair without some gradient, or a frozen query?"""
        return self.gradient is not self.queries or bool(self.queries.frozen.any())

    def _pairs(self, rows: SideRows, some: np.ndarray | bool = True) -> int:
        """Of ``some`` rows, bool ``[N]``."""
        lo, hi = rows.bounds
        times = np.bincount(self.placement.which).repeat(rows.of_sample)  # that each row occurs
        return int((times * rows.tokens * some * (hi - lo).sum(0)).sum())


# (query stream, key stream), by name
StreamPairs = tuple[tuple[str, str], ...]


class Stops(NamedTuple):
    """What gets no gradient, by the names of streams; sorted, so that equal ones make one plan."""

    pairs: StreamPairs = ()  # keys and values of the second one from queries of the first one
    frozen: tuple[str, ...] = ()  # queries, keys and values of these


NOTHING = Stops()


def batch_rows(
    packed: tuple[tuple[Geometry | Ranges, ...], ...], lengths: tuple[int, int], stops: Stops = NOTHING
) -> BatchRows:
    """The rows of a batch that is padded to ``lengths`` = (queries, keys), with ``stops`` of its geometries."""
    placement = place(packed, lengths)
    return BatchRows(placement, *side_rows(placement.samples, stops), lengths)


def side_rows(samples: Sequence[Geometry | Ranges], stops: Stops = NOTHING) -> tuple[SideRows, SideRows, SideRows]:
    """Query side, key side and ``gradient`` (see :class:`BatchRows`) of samples, geometries before ranges."""
    geometries = [s for s in samples if isinstance(s, Geometry)]
    pieces = [_geometry_sides(geometries, stops)] if geometries else []
    pieces += [_range_sides(s) for s in samples if isinstance(s, Ranges)]
    if len(pieces) == 1:
        return pieces[0]
    queries, keys, gradient = zip(*pieces, strict=True)
    of_queries = concatenated(queries)
    nothing_stopped = all(g is q for g, q in zip(gradient, queries, strict=True))
    return of_queries, concatenated(keys), of_queries if nothing_stopped else concatenated(gradient)


def stopped_streams(stops: Stops) -> np.ndarray:
    """bool ``[query stream, key stream]`` of a geometry's streams: do keys and values get no gradient?"""
    stopped = np.zeros((len(STREAMS),) * 2, bool)
    for query, key in stops.pairs:
        stopped[STREAMS.index(query), STREAMS.index(key)] = True
    stopped[:, frozen_streams(stops)] = True
    return stopped


def frozen_streams(stops: Stops) -> np.ndarray:
    """bool ``[stream]`` of a geometry's streams: does nothing of it get a gradient?"""
    return np.array([stream in stops.frozen for stream in STREAMS])


def _geometry_sides(geometries: Sequence[Geometry], stops: Stops) -> tuple[SideRows, SideRows, SideRows]:
    """Both sides of programs: each token is a query and a key.

    Noisy and clean queries of a chunk attend to almost the same history. As keys they have next to nothing in common:
    noisy ones are attended to by their own chunk alone, clean ones by all that follow. Tiles of both would be half
    empty.
    """
    rows = token_rows(geometries)
    of_queries, of_keys = intervals(rows)
    rest, none = (rows.chunk, rows.start, rows.tokens), np.zeros(rows.start.size, bool)
    are_programs = np.ones(len(geometries), bool)
    stream = STREAM_OF_SEGMENT.take(rows.segment)
    queries = SideRows(rows.of_geometry, are_programs, stream, *rest, none, of_queries)
    keys = SideRows(rows.of_geometry, are_programs, rows.segment, *rest, none, of_keys)
    if not any(stops):
        return queries, keys, queries
    queries = queries._replace(frozen=frozen_streams(stops).take(stream))
    stopped, columns = stopped_streams(stops), np.append(STREAM_OF_SEGMENT, [VIDEO, VIDEO])
    columns = columns[: queries.bounds.shape[1], None]  # those of a prefix come last
    keys.bounds[:, stopped[columns, stream]] = NOWHERE
    bounds = np.where(stopped[stream, columns], NOWHERE, queries.bounds)
    return queries, keys, queries._replace(bounds=bounds)


def _range_sides(sample: Ranges) -> tuple[SideRows, SideRows, SideRows]:
    queries = _range_side(sample.rows, sample.frozen_rows)
    gradient = queries if sample.gradient_rows is sample.rows else _range_side(sample.gradient_rows, sample.frozen_rows)
    return queries, _range_side(sample.key_rows, np.zeros_like(sample.key_rows.start, bool)), gradient


def _range_side(rows: RangeRows, frozen: np.ndarray) -> SideRows:
    """``frozen`` rows share no tile with others."""
    lo, hi = rows.bounds.transpose(2, 1, 0)
    bounds = np.where(lo < hi, (lo, hi), NOWHERE).astype(np.int32)
    of_sample, row_set = np.array([lo.shape[1]]), frozen.astype(np.int64)
    return SideRows(of_sample, np.zeros(1, bool), row_set, rows.order, rows.start, rows.tokens, frozen, bounds)


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
