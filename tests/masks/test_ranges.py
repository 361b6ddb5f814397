"""Ranges: visibility given as (query range, key range) pairs, square and rectangular, alone and packed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.geometries import geometries, small
from tests.plan.test_plan import mask_of_side
from wam_kernels import Ranges, TileShape, compile_plan
from wam_kernels.masks.ranges import MAX_COLUMNS
from wam_kernels.plan import Side


@st.composite
def ranges(draw) -> Ranges:
    """A few overlapping, empty and repeated pairs over small, possibly rectangular, lengths."""
    length, key_length = draw(st.integers(0, 40)), draw(st.integers(0, 40))

    def span(tokens: int):
        ends = sorted((draw(st.integers(0, tokens)), draw(st.integers(0, tokens))))
        return ends

    pairs = [(span(length), span(key_length)) for _ in range(draw(st.integers(0, 12)))]
    return Ranges([q for q, _ in pairs], [k for _, k in pairs], length, key_length)


def mask_in_loops(r: Ranges) -> np.ndarray:
    mask = np.zeros((r.length, r.key_length), bool)
    for i in range(r.length):
        for j in range(r.key_length):
            for (q0, q1), (k0, k1) in zip(r.q_ranges, r.k_ranges, strict=True):
                mask[i, j] |= q0 <= i < q1 and k0 <= j < k1
    return mask


def mask_of_rows(rows, length: int, others: int) -> np.ndarray:
    mask = np.zeros((length, others), bool)
    for start, count, bounds in zip(rows.start, rows.tokens, rows.bounds, strict=True):
        for lo, hi in bounds:
            assert not mask[start : start + count, lo:hi].any(), "columns must not overlap"
            mask[start : start + count, lo:hi] = True
    return mask


@settings(max_examples=120, deadline=None)
@given(ranges())
def test_rows_attend_to_what_the_pairs_say(r):
    mask = mask_in_loops(r)
    np.testing.assert_array_equal(r.dense_mask(), mask)
    np.testing.assert_array_equal(mask_of_rows(r.rows, r.length, r.key_length), mask)
    np.testing.assert_array_equal(mask_of_rows(r.key_rows, r.key_length, r.length), mask.T)


@settings(max_examples=120, deadline=None)
@given(
    batch=st.lists(st.lists(st.one_of(ranges(), geometries()), min_size=1, max_size=3), min_size=1, max_size=2),
    padding=st.tuples(st.sampled_from([0, 0, 5, 40]), st.sampled_from([0, 0, 7])),
    tile=st.sampled_from([TileShape(8, 8), TileShape(16, 8), None]),
)
def test_tiles_compute_exactly_the_visible_pairs(batch, padding, tile):
    length = max(sum(s.length for s in samples) for samples in batch) + padding[0]
    key_length = max(sum(s.key_length for s in samples) for samples in batch) + padding[1]
    if not length or not key_length:
        return
    plan = compile_plan(batch, length=length, key_length=key_length, tile=tile)
    mask = plan.mask()[:, 0].numpy()
    assert mask.shape == (plan.batch, length, key_length) and plan.visible_pairs == mask.sum()
    np.testing.assert_array_equal(mask_of_side(plan.queries, plan.batch, length, key_length), mask)
    np.testing.assert_array_equal(mask_of_side(plan.keys, plan.batch, key_length, length), mask.transpose(0, 2, 1))
    for b, samples in enumerate(batch):
        q, k = 0, 0
        for s in samples:
            if isinstance(s, Ranges):
                assert_rows_of_a_tile_share_a_token(plan.queries, mask, b, q, q + s.length)
                assert_rows_of_a_tile_share_a_token(plan.keys, mask.transpose(0, 2, 1), b, k, k + s.key_length)
            q, k = q + s.length, k + s.key_length


def assert_rows_of_a_tile_share_a_token(side: Side, mask: np.ndarray, b: int, begin: int, end: int) -> None:
    """Any two rows of a tile of this sample attend to a common token, or to none both; no other sample is in it."""
    for (of_tile, *_), row in zip(side.tiles.numpy(), side.rows.numpy(), strict=True):
        own = row[(row >= begin) & (row < end)]
        if of_tile == b and own.size:
            assert own.size == (row >= 0).sum(), "rows of two samples share a tile"
            seen = mask[b, own]
            assert (seen.astype(int) @ seen.T.astype(int) > 0).all() or not seen.any()


WINDOW = 12


@pytest.mark.parametrize(
    "r",
    [
        pytest.param(Ranges([(0, 12), (12, 20)], [(0, 12), (12, 20)], 20), id="two-documents"),
        pytest.param(Ranges([(i, i + 1) for i in range(40)], [(0, i + 1) for i in range(40)], 40), id="causal"),
        pytest.param(
            Ranges([(i, i + 1) for i in range(90)], [(max(0, i - WINDOW), i + 1) for i in range(90)], 90),
            id="sliding-window",
        ),
        pytest.param(Ranges([(0, 5), (5, 9), (9, 14)], [(0, 6), (5, 10), (9, 14)], 14), id="chain-of-three"),
        pytest.param(
            Ranges([(0, 4), (4, 8), (4, 8), (8, 12)], [(0, 4), (0, 4), (8, 12), (8, 12)], 12), id="chain-in-two-columns"
        ),
        pytest.param(Ranges([(3, 9), (20, 25)], [(2, 9), (20, 22)], 30), id="rows-in-no-range"),
        pytest.param(Ranges([(i, i + 1) for i in range(40)], [(i, i + 1) for i in range(40)], 40), id="each-itself"),
    ],
)
def test_rows_of_a_tile_share_a_token(r):
    plan = compile_plan([[small(), r], [r, r]], tile=TileShape(16, 8, key_rows=32))
    mask = plan.mask()[:, 0].numpy()
    mask_of_side(plan.queries, 2, *mask.shape[1:]), mask_of_side(plan.keys, 2, *mask.shape[:0:-1])
    n, first = r.length, small().length
    for b, begin in ((0, first), (1, 0), (1, n)):
        for side, seen in ((plan.queries, mask), (plan.keys, mask.transpose(0, 2, 1))):
            assert_rows_of_a_tile_share_a_token(side, seen, b, begin, begin + n)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda pairs: np.array(pairs, np.uint8)])
def test_pairs_of_any_integers(kind):
    assert Ranges(kind([(0, 2)]), kind([(1, 3)]), np.int64(4)) == Ranges([(0, 2)], [(1, 3)], 4)


@settings(max_examples=60, deadline=None)
@given(ranges())
def test_from_mask(r):
    again = Ranges.from_mask(r.dense_mask())
    np.testing.assert_array_equal(again.dense_mask(), r.dense_mask())
    assert (again.length, again.key_length) == (r.length, r.key_length)


def test_as_few_columns_as_the_gaps_need():
    # every query attends to a head and its own piece: one cut, wherever the pieces are
    pieces = [(i, i + 4) for i in range(4, 404, 4)]
    r = Ranges([(4, 404), *pieces], [(0, 3), *pieces], 404)
    assert r.rows.bounds.shape[1] == 2
    # one contiguous range for each row, however many rows there are: a causal mask
    causal = Ranges([(i, i + 1) for i in range(500)], [(0, i + 1) for i in range(500)], 500)
    assert causal.rows.bounds.shape[1] == 1
    assert compile_plan(causal).efficiency > 0.85


def test_equal_content_shares_a_plan():
    def make(end: int) -> Ranges:
        return Ranges(np.array([[0, 5]]), np.array([[0, end]]), 9)

    assert make(4) == make(4) and hash(make(4)) == hash(make(4)) and make(4) != make(5)
    assert compile_plan(make(4)) is compile_plan(make(4))
    assert compile_plan(make(4)) is not compile_plan(make(5))


def test_content_cannot_change_under_a_cached_plan():
    given_ranges = np.array([[0, 5]])
    r = Ranges(given_ranges, [(0, 4)], 9)
    given_ranges[0, 1] = 2
    assert r.q_ranges[0, 1] == 5
    with pytest.raises(ValueError, match="read-only"):
        r.q_ranges[0, 1] = 2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Ranges([(0, 2)], [(0, 2)], -1), "length must be at least 0, got -1"),
        (lambda: Ranges([(0, 2)], [(0, 2)], 2.5), "length must be an int, got 2.5"),
        (lambda: Ranges([(0, 2.0)], [(0, 2)], 4), r"q_ranges must be integers, got float64 \[1, 2\]"),
        (lambda: Ranges([(0, 2)], [(False, 2)], 4), r"k_ranges must be integers, got bool \[1, 2\]"),
        (lambda: Ranges([("0", "2")], [(0, 2)], 4), "q_ranges must be integers, got <U1"),
        (lambda: Ranges([(0, 2), (3,)], [(0, 2)], 4), r"q_ranges must be integers, got \[\(0, 2\), \(3,\)\]"),
        (lambda: Ranges([(0, 2**70)], [(0, 2)], 4), "q_ranges must be integers, got object"),
        (lambda: Ranges(torch.zeros(1, 2, device="meta"), [(0, 2)], 4), "q_ranges must be on the host, got meta"),
        (lambda: Ranges([0, 2], [(0, 2)], 4), r"q_ranges must have shape \[R, 2\], got \[2\]"),
        (lambda: Ranges([(0, 2)], [(0, 5)], 4), r"k_ranges\[0\] must be .* <= 4, got \[0, 5\]"),
        (lambda: Ranges([(0, 2), (3, 2)], [(0, 2)], 4), r"q_ranges\[1\] must be .* got \[3, 2\]"),
        (lambda: Ranges([(0, 2)], [(0, 2), (0, 1)], 4), "k_ranges must have R=1 rows like q_ranges, got 2"),
        (
            lambda: Ranges.from_mask(np.ones((2, 2))),
            r"mask must be a NumPy array, bool \[queries, keys\], got float64 \[2, 2\]",
        ),
        (lambda: compile_plan(Ranges([], [], 4, 0)), "at least one query and one key, got 4 queries and 0 keys"),
        (lambda: compile_plan(Ranges([], [], 4, 9), key_length=8), "key_length must be at least 9"),
        (
            lambda: Ranges([(0, 1)] * 99, [(2 * i, 2 * i + 1) for i in range(99)], 1, 200).rows,
            f"must fit {MAX_COLUMNS} columns",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_geometry_keeps_its_plan_beside_ranges():
    alone, beside = compile_plan(small()), compile_plan([[small(), Ranges([(0, 3)], [(1, 2)], 3)]])
    np.testing.assert_array_equal(beside.mask()[0, 0, :84, :84], alone.mask()[0, 0])
