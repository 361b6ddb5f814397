"""Boxes against the predicate: what the halves of tiles compute is exactly what may be attended to."""

import copy
import pickle
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.geometries import geometries, libero, small
from tests.golden_masks import load
from wam_kernels import PROGRAMS, Geometry, Ranges, compile_plan, dense_mask
from wam_kernels.plan.boxes import BOX, EMPTY, FULL, HALF, MASKED, PLACES, THREADS, TOKEN_BITS, BoxSide, compile_boxes
from wam_kernels.plan.intervals import NOWHERE
from wam_kernels.plan.side_rows import batch_rows


def bits_of_words(words: np.ndarray) -> np.ndarray:
    """bool ``[M, 2, 64 rows, 64 places]`` of words ``[M, 2, 128 threads]``, by the layout of a wgmma accumulator."""
    thread, bit = np.arange(THREADS)[:, None], np.arange(32)
    row = thread // 32 * 16 + thread % 32 // 4 + bit // 2 % 2 * 8
    place = bit // 4 * 8 + thread % 4 * 2 + bit % 2
    out = np.zeros((len(words), 2, HALF, MASKED), bool)
    out[:, :, row, place] = words.view(np.uint32)[..., None] >> bit.astype(np.uint32) & 1
    return out


def mask_of_side(side: BoxSide, batch: int, length: int, others: int) -> np.ndarray:
    """Replay the kernel's walk.

    A pair computed twice, a row owned by no tile or two, a bit of a half that leaves the step out, of a gap or of no
    row, and a token in a box that no row of the tile attends to are errors.
    """
    tiles, rows, full, boxes, words = (t.numpy() for t in side.tensors())
    bits = bits_of_words(words)
    times = np.zeros((batch, length, others), np.int8)
    owners = np.zeros((batch, length), int)
    seen_full = seen_masked = 0
    for (b, full_at, masked_at, n0, n_full, n_both, n1, b_steps), row in zip(tiles.tolist(), rows, strict=True):
        assert b == b_steps
        is_row = row >= 0
        owners[b, row[is_row]] += 1
        seen_full, seen_masked = seen_full + n_full, seen_masked + n0 + n_both + n1
        for first in full[full_at : full_at + n_full]:
            times[b, row[is_row], first : first + FULL] += 1
        for number, step in enumerate(range(masked_at, masked_at + n0 + n_both + n1)):
            by_row = bits[step].reshape(2 * HALF, PLACES, BOX)
            assert not by_row[~is_row].any()
            assert number >= n0 or not by_row[HALF:].any(), "of half 0 alone"
            assert number < n0 + n_both or not by_row[:HALF].any(), "of half 1 alone"
            for x, box in enumerate(boxes[step].tolist()):
                first, gap = box & EMPTY, box >> TOKEN_BITS
                if first == EMPTY:
                    assert box == EMPTY and not by_row[:, x].any()
                    continue
                assert not by_row[:, x, :gap].any() and by_row[is_row, x, gap:].any(0).all()
                times[b, row[is_row], first : first + BOX - gap] += by_row[is_row, x, gap:]
    assert (owners == 1).all() and (seen_full, seen_masked) == (len(full), len(boxes))
    assert times.max(initial=0) <= 1
    return times.astype(bool)


def check(batch, **lengths) -> None:
    plan = compile_plan(batch, **lengths)
    boxes = plan.boxes
    dense = plan.mask()[:, 0].numpy()
    np.testing.assert_array_equal(mask_of_side(boxes.queries, plan.batch, plan.length, plan.key_length), dense)
    mask = mask_of_side(boxes.keys, plan.batch, plan.key_length, plan.length)
    np.testing.assert_array_equal(mask, dense.transpose(0, 2, 1))
    assert boxes.queries.computed_pairs >= plan.visible_pairs


def test_boxes_match_recorded_masks():
    for _, geometry, recorded in load():
        boxes = compile_plan(geometry).boxes
        mask = mask_of_side(boxes.queries, 1, geometry.length, geometry.length)[0]
        np.testing.assert_array_equal(mask, recorded, err_msg=str(geometry))


@settings(max_examples=60, deadline=None)
@given(geometries())
def test_boxes_match_the_predicate(geometry):
    check(geometry, length=geometry.length + 7)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_with_steps_of_every_kind(program):
    check(libero(4, 64, 13, program))
    check(libero(1, 8, 11, program))


def test_batches_are_moved_samples():
    a, b = small("joint"), small("video_then_action", video_frames=9, video_tokens=7)
    check([[a, b, a], [b]])
    check([a, b, a], length=b.length + 40, key_length=b.length + 5)


def random_ranges(seed: int) -> Ranges:
    """A rectangular mask of stripes, with keys that no query attends to and queries that attend to nothing."""
    rng = np.random.default_rng(seed)
    queries, keys = rng.integers(1, 400, 2)
    mask = np.zeros((queries, keys), bool)
    begin = 0
    while begin < queries:
        end = begin + int(rng.integers(1, 120))
        for _ in range(rng.integers(0, 4)):
            lo = int(rng.integers(0, keys))
            mask[begin:end, lo : lo + int(rng.integers(1, 300))] = True
        begin = end
    for lo in rng.integers(0, keys, 6):
        mask[:, lo : lo + int(rng.integers(1, 40))] = False
    return Ranges.from_mask(mask)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_rectangular_ranges_with_holes(seed):
    check(random_ranges(seed))


def test_a_run_without_spare_tokens():
    """Its full step cannot move to where what is before it fills whole boxes."""
    check(Ranges([(0, 64), (64, 128)], [(0, 133), (5, 133)], 128, 200))


def test_sides_are_independent_and_row_sets_any_number():
    """As a stop-gradient of noisy keys would be written: pairs are missing on the key side alone."""
    geometry = small("joint", video_tokens=40)
    rows, dense = batch_rows(((geometry,),), (geometry.length,) * 2), dense_mask(geometry)
    stopped = rows.keys.row_set % 2 == 0
    bounds = rows.keys.bounds.copy()
    bounds[:, :, stopped] = NOWHERE
    many = np.arange(stopped.size) // 3
    boxes = compile_boxes(rows._replace(keys=rows.keys._replace(bounds=bounds, row_set=many)))
    for start, tokens in zip(rows.keys.start[stopped], rows.keys.tokens[stopped], strict=True):
        dense[:, start : start + tokens] = False
    assert 0 < dense.sum() < dense_mask(geometry).sum()
    np.testing.assert_array_equal(mask_of_side(boxes.keys, 1, geometry.length, geometry.length)[0], dense.T)
    for a, b in zip(boxes.queries.tensors(), compile_boxes(rows).queries.tensors(), strict=True):
        assert torch.equal(a, b)
    by_token = np.argsort(rows.keys.start)
    set_of_token = many[by_token].repeat(rows.keys.tokens[by_token])
    for tile in boxes.keys.rows.numpy():
        assert np.unique(set_of_token[tile[tile >= 0]]).size == 1


def test_a_plan_of_nothing_visits_nothing():
    empty = Ranges((), (), 200, 70)
    check(empty)
    assert compile_plan(empty).boxes.queries.computed_pairs == 0


@pytest.mark.parametrize(
    "frames, least, of_keys", [(34, 0.90, 0.89), (68, 0.945, 0.945), (130, 0.97, 0.965), (131, 0.96, 0.965)]
)
def test_the_useful_share_of_long_windows(frames, least, of_keys):
    plan = compile_plan(libero(4, 64, frames))
    boxes = plan.boxes
    assert plan.visible_pairs / boxes.queries.computed_pairs >= least
    assert plan.visible_pairs / boxes.keys.computed_pairs >= of_keys


def test_the_steps_of_a_tile_are_few():
    """Full steps are the bulk of a long plan, and no more boxes are half empty than the ends of runs are."""
    side = compile_plan(libero(4, 64)).boxes.queries
    n0, n_full, n_both, n1 = side.tiles[:, 3:7].sum(0).tolist()
    assert FULL * n_full > 4 * MASKED * (n0 + n_both + n1)
    weight = side.tiles[:, 4] * 2 * FULL + MASKED * (side.tiles[:, 3] + 2 * side.tiles[:, 5] + side.tiles[:, 6])
    assert (weight.diff() <= 0).all(), "heaviest first"


def cpu_ms(geometry: Geometry) -> float:
    rows, times = batch_rows(((geometry,),), (geometry.length,) * 2), []
    for _ in range(5):
        begin = time.process_time()
        compile_boxes(rows)
        times.append(time.process_time() - begin)
    return 1e3 * min(times)


def test_linear_in_the_tokens():
    """Ten times the tokens take no more than fifteen times as long; in absolute terms there is room for a busy host."""
    small_ms, large_ms = cpu_ms(libero(4, 64, 140)), cpu_ms(libero(4, 64, 1400))
    assert large_ms < 15 * small_ms and large_ms < 60


def test_a_second_call_computes_nothing():
    assert compile_plan(small("joint")).boxes is compile_plan(small("joint"), impl="cuda").boxes


def test_boxes_can_be_copied_and_pickled():
    boxes = compile_plan(small("joint")).boxes
    for other in (copy.deepcopy(boxes), pickle.loads(pickle.dumps(boxes))):
        assert all((a == b).all() for a, b in zip(boxes.tensors(), other.tensors(), strict=True))


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="fewer than 67108863 tokens"):
        compile_plan(small("joint"), length=EMPTY, impl="cuda")
