"""Steps: which tokens of the other side a tile visits."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..runtime.arrays import members, starts
from .intervals import NOWHERE
from .tiles import Tiles, spans


class Holes(NamedTuple):
    """Tokens inside runs that make no visible pair with any row of their tile."""

    run: np.ndarray  # int64 [N]: of all runs, counted [T, n]
    first: np.ndarray  # int64 [N]
    end: np.ndarray  # int64 [N]


class Visits(NamedTuple):
    """Lists of the tokens that the tiles of the distinct samples visit, as runs of every ``step``-th token.

    A run that begins at entry ``at`` of its tile's list has token ``base + step * j`` at entry j.
    """

    step: int
    total: np.ndarray  # int64 [T]: entries of each tile's list
    runs: np.ndarray  # int64 [T]: runs of each tile
    at_base: np.ndarray  # int64 [2, R]

    @classmethod
    def of(cls, step: int, first: np.ndarray, count: np.ndarray, holes: Holes | None = None) -> Visits:
        """``count`` entries from token ``first`` on, both ``[T, n]``, in this order; a count may be 0.

        Entries are ``step`` tokens each; with ``holes``, which are left out, one.
        """
        n_tiles, n_runs = count.shape
        some = np.flatnonzero(count)
        first, count = first.ravel()[some], count.ravel()[some]
        if holes is not None and holes.run.size:
            # what is left of the runs, as their first tokens and their ends: one more of both for each hole
            begin, end = some << 32, some << 32
            begin = np.sort(np.append(begin + first, (holes.run << 32) + holes.end))
            end = np.sort(np.append(end + first + count, (holes.run << 32) + holes.first))
            some, first, count = begin >> 32, begin & 0xFFFFFFFF, end - begin
        return cls.of_runs(step, n_tiles, some // n_runs, first, count)

    @classmethod
    def of_runs(cls, step: int, n_tiles: int, tile: np.ndarray, first: np.ndarray, count: np.ndarray) -> Visits:
        """The same of runs that are not empty, tile after tile, int64 ``[R]`` each."""
        total = np.bincount(tile, count, n_tiles).astype(np.int64)
        at = starts(count) - starts(total).take(tile)
        return cls(step, total, np.bincount(tile, minlength=n_tiles), np.array([at, first - step * at]))

    def write(self, tiles: np.ndarray, shift: np.ndarray, at: np.ndarray, out: np.ndarray) -> None:
        """Write the lists of ``tiles``, moved by ``shift``; each begins at ``out[at]``, the first one at 0.

        What lies between lists is overwritten. The entries are summed up from their differences, which are ``step``
        except where a run begins: in place, without another array as long as ``out``.
        """
        runs, counts = members(self.runs, tiles)
        at, base = self.at_base.take(runs, axis=1) + np.array([at, shift - self.step * at]).repeat(counts, axis=1)
        base[1:] += self.step - base[:-1]
        out.fill(self.step)
        out[at] = base
        np.cumsum(out, dtype=out.dtype, out=out)


def visits(bounds: np.ndarray, tiles: Tiles, step: int) -> tuple[Visits, Visits]:
    """What tiles visit of their rows' ``bounds``: full steps, by their first tokens; the tokens of partial steps."""
    bounds = spans(bounds.take(tiles.order.take(tiles.row_of), axis=2))
    # what some row of a tile attends to, and what every row does: [columns, T]
    any_lo, all_hi = np.minimum.reduceat(bounds, tiles.starts, axis=2)
    all_lo, any_hi = np.maximum.reduceat(bounds, tiles.starts, axis=2)
    np.minimum(any_lo, any_hi, out=any_lo)

    n_full = np.maximum(np.maximum(all_hi, 0) - all_lo, 0) // step  # NOWHERE - all_lo would wrap around
    # what full steps leave of a range: before and behind them (all of it before, if there is none)
    some_full = n_full > 0
    cut_lo = np.where(some_full, all_lo, any_hi)
    cut_hi = np.where(some_full, all_lo + n_full * step, any_hi)
    # [first token or count, T, columns, before or behind]
    left = np.empty((2, tiles.starts.size, len(any_lo), 2), np.int32)
    left[0, ..., 0], left[0, ..., 1] = any_lo.T, cut_hi.T
    left[1, ..., 0], left[1, ..., 1] = (cut_lo - any_lo).T, (any_hi - cut_hi).T
    holes = _holes(bounds, tiles.tile_of, cut_lo)
    first, count = left.reshape(2, tiles.starts.size, -1)
    return Visits.of(step, all_lo.T, n_full.T), Visits.of(1, first, count, holes)


def _holes(bounds: np.ndarray, tile_of: np.ndarray, cut_lo: np.ndarray) -> Holes:
    """What lies between tokens that some of a tile's rows attend to, in one column, though none attends to it.

    ``bounds`` ``[lo or hi, columns, M]``: what each row of each tile attends to. ``cut_lo`` ``[columns, T]``: what lies
    before it is in run 0 of the two that a column has, else in run 1.
    """
    of_range = tile_of * len(cut_lo) + np.arange(len(cut_lo))[:, None]
    # the ranges of all tiles and columns end to end: one running maximum serves them all
    ends = (bounds + (of_range << 32)).reshape(2, -1)
    begin, end = ends.compress((bounds[1] != NOWHERE).ravel(), axis=1)
    order = np.argsort(begin)
    begin, end = begin[order], end[order]
    reach = np.maximum.accumulate(end)[:-1]
    hole = np.flatnonzero((begin[1:] > reach) & (begin[1:] >> 32 == reach >> 32))
    of_range, first, end = begin[hole + 1] >> 32, reach[hole] & 0xFFFFFFFF, begin[hole + 1] & 0xFFFFFFFF
    return Holes(2 * of_range + (first >= cut_lo.T.ravel()[of_range]), first, end)
