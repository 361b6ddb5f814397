"""Plans against the predicate: what the tiles compute is exactly what may be seen."""

import pickle
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.geometries import geometries, libero, small
from tests.golden_masks import load
from wam_kernels import PROGRAMS, TileShape, compile_plan, dense_mask
from wam_kernels.plan import Side
from wam_kernels.plan.compile import compiled
from wam_kernels.plan.intervals import NOWHERE
from wam_kernels.plan.side_rows import side_rows


def mask_of_intervals(geometry, transposed: bool) -> np.ndarray:
    rows = side_rows([geometry])[int(transposed)]
    mask = np.zeros((geometry.length,) * 2, bool)
    for start, count, ranges in zip(rows.start, rows.tokens, rows.bounds.transpose(2, 1, 0), strict=True):
        for lo, hi in ranges:
            assert lo < hi or lo == hi == NOWHERE
            mask[start : start + count, max(lo, 0) : max(hi, 0)] = True
    return mask


def mask_of_side(side: Side, batch: int, length: int, others: int | None = None) -> np.ndarray:
    """Replay the kernel's walk.

    A pair computed twice, a row owned by no tile or two, or a token visited that no row of the tile attends to: errors.
    """
    tiles, rows, groups, bounds, full, part = (t.numpy() for t in side.tensors())
    times = np.zeros((batch, length, length if others is None else others), int)
    owners = np.zeros((batch, length), int)
    for (b, full_0, full_1, part_0, part_1), row, group in zip(tiles, rows, groups, strict=True):
        is_row = row >= 0
        owners[b, row[is_row]] += 1
        for step in range(full_0, full_1):
            times[b, row[is_row][:, None], full[step] + np.arange(side.shape.step)] += 1
        for step in range(part_0, part_1):
            tokens = part[step]
            lo, hi = np.moveaxis(bounds[group], -1, 0)[..., None]
            visible = ((lo <= tokens) & (tokens < hi)).any(1)
            assert not visible[:, tokens < 0].any(), "a hole in a partial step must be invisible"
            assert visible[is_row].any(0)[tokens >= 0].all(), "what a tile visits may be NaN, and so reach its rows"
            times[b, row[is_row][:, None], tokens[tokens >= 0]] += visible[is_row][:, tokens >= 0]
    assert (owners == 1).all()
    assert times.max(initial=0) <= 1
    return times.astype(bool)


@pytest.mark.parametrize("transposed", [False, True], ids=["keys-of-query", "queries-of-key"])
def test_intervals_match_recorded_masks(transposed):
    for _, geometry, recorded in load():
        expected = recorded.T if transposed else recorded
        np.testing.assert_array_equal(mask_of_intervals(geometry, transposed), expected, err_msg=str(geometry))


@settings(max_examples=1500, deadline=None)
@given(geometries())
def test_intervals_match_the_predicate(geometry):
    mask = dense_mask(geometry)
    if geometry.length:
        np.testing.assert_array_equal(mask_of_intervals(geometry, False), mask)
        np.testing.assert_array_equal(mask_of_intervals(geometry, True), mask.T)


@settings(max_examples=300, deadline=None)
@given(
    batch=st.lists(st.lists(geometries(), min_size=1, max_size=3), min_size=1, max_size=2),
    padding=st.sampled_from([0, 0, 5, 40]),
    tile=st.sampled_from([TileShape(8, 8), TileShape(16, 8), TileShape(64, 64), TileShape(16, 8, key_rows=8), None]),
)
def test_tiles_compute_exactly_the_visible_pairs(batch, padding, tile):
    length = max(sum(g.length for g in samples) for samples in batch) + padding
    if length == 0:
        return
    plan = compile_plan(batch, length=length, tile=tile)
    mask = plan.mask()[:, 0].numpy()
    assert plan.visible_pairs == mask.sum()
    np.testing.assert_array_equal(mask_of_side(plan.queries, plan.batch, length), mask)
    np.testing.assert_array_equal(mask_of_side(plan.keys, plan.batch, length), mask.transpose(0, 2, 1))


@pytest.mark.parametrize("program", PROGRAMS)
def test_runs_attend_to_what_their_tokens_do(program):
    plan = compile_plan([[small(program), small(program, chunk_size=1)]], length=180)
    mask = np.zeros((1, 180, 180), bool)
    for b, start, end, *bounds in plan.runs.tolist():
        for lo, hi in zip(bounds[::2], bounds[1::2], strict=True):
            mask[b, start:end, lo:hi] = True
    np.testing.assert_array_equal(mask, plan.mask()[:, 0].numpy())


def test_efficiency_at_libero_geometry():
    # counted, not measured: visible pairs over the pairs that the kernel's own tiles compute
    assert compile_plan(libero(chunk_size=4, window=64)).efficiency >= 0.95
    assert compile_plan(libero(chunk_size=1, window=8)).efficiency >= 0.70


@pytest.mark.parametrize("frames", [68, 69, 131])
@pytest.mark.parametrize("chunk_size, window", [(4, 64), (2, 30), (1, 64)])
def test_key_tiles_hold_no_noisy_and_clean_tokens(chunk_size, window, frames):
    """Clean keys are attended to by all that follows, noisy ones by their chunk: half of a tile of both is wasted."""
    plan = compile_plan(libero(chunk_size, window, frames))
    assert plan.visible_pairs / plan.keys.computed_pairs >= 0.75
    for rows in plan.keys.rows:
        noisy = rows[rows >= 0] // (frames * 32) == 0
        assert noisy.all() or not noisy.any()


def test_plans_are_cached_by_geometry():
    assert compile_plan(small()) is compile_plan(small())
    assert compile_plan(small()) is not compile_plan(small(window=6))


def test_building_is_linear_in_length():
    def seconds(frames: int) -> float:
        geometry, best = libero(chunk_size=4, window=64, frames=frames), float("inf")
        for _ in range(5):
            compiled.cache_clear()
            start = time.perf_counter()
            compile_plan(geometry)
            best = min(best, time.perf_counter() - start)
        return best

    # 100,000 tokens against 25,000: four times the work, and far from the sixteen of S x S
    assert seconds(1388) < 8 * seconds(347)


def test_index_tensors_stay_small_and_aligned():
    plan = compile_plan(libero(chunk_size=4, window=64, frames=1388))
    assert plan.length == 99_936
    assert 4 * sum(t.numel() for t in plan.tensors()) < 64 * plan.length  # bytes a token; a bool mask would be 100,000
    assert all(t.data_ptr() % 16 == 0 for t in plan.tensors() if t.numel())


@pytest.mark.parametrize(
    "samples",
    [
        [libero(4, 64, frames=frames) for frames in range(120, 131)],
        [small(video_frames=56, video_tokens=120, action_frames=56, action_tokens=8, chunk_size=4, window=30)] * 7,
    ],
    ids=["all-differ", "all-equal"],
)
def test_building_takes_less_memory_than_the_plan(samples):
    # fresh memory is much of what a plan costs; counted by tracemalloc, so nothing here depends on the machine
    compile_plan([samples], impl="triton")
    compiled.cache_clear()
    tracemalloc.start()
    plan = compile_plan([samples], impl="triton")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.length > 90_000
    assert peak < 8 * sum(t.numel() for t in plan.tensors())  # the plan itself, and less than as much beside it


def test_a_batch_of_padding_alone():
    plan = compile_plan([[], []], length=70, tile=TileShape(32, 32))
    assert plan.visible_pairs == 0 and plan.queries.full.numel() == plan.queries.part.numel() == 0
    assert plan.runs.tolist() == [[0, 0, 70, 0, 0], [1, 0, 70, 0, 0]]
    assert not mask_of_side(plan.queries, 2, 70).any() and not mask_of_side(plan.keys, 2, 70).any()


NO_TOKENS = small(video_frames=0, action_frames=0, startup_action_frames=0)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: compile_plan([]), ValueError, "batch must hold at least one geometry"),
        (lambda: compile_plan(small(), length=10), ValueError, "length must be at least 84"),
        (lambda: compile_plan(NO_TOKENS), ValueError, "at least one query and one key"),
        (lambda: compile_plan(None), TypeError, "Geometry, RuleGeometry or Ranges objects, got NoneType"),
        (lambda: compile_plan([[small()], 5]), TypeError, "Geometry, RuleGeometry or Ranges objects, got int"),
        (lambda: compile_plan(small(), tile=(8, 8)), TypeError, "tile must be a TileShape, got tuple"),
        (lambda: compile_plan(small(), device="gpu"), ValueError, "device must be a torch.device or a name .*'gpu'"),
        (lambda: compile_plan(small()).to("gpu"), ValueError, "Plan.to: device must be .*'gpu'"),
        (lambda: compile_plan([small()] * 3, length=2**30), ValueError, "at most 2147483647 tokens in all"),
        (
            lambda: compile_plan(small(), impl="gpu"),
            ValueError,
            "impl must be one of cpu, triton, cuda or None, got 'gpu'",
        ),
        (lambda: compile_plan(["joint"]), TypeError, "must hold Geometry, RuleGeometry or Ranges objects, got str"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_moves_in_one_copy():
    plan = compile_plan(small())
    assert plan.to("cpu") is plan
    assert plan.queries is not None and plan.boxes is not None
    moved = plan.to("meta")
    assert moved.device == torch.device("meta") and moved.length == plan.length
    for tensors in (moved.tensors()[:-2], moved.boxes.tensors()):
        assert len({t.untyped_storage()._cdata for t in tensors}) == 1


@pytest.mark.parametrize("impl, forms", [(None, {"runs"}), ("triton", {"runs", "sides"}), ("cuda", {"boxes"})])
def test_a_plan_has_the_form_of_one_backend_and_makes_the_others_at_their_first_use(impl, forms):
    def made(plan) -> set[str]:
        return {name for name in ("runs", "sides", "boxes") if vars(plan)[f"_{name}"] is not None}

    compiled.cache_clear()
    plan = compile_plan(small(), impl=impl)
    assert made(plan) == forms
    # the CPU's op gets the same arguments as Triton's, those that it does not walk empty
    tensors = plan.tensors("cpu")
    assert not any(t.numel() for t in tensors[:-1]) and len(tensors) == len(plan.tensors("triton"))
    assert made(compile_plan(small(), impl="cuda")) == {"runs", "sides", "boxes"}
    again = pickle.loads(pickle.dumps(plan))
    assert made(again) == {"runs", "sides", "boxes"}
    for a, b in zip([*plan.tensors(), *plan.boxes.tensors()], [*again.tensors(), *again.boxes.tensors()], strict=True):
        assert torch.equal(a, b)
