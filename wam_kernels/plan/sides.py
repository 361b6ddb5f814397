"""The form of a plan that the Triton kernels walk: tiles of both sides, full steps and listed tokens.

Each visit of a tile is a *step*:

- a full step: ``TileShape.step`` consecutive tokens that every row of the tile attends to; no masking;
- a partial step: ``STEP_PART`` listed tokens. What is left of all ranges of the tile is laid end to end, so a tile
  wastes less than one step however many ranges it has. A row attends to token ``t`` iff ``lo <= t < hi`` for one of
  its few ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from torch import Tensor

from ..runtime import index_buffer
from ..runtime.arrays import expand, members, starts
from ..runtime.host import plain
from ..runtime.index_buffer import Entry, Layout, Packed, Together, Unwritten
from .placement import Placement, moved
from .side_rows import BatchRows, SideRows, concatenated
from .steps import visits
from .tile_shape import STEP_PART, TileShape
from .tiles import BatchTiles, Lists, cut


class Side:
    """Tiles of one side; int32 tensors that are views of one buffer.

    ``tiles`` ``[T, 5]``: batch element, begin and end in ``full``, begin and end in ``part`` (in steps), heaviest
    first. ``rows`` ``[T, tile]``: token of each row, -1 for none. ``bounds_row`` ``[T, tile]``: its row of
    ``bounds``.
    ``bounds`` ``[G, ranges, 2]``. ``full`` ``[steps]``: first token. ``part`` ``[steps, STEP_PART]``: tokens or -1.
    """

    FIELDS = ("tiles", "rows", "bounds_row", "bounds", "full", "part")
    tiles: Tensor
    rows: Tensor
    bounds_row: Tensor
    bounds: Tensor
    full: Tensor
    part: Tensor

    def __init__(self, shape: TileShape, tensors: Sequence[Tensor]) -> None:
        self.shape = shape
        for name, tensor in zip(self.FIELDS, tensors, strict=True):
            setattr(self, name, tensor)

    def tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.FIELDS]

    def __reduce__(self) -> tuple:
        # on its own it needs its views alone, not the plan's whole buffer with each
        return _unpickled_side, (self.shape, [t.clone() for t in self.tensors()])

    @property
    def computed_pairs(self) -> int:
        """(row, token) pairs that the tiles compute, masked ones too."""
        full, part = (self.tiles[:, [2, 4]] - self.tiles[:, [1, 3]]).sum(0).tolist()
        return (full * self.shape.step + part * STEP_PART) * self.shape.rows

    def with_tiles(self, tiles: Tensor) -> Side:
        """Other steps of the same rows."""
        return Side(self.shape, [tiles, *self.tensors()[1:]])

    @property
    def idle_tiles(self) -> int:
        """Tiles without a step: their kernel only writes zeros."""
        return int((self.tiles[:, [1, 3]] == self.tiles[:, [2, 4]]).all(1).sum())


def _unpickled_side(shape: TileShape, tensors: Sequence[Tensor]) -> Side:
    return Side(shape, [plain(t) for t in tensors])


class Sides(Packed):
    """Both sides: ``queries`` for the forward, ``keys`` for dk and dv; and ``query_gradients`` for dq, the queries
    without the steps of tiles whose rows are all frozen.
    """

    def __init__(self, layout: Layout, buffer: Tensor, shapes: tuple[TileShape, TileShape]) -> None:
        super().__init__(layout, buffer, shapes)
        # each array of the queries lies beside that of the keys
        views = index_buffer.views(layout, self.buffer)
        both, dq_tiles = views[: 2 * len(Side.FIELDS)], views[2 * len(Side.FIELDS) :]
        self.queries, self.keys = Side(shapes[0], both[::2]), Side(shapes[1], both[1::2])
        self.query_gradients = self.queries.with_tiles(*dq_tiles) if dq_tiles else self.queries


def compile_sides(rows: BatchRows, shapes: tuple[TileShape, TileShape]) -> Sides:
    """Both sides of a batch, on the CPU, in tiles of ``shapes``, whose steps are alike."""
    return Sides(*index_buffer.pack(_arrays(rows, shapes)), shapes)


def _arrays(rows: BatchRows, shapes: tuple[TileShape, TileShape]) -> list[Entry]:
    """Each of ``Side.FIELDS`` of the queries and of the keys, and the tiles of dq where they are others.

    Queries and keys go through the array operations together: what small plans cost is the number of these.
    """
    both, step = concatenated([rows.queries, rows.keys]), shapes[0].step
    tiles = cut(both, shapes[0].rows, shapes[1].rows)
    full, part = visits(both.bounds, tiles, step)
    batch = BatchTiles.of(tiles, rows.placement)
    n_queries, tile, other = batch.n_queries, batch.tile, batch.other
    n_full, left = full.total.take(tile), part.total.take(tile)
    n_part = -(-left // STEP_PART)
    full_at, part_at = Lists.of(n_full, n_queries, 1), Lists.of(n_part, n_queries, STEP_PART)

    def write_part(out: np.ndarray) -> None:
        part.write(tile, other, part_at.entry, out)
        out[expand(part_at.entry + left, n_part * STEP_PART - left)] = -1

    # steps are listed tile after tile, in this order; the tiles themselves go heaviest first
    heavy = batch.heaviest_first(n_full * step + n_part * STEP_PART)
    steps = np.array([batch.element, full_at.step, full_at.step + n_full, part_at.step, part_at.step + n_part])
    steps, sides = steps.take(heavy, axis=1).T, (slice(n_queries), slice(n_queries, None))
    n_tiles = int(tiles.of_sample[: tiles.of_sample.size // 2].sum())  # of queries
    heavy_tile = tile.take(heavy)
    heavy_tile[n_queries:] -= n_tiles
    # the rows of ``bounds`` count over the batch, those of a tile from its sample's first one
    bounds_row = tiles.by_place(tiles.order - starts(both.of_sample).repeat(both.of_sample))
    n_rows = both.of_sample.reshape(2, -1).take(rows.placement.which, axis=1)
    first_row = (n_rows.cumsum(1) - n_rows).ravel().take(batch.entry)

    def of_rows(places: np.ndarray, shift: np.ndarray, least: int) -> list[Entry]:
        """``places`` of the tiles of each side, moved."""
        n_places, shift = n_tiles * shapes[0].rows, shift.take(heavy)
        templates = [
            some.reshape(-1, shape.rows)
            for some, shape in zip((places[:n_places], places[n_places:]), shapes, strict=True)
        ]
        return [
            Unwritten(
                (heavy_tile[side].size, template.shape[1]),
                partial(moved, template, heavy_tile[side], shift[side], least),
            )
            for template, side in zip(templates, sides, strict=True)
        ]

    dq_tiles = []
    if tiles.frozen.any():
        dq_tiles = [steps[:n_queries].copy()]
        dq_tiles[0][tiles.frozen.take(heavy_tile[:n_queries]), 1:] = 0

    return [
        *(steps[side] for side in sides),
        *of_rows(tiles.token, batch.own, -1),
        *of_rows(bounds_row, first_row, 0),
        *(_bounds(of_side, rows.placement, i) for i, of_side in enumerate((rows.queries, rows.keys))),
        Together(tuple((n,) for n in full_at.lengths), lambda out: full.write(tile, other, full_at.entry, out)),
        Together(tuple((n, STEP_PART) for n in part_at.lengths), write_part),
        *dq_tiles,
    ]


def _bounds(rows: SideRows, placement: Placement, side: int) -> Unwritten:
    """What every row of a side (0: queries, 1: keys) attends to, in all samples of the batch."""
    row, counts = members(rows.of_sample, placement.which)
    shift = placement.first[1 - side].repeat(counts)

    def write(out: np.ndarray) -> None:
        moved(rows.bounds_by_row(), row, shift, 0, out.reshape(row.size, -1))

    return Unwritten((row.size, rows.bounds.shape[1], 2), write)
