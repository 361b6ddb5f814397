"""The form of a plan that the CPU backend walks: runs of tokens that attend to the same keys."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..runtime import index_buffer
from ..runtime.arrays import members, starts
from ..runtime.index_buffer import Layout, Packed
from .intervals import NOWHERE
from .placement import Placement, moved
from .side_rows import BatchRows, SideRows


class Runs(Packed):
    """``rows`` int32 ``[R, 3 + 2 * ranges]``: batch element, first token, end, lo, hi, lo, hi, ... of each run.

    ``gradient``: the same runs, with the keys that get gradients from them, and the first token as the end where no
    query gets one; no rows at all where all do.
    ``nothing``: a tensor without entries, on the same device.
    """

    def __init__(self, layout: Layout, buffer: Tensor) -> None:
        super().__init__(layout, buffer)
        self.rows, self.gradient, self.nothing = index_buffer.views(layout, self.buffer)


def compile_runs(rows: BatchRows) -> Runs:
    """The runs of a batch, on the CPU."""
    sides = [rows.queries, rows.gradient] if rows.stops_something else [rows.queries]
    runs, *gradient = _runs(sides, rows.placement)
    return Runs(*index_buffer.pack([runs, *(gradient or [runs[:0]]), np.empty(0, np.int32)]))


def _runs(sides: list[SideRows], placement: Placement) -> list[np.ndarray]:
    """Runs of consecutive tokens that attend to exactly the same keys on all ``sides``: ``[R, 3 + 2 * ranges]`` each.

    (batch element, first token, end, lo, hi, lo, hi, ...): what the CPU backend multiplies. The sides are alike up to
    their bounds; the first has all pairs.
    """
    # rows follow each other without a gap; those of different samples are alike only if they are fully masked
    rows = sides[0]
    masked = (rows.bounds == NOWHERE).all((0, 1))
    new = np.ones(masked.size, bool)
    new[1:] = np.logical_or.reduce([(s.bounds[..., 1:] != s.bounds[..., :-1]).any((0, 1)) for s in sides])
    new[1:] |= rows.frozen[1:] != rows.frozen[:-1]

    row, counts = members(rows.of_sample, placement.which)
    batch, first_query, first_key = np.array([placement.batch, *placement.first]).repeat(counts, axis=1)
    start, new, masked = first_query + rows.start[row], new[row], masked[row]
    first = starts(counts)[counts > 0]  # row of each sample that has any
    new[first] = ~(masked[first] & masked[first - 1] & (batch[first] == batch[first - 1]))
    new[0] = True
    run_starts = np.flatnonzero(new)
    last = np.append(run_starts[1:], new.size) - 1
    found = []
    for side in sides:
        runs = np.empty((run_starts.size, 3 + 2 * side.bounds.shape[1]), np.int32)
        runs[:, 0], runs[:, 1], runs[:, 2] = batch[run_starts], start[run_starts], start[last] + rows.tokens[row[last]]
        runs[:, 3:] = moved(side.bounds_by_row(), row[run_starts], first_key[run_starts], 0)
        found.append(runs)
    if len(found) > 1:
        gradient = found[1]
        gradient[:, 2] = np.where(rows.frozen[row[run_starts]], gradient[:, 1], gradient[:, 2])
    return found
