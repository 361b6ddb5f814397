"""Tiles: which rows of tokens of a side are computed together."""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np

from ..runtime.arrays import expand, members, starts
from ..runtime.index_buffer import aligned
from .intervals import NOWHERE
from .placement import Placement
from .side_rows import SideRows


class Tiles(NamedTuple):
    """Tiles of the queries of the distinct samples, then of their keys; tokens and rows count from the sample's first.

    Places are the rows of all tiles, tile after tile.
    """

    of_sample: np.ndarray  # int64 [samples]: tiles of each
    order: np.ndarray  # int64 [N]: the rows of SideRows, of all samples, by their places
    width: np.ndarray  # int64 [N]: places of each, those of the padding before it too, and of what is behind the last
    padding: np.ndarray  # int64: the places that row sets are padded with
    token: np.ndarray  # int32 [places]: of each row; NOWHERE where a row set is padded
    starts: np.ndarray  # int64 [T]: where the rows of each tile begin in what follows
    tile_of: np.ndarray  # int64 [M]: tile after tile
    row_of: np.ndarray  # int64 [M]: which of ``order``
    first: np.ndarray  # int64 [M]: the places of all tokens of each, in this tile and in its neighbours
    end: np.ndarray  # int64 [M]
    frozen: np.ndarray  # bool [T]: all rows of each get no gradient as queries

    def by_place(self, of_row: np.ndarray, nowhere: int = NOWHERE) -> np.ndarray:
        """What each place's row of ``order`` has, int32 ``[places]``; ``nowhere`` where a row set is padded."""
        out = of_row.astype(np.int32).repeat(self.width)
        out[self.padding] = nowhere
        return out


class BatchTiles(NamedTuple):
    """Every tile of a batch, those of queries first; inside an element the padding's come before the samples'."""

    n_queries: int
    tile: np.ndarray  # int64 [T]: which one of Tiles
    entry: np.ndarray  # int64 [T]: of what in the Placement; of keys P more
    element: np.ndarray  # int64 [T]: batch element
    own: np.ndarray  # int64 [T]: first token of its sample, on its side and on the other one
    other: np.ndarray

    @classmethod
    def of(cls, tiles: Tiles, placement: Placement) -> Self:
        n = placement.which.size
        order = np.lexsort((~placement.padding, placement.batch))
        which = placement.which.take(order)
        tile, counts = members(tiles.of_sample, np.concatenate([which, which + tiles.of_sample.size // 2]))
        entry = np.concatenate([order, order + n]).repeat(counts)
        first = placement.first.ravel()
        # what is below 0 counts from the end
        places = placement.batch.take(entry - n), first.take(entry), first.take(entry - n)
        return cls(int(counts[:n].sum()), tile, entry, *places)

    def heaviest_first(self, work: np.ndarray) -> np.ndarray:
        """The tiles of either side by what they compute, int64 ``[T]``."""
        return np.lexsort((-work, np.arange(work.size) >= self.n_queries))


class Lists(NamedTuple):
    """Where the list of each tile begins: in steps of its side, and in the memory of both sides."""

    step: np.ndarray  # int64 [T]
    entry: np.ndarray  # int64 [T]
    lengths: tuple[int, int]  # steps of either side

    @classmethod
    def of(cls, counts: np.ndarray, n_queries: int, entries: int) -> Self:
        """Lists of so many steps, each of so many ``entries``."""
        step = starts(counts)
        queries, both = int(step[n_queries]), int(step[-1] + counts[-1])
        entry = step * entries
        entry[n_queries:] += aligned(queries * entries) - queries * entries
        step[n_queries:] -= queries
        return cls(step, entry, (queries, both - queries))


def spans(bounds: np.ndarray) -> np.ndarray:
    """``bounds``, overwritten: an empty range begins last and ends first of all."""
    lo = bounds[0]
    np.copyto(lo, np.iinfo(np.int32).max, where=lo == NOWHERE)
    return bounds


def cut(rows: SideRows, of_queries: int, of_keys: int) -> Tiles:
    """Cut both sides, queries before keys, into tiles of so many rows each; all in whole-array operations.

    A row set's tile that is not full is the one with the least to do: of queries the first, which have the shortest
    history, of a program's keys the last, which have the fewest queries after them; of ranges the first.

    What a tile visits reaches each of its rows if it is NaN, for 0 * NaN is NaN. So the rows of a tile share a visible
    token, or are all fully masked. Rows of programs stay together whatever they attend to.
    """
    sample = np.arange(rows.of_sample.size).repeat(rows.of_sample)
    row_set = sample * (int(rows.row_set.max(initial=0)) + 1) + rows.row_set
    order = np.lexsort((rows.order, row_set))  # stable: like rows stay in the order of their tokens
    row_set, start, count = row_set.take(order), rows.start.take(order), rows.tokens.take(order)
    keys = int(rows.of_sample[: rows.of_sample.size // 2].sum())  # the first row of the keys
    tile_rows = np.full(count.size, of_queries)
    tile_rows[keys:] = of_keys
    new = np.ones(count.size, bool)
    np.not_equal(row_set[1:], row_set[:-1], out=new[1:])
    some_ranges = not rows.is_program.all()
    if some_ranges:
        # fully masked rows have that in common: one more column
        no_range = np.full((2, 1, count.size), NOWHERE, np.int32)
        lo, hi = spans(np.concatenate([rows.bounds, no_range], 1).take(order, 2))
        masked = (hi == NOWHERE).all(0)
        lo[-1, masked], hi[-1, masked] = 0, 1
        kept = rows.is_program[sample]  # samples are in their order
        lo[:, kept], hi[:, kept] = 0, 1
        new[1:] |= ~(np.maximum(lo[:, 1:], lo[:, :-1]) < np.minimum(hi[:, 1:], hi[:, :-1])).any(0)
    # row sets are padded to whole tiles
    first_rows = new.nonzero()[0]
    missing = -np.add.reduceat(count, first_rows) % tile_rows.take(first_rows)
    # of a program's keys behind a row set, so before the next one; two may be added there
    behind_it = rows.is_program.take(sample.take(first_rows)) & (first_rows >= keys)
    at = np.where(behind_it, np.concatenate([first_rows[1:], [count.size]]), first_rows)
    padding = np.bincount(at, missing, count.size + 1).astype(np.int64)  # before each row, and behind the last one
    while True:
        before = padding[:-1]
        place = (count + before).cumsum() - count
        # rows are in order of their places, so those of a tile follow each other
        of_side = place.copy()
        of_side[keys:] -= place[keys] - before[keys]
        first, last = of_side // tile_rows, (of_side + count - 1) // tile_rows
        n_tiles = last - first + 1
        first[keys:] += last[keys - 1] + 1
        tile, row = expand(first, n_tiles), np.arange(count.size).repeat(n_tiles)
        new = np.ones(tile.size, bool)
        np.not_equal(tile[1:], tile[:-1], out=new[1:])
        begins = new.nonzero()[0]
        if not some_ranges:
            break
        # neighbours overlap, but the ends of a chain need not: halve its tile until they do
        common = np.maximum.reduceat(lo.take(row, 1), begins, 1) < np.minimum.reduceat(hi.take(row, 1), begins, 1)
        apart = np.flatnonzero(~common.any(0))
        if not apart.size:
            break
        ends = np.append(begins[1:], row.size)[apart] - 1
        middle = (row[begins[apart]] + row[ends] + 1) // 2
        padding[middle] += tile_rows[middle]  # the first half keeps its places

    end = place + count
    width = count + before
    width[-1] += padding[-1]
    empty = expand(np.concatenate([place - before, end[-1:]]), padding)
    token = (start - place).astype(np.int32).repeat(width)
    token += np.arange(token.size, dtype=np.int32)
    token[empty] = NOWHERE
    of_sample = np.bincount(sample.take(row.take(begins)), minlength=rows.of_sample.size)
    frozen = rows.frozen.take(order.take(row.take(begins)))  # those share no row set with others
    return Tiles(of_sample, order, width, empty, token, begins, tile, row, place.take(row), end.take(row), frozen)
