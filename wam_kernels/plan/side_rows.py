"""One side of samples, whatever they are made of: rows of tokens and the ranges that each attends to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

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
    is_key: np.ndarray  # bool [samples]: or queries
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
    keys: SideRows
    lengths: tuple[int, int]

    @property
    def visible_pairs(self) -> int:
        """Of the whole batch."""
        lo, hi = self.queries.bounds
        times = np.bincount(self.placement.which).repeat(self.queries.of_sample)  # that each row occurs
        return int((times * self.queries.tokens * (hi - lo).sum(0)).sum())


def batch_rows(packed: tuple[tuple[Geometry | Ranges, ...], ...], lengths: tuple[int, int]) -> BatchRows:
    """The rows of a batch that is padded to ``lengths`` = (queries, keys)."""
    placement = place(packed, lengths)
    return BatchRows(placement, *side_rows(placement.samples), lengths)


def side_rows(samples: Sequence[Geometry | Ranges]) -> tuple[SideRows, SideRows]:
    """Query side and key side of samples, geometries before ranges."""
    geometries = [s for s in samples if isinstance(s, Geometry)]
    pieces = [_geometry_sides(geometries)] if geometries else []
    ranges = [s for s in samples if isinstance(s, Ranges)]
    pieces += [(_range_side(s.rows, is_key=False), _range_side(s.key_rows, is_key=True)) for s in ranges]
    if len(pieces) == 1:
        return pieces[0]
    queries, keys = zip(*pieces, strict=True)
    return concatenated(queries), concatenated(keys)


def _geometry_sides(geometries: Sequence[Geometry]) -> tuple[SideRows, SideRows]:
    """Both sides of programs: each token is a query and a key.

    Noisy and clean queries of a chunk attend to almost the same history. As keys they have next to nothing in common:
    noisy ones are attended to by their own chunk alone, clean ones by all that follow. Tiles of both would be half
    empty.
    """
    rows = token_rows(geometries)
    rest = rows.chunk, rows.start, rows.tokens
    yes, no = np.ones(len(geometries), bool), np.zeros(len(geometries), bool)
    queries = SideRows(rows.of_geometry, yes, no, STREAM_OF_SEGMENT[rows.segment], *rest, intervals(rows))
    return queries, SideRows(rows.of_geometry, yes, yes, rows.segment, *rest, intervals(rows, transposed=True))


def _range_side(rows: RangeRows, is_key: bool) -> SideRows:
    lo, hi = rows.bounds.transpose(2, 1, 0)
    bounds = np.where(lo < hi, (lo, hi), NOWHERE).astype(np.int32)
    of_sample, row_set = np.array([lo.shape[1]]), np.zeros_like(rows.start)
    kind = np.array([False]), np.array([is_key])
    return SideRows(of_sample, *kind, row_set, rows.order, rows.start, rows.tokens, bounds)


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
