"""Visibility given as ranges: these queries attend to those keys. What a plan takes where no interaction program fits.

``Ranges`` is the general form of visibility. Programs of other systems (``wam_kernels.masks.systems``), lists of
``(q_range, k_range)`` pairs and converted mask functions all end here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..runtime.arrays import expand
from ..runtime.checks import flags, int_pairs, integer

# Key columns of one side: a row tests a token against every column's range, and Triton unrolls that test.
MAX_COLUMNS = 32


class RangeRows(NamedTuple):
    """Runs of tokens with one visibility. Inside a column a row attends to one range, and columns do not overlap."""

    start: np.ndarray  # int64 [N]
    tokens: np.ndarray  # int64 [N]: how many
    order: np.ndarray  # int64 [N]: rows next to each other here attend to nearly the same, so they should share a tile
    bounds: np.ndarray  # int64 [N, columns, 2]; an empty range is [0, 0)


IntPairs = Sequence[tuple[int, int]] | np.ndarray | Tensor
Flags = Sequence[bool] | np.ndarray | Tensor


@dataclass(frozen=True, eq=False, init=False)
class Ranges:
    """Query tokens ``q_ranges[i]`` attend to key tokens ``k_ranges[i]``, for every i; a token to the union.

    Equal contents are equal and hash alike, so plans are cached by them.

    Args:
        q_ranges: int ``[R, 2]``, begin and end of query tokens: pairs, a NumPy array or a CPU tensor. Pairs may repeat
            and overlap, a key still counts once.
        k_ranges: int ``[R, 2]``, begin and end of key tokens.
        length: Query tokens.
        key_length: Key tokens; default ``length``. Another number makes a rectangular plan: queries over a cache.
        stop_gradient: bool ``[R]``: the keys and values of ``k_ranges[i]`` get no gradient from the queries of
            ``q_ranges[i]``, which get theirs. A pair that another i names without it keeps its gradient. Default: none.
        frozen_queries: int ``[F, 2]``, begin and end of queries that get no gradient themselves. Default: none.

    Raises:
        ValueError: a shape, numbers that are no integers, a range that leaves the tokens or runs backwards, flags that
            are not bool, or lengths below 0.

    Source: the (q_ranges, k_ranges) lists of MagiAttention's flexible flash attention.
    """

    q_ranges: np.ndarray
    k_ranges: np.ndarray
    length: int
    key_length: int
    stop_gradient: np.ndarray
    frozen_queries: np.ndarray

    def __init__(
        self,
        q_ranges: IntPairs,
        k_ranges: IntPairs,
        length: int,
        key_length: int | None = None,
        stop_gradient: Flags | None = None,
        frozen_queries: IntPairs = (),
    ) -> None:
        for name, value in (("length", length), ("key_length", length if key_length is None else key_length)):
            object.__setattr__(self, name, integer("Ranges", name, value))
        for name, pairs, tokens in (
            ("q_ranges", q_ranges, self.length),
            ("k_ranges", k_ranges, self.key_length),
            ("frozen_queries", frozen_queries, self.length),
        ):
            array = int_pairs("Ranges", name, pairs)  # a copy: nobody else may change it
            bad = np.flatnonzero((array[:, 0] < 0) | (array[:, 1] < array[:, 0]) | (array[:, 1] > tokens))
            if bad.size:
                i, got = int(bad[0]), array[bad[0]].tolist()
                raise ValueError(
                    f"Ranges: {name}[{i}] must be [begin, end) with 0 <= begin <= end <= {tokens}, got {got}"
                )
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if len(self.q_ranges) != len(self.k_ranges):
            raise ValueError(
                f"Ranges: k_ranges must have R={len(self.q_ranges)} rows like q_ranges, got {len(self.k_ranges)}"
            )
        object.__setattr__(self, "stop_gradient", flags("Ranges", "stop_gradient", stop_gradient, len(self.q_ranges)))

    @classmethod
    def from_mask(cls, mask: np.ndarray) -> Ranges:
        """The ranges that a boolean mask ``[queries, keys]`` spells out. Reads every pair: for masks that exist anyway.

        Raises:
            ValueError: not a 2-D boolean array.
        """
        if not isinstance(mask, np.ndarray) or mask.ndim != 2 or mask.dtype != bool:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask).__name__
            raise ValueError(f"Ranges.from_mask: mask must be a NumPy array, bool [queries, keys], got {got}")
        # equal rows that follow each other are one range of queries
        edges = np.flatnonzero((mask[1:] != mask[:-1]).any(1)) + 1
        edges = np.concatenate([[0], edges, [len(mask)]]) if len(mask) else np.zeros(1, np.int64)
        change = np.diff(np.pad(mask[edges[:-1]].astype(np.int8), ((0, 0), (1, 1))), axis=1)
        (row, begin), (_, end) = np.nonzero(change == 1), np.nonzero(change == -1)
        return cls(np.stack([edges[row], edges[row + 1]], 1), np.stack([begin, end], 1), *mask.shape)

    @cached_property
    def _content(self) -> tuple:
        arrays = self.q_ranges, self.k_ranges, self.stop_gradient, self.frozen_queries
        return self.length, self.key_length, *(a.tobytes() for a in arrays)

    def __hash__(self) -> int:
        return hash(self._content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and self._content == other._content

    def __reduce__(self) -> tuple:
        lengths = self.length, self.key_length
        return Ranges, (self.q_ranges, self.k_ranges, *lengths, self.stop_gradient, self.frozen_queries)

    def __repr__(self) -> str:
        stopped = f", {self.stop_gradient.sum()} with stop-gradient" if self.stop_gradient.any() else ""
        return f"Ranges({len(self.q_ranges)} pairs{stopped}, length={self.length}, key_length={self.key_length})"

    def dense_mask(self, gradient: bool = False) -> np.ndarray:
        """bool ``[length, key_length]``: for tests, pictures and the reference backend.

        With ``gradient`` only the pairs through which keys and values get gradients.
        """
        mask = np.zeros((self.length, self.key_length), bool)
        for q_range, k_range, stopped in zip(self.q_ranges, self.k_ranges, self.stop_gradient, strict=True):
            if not (gradient and stopped):
                mask[slice(*q_range), slice(*k_range)] = True
        return mask

    @cached_property
    def rows(self) -> RangeRows:
        """Runs of queries and the keys that they attend to."""
        some = self.frozen_queries[:, 0] < self.frozen_queries[:, 1]
        return _rows(self.q_ranges, self.k_ranges, self.length, self.key_length, self.frozen_queries[some])

    @cached_property
    def frozen_rows(self) -> np.ndarray:
        """bool ``[N]``: do the queries of each of :attr:`rows` get no gradient?"""
        start = self.rows.start[:, None]
        return np.any((self.frozen_queries[:, 0] <= start) & (start < self.frozen_queries[:, 1]), axis=1)

    @cached_property
    def gradient_rows(self) -> RangeRows:
        """The runs of :attr:`rows` and the keys that get gradients from them."""
        if not self.stop_gradient.any():
            return self.rows
        flow = ~self.stop_gradient
        return _rows(self.q_ranges[flow], self.k_ranges[flow], self.length, self.key_length, self.rows.start)

    @cached_property
    def key_rows(self) -> RangeRows:
        """Runs of keys and the queries that they get gradients from."""
        flow = ~self.stop_gradient
        return _rows(self.k_ranges[flow], self.q_ranges[flow], self.key_length, self.length, self.k_ranges[:0])


def _rows(
    q_ranges: np.ndarray, k_ranges: np.ndarray, length: int, key_length: int, more_edges: np.ndarray
) -> RangeRows:
    """Cut the queries wherever a pair begins or ends and at ``more_edges``, and give every piece its keys, sorted into
    columns.
    """
    used = (q_ranges[:, 0] < q_ranges[:, 1]) & (k_ranges[:, 0] < k_ranges[:, 1])
    q_ranges, k_ranges = q_ranges[used], k_ranges[used]
    edges = np.unique(np.concatenate([[0, length], q_ranges.ravel(), more_edges.ravel()]))
    start, count = edges[:-1], np.diff(edges)
    if not used.any():  # padding, above all: one fully masked row, if there are queries
        return RangeRows(start, count, np.zeros_like(start), np.zeros((start.size, 1, 2), np.int64))

    # every pair on every piece that it covers, in order of (piece, begin)
    first, last = np.searchsorted(edges, q_ranges).T
    row = expand(first, last - first)
    lo, hi = np.repeat(k_ranges, last - first, axis=0).T
    order = np.lexsort((lo, row))
    row, lo, hi = row[order], lo[order], hi[order]
    # ranges of a piece that touch or overlap become one; an offset keeps the pieces apart
    offset = row * (key_length + 1)
    reach = np.maximum.accumulate(hi + offset) if hi.size else hi
    new = np.flatnonzero(np.concatenate([np.ones(min(1, hi.size), bool), (lo + offset)[1:] > reach[:-1]]))
    end_of = np.concatenate([new[1:], [hi.size]])[: new.size] - 1
    row, lo, hi = row[new], lo[new], (reach - offset)[end_of]

    cuts = _columns(row, lo, hi)
    first, last = np.searchsorted(cuts, lo, "right"), np.searchsorted(cuts, hi - 1, "right")
    pieces = last - first + 1
    column = expand(first, pieces)
    edges = np.concatenate([[0], cuts, [key_length]])
    row, lo, hi = (np.repeat(a, pieces) for a in (row, lo, hi))
    width = 1 << len(cuts).bit_length()  # a power of two: programs of nearly the same shape share a kernel
    bounds = np.zeros((start.size, width, 2), np.int64)
    bounds[row, column, 0] = np.maximum(lo, edges[column])
    bounds[row, column, 1] = np.minimum(hi, edges[column + 1])
    return RangeRows(start, count, _order(start, count, bounds), bounds)


def _columns(row: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """The fewest key positions that separate all ranges of every row.

    Two ranges of one row that follow each other need a cut in the gap between them. The fewest points that stab all
    gaps: take the gaps by their ends, and cut at the end of the first one that no cut has stabbed yet.
    """
    follows = row[1:] == row[:-1]
    gaps = np.unique(np.stack([lo[1:][follows], hi[:-1][follows]], 1), axis=0)  # (end, begin), by end
    cuts: list[int] = []
    while gaps.size:
        if len(cuts) == MAX_COLUMNS - 1:
            raise ValueError(
                f"Ranges: the ranges must fit {MAX_COLUMNS} columns (cut the keys at {MAX_COLUMNS - 1} places, and a "
                "token attends to one range of each piece), got more; use fewer, longer ranges, or split the call"
            )
        cuts.append(int(gaps[0, 0]))
        gaps = gaps[gaps[:, 1] > cuts[-1]]
    return np.array(cuts, np.int64)


def _order(start: np.ndarray, count: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Rank of each row when rows are sorted by what they attend to, the column with the most visible pairs first.

    So the noisy and clean tokens of a chunk, which share their history, come to lie side by side.
    """
    area = (count[:, None] * (bounds[..., 1] - bounds[..., 0])).sum(0)
    keys = [start]  # the last key decides first
    for column in np.argsort(area, kind="stable"):
        keys += [bounds[:, column, 0], bounds[:, column, 1]]
    rank = np.empty(start.size, np.int64)
    rank[np.lexsort(keys)] = np.arange(start.size)
    return rank
