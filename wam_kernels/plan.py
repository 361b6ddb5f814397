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
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _index_buffer
from ._index_buffer import Unwritten
from .intervals import NOWHERE, SideRows, side_rows
from .programs import Program
from .ranges import Ranges, expand, starts
from .visibility import Geometry, dense_mask

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
    placement = _place(packed, lengths)
    queries, keys = side_rows(placement.samples)
    lo, hi = queries.bounds
    pairs = np.append(0, (queries.count * (hi - lo).sum(0)).cumsum())[queries.begin]
    visible = int(np.diff(pairs)[placement.which].sum())
    shape = tile or tile_shape(visible / (len(packed) * lengths[0]))
    query_tiles = _cut(queries, shape.rows)
    key_tiles = query_tiles if keys.start is queries.start else _cut(keys, shape.rows)
    query_side = _side(queries, query_tiles, shape, placement, side=0)
    parts = [
        *query_side,
        *_side(keys, key_tiles, shape, placement, side=1),
        _runs(queries, placement, query_side[Side.FIELDS.index("bounds")]),
    ]
    return Plan(packed, lengths, visible, (shape, shape), *_index_buffer.pack(parts))


class Placement(NamedTuple):
    """Where the samples of a batch begin: one entry for each of them, and one for padding, in token order."""

    samples: list[Geometry | Ranges]  # the distinct ones, geometries first
    which: np.ndarray  # int64 [P]: index into samples
    batch: np.ndarray  # int64 [P]
    first: np.ndarray  # int64 [2, P]: query and key
    padding: np.ndarray  # bool [P]


def _place(packed: tuple[tuple[Geometry | Ranges, ...], ...], lengths: tuple[int, int]) -> Placement:
    entries = []
    for b, samples in enumerate(packed):
        q, k = 0, 0
        for sample in samples:
            entries.append((sample, b, q, k, False))
            q, k = q + sample.length, k + sample.key_length
        if (q, k) != lengths:  # padding is a sample in which nothing sees anything
            entries.append((Ranges((), (), lengths[0] - q, lengths[1] - k), b, q, k, True))
    samples, *columns = zip(*entries, strict=True)
    distinct = sorted(dict.fromkeys(samples), key=lambda sample: isinstance(sample, Ranges))
    number = {sample: i for i, sample in enumerate(distinct)}
    batch, q, k, padding = (np.array(column) for column in columns)
    return Placement(distinct, np.array([number[s] for s in samples]), batch, np.stack([q, k]), padding)


def _members(begin: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What samples ``which`` have, of things that are listed by sample: their indices, and how many each has."""
    counts = np.diff(begin)[which]
    return expand(begin[which], counts), counts


def _moved(
    template: np.ndarray, index: np.ndarray, shift: np.ndarray, least: int, out: np.ndarray | None = None
) -> np.ndarray:
    """``template[index] + shift`` by row, int32; what is NOWHERE becomes ``least``."""
    out = np.take(template, index, axis=0, out=out, mode="clip")  # "raise", the default, would buffer ``out``
    out += shift.astype(np.int32)[:, None]
    return np.maximum(out, least, out=out)


class Tiles(NamedTuple):
    """Tiles of one side of the distinct samples; tokens and rows count from the sample's first."""

    begin: np.ndarray  # int64 [samples + 1]: the tiles of sample i are begin[i] .. begin[i + 1]
    tokens: np.ndarray  # int32 [T, rows], NOWHERE where a group is padded
    rows: np.ndarray  # int32 [T, rows], the same
    meets: np.ndarray  # int64 [M]: rows of SideRows that the tiles meet, tile after tile
    heads: np.ndarray  # int64 [T]: where those of a tile begin


def _cut(rows: SideRows, tile_rows: int) -> Tiles:
    """Cut rows into tiles; all in whole-array operations."""
    # groups (sample, stream) are padded in front to whole tiles
    n_samples = rows.begin.size - 1
    sample = np.repeat(np.arange(n_samples), np.diff(rows.begin))
    group = 2 * sample + rows.stream
    order = np.lexsort((rows.order, group))  # stable: like rows stay in the order of their tokens
    group, start, count = group[order], rows.start[order], rows.count[order]
    tokens = np.bincount(group, count, 2 * n_samples).astype(np.int64)
    slots = -(-tokens // tile_rows) * tile_rows
    padding = slots - tokens
    slot = starts(count) + padding.cumsum()[group]
    n_slots = int(slots.sum())

    width = np.diff(slot + count, prepend=0)  # a row's slots and the padding before them
    token_at = np.repeat((start - slot).astype(np.int32), width)
    token_at += np.arange(n_slots, dtype=np.int32)
    row_at = np.repeat((order - rows.begin[sample[order]]).astype(np.int32), width)
    empty = expand(starts(slots), padding)
    token_at[empty] = NOWHERE
    row_at[empty] = NOWHERE

    # rows are in slot order, so those that a tile meets follow each other
    first, last = slot // tile_rows, (slot + count - 1) // tile_rows
    n_tiles = last - first + 1
    tile = expand(first, n_tiles)
    return Tiles(
        begin=np.append(0, slots.reshape(-1, 2).sum(1).cumsum() // tile_rows),
        tokens=token_at.reshape(-1, tile_rows),
        rows=row_at.reshape(-1, tile_rows),
        meets=np.repeat(order, n_tiles),
        heads=np.flatnonzero(np.diff(tile, prepend=-1)),
    )


class Visits(NamedTuple):
    """What the tiles of the distinct samples visit, as runs of tokens that count from the sample's first."""

    total: np.ndarray  # int64 [T]: steps, or tokens, of a tile
    begin: np.ndarray  # int64 [T + 1]: the runs of tile i are begin[i] .. begin[i + 1]
    first: np.ndarray  # int64 [R]: first token
    at: np.ndarray  # int64 [R]: where the run begins among all that its tile visits

    @classmethod
    def of(cls, first: np.ndarray, count: np.ndarray) -> Visits:
        """Of runs ``[runs, T]``, some of them empty."""
        total = count.sum(0, dtype=np.int64)
        some = np.flatnonzero(count.T)
        tile = some // len(count)
        at = starts(count.T.ravel()[some]) - starts(total)[tile]
        return cls(total, np.append(0, (count > 0).sum(0).cumsum()), first.T.ravel()[some], at)

    def write(self, tiles: np.ndarray, shift: np.ndarray, at: np.ndarray, step: int, out: np.ndarray) -> None:
        """Every ``step``-th token of the runs of ``tiles``, moved by ``shift``, each tile's from ``out[at]`` on.

        Written as differences that are summed in place: nothing else as long as ``out`` is allocated.
        """
        runs, counts = _members(self.begin, tiles)
        at = self.at[runs] + np.repeat(at, counts)
        first = self.first[runs] + np.repeat(shift, counts)
        out.fill(step)
        out[at] = np.diff(first - step * at, prepend=step) + step
        np.cumsum(out, dtype=out.dtype, out=out)


def _visits(bounds: np.ndarray, tiles: Tiles, step: int) -> tuple[Visits, Visits]:
    """Full steps, and the tokens of partial steps."""
    lo, hi = bounds
    lo = np.where(lo == NOWHERE, np.iinfo(np.int32).max, lo).take(tiles.meets, axis=1)
    hi = hi.take(tiles.meets, axis=1)
    # what some row of a tile sees, and what every row sees: [columns, T]
    any_lo, all_lo = (f.reduceat(lo, tiles.heads, axis=1) for f in (np.minimum, np.maximum))
    any_hi, all_hi = (f.reduceat(hi, tiles.heads, axis=1) for f in (np.maximum, np.minimum))
    np.minimum(any_lo, any_hi, out=any_lo)

    n_full = np.maximum(np.maximum(all_hi, 0) - all_lo, 0) // step
    # what full steps leave of a range: before and behind them (all of it before, if there is none)
    cut_lo = np.where(n_full > 0, all_lo, any_hi)
    cut_hi = np.where(n_full > 0, all_lo + n_full * step, any_hi)
    left = np.stack([any_lo, cut_hi], 1), np.stack([cut_lo - any_lo, any_hi - cut_hi], 1)
    return Visits.of(all_lo, n_full), Visits.of(*(x.reshape(-1, tiles.heads.size) for x in left))


def _side(rows: SideRows, tiles: Tiles, shape: TileShape, placement: Placement, side: int) -> list:
    """What a :class:`Side` holds, for ``_index_buffer.pack``: tiles and steps of the samples, moved to their places."""
    first_row = starts(np.diff(rows.begin)[placement.which])
    index, counts = _members(rows.begin, placement.which)
    bounds = rows.bounds.transpose(2, 1, 0).reshape(rows.start.size, -1)
    bounds = _moved(bounds, index, np.repeat(placement.first[1 - side], counts), 0)

    # tiles in the order of the samples, padding before the samples of its batch element
    order = np.lexsort((~placement.padding, placement.batch))
    index, counts = _members(tiles.begin, placement.which[order])
    places = np.stack([placement.batch, placement.first[side], placement.first[1 - side], first_row])
    batch, own, other, first_row = np.repeat(places[:, order], counts, axis=1)

    full, part = _visits(rows.bounds, tiles, shape.step)
    n_full, left = full.total[index], part.total[index]
    n_part = -(-left // STEP_PART)
    full_at, part_at = starts(n_full), starts(n_part)
    heavy = np.argsort(-(n_full * shape.step + n_part * STEP_PART), kind="stable")
    index_heavy, own, first_row = index[heavy], own[heavy], first_row[heavy]

    def write_part(out: np.ndarray) -> None:
        out = out.reshape(-1)
        part.write(index, other, part_at * STEP_PART, 1, out)
        out[expand(part_at * STEP_PART + left, n_part * STEP_PART - left)] = -1

    return [
        np.stack([batch, full_at, full_at + n_full, part_at, part_at + n_part], 1)[heavy],
        Unwritten((index.size, shape.rows), lambda out: _moved(tiles.tokens, index_heavy, own, -1, out)),
        Unwritten((index.size, shape.rows), lambda out: _moved(tiles.rows, index_heavy, first_row, 0, out)),
        bounds.reshape(len(bounds), -1, 2),
        Unwritten((int(n_full.sum()),), lambda out: full.write(index, other, full_at, shape.step, out)),
        Unwritten((int(n_part.sum()), STEP_PART), write_part),
    ]


def _runs(rows: SideRows, placement: Placement, bounds: np.ndarray) -> np.ndarray:
    """Runs of consecutive tokens that see exactly the same keys: ``[R, 3 + 2 * ranges]``.

    (batch element, first token, end, lo, hi, lo, hi, ...): what the CPU backend multiplies.
    """
    index, counts = _members(rows.begin, placement.which)
    batch, first = np.repeat(np.stack([placement.batch, placement.first[0]]), counts, axis=1)
    start = first + rows.start[index]
    end = start + rows.count[index]
    flat = bounds.reshape(start.size, -1)
    new = np.ones(start.size, bool)
    new[1:] = (batch[1:] != batch[:-1]) | (end[:-1] != start[1:]) | (flat[1:] != flat[:-1]).any(1)
    head = np.flatnonzero(new)
    last = np.append(head[1:], new.size) - 1
    out = np.empty((head.size, 3 + flat.shape[1]), np.int32)
    out[:, 0], out[:, 1], out[:, 2], out[:, 3:] = batch[head], start[head], end[last], flat[head]
    return out
