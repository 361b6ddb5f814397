"""Tiles: which rows of tokens of a side are computed together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..runtime.arrays import expand, starts
from .intervals import NOWHERE
from .side_rows import SideRows


class Tiles(NamedTuple):
    """Tiles of one side of the distinct samples; tokens and rows count from the sample's first."""

    of_sample: np.ndarray  # int64 [samples]: tiles of each
    tokens: np.ndarray  # int32 [T, tile]; NOWHERE where a group is padded
    rows: np.ndarray  # int32 [T, tile]: the SideRows row that each token is in; NOWHERE likewise
    meets: np.ndarray  # int64 [M]: the rows that a tile meets, tile after tile; counted over all samples
    heads: np.ndarray  # int64 [T]: where those of each tile begin


def spans(bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """lo and hi of ``bounds`` with an empty range that begins last and ends first of all."""
    lo, hi = bounds
    return np.where(lo == NOWHERE, np.iinfo(np.int32).max, lo), hi


def cut(rows: SideRows, tile_rows: int, programs: int) -> Tiles:
    """Cut rows into tiles; all in whole-array operations.

    What a tile visits reaches each of its rows if it is NaN, for 0 * NaN is NaN. So the rows of a tile meet a token in
    common, or nothing at all. Rows of the first ``programs`` samples stay together whatever they meet.
    """
    # groups (sample, stream) are padded in front to whole tiles
    sample = np.arange(rows.of_sample.size).repeat(rows.of_sample)
    group = 2 * sample + rows.stream
    order = np.lexsort((rows.order, group))  # stable: like rows stay in the order of their tokens
    group, start, count = group[order], rows.start[order], rows.tokens[order]
    new = np.ones(group.size, bool)
    new[1:] = group[1:] != group[:-1]
    if programs < rows.of_sample.size:
        # rows that meet nothing have that in common: one more column
        lo, hi = spans(np.concatenate([rows.bounds, np.full((2, 1, group.size), NOWHERE, np.int32)], 1).take(order, 2))
        nothing = (hi == NOWHERE).all(0)
        lo[-1, nothing], hi[-1, nothing] = 0, 1
        kept = rows.of_sample[:programs].sum()
        lo[:, :kept], hi[:, :kept] = 0, 1
        new[1:] |= ~(np.maximum(lo[:, 1:], lo[:, :-1]) < np.minimum(hi[:, 1:], hi[:, :-1])).any(0)
    first_rows = np.flatnonzero(new)
    padding = np.zeros_like(count)  # before each row
    padding[first_rows] = -np.add.reduceat(count, first_rows) % tile_rows
    while True:
        slot = starts(count + padding) + padding
        # rows are in slot order, so those that a tile meets follow each other
        first, last = slot // tile_rows, (slot + count - 1) // tile_rows
        n_tiles = last - first + 1
        tile, row = expand(first, n_tiles), np.arange(group.size).repeat(n_tiles)
        heads = np.flatnonzero(np.diff(tile, prepend=-1))
        if programs == rows.of_sample.size:
            break
        # neighbours overlap, but the ends of a chain need not: halve its tile until they do
        common = np.maximum.reduceat(lo.take(row, 1), heads, 1) < np.minimum.reduceat(hi.take(row, 1), heads, 1)
        apart = np.flatnonzero(~common.any(0))
        if not apart.size:
            break
        ends = np.append(heads[1:], row.size)[apart] - 1
        padding[(row[heads[apart]] + row[ends] + 1) // 2] += tile_rows  # the first half keeps its slots

    width = count + padding
    token_at = (start - slot).astype(np.int32).repeat(width)
    token_at += np.arange(token_at.size, dtype=np.int32)
    row_at = (order - starts(rows.of_sample)[sample]).astype(np.int32).repeat(width)
    empty = expand(slot - padding, padding)
    token_at[empty] = NOWHERE
    row_at[empty] = NOWHERE
    return Tiles(
        of_sample=np.bincount(sample[row[heads]], minlength=rows.of_sample.size),
        tokens=token_at.reshape(-1, tile_rows),
        rows=row_at.reshape(-1, tile_rows),
        meets=order[row],
        heads=heads,
    )
