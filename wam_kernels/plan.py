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

Samples do not meet, so each distinct one is compiled once, with tokens that count from its first one, and then moved
to every place where it lies. What is large (the tokens of tiles and of steps) is written straight into the plan's one
buffer: touching fresh memory costs more than computing what goes there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _index_buffer
from ._checks import MAX_INT, integer
from ._host import device_of, eager, host_side, plain
from ._index_buffer import Unwritten
from .intervals import NOWHERE, SideRows, side_rows
from .ranges import Ranges, expand, starts
from .rules import RuleGeometry
from .tuning import tuned
from .visibility import Geometry, dense_mask

STEP_PART = 32

# What a plan is made of: one sample, whose tokens see each other and nothing else.
Sample = Geometry | RuleGeometry | Ranges


@dataclass(frozen=True)
class TileShape:
    """Query rows and key rows of a tile, and tokens of a full step of either side. Powers of two for a GPU.

    Raises:
        ValueError: a number that is not an int of at least 1.
    """

    rows: int
    step: int
    key_rows: int | None = None  # as many as rows

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None or name != "key_rows":
                object.__setattr__(self, name, integer("TileShape", name, value, 1))


# Mean visible tokens per row from which a plan gets the tile for long windows.
LONG_WINDOW = 256


@tuned("plan.tile_shape")
def tile_shape(long_window: bool) -> TileShape:
    """Tile of a plan whose rows see few or many tokens.

    Small windows waste most of a large tile (LIBERO ``joint``, chunk 1, window 8: 0.57 of 64 x 64 is useful, 0.79
    of 32 x 32); long ones want the 64-row tensor-core instruction (chunk 4, window 64: 0.96 of 64 x 64 is useful).
    128 query rows would read keys and values half as often, for 0.92 useful. Key tiles of long windows have 128 rows:
    the sums of dk and dv of 64 do not fit into the registers of one warpgroup, and a second one would compute the same
    scores once more. The efficiencies are counted; which tile is fastest is not yet measured on a GPU: ``wam bench
    tune`` tries them.
    """
    return TileShape(64, 64, key_rows=128) if long_window else TileShape(32, 32)


class Side:
    """Tiles of one side; int32 tensors that are views of one buffer.

    ``tiles`` ``[T, 5]``: batch element, begin and end in ``full``, begin and end in ``part`` (in steps), heaviest
    first. ``rows`` ``[T, tile]``: token of each row, -1 for none. ``groups`` ``[T, tile]``: row of ``bounds``.
    ``bounds`` ``[G, ranges, 2]``. ``full`` ``[steps]``: first token. ``part`` ``[steps, STEP_PART]``: tokens or -1.
    """

    FIELDS = ("tiles", "rows", "groups", "bounds", "full", "part")
    tiles: Tensor
    rows: Tensor
    groups: Tensor
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


class Plan:
    """What ``block_attention`` needs to know about a batch. Made by :func:`compile_plan`; immutable.

    Can be copied and pickled, a DataLoader's workers may send it: as its samples and its one buffer.

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
        self._shapes, self._layout, self._buffer = shapes, layout, plain(buffer)
        n, views = len(Side.FIELDS), _index_buffer.views(layout, self._buffer)
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
        return self if device == self.device else self._moved(device, non_blocking)

    @host_side
    def _moved(self, device: torch.device | str, non_blocking: bool) -> Plan:
        device = device_of("Plan.to", device)
        if device == self.device:
            return self
        parts = self._parts()
        return Plan(*parts[:-1], parts[-1].to(device, non_blocking=non_blocking))

    def _parts(
        self,
    ) -> tuple[
        tuple[tuple[Geometry | Ranges, ...], ...],
        tuple[int, int],
        int,
        tuple[TileShape, TileShape],
        tuple[tuple[int, ...], ...],
        Tensor,
    ]:
        """What it is made of."""
        lengths = (self.length, self.key_length)
        return self.geometries, lengths, self.visible_pairs, self._shapes, self._layout, self._buffer

    def __reduce__(self) -> tuple:
        return Plan, self._parts()

    @host_side
    def mask(self) -> Tensor:
        """Dense bool ``[batch, 1, S, T]`` straight from the predicate: for the reference backend and for tests."""
        mask = torch.zeros(self.batch, 1, self.length, self.key_length, dtype=torch.bool, device="cpu")
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
        length: Query tokens of every batch element; the rest is padding that sees nothing. Default: the longest one.
        key_length: Key tokens of every batch element, the rest unseen. Default: ``length`` where all samples have as
            many keys as queries, else the longest element.
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
    return _compile(packed, (length, key_length), tile, tuned_tiles, device_of("compile_plan", device))


def _listed(samples: Any) -> tuple:
    """A sequence as a tuple; anything else, a sample above all, as a tuple of it alone."""
    try:
        return (samples,) if isinstance(samples, Sample) else tuple(samples)
    except TypeError:
        return (samples,)


@lru_cache(maxsize=64)
@host_side
def _compile(
    packed: tuple, lengths: tuple[int, int], tile: TileShape | None, tuned_tiles: bool, device: torch.device
) -> Plan:
    if device.type != "cpu":
        return _compile(packed, lengths, tile, tuned_tiles, torch.device("cpu")).to(device)
    placement = _place(packed, lengths)
    queries, keys = side_rows(placement.samples)
    lo, hi = queries.bounds
    times = np.bincount(placement.which).repeat(queries.of_sample)  # that each row occurs in the batch
    visible = int((times * queries.tokens * (hi - lo).sum(0)).sum())
    tile = tile or tile_shape(visible >= LONG_WINDOW * len(packed) * lengths[0])
    shapes = tile, TileShape(tile.key_rows or tile.rows, tile.step)
    programs = sum(isinstance(sample, Geometry) for sample in placement.samples)
    query_tiles = _cut(queries, shapes[0].rows, programs)
    # programs' rows are alike but for their bounds, which do not decide how they are cut
    alike = shapes[0].rows == shapes[1].rows and programs == len(placement.samples)
    key_tiles = query_tiles if alike else _cut(keys, shapes[1].rows, programs)
    parts = [
        *_side(queries, query_tiles, shapes[0], placement, side=0),
        *_side(keys, key_tiles, shapes[1], placement, side=1),
        _runs(queries, placement),
    ]
    return Plan(packed, lengths, visible, shapes, *_index_buffer.pack(parts))


class Placement(NamedTuple):
    """Where the samples of a batch begin. P entries, in the order of tokens: samples, and the padding of an element."""

    samples: list[Geometry | Ranges]  # the distinct ones, geometries first
    which: np.ndarray  # int64 [P]: index into samples
    batch: np.ndarray  # int64 [P]
    first: np.ndarray  # int64 [2, P]: query and key
    padding: np.ndarray  # bool [P]


def _place(packed: tuple[tuple[Geometry | Ranges, ...], ...], lengths: tuple[int, int]) -> Placement:
    """Lay the samples of every batch element end to end and pad it to ``lengths`` = (queries, keys)."""
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
    batch, first_query, first_key, padding = (np.array(column) for column in columns)
    first = np.stack([first_query, first_key])
    return Placement(distinct, np.array([number[s] for s in samples]), batch, first, padding)


def _members(counts: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of all things, grouped into ``counts``, are in groups ``which``; and how many are in each of those."""
    chosen = counts[which]
    return expand(starts(counts)[which], chosen), chosen


def _moved(
    template: np.ndarray, index: np.ndarray, shift: np.ndarray, least: int, out: np.ndarray | None = None
) -> np.ndarray:
    """``template[index] + shift``, row by row, int32; what is NOWHERE becomes ``least``."""
    out = np.take(template, index, axis=0, out=out, mode="clip")  # "raise", the default, would fill a copy of ``out``
    out += shift.astype(np.int32)[:, None]
    return np.maximum(out, least, out=out)


class Tiles(NamedTuple):
    """Tiles of one side of the distinct samples; tokens and rows count from the sample's first."""

    of_sample: np.ndarray  # int64 [samples]: tiles of each
    tokens: np.ndarray  # int32 [T, tile]; NOWHERE where a group is padded
    rows: np.ndarray  # int32 [T, tile]: the SideRows row that each token is in; NOWHERE likewise
    meets: np.ndarray  # int64 [M]: the rows that a tile meets, tile after tile; counted over all samples
    heads: np.ndarray  # int64 [T]: where those of each tile begin


def _spans(bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """lo and hi of ``bounds`` with an empty range that begins last and ends first of all."""
    lo, hi = bounds
    return np.where(lo == NOWHERE, np.iinfo(np.int32).max, lo), hi


def _cut(rows: SideRows, tile_rows: int, programs: int) -> Tiles:
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
        lo, hi = _spans(np.concatenate([rows.bounds, np.full((2, 1, group.size), NOWHERE, np.int32)], 1).take(order, 2))
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


class Holes(NamedTuple):
    """Tokens inside runs, which nothing of their tile meets."""

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
        tile = some // n_runs
        total = np.bincount(tile, count, n_tiles).astype(np.int64)
        at = starts(count) - starts(total)[tile]
        return cls(step, total, np.bincount(tile, minlength=n_tiles), np.array([at, first - step * at]))

    def write(self, tiles: np.ndarray, shift: np.ndarray, at: np.ndarray, out: np.ndarray) -> None:
        """Write the lists of ``tiles``, moved by ``shift``; each begins at ``out[at]``, the first one at 0.

        What lies between lists is overwritten. The entries are summed up from their differences, which are ``step``
        except where a run begins: in place, without another array as long as ``out``.
        """
        runs, counts = _members(self.runs, tiles)
        at, base = self.at_base.take(runs, axis=1) + np.array([at, shift - self.step * at]).repeat(counts, axis=1)
        base[1:] += self.step - base[:-1]
        out.fill(self.step)
        out[at] = base
        np.cumsum(out, dtype=out.dtype, out=out)


def _visits(bounds: np.ndarray, tiles: Tiles, step: int) -> tuple[Visits, Visits]:
    """What tiles visit of their rows' ``bounds``: full steps, by their first tokens; the tokens of partial steps."""
    lo, hi = _spans(bounds)
    lo, hi = lo.take(tiles.meets, axis=1), hi.take(tiles.meets, axis=1)
    # what some row of a tile sees, and what every row sees: [columns, T]
    any_lo, all_lo = (f.reduceat(lo, tiles.heads, axis=1) for f in (np.minimum, np.maximum))
    any_hi, all_hi = (f.reduceat(hi, tiles.heads, axis=1) for f in (np.maximum, np.minimum))
    np.minimum(any_lo, any_hi, out=any_lo)

    n_full = np.maximum(np.maximum(all_hi, 0) - all_lo, 0) // step  # NOWHERE - all_lo would wrap around
    # what full steps leave of a range: before and behind them (all of it before, if there is none)
    cut_lo = np.where(n_full > 0, all_lo, any_hi)
    cut_hi = np.where(n_full > 0, all_lo + n_full * step, any_hi)
    left = np.empty((2, tiles.heads.size, len(lo), 2), np.int32)  # [first token or count, T, columns, before or behind]
    left[0, ..., 0], left[0, ..., 1] = any_lo.T, cut_hi.T
    left[1, ..., 0], left[1, ..., 1] = (cut_lo - any_lo).T, (any_hi - cut_hi).T
    holes = _holes(lo, hi, tiles.heads, cut_lo)
    first, count = left.reshape(2, tiles.heads.size, -1)
    return Visits.of(step, all_lo.T, n_full.T), Visits.of(1, first, count, holes)


def _holes(lo: np.ndarray, hi: np.ndarray, heads: np.ndarray, cut_lo: np.ndarray) -> Holes:
    """What lies between tokens that some of a tile's rows see, in one column, but is seen by none of them.

    ``lo``, ``hi`` ``[columns, M]``: what each row of each tile sees. ``cut_lo`` ``[columns, T]``: what lies before it
    is in run 0 of the two that a column has, else in run 1.
    """
    tile = np.zeros(lo.shape[1], np.int64)
    tile[heads[1:]] = 1
    of_range = tile.cumsum() * len(lo) + np.arange(len(lo))[:, None]
    some = hi != NOWHERE
    # the ranges of all tiles and columns end to end: one running maximum serves them all
    begin, end = ((of_range << 32) + lo)[some], ((of_range << 32) + hi)[some]
    order = np.argsort(begin)
    begin, end = begin[order], end[order]
    reach = np.maximum.accumulate(end)[:-1]
    hole = np.flatnonzero((begin[1:] > reach) & (begin[1:] >> 32 == reach >> 32))
    of_range, first, end = begin[hole + 1] >> 32, reach[hole] & 0xFFFFFFFF, begin[hole + 1] & 0xFFFFFFFF
    return Holes(2 * of_range + (first >= cut_lo.T.ravel()[of_range]), first, end)


def _side(
    rows: SideRows, tiles: Tiles, shape: TileShape, placement: Placement, side: int
) -> list[np.ndarray | Unwritten]:
    """The arrays of a :class:`Side` (0: queries, 1: keys): what the samples have, moved to where they lie."""
    row, counts = _members(rows.of_sample, placement.which)
    first_of_row = placement.first[1 - side].repeat(counts)

    # every tile of the batch: which one of its sample it is, and where that lies. Padding comes before the samples
    order = np.lexsort((~placement.padding, placement.batch))
    tile, counts = _members(tiles.of_sample, placement.which[order])
    first_row = starts(rows.of_sample[placement.which])
    places = np.array([placement.batch, placement.first[side], placement.first[1 - side], first_row])
    batch, own, other, first_row = places[:, order].repeat(counts, axis=1)

    # steps are listed tile after tile, in this order; the tiles themselves go heaviest first
    full, part = _visits(rows.bounds, tiles, shape.step)
    n_full, left = full.total[tile], part.total[tile]
    n_part = -(-left // STEP_PART)
    full_at, part_at = starts(n_full), starts(n_part)
    steps = np.array([batch, full_at, full_at + n_full, part_at, part_at + n_part])
    heavy = np.argsort(-(n_full * shape.step + n_part * STEP_PART), kind="stable")
    heavy_tile, own, first_row = tile[heavy], own[heavy], first_row[heavy]

    def write_bounds(out: np.ndarray) -> None:
        _moved(rows.bounds_by_row(), row, first_of_row, 0, out.reshape(row.size, -1))

    def write_part(out: np.ndarray) -> None:
        out = out.reshape(-1)
        part.write(tile, other, part_at * STEP_PART, out)
        out[expand(part_at * STEP_PART + left, n_part * STEP_PART - left)] = -1

    return [
        steps.take(heavy, axis=1).T,
        Unwritten((tile.size, shape.rows), lambda out: _moved(tiles.tokens, heavy_tile, own, -1, out)),
        Unwritten((tile.size, shape.rows), lambda out: _moved(tiles.rows, heavy_tile, first_row, 0, out)),
        Unwritten((row.size, rows.bounds.shape[1], 2), write_bounds),
        Unwritten((int(n_full.sum()),), lambda out: full.write(tile, other, full_at, out)),
        Unwritten((int(n_part.sum()), STEP_PART), write_part),
    ]


def _runs(rows: SideRows, placement: Placement) -> np.ndarray:
    """Runs of consecutive tokens that see exactly the same keys: ``[R, 3 + 2 * ranges]``.

    (batch element, first token, end, lo, hi, lo, hi, ...): what the CPU backend multiplies.
    """
    # rows follow each other without a gap; those of different samples see the same only if they see nothing
    nothing = (rows.bounds == NOWHERE).all((0, 1))
    new = np.ones(nothing.size, bool)
    new[1:] = (rows.bounds[..., 1:] != rows.bounds[..., :-1]).any((0, 1))

    row, counts = _members(rows.of_sample, placement.which)
    batch, first_query, first_key = np.array([placement.batch, *placement.first]).repeat(counts, axis=1)
    start, new, nothing = first_query + rows.start[row], new[row], nothing[row]
    first = starts(counts)[counts > 0]  # row of each sample that has any
    new[first] = ~(nothing[first] & nothing[first - 1] & (batch[first] == batch[first - 1]))
    new[0] = True
    heads = np.flatnonzero(new)
    last = np.append(heads[1:], new.size) - 1
    runs = np.empty((heads.size, 3 + 2 * rows.bounds.shape[1]), np.int32)
    runs[:, 0], runs[:, 1], runs[:, 2] = batch[heads], start[heads], start[last] + rows.tokens[row[last]]
    runs[:, 3:] = _moved(rows.bounds_by_row(), row[heads], first_key[heads], 0)
    return runs
