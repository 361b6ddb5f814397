"""Control without a clock: seeded latencies, jitter, lost and late observations, plans that are none."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wam_models import RolloutConfig
from wam_models.control import ControlConfig, Controller, RanDryError
from wam_models.control.limits import Limiter
from wam_models.control.rates import at_rate
from wam_models.control.runner import planner
from wam_models.rollout.robots import RobotBatch
from wam_models.simulator import Observation

from ..serve.policies import of_states

FREE = ControlConfig(kind="absolute", rate=10.0, stale=100.0)
CHUNK = 8  # actions, of 4 frames


def controlled(config=FREE, **options):
    return Controller(config, **{"width": 2, "actions_per_frame": 2, "horizon": CHUNK} | options)


def told(request, data_ticks=1.0):
    """A plan that says what it is: the tick of its observation, and its own, both at the data's rate."""
    start = request.start * data_ticks
    return np.stack([np.full(CHUNK, start), start + np.arange(CHUNK)], 1).astype(np.float32)


def simulate(
    controller, ticks, plan=told, latency=lambda: 0, lost=lambda: False, delay=lambda: 0, observe=lambda: None
):
    """As the runner does it, with ticks for a clock: actions, and requests with the ticks of their plans."""
    actions, requests, on_its_way, coming = [], [], None, [(0, 0, observe())]
    while len(actions) < ticks:
        tick = controller.tick
        if tick and tick % controller.ticks_per_frame == 0 and not lost():
            coming.append((tick + delay(), tick, observe()))
        for entry in [entry for entry in coming if entry[0] <= tick]:
            coming.remove(entry)
            controller.observe(*entry[1:])
        for _ in range(2):
            if on_its_way is None and (request := controller.request()) is not None:
                requests.append(request)
                on_its_way = (tick + latency() if controller.ready else tick, request)
            if on_its_way is not None and on_its_way[0] <= tick:
                controller.deliver(on_its_way[1], plan(on_its_way[1]))
                on_its_way = None
        actions.append(controller.action())
    return np.stack(actions), requests


def test_the_next_chunk_is_planned_while_this_one_is_executed():
    """Latency within the chunk: no tick without an action, no plan that is late once one was measured."""
    controller = controlled(expected=3)
    actions, requests = simulate(controller, 200, latency=lambda: 3)
    counts = controller.counts
    assert (counts.held, counts.late, counts.missed, counts.dropped, counts.limited) == (0, 0, 0, 0, 0)
    np.testing.assert_array_equal(actions[:, 1], np.arange(200))
    assert (np.arange(200) - actions[:, 0]).max() < CHUNK
    assert counts.begun == 1 and len(requests) - counts.plans in (0, 1)  # one may be on its way
    for before, after in zip(requests, requests[1:], strict=False):
        assert after.start - before.start == len(after.executed) and after.start > before.start
        np.testing.assert_array_equal(after.executed, actions[before.start : after.start])
        held = after.committed
        assert len(held) >= after.asked - after.start + 3 and after.covered == after.start + len(held)
        np.testing.assert_array_equal(held, actions[after.start : after.start + len(held)])


@pytest.mark.parametrize("latency, missed", [(3, 0), (7, 1)])
def test_the_deadline_is_the_end_of_the_chunk(latency, missed):
    """Chunks begin with an observation, so two latencies and the age of the observation must fit into one."""
    controller = controlled(expected=latency)
    actions, _ = simulate(controller, 400, latency=lambda: latency)
    counts = controller.counts
    assert (counts.missed > 0) == (counts.held > 0) == bool(missed)
    if missed:  # it holds where it was
        held = np.flatnonzero(actions[1:, 1] == actions[:-1, 1])
        assert len(held) == counts.held and counts.stale == 0


def test_late_plans_are_used_or_dropped():
    """The second plan takes five ticks where one was expected."""
    for late, expected in (("use", 2), ("drop", 0)):
        controller, took = controlled(replace(FREE, late=late), expected=1), iter([5, 1])
        actions, requests = simulate(controller, 8, latency=lambda took=took: next(took))
        assert requests[1].covered == 3  # and it is there at tick 7
        assert (controller.counts.late, controller.counts.dropped) == (1, late == "drop")
        np.testing.assert_array_equal(actions[:, 0], [0] * 7 + [expected])
        np.testing.assert_array_equal(actions[:, 1], np.arange(8))


def test_no_action_is_older_than_it_may_be():
    controller = controlled(replace(FREE, stale=0.4), expected=1)
    actions, _ = simulate(controller, 20, latency=lambda: 50)
    np.testing.assert_array_equal(actions[:5, 1], np.arange(5))  # 0.4 s are four ticks after the first
    np.testing.assert_array_equal(actions[5:], np.repeat(actions[4:5], 15, 0))
    assert controller.counts.stale == 3 and controller.counts.held == 15
    stopping = controlled(replace(FREE, stale=0.4, empty="stop"))
    with pytest.raises(RanDryError, match="no action for tick 5"):
        simulate(stopping, 20, latency=lambda: 50)


@pytest.mark.parametrize(
    "kind, hold, expected", [("absolute", None, [0, 7]), ("relative", None, [0, 0]), ("absolute", (3.0, 4.0), [3, 4])]
)
def test_what_holds_the_robot(kind, hold, expected):
    controller = controlled(replace(FREE, kind=kind, hold=hold))
    actions, _ = simulate(controller, 12, latency=lambda: 50)
    np.testing.assert_array_equal(actions[8:], [expected] * 4)
    with pytest.raises(ValueError, match="hold must be 2 finite numbers"):
        controlled(replace(FREE, hold=(1.0,)))


def test_an_observation_that_is_lost_begins_an_episode():
    controller = controlled()
    lost = iter([False, True] + [False] * 20)
    _, requests = simulate(controller, 12, lost=lambda: next(lost))
    assert [r.start for r in requests] == [0, 2, 6, 8, 10] and controller.counts.begun == 2
    assert [r.executed is None for r in requests] == [True, False, True, False, False]
    twice = controlled()
    simulate(twice, 5)
    twice.observe(2, "again")  # it was planned from
    assert twice.request() is None
    for tick, message in ((3, "a multiple of 2"), (6, "from 0 to 5")):
        with pytest.raises(ValueError, match=message):
            twice.observe(tick, None)


BAD = {
    "raises": ValueError("no"),
    "not finite": np.full((CHUNK, 2), np.nan, np.float32),
    "infinite": np.full((CHUNK, 2), np.inf),
    "overflows": np.full((CHUNK, 2), 1e300),
    "short": np.zeros((CHUNK - 1, 2), np.float32),
    "wide": np.zeros((CHUNK, 3), np.float32),
    "nothing": None,
    "a list": [[0.0, 0.0]] * CHUNK,
    "whole numbers": np.zeros((CHUNK, 2), np.int64),
}


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_stale_and_no_infinite_action_reaches_the_robot(data):
    """Whatever is late, lost, out of order or no plan at all."""
    stale, late = data.draw(st.integers(1, 12), "stale"), data.draw(st.sampled_from(("use", "drop")), "late")
    limits = data.draw(st.sampled_from(({}, {"low": -1.0, "high": 60.0}, {"rate_limit": 20.0, "jerk_limit": 50.0})))
    config = ControlConfig(kind="absolute", rate=10.0, stale=stale / 10, late=late, hold=(-1.0, -1.0), **limits)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    slow, lossy, broken = (data.draw(st.sampled_from(values)) for values in ((2, 6, 20), (0, 0.2, 0.7), (0, 0.3)))
    controller = controlled(config, expected=data.draw(st.integers(0, 9), "expected"))

    def plan(request):
        if request.start and rng.random() < broken:
            return BAD[rng.choice(list(BAD))]
        return told(request)

    actions, requests = simulate(
        controller, 120, plan, lambda: int(rng.integers(0, slow)), lambda: rng.random() < lossy,
        lambda: int(rng.integers(0, 5)),
    )  # fmt: skip
    assert np.isfinite(actions).all() and controller.counts.ticks == 120
    assert all(np.isfinite(r.committed).all() and len(r.committed) <= CHUNK for r in requests)
    if "low" in limits:
        assert (actions >= -1).all() and (actions <= 60).all()
    elif limits:
        moves = np.diff(actions.astype(np.float64), axis=0)
        assert np.abs(moves).max() <= 2 + 1e-5 and np.abs(np.diff(moves, axis=0)).max() <= 0.5 + 1e-5
    else:
        assert controller.counts.limited == 0
        holds = (actions == -1).all(1)
        assert holds.sum() == controller.counts.held
        ticks = np.arange(120)[~holds]
        np.testing.assert_array_equal(actions[~holds, 1], ticks)  # each at its own time
        assert (ticks - actions[~holds, 0]).max(initial=0) <= stale
        assert set(actions[~holds, 0]) <= {r.start for r in requests}
    for request in requests:
        assert request.executed is None or len(request.executed) == 2 * len(request.observations)


def test_the_same_seed_is_the_same_run():
    def run():
        rng = np.random.default_rng(5)
        controller = controlled(expected=2)
        actions, _ = simulate(controller, 100, told, lambda: int(rng.integers(0, 9)), lambda: rng.random() < 0.3)
        return actions, controller.counts

    (first, counts), (second, again) = run(), run()
    np.testing.assert_array_equal(first, second)
    assert counts == again and counts.late > 0 and counts.begun > 1


# ---- limits and rates ----


def test_limits():
    limit = Limiter(2, 10.0, low=[-1, -2], high=1.0, rate=2.0)
    np.testing.assert_array_equal(limit(np.array([5.0, -5.0])), [1, -2])
    np.testing.assert_allclose(limit(np.array([-5.0, -5.0])), [0.8, -2], rtol=1e-6)
    assert limit.changed == 2
    np.testing.assert_allclose(limit(np.array([0.8, -1.9])), [0.8, -1.9], rtol=1e-6)
    assert limit.changed == 2
    smooth = Limiter(1, 10.0, rate=2.0, jerk=5.0)
    places = [float(smooth(np.array([x]))[0]) for x in [0.0] + [9.0] * 8]
    np.testing.assert_allclose(np.diff(places), [0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.2, 0.2], rtol=1e-5)
    for bad, message in (
        ({"low": 1.0, "high": 0.0}, "low must be at most high"),
        ({"low": [1.0, 2.0, 3.0]}, "low must be a finite number, or 2 of them"),
        ({"high": np.nan}, "high must be a finite number"),
        ({"rate": 0.0}, "must be positive"),
        ({"jerk": "fast"}, "jerk must be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            Limiter(2, 10.0, **bad)


def test_rates():
    places, moves = np.array([[1.0], [3.0], [3.0], [5.0]]), np.array([[1.0], [2.0], [0.0], [2.0]])
    fast = at_rate(places, 2, 4, "absolute", np.zeros(1))
    np.testing.assert_allclose(fast[:, 0], [0.5, 1, 2, 3, 3, 3, 4, 5])
    np.testing.assert_allclose(at_rate(fast, 2, 2, "absolute", np.zeros(1)), places)
    np.testing.assert_allclose(at_rate(moves, 2, 4, "relative", None)[:, 0], [0.5, 0.5, 1, 1, 0, 0, 1, 1])
    np.testing.assert_allclose(at_rate(moves, 2, 1, "relative", None)[:, 0], [3, 2])
    assert at_rate(places, 2, 2, "absolute", None) is places
    np.testing.assert_allclose(at_rate(places[:1], 1, 3, "absolute", None)[:, 0], [1, 1, 1])


@pytest.mark.parametrize("rate, ticks", [(20.0, 4), (5.0, 1), (15.0, 3)])
def test_a_robot_of_another_rate(rate, ticks):
    """The same places at the same times; what the policy is told is at its own rate again."""
    controller = controlled(replace(FREE, rate=rate, data_rate=10.0), expected=1)
    assert controller.ticks_per_frame == ticks
    actions, requests = simulate(controller, 20 * ticks, lambda r: told(r, 10 / rate), lambda: 1)
    times = (1 + np.arange(len(actions))) * 10 / rate - 1  # a plan says where to be at the end of each data tick
    np.testing.assert_allclose(actions[times >= 0, 1], times[times >= 0], rtol=1e-5, atol=1e-5)
    assert controller.counts.held == controller.counts.late == 0
    for request in requests[1:]:
        assert request.executed.shape[1] == 2 and len(request.executed) == 2 * len(request.observations)
    with pytest.raises(ValueError, match="a whole number of actions, got 2.4"):
        controlled(replace(FREE, rate=12.0, data_rate=10.0))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "other"}, "kind must be one of"),
        ({"rate": 0}, "rate must be a number"),
        ({"late": "wait"}, "late must be one of"),
        ({"empty": "repeat"}, "empty must be one of"),
        ({"hold": "still"}, "hold must be one of"),
        ({"stale": -1}, "stale must be a finite number"),
        ({"data_rate": "x"}, "data_rate must be a number"),
    ],
    ids=str,
)
def test_configs_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(FREE, **changes)


# ---- a policy ----


def test_plans_of_a_policy_go_on_where_the_one_before_is_left():
    """What was committed is what the new plan has there, so no switch is a jump."""
    policy = of_states()
    robots = RobotBatch(policy, RolloutConfig(program="joint", chunk_size=4, window=4, steps=2))
    plan, plans, rng = planner(robots, "lift", seed=0), {}, np.random.default_rng(0)

    def planned(request):
        plans[request.start] = plan(request)
        return plans[request.start]

    controller = controlled(expected=3, actions_per_token=2)
    actions, requests = simulate(
        controller, 24, planned, lambda: 3, observe=lambda: Observation(rng.normal(size=3).astype(np.float32))
    )
    assert controller.counts.held == controller.counts.late == controller.counts.refused == 0
    assert controller.counts.begun == 1 and len(plans) >= 6
    assert any(request.executed is not None and len(request.executed) > 2 for request in requests)
    for request in requests[1:-1]:
        held = len(request.committed)
        assert 4 <= held <= CHUNK
        np.testing.assert_allclose(plans[request.start][:held], request.committed, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            plans[request.start][:held], actions[request.start : request.start + held], rtol=1e-4, atol=1e-5
        )
