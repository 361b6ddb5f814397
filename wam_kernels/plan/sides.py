"""The form of a plan that the Triton kernels walk: tiles of both sides, full steps and listed tokens.

Each visit of a tile is a *step*:

- a full step: ``TileShape.step`` consecutive tokens that every row of the tile attends to; no masking;
- a partial step: ``STEP_PART`` listed tokens. What is left of all ranges of the tile is laid end to end, so a tile
  wastes less than one step however many ranges it has. A row attends to token ``t`` iff ``lo <= t < hi`` for one of
  its few ranges.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..runtime import index_buffer
from ..runtime.arrays import expand, members, starts
from ..runtime.host import plain
from ..runtime.index_buffer import Layout, Packed, Unwritten
from .placement import Placement, moved
from .side_rows import BatchRows, SideRows
from .steps import visits
from .tile_shape import STEP_PART, TileShape
from .tiles import Tiles, cut


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
        steps = self.full.shape[0] * self.shape.step + self.part.shape[0] * STEP_PART
        return steps * self.shape.rows


def _unpickled_side(shape: TileShape, tensors: Sequence[Tensor]) -> Side:
    return Side(shape, [plain(t) for t in tensors])


class Sides(Packed):
    """Both sides: ``queries`` for the forward and dq, ``keys`` for dk and dv."""

    def __init__(self, layout: Layout, buffer: Tensor, shapes: tuple[TileShape, TileShape]) -> None:
        super().__init__(layout, buffer, shapes)
        views, n = index_buffer.views(layout, self.buffer), len(Side.FIELDS)
        self.queries, self.keys = Side(shapes[0], views[:n]), Side(shapes[1], views[n:])


def compile_sides(rows: BatchRows, shapes: tuple[TileShape, TileShape]) -> Sides:
    """Both sides of a batch, on the CPU, in tiles of ``shapes``."""
    parts = [
        array
        for side, (of_side, shape) in enumerate(zip((rows.queries, rows.keys), shapes, strict=True))
        for array in _side(of_side, cut(of_side, shape.rows), shape, rows.placement, side)
    ]
    return Sides(*index_buffer.pack(parts), shapes)


def _side(
    rows: SideRows, tiles: Tiles, shape: TileShape, placement: Placement, side: int
) -> list[np.ndarray | Unwritten]:
    """The arrays of a :class:`Side` (0: queries, 1: keys): what the samples have, moved to where they lie."""
    row, counts = members(rows.of_sample, placement.which)
    first_of_row = placement.first[1 - side].repeat(counts)

    # every tile of the batch: which one of its sample it is, and where that lies. Padding comes before the samples
    order = np.lexsort((~placement.padding, placement.batch))
    tile, counts = members(tiles.of_sample, placement.which[order])
    first_row = starts(rows.of_sample[placement.which])
    places = np.array([placement.batch, placement.first[side], placement.first[1 - side], first_row])
    batch, own, other, first_row = places[:, order].repeat(counts, axis=1)

    # steps are listed tile after tile, in this order; the tiles themselves go heaviest first
    full, part = visits(rows.bounds, tiles, shape.step)
    n_full, left = full.total[tile], part.total[tile]
    n_part = -(-left // STEP_PART)
    full_at, part_at = starts(n_full), starts(n_part)
    steps = np.array([batch, full_at, full_at + n_full, part_at, part_at + n_part])
    heavy = np.argsort(-(n_full * shape.step + n_part * STEP_PART), kind="stable")
    heavy_tile, own, first_row = tile[heavy], own[heavy], first_row[heavy]

    def write_bounds(out: np.ndarray) -> None:
        moved(rows.bounds_by_row(), row, first_of_row, 0, out.reshape(row.size, -1))

    def write_part(out: np.ndarray) -> None:
        out = out.reshape(-1)
        part.write(tile, other, part_at * STEP_PART, out)
        out[expand(part_at * STEP_PART + left, n_part * STEP_PART - left)] = -1

    return [
        steps.take(heavy, axis=1).T,
        Unwritten((tile.size, shape.rows), lambda out: moved(tiles.rows, heavy_tile, own, -1, out)),
        Unwritten((tile.size, shape.rows), lambda out: moved(tiles.bounds_row, heavy_tile, first_row, 0, out)),
        Unwritten((row.size, rows.bounds.shape[1], 2), write_bounds),
        Unwritten((int(n_full.sum()),), lambda out: full.write(tile, other, full_at, out)),
        Unwritten((int(n_part.sum()), STEP_PART), write_part),
    ]
