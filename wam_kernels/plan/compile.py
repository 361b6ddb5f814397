"""Plans: a geometry compiled into the tiles that the attention kernels walk, in time O(tokens x ranges).

A plan has two *sides*. The query side lists, for every tile of queries, the keys it visits (forward and dQ); the
key side lists, for every tile of keys, the queries it visits (dK, dV). Each visit is a *step*:

- a full step: ``TileShape.step`` consecutive tokens that every row of the tile attends to; no masking;
- a partial step: ``STEP_PART`` listed tokens. What is left of all ranges of the tile is laid end to end, so a tile
  wastes less than one step however many ranges it has. A row attends to token ``t`` iff ``lo <= t < hi`` for one of
  its few ranges.

Row order decides the efficiency: one action chunk is only 4 to 16 tokens. Tiles of queries take rows by (sample,
stream, chunk, noise): noisy and clean tokens of a chunk attend to almost the same history, and an action tile spans few
chunks. Tiles of keys take them by (sample, stream, noise, chunk): a noisy token is attended to by its own chunk alone,
a clean one by all that follow. The incomplete tile of such a row set is put where the least is attended to, and so
wasted: first of the queries, last of the keys.

No token attends to another sample, so each distinct one is compiled once, with tokens that count from its first one,
and then moved to every place where it lies. What is large (the tokens of tiles and of steps) is written straight into
the plan's one buffer: touching fresh memory costs more than computing what goes there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ..masks.ranges import Ranges
from ..masks.rules import RuleGeometry
from ..masks.visibility import Geometry
from ..runtime import index_buffer
from ..runtime.arrays import expand, members, starts
from ..runtime.checks import MAX_INT, integer
from ..runtime.host import device_of, eager, host_side
from ..runtime.index_buffer import Unwritten
from .intervals import NOWHERE
from .placement import Placement, moved, place
from .plan import Plan
from .side_rows import SideRows, side_rows
from .steps import visits
from .tile_shape import LONG_WINDOW, STEP_PART, TileShape, tile_shape
from .tiles import Tiles, cut

# What a plan is made of: one sample, whose tokens attend to each other and nothing else.
Sample = Geometry | RuleGeometry | Ranges


@eager
def compile_plan(
    batch: Sample | Sequence[Sample | Sequence[Sample]],
    *,
    length: int | None = None,
    key_length: int | None = None,
    device: torch.device | str = "cpu",
    tile: TileShape | None = None,
) -> Plan:
    """Compile geometries into a :class:`Plan`. Cached by geometry; never builds anything of size S x S.

    Args:
        batch: One sample (a :class:`Geometry`, a :class:`RuleGeometry` or :class:`Ranges`) shared by every batch
            element; or one entry per batch element, each a sample or a sequence of samples packed one after another.
        length: Query tokens of every batch element; the rest is padding, fully masked. Default: the longest one.
        key_length: Key tokens of every batch element, the rest attended to by none. Default: ``length`` where all
            samples have as many keys as queries, else the longest element.
        device: Where the plan's index tensors go.
        tile: Tiles of both sides; default by :func:`tile_shape`. For measurements.

    Raises:
        ValueError: an empty batch, no queries or no keys at all, ``length`` or ``key_length`` that is no integer or
            shorter than the samples, or more tokens than int32 counts.
        TypeError: an entry that is none of the three.
    """
    packed = tuple(_listed(entry) for entry in _listed(batch))
    if not packed:
        raise ValueError("compile_plan: batch must hold at least one geometry, got none; pass a Geometry")
    for samples in packed:
        for sample in samples:
            if not isinstance(sample, Sample):
                kind = type(sample).__name__
                raise TypeError(f"compile_plan: batch must hold Geometry, RuleGeometry or Ranges objects, got {kind}")
    packed = tuple(tuple(s.ranges if isinstance(s, RuleGeometry) else s for s in samples) for samples in packed)
    square = all(s.length == s.key_length for samples in packed for s in samples)
    longest = max(sum(s.length for s in samples) for samples in packed)
    longest_keys = max(sum(s.key_length for s in samples) for samples in packed)
    length = integer("compile_plan", "length", longest if length is None else length)
    if key_length is None:
        key_length = length if square else longest_keys
    key_length = integer("compile_plan", "key_length", key_length)
    for name, value, least in (("length", length, longest), ("key_length", key_length, longest_keys)):
        if value < least:
            raise ValueError(f"compile_plan: {name} must be at least {least} (the longest element), got {value}")
    if length == 0 or key_length == 0:
        raise ValueError(
            f"compile_plan: batch must hold at least one query and one key, got {length} queries and {key_length} "
            "keys; attention over no keys gives 0, so leave the call out"
        )
    if len(packed) * max(length, key_length) > MAX_INT:
        raise ValueError(
            f"compile_plan: batch must hold at most {MAX_INT} tokens in all, got {len(packed)} elements of "
            f"{max(length, key_length)}; split the batch"
        )
    if tile is not None and not isinstance(tile, TileShape):
        raise TypeError(f"compile_plan: tile must be a TileShape, got {type(tile).__name__}")
    # what is tuned for this GPU is known as soon as CUDA runs, so plans from before are others
    tuned_tiles = tile is None and torch.cuda.is_initialized()
    return compiled(packed, (length, key_length), tile, tuned_tiles, device_of("compile_plan", device))


def _listed(samples: Any) -> tuple:
    """A sequence as a tuple; anything else, a sample above all, as a tuple of it alone."""
    try:
        return (samples,) if isinstance(samples, Sample) else tuple(samples)
    except TypeError:
        return (samples,)


def forget_plans() -> None:
    """Drop the plans that are cached, so that the next call builds its plan: for measurements."""
    compiled.cache_clear()


@lru_cache(maxsize=64)
@host_side
def compiled(
    packed: tuple, lengths: tuple[int, int], tile: TileShape | None, tuned_tiles: bool, device: torch.device
) -> Plan:
    if device.type != "cpu":
        return compiled(packed, lengths, tile, tuned_tiles, torch.device("cpu")).to(device)
    placement = place(packed, lengths)
    queries, keys = side_rows(placement.samples)
    lo, hi = queries.bounds
    times = np.bincount(placement.which).repeat(queries.of_sample)  # that each row occurs in the batch
    visible = int((times * queries.tokens * (hi - lo).sum(0)).sum())
    tile = tile or tile_shape(visible >= LONG_WINDOW * len(packed) * lengths[0])
    shapes = tile, TileShape(tile.key_rows or tile.rows, tile.step)
    programs = sum(isinstance(sample, Geometry) for sample in placement.samples)
    query_tiles = cut(queries, shapes[0].rows, programs, keys=False)
    key_tiles = cut(keys, shapes[1].rows, programs, keys=True)
    parts = [
        *_side(queries, query_tiles, shapes[0], placement, side=0),
        *_side(keys, key_tiles, shapes[1], placement, side=1),
        _runs(queries, placement),
    ]
    return Plan(packed, lengths, visible, shapes, *index_buffer.pack(parts))


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


def _runs(rows: SideRows, placement: Placement) -> np.ndarray:
    """Runs of consecutive tokens that attend to exactly the same keys: ``[R, 3 + 2 * ranges]``.

    (batch element, first token, end, lo, hi, lo, hi, ...): what the CPU backend multiplies.
    """
    # rows follow each other without a gap; those of different samples are alike only if they are fully masked
    masked = (rows.bounds == NOWHERE).all((0, 1))
    new = np.ones(masked.size, bool)
    new[1:] = (rows.bounds[..., 1:] != rows.bounds[..., :-1]).any((0, 1))

    row, counts = members(rows.of_sample, placement.which)
    batch, first_query, first_key = np.array([placement.batch, *placement.first]).repeat(counts, axis=1)
    start, new, masked = first_query + rows.start[row], new[row], masked[row]
    first = starts(counts)[counts > 0]  # row of each sample that has any
    new[first] = ~(masked[first] & masked[first - 1] & (batch[first] == batch[first - 1]))
    new[0] = True
    run_starts = np.flatnonzero(new)
    last = np.append(run_starts[1:], new.size) - 1
    runs = np.empty((run_starts.size, 3 + 2 * rows.bounds.shape[1]), np.int32)
    runs[:, 0], runs[:, 1], runs[:, 2] = batch[run_starts], start[run_starts], start[last] + rows.tokens[row[last]]
    runs[:, 3:] = moved(rows.bounds_by_row(), row[run_starts], first_key[run_starts], 0)
    return runs
