"""Plans: a geometry compiled into the tiles that the attention kernels walk, in time O(tokens x ranges).

A plan has two *sides*. The query side lists, for every tile of queries, the keys it visits (forward and dQ); the
key side lists, for every tile of keys, the queries it visits (dK, dV). Each visit is a *step*:

- a full step: ``STEP_FULL`` consecutive tokens that every row of the tile sees; no masking;
- a partial step: ``STEP_PART`` listed tokens. What is left of all ranges of the tile is laid end to end, so a tile
  wastes less than one step however many ranges it has. A row sees token ``t`` iff ``lo <= t < hi`` for one of
  its few ranges.

Row order decides the efficiency: one action chunk is only 4 to 16 tokens. Tiles take rows by (sample, stream, chunk,
noise): noisy and clean tokens of a chunk see almost the same history, and an action tile spans few chunks. The
last, incomplete tile of a group is put first, where the history, and so the waste, is shortest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from . import _index_buffer
from .intervals import SideRows, side_rows
from .programs import Program
from .ranges import Ranges, expand
from .visibility import SEGMENTS, Geometry, dense_mask

STEP_PART = 32

# What a plan is made of: one sample, whose tokens see each other and nothing else.
Sample = Geometry | Program | Ranges


@dataclass(frozen=True)
class TileShape:
    """Rows of a tile and tokens of a full step, for one side of a plan."""

    rows: int
    step: int


def tile_shape(visible_per_row: float) -> TileShape:
    """Tile for a mean number of visible tokens per row.

    Small windows waste most of a large tile (LIBERO ``joint``, chunk 1, window 8: 0.51 of 64 x 64 is useful, 0.79
    of 32 x 32); long ones want the 64-row tensor-core instruction (chunk 4, window 64: 0.96 of 64 x 64 is useful).
    The efficiencies are counted; which tile is fastest is not yet measured on a GPU.
    """
    return TileShape(32, 32) if visible_per_row < 256 else TileShape(64, 64)


class Side:
    """Tiles of one side; int32 tensors that are views of one buffer.

    ``tiles`` ``[T, 5]``: batch element, begin and end in ``full``, begin and end in ``part`` (in steps), heaviest
    first. ``rows`` ``[T, tile]``: token of each row, -1 for none. ``groups`` ``[T, tile]``: row of ``bounds``.
    ``bounds`` ``[G, ranges, 2]``. ``full`` ``[steps]``: first token. ``part`` ``[steps, STEP_PART]``: tokens or -1.
    """

    FIELDS = ("tiles", "rows", "groups", "bounds", "full", "part")

    def __init__(self, shape: TileShape, tensors: Sequence[Tensor]) -> None:
        self.shape = shape
        for name, tensor in zip(self.FIELDS, tensors, strict=True):
            setattr(self, name, tensor)

    def tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.FIELDS]

    @property
    def computed_pairs(self) -> int:
        steps = self.full.shape[0] * self.shape.step + self.part.shape[0] * STEP_PART
        return steps * self.shape.rows


class Plan:
    """What ``block_attention`` needs to know about a batch. Made by :func:`compile_plan`; immutable.

    Attributes:
        length: Query tokens S of one batch element. Tensors of another length are refused.
        key_length: Key tokens T of one batch element; S unless the plan was made from rectangular ``Ranges``.
        batch: Batch elements; 1 serves any batch size with the same visibility.
        visible_pairs: (query, key) pairs that see each other, over the batch elements of the plan.
        device: Where the index tensors live; q, k, v must be there too.
    """

    def __init__(
        self,
        batch_geometries: tuple[tuple[Geometry | Ranges, ...], ...],
        lengths: tuple[int, int],
        visible_pairs: int,
        shapes: tuple[TileShape, TileShape],
        layout: tuple[tuple[int, ...], ...],
        buffer: Tensor,
    ) -> None:
        self.geometries = batch_geometries
        self.batch = len(batch_geometries)
        self.length, self.key_length = lengths
        self.visible_pairs = visible_pairs
        self._shapes, self._layout, self._buffer = shapes, layout, buffer
        n, views = len(Side.FIELDS), _index_buffer.views(layout, buffer)
        self.queries, self.keys = Side(shapes[0], views[:n]), Side(shapes[1], views[n : 2 * n])
        self.runs = views[2 * n]

    @property
    def device(self) -> torch.device:
        return self._buffer.device

    @property
    def efficiency(self) -> float:
        """Visible pairs / computed pairs of the forward, with the tiles that the kernel uses."""
        return self.visible_pairs / max(1, self.queries.computed_pairs)

    @property
    def density(self) -> float:
        """Visible pairs / all pairs."""
        return self.visible_pairs / max(1, self.batch * self.length * self.key_length)

    def tensors(self) -> list[Tensor]:
        """Everything a registered op reads: query side, key side, runs."""
        return [*self.queries.tensors(), *self.keys.tensors(), self.runs]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Plan:
        """The same plan on another device, in one copy; itself when it is there already."""
        if torch.device(device) == self.device:
            return self
        buffer = self._buffer.to(device, non_blocking=non_blocking)
        lengths = (self.length, self.key_length)
        return Plan(self.geometries, lengths, self.visible_pairs, self._shapes, self._layout, buffer)

    def mask(self) -> Tensor:
        """Dense bool ``[batch, 1, S, T]`` straight from the predicate: for the reference backend and for tests."""
        mask = torch.zeros(self.batch, 1, self.length, self.key_length, dtype=torch.bool)
        for b, samples in enumerate(self.geometries):
            q, k = 0, 0
            for sample in samples:
                dense = sample.dense_mask() if isinstance(sample, Ranges) else dense_mask(sample)
                mask[b, 0, q : q + sample.length, k : k + sample.key_length] = torch.from_numpy(dense)
                q, k = q + sample.length, k + sample.key_length
        return mask.to(self.device)

    def __repr__(self) -> str:
        return (
            f"Plan(batch={self.batch}, length={self.length}, density={self.density:.3f}, "
            f"efficiency={self.efficiency:.3f}, device={self.device})"
        )


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
        batch: One sample (a :class:`Geometry`, a :class:`Program` or :class:`Ranges`) shared by every batch element; or
            one entry per batch element, each a sample or a sequence of samples packed one after another.
        length: Query tokens of every batch element; the rest is padding that sees nothing. Default: the longest one.
        key_length: Key tokens of every batch element, the rest unseen. Default: ``length`` where all samples have as
            many keys as queries, else the longest element.
        device: Where the plan's index tensors go.
        tile: Tile of both sides; default by :func:`tile_shape`. For measurements.

    Raises:
        ValueError: an empty batch, no tokens at all, or ``length`` or ``key_length`` shorter than the samples.
        TypeError: an entry that is none of the three.
    """
    entries = [batch] if isinstance(batch, Sample) else list(batch)
    packed = tuple((e,) if isinstance(e, Sample) else tuple(e) for e in entries)
    if not packed:
        raise ValueError("compile_plan: batch must hold at least one geometry, got none; pass a Geometry")
    for samples in packed:
        for s in samples:
            if not isinstance(s, Sample):
                kind = type(s).__name__
                raise TypeError(f"compile_plan: batch must hold Geometry, Program or Ranges objects, got {kind}")
    packed = tuple(tuple(s.ranges if isinstance(s, Program) else s for s in samples) for samples in packed)
    square = all(s.length == s.key_length for samples in packed for s in samples)
    longest = max(sum(s.length for s in samples) for samples in packed)
    longest_keys = max(sum(s.key_length for s in samples) for samples in packed)
    length = longest if length is None else length
    if key_length is None:
        key_length = length if square else longest_keys
    for name, value, least in (("length", length, longest), ("key_length", key_length, longest_keys)):
        if value < least:
            raise ValueError(f"compile_plan: {name} must be at least {least} (the longest element), got {value}")
    if length == 0 or key_length == 0:
        raise ValueError("compile_plan: batch must hold at least one token, got empty geometries")
    return _compile(packed, (int(length), int(key_length)), tile, torch.device(device))


@lru_cache(maxsize=64)
def _compile(packed: tuple, lengths: tuple[int, int], tile: TileShape | None, device: torch.device) -> Plan:
    if device.type != "cpu":
        return _compile(packed, lengths, tile, torch.device("cpu")).to(device)
    queries, keys = side_rows(packed, lengths)
    visible = int((queries.count * (queries.bounds[..., 1] - queries.bounds[..., 0]).sum(-1)).sum())
    shape = tile or tile_shape(visible / max(1, int(queries.count.sum())))
    arrays = [*_side(queries, shape), *_side(keys, shape), _runs(queries)]
    return Plan(packed, lengths, visible, (shape, shape), *_index_buffer.pack(arrays))


def _starts(counts: np.ndarray) -> np.ndarray:
    return counts.cumsum() - counts


def _side(rows: SideRows, shape: TileShape) -> list[np.ndarray]:
    """Cut rows into tiles and list each tile's steps; all in whole-array operations."""
    bounds = rows.bounds
    stream = np.array([*(s for s, _ in SEGMENTS), -1])[rows.segment]
    order = np.lexsort((rows.start, rows.segment, rows.order, stream, rows.sample, rows.batch))
    start, count, bounds_of = rows.start[order], rows.count[order], bounds[order]

    # groups (batch, sample, stream) are padded in front to whole tiles
    ids = np.stack([rows.batch, rows.sample, stream])[:, order]
    new = np.concatenate([[True], (ids[:, 1:] != ids[:, :-1]).any(0)])
    group = new.cumsum() - 1
    tokens = np.bincount(group, count).astype(np.int64)
    slots = -(-tokens // shape.rows) * shape.rows
    shift = _starts(slots) + slots - tokens - _starts(tokens)  # from position among tokens to slot
    slot = _starts(count) + shift[group]
    n_tiles = int(slots.sum()) // shape.rows

    row_token = np.full(n_tiles * shape.rows, -1, np.int32)
    row_group = np.zeros_like(row_token)
    at = expand(slot, count)
    row_token[at] = expand(start, count)
    row_group[at] = np.repeat(order.astype(np.int32), count)

    # which (row, tile) pairs meet; rows are in slot order, so a tile's rows are consecutive
    first, last = slot // shape.rows, (slot + np.maximum(count, 1) - 1) // shape.rows
    meets = last - first + 1
    tile_of = expand(first, meets)
    lo, hi = np.moveaxis(np.repeat(bounds_of, meets, axis=0), -1, 0)
    heads = np.flatnonzero(np.concatenate([[True], tile_of[1:] != tile_of[:-1]]))
    empty = lo >= hi
    big = np.iinfo(np.int32).max
    any_lo = np.minimum.reduceat(np.where(empty, big, lo), heads)  # [tiles, ranges]
    any_hi = np.maximum.reduceat(np.where(empty, 0, hi), heads)
    all_lo = np.maximum.reduceat(np.where(empty, big, lo), heads)
    all_hi = np.minimum.reduceat(np.where(empty, 0, hi), heads)
    any_lo = np.minimum(any_lo, any_hi)

    n_full = np.maximum(all_hi - all_lo, 0) // shape.step
    full = np.repeat(all_lo.ravel(), n_full.ravel()) + shape.step * expand(
        np.zeros_like(n_full).ravel(), n_full.ravel()
    )
    # what full steps leave of a range: before and behind them (all of it before, if there is none)
    cut_lo = np.where(n_full > 0, all_lo, any_hi)
    cut_hi = np.where(n_full > 0, all_lo + n_full * shape.step, any_hi)
    piece_start = np.stack([any_lo, cut_hi], -1).reshape(n_tiles, -1)
    piece_count = np.stack([cut_lo - any_lo, any_hi - cut_hi], -1).reshape(n_tiles, -1)
    left = piece_count.sum(1)
    n_part = -(-left // STEP_PART)
    part = np.full(int(n_part.sum()) * STEP_PART, -1, np.int32)
    piece_at = (_starts(n_part) * STEP_PART)[:, None] + piece_count.cumsum(1) - piece_count
    part[expand(piece_at.ravel(), piece_count.ravel())] = expand(piece_start.ravel(), piece_count.ravel())

    n_full = n_full.sum(1)
    batch_of = rows.batch[order][np.repeat(np.arange(order.size), meets)[heads]]
    tiles = np.stack([batch_of, _starts(n_full), n_full.cumsum(), _starts(n_part), n_part.cumsum()], 1)
    heavy_first = np.argsort(-(n_full * shape.step + n_part * STEP_PART), kind="stable")
    grid = (n_tiles, shape.rows)
    return [
        tiles[heavy_first],
        row_token.reshape(grid)[heavy_first],
        row_group.reshape(grid)[heavy_first],
        bounds,
        full,
        part.reshape(-1, STEP_PART),
    ]


def _runs(rows: SideRows) -> np.ndarray:
    """Runs of consecutive tokens that see exactly the same keys: ``[R, 3 + 2 * ranges]``.

    (batch element, first token, end, lo, hi, lo, hi, ...): what the CPU backend multiplies.
    """
    flat = rows.bounds.reshape(rows.start.size, -1)
    end = rows.start + rows.count
    same = (rows.batch[1:] == rows.batch[:-1]) & (end[:-1] == rows.start[1:]) & (flat[1:] == flat[:-1]).all(1)
    first = np.flatnonzero(np.concatenate([[True], ~same]))
    last = np.concatenate([first[1:] - 1, [end.size - 1]])
    return np.concatenate([rows.batch[first, None], rows.start[first, None], end[last, None], flat[first]], 1)
