"""Tiles: which rows of tokens of a side are computed together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..runtime.arrays import expand, starts
from .intervals import NOWHERE
from .side_rows import SideRows


class Tiles(NamedTuple):
    """Tiles of the queries of the distinct samples, then of their keys; tokens and rows count from the sample's first.

    Places are the rows of all tiles, tile after tile.
    """

    of_sample: np.ndarray  # int64 [samples]: tiles of each
    rows: np.ndarray  # int32 [places]: token of each row; NOWHERE where a row set is padded
    bounds_row: np.ndarray  # int32 [places]: the SideRows row that each token is in; NOWHERE likewise
    side_rows: np.ndarray  # int64 [M]: the SideRows rows in each tile, tile after tile; counted over all samples
    tile: np.ndarray  # int64 [M]: the tile of each
    starts: np.ndarray  # int64 [T]: where those of each tile begin
    first: np.ndarray  # int64 [M]: the places of all tokens of each, in this tile and in its neighbours
    end: np.ndarray  # int64 [M]


def spans(bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """lo and hi of ``bounds`` with an empty range that begins last and ends first of all."""
    lo, hi = bounds
    return np.where(lo == NOWHERE, np.iinfo(np.int32).max, lo), hi


def cut(rows: SideRows, of_queries: int, of_keys: int) -> Tiles:
    """Cut both sides into tiles of so many rows each; all in whole-array operations. Queries come before keys.

    A row set's tile that is not full is the one with the least to do: of queries the first, which have the shortest
    history, of a program's keys the last, which have the fewest queries after them; of ranges the first.

    What a tile visits reaches each of its rows if it is NaN, for 0 * NaN is NaN. So the rows of a tile share a visible
    token, or are all fully masked. Rows of programs stay together whatever they attend to.
    """
    # row sets are padded to whole tiles
    sample = np.arange(rows.of_sample.size).repeat(rows.of_sample)
    row_set = sample * (rows.row_set.max(initial=0) + 1) + rows.row_set
    order = np.lexsort((rows.order, row_set))  # stable: like rows stay in the order of their tokens
    row_set, start, count = row_set[order], rows.start[order], rows.tokens[order]
    tile_rows = np.where(rows.is_key, of_keys, of_queries)[sample]
    keys = int(np.count_nonzero(~rows.is_key[sample]))  # the first row of the keys
    new = np.ones(row_set.size, bool)
    new[1:] = row_set[1:] != row_set[:-1]
    some_ranges = not rows.is_program.all()
    if some_ranges:
        # fully masked rows have that in common: one more column
        no_range = np.full((2, 1, row_set.size), NOWHERE, np.int32)
        lo, hi = spans(np.concatenate([rows.bounds, no_range], 1).take(order, 2))
        masked = (hi == NOWHERE).all(0)
        lo[-1, masked], hi[-1, masked] = 0, 1
        kept = rows.is_program[sample]  # samples are in their order
        lo[:, kept], hi[:, kept] = 0, 1
        new[1:] |= ~(np.maximum(lo[:, 1:], lo[:, :-1]) < np.minimum(hi[:, 1:], hi[:, :-1])).any(0)
    first_rows = np.flatnonzero(new)
    padding = np.zeros(count.size + 1, np.int64)  # before each row, and behind the last one
    missing = -np.add.reduceat(count, first_rows) % tile_rows[first_rows]
    # of a program's keys behind a row set, so before the next one; two may be added there
    behind_it = (rows.is_key & rows.is_program)[sample[first_rows]]
    np.add.at(padding, np.where(behind_it, np.append(first_rows[1:], count.size), first_rows), missing)
    padding, behind = padding[:-1], int(padding[-1])
    while True:
        place = starts(count + padding) + padding
        # rows are in order of their places, so those of a tile follow each other
        of_side = place.copy()
        of_side[keys:] -= place[keys] - padding[keys]
        first, last = of_side // tile_rows, (of_side + count - 1) // tile_rows
        n_tiles = last - first + 1
        first[keys:] += last[keys - 1] + 1
        tile, row = expand(first, n_tiles), np.arange(row_set.size).repeat(n_tiles)
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

    width = count + padding
    width[-1] += behind
    token_at = (start - place).astype(np.int32).repeat(width)
    token_at += np.arange(token_at.size, dtype=np.int32)
    row_at = (order - starts(rows.of_sample)[sample]).astype(np.int32).repeat(width)
    empty = expand(place - padding, padding)
    for at in (token_at, row_at):
        at[empty] = NOWHERE
        at[at.size - behind :] = NOWHERE
    return Tiles(
        of_sample=np.bincount(sample[row[begins]], minlength=rows.of_sample.size),
        rows=token_at,
        bounds_row=row_at,
        side_rows=order[row],
        tile=tile,
        starts=begins,
        first=place[row],
        end=(place + count)[row],
    )
