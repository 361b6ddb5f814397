"""The steps of 128-row tiles as full steps and boxes: what kernels walk that take every step by TMA (Hopper).

A tile is 2 x 64 rows, one half for each warpgroup. It visits, in this order,

- ``n0`` masked steps that only half 0 takes,
- ``n_full`` full steps: ``FULL`` consecutive tokens that every row of both halves attends to; no masking,
- ``n_both`` masked steps of both halves,
- ``n1`` masked steps that only half 1 takes.

So each half takes one contiguous piece of the tile's steps and leaves steps out at the ends alone: a warpgroup that
left one out in the middle would hold what its products still read, and the copies could not pass it.

A masked step is ``MASKED // BOX`` boxes, each at most ``BOX`` contiguous tokens, *every one attended to by some row of
the tile*: what no row attends to is never read, and if it is NaN it reaches nothing. A box of fewer tokens has a gap of
zero rows before them. Its bits say which row attends to which of its tokens; they are stored as the threads of a
warpgroup hold the scores (``words``), so one coalesced 4-byte load a thread masks 64 tokens.

What the format carries beyond the programs of today, each without another field:

- a stop-gradient of a pair of streams: the sides are independent, so its pairs are left out of the key side alone,
  where dk and dv come from, and stay on the query side (forward and dq). Of a frozen stream, whose queries get no
  gradient either, the tiles have no steps in ``query_gradients``, a query side for dq alone that shares the rest.
- any number of streams and query groups: they are nothing but row sets (``SideRows.row_set``), the order in which rows
  fill tiles.
- many query batches on one row of a cache: a tile names the batch element of its rows and that of its steps. In the
  forward and dq they may differ; a key tile's steps are of one batch element, so dk and dv of shared keys are not.

All in whole-array operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..runtime import index_buffer
from ..runtime.arrays import expand, members, starts
from ..runtime.index_buffer import Entry, Layout, Packed, Together, Unwritten
from .placement import moved
from .side_rows import BatchRows, concatenated
from .steps import Visits
from .tiles import BatchTiles, Lists, Tiles, cut

ROWS, HALF = 128, 64  # of a tile and of a warpgroup
FULL, MASKED, BOX = 128, 64, 32  # tokens of a full step, of a masked one and of a box
PLACES = MASKED // BOX
TOKEN_BITS = 26  # of a box: the first token; above them its gap
EMPTY = (1 << TOKEN_BITS) - 1  # a token that no tensor has, so a box of zeros
THREADS = 128  # of a warpgroup
AT_ONCE = 4096  # entries that go through array operations together where there are many: memory that stays in a cache
NONE = -(1 << 40)  # in place of an index: below 0 whatever is added to it


class BoxSide:
    """Tiles of one side, int32 tensors that are views of one buffer.

    ``tiles`` ``[T, 8]``: batch element of the rows, first full step, first masked step, n0, n_full, n_both, n1, batch
    element of the steps; heaviest first. ``rows`` ``[T, 128]``: token of each row, -1 for none. ``full`` ``[F]``: first
    token. ``boxes`` ``[M, 2]``: first token | gap << 26, or EMPTY. ``words`` ``[M, 2, 128]``: of each half and thread;
    bit 4 j + 2 i + c of thread 32 w + 4 g + q says that row 16 w + g + 8 i of the half attends to place
    8 j + 2 q + c of the step's 64.
    """

    FIELDS = ("tiles", "rows", "full", "boxes", "words")
    tiles: Tensor
    rows: Tensor
    full: Tensor
    boxes: Tensor
    words: Tensor

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        for name, tensor in zip(self.FIELDS, tensors, strict=True):
            setattr(self, name, tensor)

    def tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.FIELDS]

    @property
    def computed_pairs(self) -> int:
        """(row, token) pairs that the two halves compute, masked ones too."""
        n0, n_full, n_both, n1 = self.tiles[:, 3:7].sum(0).tolist()
        return HALF * (2 * FULL * n_full + MASKED * (n0 + 2 * n_both + n1))

    @property
    def idle_tiles(self) -> int:
        """Tiles without a step: their kernel only writes zeros."""
        return int((self.tiles[:, 3:7] == 0).all(1).sum())

    def with_tiles(self, tiles: Tensor) -> BoxSide:
        """Other steps of the same rows."""
        return BoxSide([tiles, *self.tensors()[1:]])


class Boxes(Packed):
    """Both sides of a plan as boxes: ``queries`` for the forward, ``keys`` for dk and dv; and ``query_gradients`` for
    dq, the queries without the steps of tiles whose rows are all frozen.

    ``pairs`` int32 ``[4, 2]``, which no kernel reads: int64 numbers of pairs, those of the forward, of dq, of dk and
    dv, and of any of the three gradients.
    """

    def __init__(self, layout: Layout, buffer: Tensor) -> None:
        super().__init__(layout, buffer)
        # each array of the queries lies beside that of the keys
        self.pairs, *views = index_buffer.views(layout, self.buffer)
        both, dq_tiles = views[: 2 * len(BoxSide.FIELDS)], views[2 * len(BoxSide.FIELDS) :]
        self.queries, self.keys = BoxSide(both[::2]), BoxSide(both[1::2])
        self.query_gradients = self.queries.with_tiles(*dq_tiles) if dq_tiles else self.queries

    def tensors(self) -> list[Tensor]:
        """What the registered op reads: query side, key side, tiles of dq, pairs."""
        return [*self.queries.tensors(), *self.keys.tensors(), self.query_gradients.tiles, self.pairs]


def compile_boxes(rows: BatchRows) -> Boxes:
    """The boxes of a batch, on the CPU. O(tokens x ranges), never anything of size S x S.

    Raises:
        ValueError: more tokens in one batch element than a box can name.
    """
    if max(rows.lengths) >= EMPTY:
        raise ValueError(
            f"block_attention: plan must have fewer than {EMPTY} tokens a batch element for impl='cuda', got "
            f"{max(rows.lengths)}; use impl='triton'"
        )
    return Boxes(*index_buffer.pack(_arrays(rows)))


class TileRows(NamedTuple):
    """The rows of SideRows in each tile, tile after tile, and what they attend to."""

    tile: np.ndarray  # int64 [M]
    starts: np.ndarray  # int64 [T]: where those of each tile begin
    n_rows: np.ndarray  # int64 [T]
    of_half: np.ndarray  # int64 [2, T]: how many of them are in each half: the first ones, the last ones
    bounds: np.ndarray  # int32 [2, columns, M]: lo and hi; 0 and 0 where a range is empty


def _tile_rows(bounds: np.ndarray, tiles: Tiles) -> TileRows:
    middle = tiles.tile_of * ROWS + HALF
    halves = np.array([tiles.first < middle, tiles.end > middle], np.int64)
    of_half = np.add.reduceat(halves, tiles.starts, axis=1)
    bounds = np.maximum(bounds.take(tiles.order.take(tiles.row_of), axis=2), 0)  # NOWHERE is below
    return TileRows(tiles.tile_of, tiles.starts, np.bincount(tiles.tile_of), of_half, bounds)


def _union(ranges: np.ndarray) -> np.ndarray:
    """Disjoint runs of the union of ranges, which are overwritten, sorted, ``[begin or end, runs]``; ranges that touch
    are one run.
    """
    ranges.sort(axis=1)
    begin, end = ranges  # a run begins where every range begun before has ended
    new = np.ones(begin.size + 1, bool)
    np.greater(begin[1:], end[:-1], out=new[1:-1])
    return np.array([begin[new[:-1]], end[new[1:]]])


class Pieces(NamedTuple):
    """What tiles visit: full steps as runs, the rest in boxes; tile after tile, by token."""

    full: Visits
    tile: np.ndarray  # int64 [boxes]
    first: np.ndarray  # int32 [boxes]: first token
    length: np.ndarray  # int32 [boxes]: tokens, 1 to 32
    some: np.ndarray  # bool [columns, boxes]: may some row attend to some token of it in this column?


def _pieces(rows: TileRows) -> Pieces:
    """Cut what the rows of each tile attend to into full steps and boxes."""
    lo, hi = rows.bounds
    bits = int(hi.max(initial=0)).bit_length()  # tile t's token is at t << bits | token: no two tiles touch
    attended = lo < hi
    everything = _union((rows.bounds + (rows.tile << bits)).reshape(2, -1).compress(attended.ravel(), axis=1))

    # what some row of a tile attends to, and what every row does: [columns, T]; every tile has a row
    lo = np.where(attended, lo, 1 << bits)
    any_lo, all_lo = np.minimum.reduceat(lo, rows.starts, axis=1), np.maximum.reduceat(lo, rows.starts, axis=1)
    any_hi, all_hi = np.maximum.reduceat(hi, rows.starts, axis=1), np.minimum.reduceat(hi, rows.starts, axis=1)
    c, tile = (all_lo < all_hi).nonzero()
    begin, end = _union(np.array([all_lo[c, tile], all_hi[c, tile]]) + (tile << bits))
    some = ((end - begin) // FULL).nonzero()[0]
    begin, end = begin.take(some), end.take(some)
    count = (end - begin) // FULL
    # what is left of the run before the full steps fills whole boxes, where the spare tokens allow it
    shift = (everything[0].take(everything[0].searchsorted(begin, "right") - 1) - begin) % BOX
    begin += np.where(shift <= end - begin - count * FULL, shift, 0)
    full = Visits.of_runs(FULL, rows.n_rows.size, begin >> bits, begin & (1 << bits) - 1, count)

    left_and_stop = np.concatenate([everything, [begin + count * FULL, begin]], axis=1)
    left_and_stop.sort(axis=1)
    left, stop = left_and_stop
    boxes = -((left - stop) // BOX)
    first = (left - BOX * starts(boxes)).repeat(boxes)
    first += np.arange(0, BOX * first.size, BOX)
    length = np.minimum(stop.repeat(boxes) - first, BOX)
    tile, first, length = first >> bits, (first & (1 << bits) - 1).astype(np.int32), length.astype(np.int32)
    some = (any_lo.take(tile, axis=1) < first + length) & (any_hi.take(tile, axis=1) > first)
    return Pieces(full, tile, first, length, some)


def _bits(rows: TileRows, pieces: Pieces, n_rows: np.ndarray, bits_at: np.ndarray) -> np.ndarray:
    """Tokens of a box that a row attends to, for each box and row of its tile, uint32; those of a box at ``bits_at``.

    Before all of them are bits of no token.
    """
    end = int(n_rows.sum()) + 1
    bits = np.zeros(end, np.uint32)
    # nearly every box is in one column
    column, (columns, boxes) = pieces.some.argmax(0), pieces.some.nonzero()
    for first in range(0, column.size, AT_ONCE):
        some = slice(first, first + AT_ONCE)
        at = slice(int(bits_at[first]), int(bits_at[some.stop]) if some.stop < column.size else end)
        bits[at] = _bits_of_column(rows, pieces, np.arange(column.size)[some], column[some], n_rows[some])
    more = (columns != column.take(boxes)).nonzero()[0]
    if more.size:
        columns, boxes = columns.take(more), boxes.take(more)
        n_rows = n_rows.take(boxes)
        of_boxes = expand(bits_at.take(boxes), n_rows)
        np.bitwise_or.at(bits, of_boxes, _bits_of_column(rows, pieces, boxes, columns, n_rows))
    return bits


def _bits_of_column(
    rows: TileRows, pieces: Pieces, boxes: np.ndarray, column: np.ndarray, n_rows: np.ndarray
) -> np.ndarray:
    """The bits of these boxes that one column of each has."""
    row = column * rows.tile.size + rows.starts.take(pieces.tile.take(boxes))
    gap = BOX - pieces.length.take(boxes)
    ends = rows.bounds.reshape(2, -1).take(expand(row, n_rows), axis=1)
    ends += (gap - pieces.first.take(boxes)).repeat(n_rows)
    np.maximum(ends, gap.repeat(n_rows), out=ends)
    # bits lo .. hi - 1 are 2**hi - 2**lo; of 32 and more NumPy makes 0, which is as good as 2**32
    lo, hi = np.left_shift(np.uint32(1), ends.view(np.uint32), out=ends.view(np.uint32))
    return np.subtract(hi, lo, out=hi)


class RowPairs(NamedTuple):
    """The two rows that threads 4 g .. 4 g + 3 of a warp hold, where they are others than those of the fours before.

    Half after half, by warp and g: few differ, so the words of these alone are computed.
    """

    of_half: np.ndarray  # int64 [2 * T]: how many
    rows: np.ndarray  # int64 [i, P]: which of its tile's; NONE for none
    fours: np.ndarray  # int64 [P]: so many fours of threads hold them


def _row_pairs(tiles: Tiles) -> RowPairs:
    # what begins or ends at place 16 w + 8 i + g does so at fours 8 w + g, and changes the first ones of that warp (of
    # the next one, if i is 1), which hold other rows than the last ones of the warp before
    edge = np.concatenate([tiles.first, tiles.end])
    new = np.zeros(tiles.token.size // 2 + 1, bool)
    new[edge // 16 * 8 + edge % 8] = True
    new[(edge + 8) // 16 * 8] = True
    new[:: HALF // 2] = True  # the first ones of each half, and the end
    first = new.nonzero()[0]
    fours, first = first[1:] - first[:-1], first[:-1]
    place = first // 8 * 16 + first % 8
    rows = tiles.by_place(np.arange(tiles.order.size), nowhere=-1).take([place, place + 8])
    rows = np.where(rows < 0, NONE, rows - tiles.row_of.take(tiles.starts).take(place // ROWS))
    return RowPairs(np.bincount(place // HALF, minlength=tiles.token.size // HALF), rows, fours)


class Masked(NamedTuple):
    """Masked steps of the tiles of the distinct samples, tile after tile."""

    n_steps: np.ndarray  # int64 [T, 3]: of half 0 alone, of both, of half 1 alone
    boxes: np.ndarray  # int32 [M, 2]
    n_words: np.ndarray  # int64 [M]: different words of each, those of four threads in 16 bytes
    words: np.ndarray  # complex128 [K]
    fours: np.ndarray  # int64 [K]: how many fours of threads have each, one after the other


def _masked(rows: TileRows, pairs: RowPairs, pieces: Pieces) -> Masked:
    """Boxes with their bits, put together into steps."""
    n_tiles, n_rows = rows.n_rows.size, rows.n_rows.take(pieces.tile)
    bits_at = starts(n_rows) + 1
    bits = _bits(rows, pieces, n_rows, bits_at)

    # a box is of half 0 (kind 0), of both (1) or of half 1 (2)
    of_half0, of_half1 = rows.of_half.take(pieces.tile, axis=1)
    attend = (bits != 0).cumsum()  # so many up to here
    last = bits_at + n_rows - 1
    by_half0 = attend.take(bits_at + of_half0 - 1) > attend.take(bits_at - 1)
    by_half1 = attend.take(last) > attend.take(last - of_half1)
    kind = 3 * pieces.tile + 1 + by_half1 - by_half0
    order = kind.argsort(kind="stable")
    count = np.bincount(kind, minlength=3 * n_tiles).reshape(-1, 3).T
    # what a half has left over fills a step of both where that computes no more
    odd0, odd, odd1 = count % PLACES != 0
    move0, move1 = odd0 & (odd | odd1), odd1 & (odd ^ odd0)
    sizes = (count + np.array([0 - move0, move0 + move1.astype(np.int64), 0 - move1])).T
    n_steps = -(-sizes // PLACES)
    n_masked = n_steps[:, 0] + n_steps[:, 1] + n_steps[:, 2]
    place_of = np.empty(order.size, np.int64)
    place_of[order] = expand(starts(n_steps.ravel()) * PLACES, sizes.ravel())

    boxes = np.full((int(n_masked.sum()), PLACES), EMPTY, np.int32)
    boxes.reshape(-1)[place_of] = pieces.first | (BOX - pieces.length) << TOKEN_BITS
    at = np.full(boxes.shape, NONE)  # where the bits of the box in each place are
    at.reshape(-1)[place_of] = bits_at
    return Masked(n_steps, boxes, *_words(pairs, np.arange(n_tiles).repeat(n_masked), at, bits))


def _words(
    pairs: RowPairs, step_tile: np.ndarray, bits_at: np.ndarray, bits: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``n_words``, ``words`` and ``fours`` of :class:`Masked`."""
    half = (2 * step_tile).repeat(2)
    half[1::2] += 1
    pair, of_half = members(pairs.of_half, half)
    n_words = of_half[::2] + of_half[1::2]
    step = np.arange(n_words.size).repeat(n_words)
    rows, box_at = pairs.rows[:, None], bits_at.T.copy()
    words = np.empty(pair.size, np.complex128)
    by_thread = words.view(np.uint32).reshape(-1, 4)  # [K, q]
    for first in range(0, pair.size, AT_ONCE):
        some = slice(first, first + AT_ONCE)
        at = rows.take(pair[some], axis=2) + box_at.take(step[some], axis=1)  # [i, x, K]
        tokens = bits.take(np.maximum(at, 0, out=at))[:, :, None]
        # tokens 8 j + 2 q + c of a box, of the row i: bits 4 j + 2 i + c of thread q
        word, second = tokens >> np.arange(0, 8, 2, dtype=np.uint32)[:, None] & np.uint32(0x03030303)  # [x, q, K]
        word |= np.left_shift(second, np.uint32(2), out=second)
        word |= np.right_shift(word, np.uint32(4), out=second)
        word &= np.uint32(0x00FF00FF)
        word |= np.right_shift(word, np.uint32(8), out=second)
        word &= np.uint32(0x0000FFFF)
        x0, x1 = word
        by_thread[some] = (x0 | x1 << np.uint32(16)).T
    return n_words, words, pairs.fours.take(pair)


def _arrays(rows: BatchRows) -> list[Entry]:
    """Numbers of pairs; each of ``BoxSide.FIELDS`` of the queries and of the keys: what the samples have, moved to
    where they lie; and the tiles of dq where they are others.

    Both go through the array operations together: what small plans cost is the number of these.
    """
    both = concatenated([rows.queries, rows.keys])
    tiles = cut(both, ROWS, ROWS)
    of_tile = _tile_rows(both.bounds, tiles)
    pieces = _pieces(of_tile)
    full, masked = pieces.full, _masked(of_tile, _row_pairs(tiles), pieces)

    batch = BatchTiles.of(tiles, rows.placement)
    tile, other, n_queries = batch.tile, batch.other, batch.n_queries
    n_steps = masked.n_steps.take(tile, axis=0)
    n_full, (n0, n_both, n1) = full.total.take(tile), n_steps.T
    n_masked = n0 + n_both + n1
    full_at, masked_at = Lists.of(n_full, n_queries, 1), Lists.of(n_masked, n_queries, PLACES)
    step, _ = members(masked.n_steps.sum(1), tile)
    shift = other.repeat(n_masked).astype(np.int32)[:, None]
    heavy = batch.heaviest_first(2 * FULL * n_full + MASKED * (n0 + 2 * n_both + n1))
    about = np.array([batch.element, full_at.step, masked_at.step, n0, n_full, n_both, n1, batch.element])
    about = about.take(heavy, axis=1).T
    n_first = masked_at.lengths[0]
    dq_tiles = []
    if tiles.frozen.any():
        dq_tiles = [about[:n_queries].copy()]
        dq_tiles[0][tiles.frozen.take(tile.take(heavy[:n_queries])), 3:7] = 0

    def write_rows(out: np.ndarray) -> None:
        moved(tiles.token.reshape(-1, ROWS), tile.take(heavy), batch.own.take(heavy), -1, out.reshape(-1, ROWS))

    def write_boxes(steps: slice, out: np.ndarray) -> None:
        masked.boxes.take(step[steps], axis=0, out=out, mode="clip")
        np.add(out, shift[steps], out=out, where=out != EMPTY)

    def write_words(out: np.ndarray) -> None:
        out = out.view(np.complex128)
        word, _ = members(masked.n_words, step)
        end = 0
        for first in range(0, word.size, AT_ONCE):
            some = word[first : first + AT_ONCE]
            words = masked.words.take(some).repeat(masked.fours.take(some))
            begin, end = end, end + words.size
            out[begin:end] = words

    return [
        np.array(rows.pairs, np.int64).view(np.int32).reshape(-1, 2),
        about[:n_queries],
        about[n_queries:],
        Together(((n_queries, ROWS), (tile.size - n_queries, ROWS)), write_rows),
        Together(tuple((n,) for n in full_at.lengths), lambda out: full.write(tile, other, full_at.entry, out)),
        Unwritten((n_first, PLACES), partial(write_boxes, slice(n_first))),
        Unwritten((step.size - n_first, PLACES), partial(write_boxes, slice(n_first, None))),
        Together(tuple((n, 2, THREADS) for n in masked_at.lengths), write_words),
        *dq_tiles,
    ]
