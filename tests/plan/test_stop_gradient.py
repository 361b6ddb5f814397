"""Stop-gradient and frozen streams in plans against brute force: key side and dq leave out what nothing needs."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.geometries import geometries, libero, small
from tests.plan.test_boxes import mask_of_side as mask_of_boxes
from tests.plan.test_plan import mask_of_side
from wam_kernels import RULE_PROGRAMS, Plan, Ranges, TileShape, compile_plan, dense_mask, tokens
from wam_kernels.masks.programs import STREAMS

ACTION_TO_VIDEO = [("action", "video")]
PAIRS = [(query, key) for query in STREAMS for key in STREAMS]


def require_skips(plan: Plan, flow: np.ndarray) -> None:
    """``flow`` ``[batch, S, T]``: pairs that keys get gradients through, by brute force."""
    np.testing.assert_array_equal(plan.mask(gradient=True)[:, 0].numpy(), flow)
    assert plan.gradient_pairs == flow.sum()
    lengths = plan.batch, plan.key_length, plan.length
    np.testing.assert_array_equal(mask_of_side(plan.keys, *lengths), flow.transpose(0, 2, 1))
    np.testing.assert_array_equal(mask_of_boxes(plan.boxes.keys, *lengths), flow.transpose(0, 2, 1))
    # a tile without a step is one whose keys get no gradient from any query, and the other way round
    for side, steps in (
        (plan.keys, plan.keys.tiles[:, [2, 4]] - plan.keys.tiles[:, [1, 3]]),
        (plan.boxes.keys, plan.boxes.keys.tiles[:, 3:7]),
    ):
        needed = [flow[tile[0], :, row[row >= 0]].any() for tile, row in zip(side.tiles, side.rows, strict=True)]
        assert (steps.sum(1) > 0).tolist() == needed
        assert side.idle_tiles == needed.count(False)


def require_frozen(plan: Plan, frozen: np.ndarray) -> None:
    """``frozen`` ``[batch, S]``: queries that get no gradient, by brute force."""
    np.testing.assert_array_equal(plan.frozen_queries().numpy(), frozen)
    assert plan.query_gradient_pairs == (plan.mask()[:, 0].numpy() & ~frozen[..., None]).sum()
    for side, dq, counts in (
        (plan.queries, plan.query_gradients, slice(1, 5)),
        (plan.boxes.queries, plan.boxes.query_gradients, slice(3, 7)),
    ):
        # a tile has frozen queries alone or none; of the first there are no steps, of the others all
        of_tile = [frozen[tile[0], row[row >= 0]] for tile, row in zip(side.tiles, side.rows, strict=True)]
        left_out = np.array([rows.any() for rows in of_tile], bool)
        assert left_out.tolist() == [rows.all() for rows in of_tile]
        expected = side.tiles.clone()
        expected[left_out, counts] = 0
        assert torch.equal(dq.tiles, expected)
        assert all(a is b for a, b in zip(dq.tensors()[1:], side.tensors()[1:], strict=True))
        assert frozen.any() or dq is side


def require_the_same_queries(plan: Plan, plain: Plan) -> None:
    ours, theirs = ([*p.queries.tensors(), *p.boxes.queries.tensors()] for p in (plan, plain))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(plan.mask(), plain.mask()) and plan.visible_pairs == plain.visible_pairs


@settings(max_examples=40, deadline=None)
@given(
    samples=st.lists(geometries(), min_size=1, max_size=3),
    pairs=st.lists(st.sampled_from(PAIRS), max_size=4),
    frozen=st.lists(st.sampled_from(STREAMS), max_size=2),
    tile=st.sampled_from([TileShape(8, 8), TileShape(16, 8, key_rows=8), None]),
)
def test_programs(samples, pairs, frozen, tile):
    check(samples, pairs, frozen, tile)


def check(samples, pairs, frozen, tile):
    length = sum(g.length for g in samples) + 7
    plan = compile_plan([samples], length=length, tile=tile, stop_gradient=pairs, frozen=frozen)
    flow, of_frozen, first = np.zeros((1, length, length), bool), np.zeros((1, length), bool), 0
    for sample in samples:
        stream = np.array(STREAMS)[tokens(sample).stream]
        stopped = np.zeros((sample.length,) * 2, bool)
        for query, key in pairs:
            stopped |= (stream == query)[:, None] & (stream == key)
        stopped |= np.isin(stream, frozen)
        of_frozen[0, first : first + sample.length] = np.isin(stream, frozen)
        flow[0, first : first + sample.length, first : first + sample.length] = dense_mask(sample) & ~stopped
        first += sample.length
    require_skips(plan, flow)
    require_frozen(plan, of_frozen)
    require_the_same_queries(plan, compile_plan([samples], length=length, tile=tile))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_marked_ranges(seed):
    check_ranges(seed)


def check_ranges(seed):
    rng = np.random.default_rng(seed)
    queries, keys = rng.integers(1, 200, 2)
    q_ranges, k_ranges = (np.sort(rng.integers(0, n + 1, (5, 2)), 1) for n in (queries, keys))
    flags = rng.random(5) < 0.5
    frozen = np.sort(rng.integers(0, queries + 1, (rng.integers(3), 2)), 1)
    plan = compile_plan(Ranges(q_ranges, k_ranges, queries, keys, flags, frozen), tile=TileShape(16, 8))
    flow = np.zeros((1, queries, keys), bool)
    for (q, q_end), (k, k_end), stopped in zip(q_ranges, k_ranges, flags, strict=True):
        flow[0, q:q_end, k:k_end] |= not stopped
    require_skips(plan, flow)
    of_frozen = np.zeros((1, queries), bool)
    for begin, end in frozen:
        of_frozen[0, begin:end] = True
    require_frozen(plan, of_frozen)
    if not of_frozen.any():
        require_the_same_queries(plan, compile_plan(Ranges(q_ranges, k_ranges, queries, keys), tile=TileShape(16, 8)))


@pytest.mark.parametrize("pairs", [[("action", "prefix"), ("state", "prefix")], [("prefix", "prefix")]], ids=str)
def test_segments_of_rules(pairs):
    sample = RULE_PROGRAMS["prefix_suffix"](prefix=45, actions=9, states=1, padding=((20, 26),))
    plan = compile_plan(sample, stop_gradient=pairs)
    q, k = (np.array(sample.segments)[runs.tokens().segment] for runs in (sample.queries, sample.keys))
    flow = sample.dense_mask()
    for query, key in pairs:
        flow &= ~((q == query)[:, None] & (k == key))
    require_skips(plan, flow[None])
    require_the_same_queries(plan, compile_plan(sample))
    plan = compile_plan(sample, frozen=["prefix", "padding"])
    constant = np.isin(q, ["prefix", "padding"])
    require_skips(plan, (sample.dense_mask() & ~constant)[None])
    require_frozen(plan, constant[None])


def test_runs_and_their_keys_with_gradients():
    plan = compile_plan([[small(), small(chunk_size=1)]], length=180, stop_gradient=ACTION_TO_VIDEO)
    for runs, mask in zip(plan.tensors()[-2:], (plan.mask(gradient=True), plan.mask()), strict=True):
        found = torch.zeros(180, 180, dtype=torch.bool)
        for _, start, end, *bounds in runs.tolist():
            for lo, hi in zip(bounds[::2], bounds[1::2], strict=True):
                found[start:end, lo:hi] = True
        assert torch.equal(found, mask[0, 0])


def test_cached_by_the_pairs_in_any_order_and_pickled():
    frozen = [("video", "video"), ("action", "video")]
    plan = compile_plan(small(), stop_gradient=frozen)
    assert plan is compile_plan(small(), stop_gradient=(*frozen[::-1], frozen[0]))
    assert plan is not compile_plan(small()) and plan is not compile_plan(small(), stop_gradient=ACTION_TO_VIDEO)
    assert compile_plan(small(), stop_gradient=()) is compile_plan(small())
    for other in (pickle.loads(pickle.dumps(plan)), plan.to("meta")):
        assert (other.stop_gradient, other.gradient_pairs) == (plan.stop_gradient, plan.gradient_pairs)
        if other.device == plan.device:
            assert torch.equal(other.mask(gradient=True), plan.mask(gradient=True))
            assert torch.equal(other.boxes.keys.words, plan.boxes.keys.words)
    marked, plain = (Ranges([(0, 4)], [(0, 4)], 4, stop_gradient=flags) for flags in ([True], [False]))
    assert marked != plain == Ranges([(0, 4)], [(0, 4)], 4) and pickle.loads(pickle.dumps(marked)) == marked
    assert "1 with stop-gradient" in repr(marked) and "stopped_pairs=16," in repr(compile_plan(marked))
    assert "stopped" not in repr(compile_plan(plain))
    of_both = compile_plan(small(), frozen=["video", "action"])
    assert of_both is compile_plan(small(), frozen=("action", "video", "video")) is not plan
    assert of_both.to("meta").frozen == pickle.loads(pickle.dumps(of_both)).frozen == ("action", "video")
    some, none = Ranges([(0, 4)], [(0, 4)], 4, frozen_queries=[(1, 3)]), Ranges([(0, 4)], [(0, 4)], 4)
    assert some != none and pickle.loads(pickle.dumps(some)) == some


@pytest.mark.parametrize("chunk_size, window", [(4, 64), (1, 8)])
def test_computed_pairs_fall_with_the_needed_ones(chunk_size, window):
    """Counted, in both forms: the useful share stays, and under a frozen video nearly nothing is left to do."""
    plain, stopped, frozen = (
        compile_plan(libero(chunk_size, window), stop_gradient=pairs)
        for pairs in ((), ACTION_TO_VIDEO, [("video", "video"), *ACTION_TO_VIDEO])
    )
    assert stopped.key_efficiency == stopped.gradient_pairs / stopped.keys.computed_pairs > 0.9 * plain.key_efficiency
    for side in (lambda plan: plan.keys, lambda plan: plan.boxes.keys):
        whole, left, of_actions = (side(plan).computed_pairs for plan in (plain, stopped, frozen))
        assert left < whole and of_actions < 0.15 * whole
        assert side(frozen).idle_tiles > 0.8 * len(side(frozen).tiles) and side(plain).idle_tiles == 0
    constant = compile_plan(libero(chunk_size, window), frozen=["video"])
    assert constant.gradient_pairs == frozen.gradient_pairs
    for part in (lambda plan: plan, lambda plan: plan.boxes):
        whole, left = part(constant).queries, part(constant).query_gradients
        assert left.computed_pairs < 0.3 * whole.computed_pairs
        assert left.idle_tiles > 0.8 * len(left.tiles) and whole.idle_tiles == 0


@pytest.mark.parametrize(
    "sample, pairs, message",
    [
        (
            small(),
            ("action", "video"),
            r"must hold pairs \(query stream, key stream\) .* use as \[\('action', 'video'\)",
        ),
        (small(), "action", "must hold pairs .*got 'action'"),
        (small(), [("action", 0)], r"must hold pairs .*got \('action', 0\)"),
        (small(), None, "must hold pairs .*got None"),
        (small(), [("action", "text")], r"streams of joint, \('video', 'action'\), got 'text'"),
        (
            RULE_PROGRAMS["prefix_suffix"](prefix=4, actions=2),
            [("action", "video")],
            r"streams of prefix_suffix, \('prefix', 'state', 'action', 'padding'\), got 'video'",
        ),
        (Ranges([(0, 4)], [(0, 4)], 4), ACTION_TO_VIDEO, r"got Ranges; .*Ranges\(\.\.\., stop_gradient="),
    ],
)
def test_refusals(sample, pairs, message):
    with pytest.raises(ValueError, match=f"compile_plan: stop_gradient .*{message}"):
        compile_plan(sample, stop_gradient=pairs)


@pytest.mark.parametrize(
    "sample, frozen, message",
    [
        (small(), "video", r"must hold names of streams, got 'video'; use as \['video'\]"),
        (small(), [("video",)], "must hold names of streams, got .*"),
        (small(), ["text"], r"must name streams of joint, \('video', 'action'\), got 'text'"),
        (Ranges([(0, 4)], [(0, 4)], 4), ["video"], r"got Ranges; .*frozen_queries=\[\(begin, end\), \.\.\.\]"),
    ],
)
def test_names_that_are_refused(sample, frozen, message):
    with pytest.raises(ValueError, match=f"compile_plan: frozen .*{message}"):
        compile_plan(sample, frozen=frozen)


@pytest.mark.parametrize("flags", [[True], [1, 0], [[True, False]], torch.ones(2)])
def test_flags_that_are_refused(flags):
    with pytest.raises(ValueError, match="Ranges: stop_gradient must be R=2 bools, got"):
        Ranges([(0, 4)] * 2, [(0, 4)] * 2, 4, stop_gradient=flags)
