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
  where dk and dv come from, and stay on the query side (forward and dq). No gradient to the queries would need query
  sides of their own for the forward and for dq.
- any number of streams and query groups: they are nothing but row sets (``SideRows.row_set``), the order in which rows
  fill tiles.
- many query batches on one row of a cache: a tile names the batch element of its rows and that of its steps. In the
  forward and dq they may differ; a key tile's steps are of one batch element, so dk and dv of shared keys are not.

All in whole-array operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..runtime import index_buffer
from ..runtime.arrays import expand, members, starts
from ..runtime.index_buffer import Layout, Packed, Unwritten
from .placement import Placement, moved
from .side_rows import BatchRows, SideRows, concatenated
from .steps import Visits
from .tiles import Tiles, cut

ROWS, HALF = 128, 64  # of a tile and of a warpgroup
FULL, MASKED, BOX = 128, 64, 32  # tokens of a full step, of a masked one and of a box
PLACES = MASKED // BOX
TOKEN_BITS = 26  # of a box: the first token; above them its gap
EMPTY = (1 << TOKEN_BITS) - 1  # a token that no tensor has, so a box of zeros
THREADS = 128  # of a warpgroup
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


class Boxes(Packed):
    """Both sides of a plan as boxes: ``queries`` for the forward and dq, ``keys`` for dk and dv."""

    def __init__(self, layout: Layout, buffer: Tensor) -> None:
        super().__init__(layout, buffer)
        views, n = index_buffer.views(layout, self.buffer), len(BoxSide.FIELDS)
        self.queries, self.keys = BoxSide(views[:n]), BoxSide(views[n:])

    def tensors(self) -> list[Tensor]:
        return [*self.queries.tensors(), *self.keys.tensors()]


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
    # both sides in one go: small plans cost the number of array operations
    both = concatenated([rows.queries, rows.keys])
    tiles = cut(both, ROWS, ROWS)
    steps = _steps(_distinct(both, tiles))
    n_queries = rows.queries.of_sample.size
    sides = [
        _side(steps, tiles, rows.placement, side, slice(side * n_queries, (side + 1) * n_queries)) for side in (0, 1)
    ]
    return Boxes(*index_buffer.pack([array for side in sides for array in side]))


class Distinct(NamedTuple):
    """The different rows of ``SideRows`` in the halves of tiles, tile after tile and half after half."""

    of_tile: np.ndarray  # int64 [T]: how many
    tile: np.ndarray  # int64 [M]
    half: np.ndarray  # int64 [M]: 0 or 1
    bounds: np.ndarray  # int32 [2, columns, M]: lo and hi of what they attend to; lo >= hi where a range is empty
    of_row: np.ndarray  # int32 [T, 128]: which of its tile's different ones each row is, -1 for no row


def _distinct(rows: SideRows, tiles: Tiles) -> Distinct:
    # what of each row is in each half
    begin = tiles.tile * ROWS
    tile_first, tile_end = np.maximum(tiles.first, begin), np.minimum(tiles.end, begin + ROWS)
    first_half = tile_first // HALF
    halves = (tile_end - 1) // HALF - first_half + 1
    half = expand(first_half, halves)
    first = np.maximum(tile_first.repeat(halves), half * HALF)
    end = np.minimum(tile_end.repeat(halves), (half + 1) * HALF)
    tile, of_tile = half // 2, np.add.reduceat(halves, tiles.starts)

    # rows of tiles that are none, and in turn those that are one of the different ones
    edges = np.empty(2 * half.size + 2, np.int64)
    edges[0], edges[1:-1:2], edges[2:-1:2], edges[-1] = 0, first, end, tiles.rows.size
    which = np.full(edges.size - 1, -1, np.int32)
    which[1::2] = np.arange(half.size) - starts(of_tile).take(tile)
    bounds = np.maximum(rows.bounds.take(tiles.side_rows.repeat(halves), axis=2), 0)  # NOWHERE is below
    return Distinct(of_tile, tile, half % 2, bounds, which.repeat(edges[1:] - edges[:-1]).reshape(-1, ROWS))


def _union(begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint runs of the union of ranges, sorted; ranges that touch are one run."""
    begin, end = np.sort(begin), np.sort(end)  # a run begins where every range begun before has ended
    new = np.ones(begin.size, bool)
    new[1:] = begin[1:] > end[:-1]
    last = np.ones(begin.size, bool)
    last[:-1] = new[1:]
    return begin[new], end[last]


class Pieces(NamedTuple):
    """What tiles visit: full steps as runs of ``count``, the rest in boxes; tile after tile, by token."""

    full_tile: np.ndarray  # int64 [R]
    full_first: np.ndarray
    full_count: np.ndarray
    tile: np.ndarray  # int64 [boxes]
    first: np.ndarray  # first token
    length: np.ndarray  # tokens, 1 to 32


def _pieces(rows: Distinct) -> Pieces:
    """Cut what the rows of each tile attend to into full steps and boxes."""
    lo, hi = rows.bounds
    far = int(hi.max(initial=0)) + 1  # tile t's token is at t * far + token: no two tiles touch
    some = lo < hi
    at = np.broadcast_to(rows.tile * far, lo.shape)[some]
    any_begin, any_end = _union(at + lo[some], at + hi[some])

    # what every row of a tile attends to; every tile has a row
    heads = starts(rows.of_tile)
    all_lo = np.maximum.reduceat(np.where(some, lo, far), heads, axis=1)
    all_hi = np.minimum.reduceat(np.where(some, hi, 0), heads, axis=1)
    c, tile = np.nonzero(all_lo < all_hi)
    begin, end = _union(tile * far + all_lo[c, tile], tile * far + all_hi[c, tile])
    count = (end - begin) // FULL
    begin, end, count = begin[count > 0], end[count > 0], count[count > 0]
    # what is left of the run before the full steps fills whole boxes, where the spare tokens allow it
    shift = (any_begin[np.searchsorted(any_begin, begin, "right") - 1] - begin) % BOX
    begin = begin + np.where(shift <= end - begin - count * FULL, shift, 0)
    end = begin + count * FULL

    left, stop = np.sort(np.concatenate([any_begin, end])), np.sort(np.concatenate([any_end, begin]))
    boxes = -(-(stop - left) // BOX)
    first = left.repeat(boxes) + expand(np.zeros_like(boxes), boxes) * BOX
    length = np.minimum(first + BOX, stop.repeat(boxes)) - first
    tile = first // far
    return Pieces(begin // far, begin % far, count, tile, first - tile * far, length)


class Masked(NamedTuple):
    """Masked steps of the tiles of the distinct samples, tile after tile."""

    n_steps: np.ndarray  # int64 [T, 3]: of half 0 alone, of both, of half 1 alone
    boxes: np.ndarray  # int32 [M, 2]
    words: np.ndarray  # complex128 [K]: the different ones, those of four threads in 16 bytes
    word_of: np.ndarray  # int64 [M, 64]: which of them each four threads have


def _masked(rows: Distinct, pieces: Pieces) -> Masked:
    """Boxes with their bits, put together into steps."""
    n_tiles = rows.of_tile.size
    # bits of every box and every different row of its tile
    pairs = rows.of_tile[pieces.tile]
    pair_at = starts(pairs)
    bits = _bits(rows, pieces, pairs)

    # a box is of half 0 (kind 0), of both (1) or of half 1 (2)
    of_half = np.bincount(2 * rows.tile + rows.half, minlength=2 * n_tiles).reshape(-1, 2).take(pieces.tile, axis=0)
    halves = np.array([pair_at, pair_at + of_half[:, 0]]).T
    by_half = (np.bitwise_or.reduceat(bits, halves.ravel()).reshape(-1, 2) != 0) & (of_half > 0)
    kind = 1 + by_half[:, 1].astype(np.int64) - by_half[:, 0]
    kind += 3 * pieces.tile
    order = np.argsort(kind, kind="stable")
    count = np.bincount(kind, minlength=3 * n_tiles).reshape(-1, 3)
    # what a half has left over fills a step of both where that computes no more
    odd0, odd, odd1 = (count % PLACES != 0).T
    move0, move1 = odd0 & (odd | odd1), odd1 & (odd ^ odd0)
    sizes = count + np.array([-move0.astype(np.int64), move0 + move1.astype(np.int64), -move1.astype(np.int64)]).T
    n_steps = -(-sizes // PLACES)
    n_masked = int(n_steps.sum())
    place_of = np.empty(pairs.size, np.int64)
    place_of[order] = expand(starts(n_steps.ravel()) * PLACES, sizes.ravel())

    boxes = np.full(n_masked * PLACES, EMPTY, np.int32)
    boxes[place_of] = pieces.first | (BOX - pieces.length) << TOKEN_BITS
    first_pair = np.full(n_masked * PLACES, NONE)  # of the box in each place
    first_pair[place_of] = pair_at
    step_tile = np.arange(n_tiles).repeat(n_steps.sum(1))
    words = _words(rows.of_row, step_tile, first_pair.reshape(-1, PLACES), bits)
    return Masked(n_steps, boxes.reshape(-1, PLACES), *words)


def _bits(rows: Distinct, pieces: Pieces, pairs: np.ndarray) -> np.ndarray:
    """uint32 ``[N + 1]``: tokens of a box that a row attends to, for each box and different row of its tile; then 0."""
    which = expand(starts(rows.of_tile).take(pieces.tile), pairs)
    gap = (BOX - pieces.length).astype(np.int32)
    ends = rows.bounds.take(which, axis=2)
    ends += (gap - pieces.first.astype(np.int32)).repeat(pairs)
    np.maximum(ends, gap.repeat(pairs), out=ends)
    np.minimum(ends, BOX, out=ends)
    np.maximum(ends[0], ends[1], out=ends[1])
    # bits lo .. hi - 1 are 2**hi - 2**lo, where 2**32, which NumPy makes 0, is as good as it is
    lo, hi = np.left_shift(np.uint32(1), ends.view(np.uint32), out=ends.view(np.uint32))
    hi -= lo
    bits = np.zeros(which.size + 1, np.uint32)
    np.bitwise_or.reduce(hi, axis=0, out=bits[:-1])
    return bits


def _words(
    of_row: np.ndarray, step_tile: np.ndarray, first_pair: np.ndarray, bits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """``words`` and ``word_of`` of :class:`Masked`.

    Threads 4 g .. 4 g + 3 of a warp hold two rows, and few pairs of rows in a half differ in what they attend to: so
    the words of those alone are computed.
    """
    # distinct pairs of rows, half after half; they lie next to each other
    by_thread = of_row.reshape(-1, 4, 2, 8)  # [halves, warp, i, g]
    rows = np.ascontiguousarray(by_thread.transpose(2, 0, 1, 3)).reshape(2, -1, 32)
    new = np.ones(rows.shape[1:], bool)
    new[:, 1:] = (rows[:, :, 1:] != rows[:, :, :-1]).any(0)
    pairs_of_half = np.count_nonzero(new, axis=1)
    begins = np.flatnonzero(new)
    threads = np.empty_like(begins)  # of each pair, in fours
    threads[:-1], threads[-1] = begins[1:] - begins[:-1], new.size - begins[-1]
    distinct = rows.reshape(2, -1).take(begins, axis=1).astype(np.int64)  # [i, pairs]: of its tile's rows
    distinct[distinct < 0] = NONE

    # both halves of every step
    index, counts = members(pairs_of_half, (2 * step_tile[:, None] + np.arange(2)).ravel())
    step = np.arange(step_tile.size).repeat(counts.reshape(-1, 2).sum(1))
    at = distinct.take(index, axis=1)[:, :, None] + first_pair.take(step, axis=0)  # [i, K, x]
    np.copyto(at, bits.size - 1, where=at < 0)
    tokens = bits.take(at).view(np.uint64)  # [i, K, 1]: the step's 64
    both = tokens >> np.arange(0, 8, 2, dtype=np.uint64)  # [i, K, q]
    both &= np.uint64(0x0303030303030303)
    x, second = both
    second <<= np.uint64(2)
    x |= second  # bit 8 j + 2 i + c
    for shift, mask in ((4, 0x00FF00FF00FF00FF), (8, 0x0000FFFF0000FFFF), (16, 0x00000000FFFFFFFF)):
        x |= x >> np.uint64(shift)
        x &= np.uint64(mask)
    words = x.astype(np.uint32).view(np.complex128).ravel()
    return words, np.arange(words.size).repeat(threads.take(index)).reshape(-1, THREADS // 2)


def _steps(rows: Distinct) -> tuple[Visits, Masked]:
    """Full and masked steps of every tile."""
    pieces = _pieces(rows)
    runs = np.bincount(pieces.full_tile, minlength=rows.of_tile.size)
    first, count = np.zeros((2, runs.size, max(1, int(runs.max(initial=0)))), np.int64)
    column = expand(np.zeros_like(runs), runs)
    first[pieces.full_tile, column], count[pieces.full_tile, column] = pieces.full_first, pieces.full_count
    return Visits.of(FULL, first, count), _masked(rows, pieces)


def _side(
    steps: tuple[Visits, Masked], tiles: Tiles, placement: Placement, side: int, samples: slice
) -> list[np.ndarray | Unwritten]:
    """The arrays of a :class:`BoxSide` (0: queries, 1: keys): what ``samples`` have, moved to where they lie."""
    full, masked = steps
    order = np.lexsort((~placement.padding, placement.batch))
    tile, counts = members(tiles.of_sample[samples], placement.which[order])
    tile += int(tiles.of_sample[: samples.start].sum())
    places = np.array([placement.batch, placement.first[side], placement.first[1 - side]])
    batch, own, other = places[:, order].repeat(counts, axis=1)
    n0, n_both, n1 = masked.n_steps[tile].T
    n_full, n_masked = full.total[tile], n0 + n_both + n1
    full_at, masked_at = starts(n_full), starts(n_masked)
    step, _ = members(masked.n_steps.sum(1), tile)
    shift = other.repeat(n_masked).astype(np.int32)[:, None]
    heavy = np.argsort(-(2 * FULL * n_full + MASKED * (n0 + 2 * n_both + n1)), kind="stable")

    def write_boxes(out: np.ndarray) -> None:
        masked.boxes.take(step, axis=0, out=out, mode="clip")
        np.add(out, shift, out=out, where=out != EMPTY)

    def write_words(out: np.ndarray) -> None:
        word = masked.word_of.take(step, axis=0)
        masked.words.take(word, out=out.view(np.complex128).reshape(word.shape), mode="clip")

    return [
        np.array([batch, full_at, masked_at, n0, n_full, n_both, n1, batch]).T[heavy],
        Unwritten((tile.size, ROWS), lambda out: moved(tiles.rows.reshape(-1, ROWS), tile[heavy], own[heavy], -1, out)),
        Unwritten((int(n_full.sum()),), lambda out: full.write(tile, other, full_at, out)),
        Unwritten((step.size, PLACES), write_boxes),
        Unwritten((step.size, 2, THREADS), write_words),
    ]
