"""The clock and the thread: the robot waits for the first plan, and never for another."""

import threading
import time

import numpy as np
import pytest

from wam_models.control import RanDryError, run_in_real_time
from wam_models.control.controller import ControlConfig, Controller

CONFIG = ControlConfig(kind="absolute", rate=200.0, stale=100.0)


class Robot:
    def __init__(self, end=None):
        self.actions, self.end, self.observed = [], end, 0

    def observe(self):
        self.observed += 1
        return self.observed

    def act(self, action):
        self.actions.append(action)
        return len(self.actions) == self.end


def controlled(**changes):
    config = ControlConfig(**vars(CONFIG) | changes)
    return Controller(config, width=1, actions_per_frame=2, horizon=8, expected=2)


def counted(request):
    return (request.start + np.arange(8.0, dtype=np.float32))[:, None]


def test_a_robot_in_real_time():
    robot, controller = Robot(), controlled()
    began = time.perf_counter()
    ran = run_in_real_time(controller, robot, counted, ticks=40)
    assert time.perf_counter() - began >= 39 / 200 and not ran.ended and not ran.failures
    assert len(robot.actions) == controller.counts.ticks == 40 and robot.observed == 21
    assert len(ran.plan_seconds) == controller.counts.plans + controller.counts.dropped
    own = np.diff(np.concatenate(robot.actions)) != 0
    assert own.sum() >= 39 - controller.counts.held  # what was not held went on as planned
    assert "planner" not in [thread.name for thread in threading.enumerate()]


def test_a_plan_that_hangs_does_not_stop_the_robot():
    robot, controller, release = Robot(), controlled(), threading.Event()

    def plan(request):
        if request.start:
            release.wait(20)
        return counted(request)

    def act(action):
        if len(robot.actions) == 19:
            release.set()
        return Robot.act(robot, action)

    robot.act = act
    run_in_real_time(controller, robot, plan, ticks=20)
    assert len(robot.actions) == 20 and controller.counts.held == 12
    np.testing.assert_array_equal(np.concatenate(robot.actions)[:8], np.arange(8))
    with pytest.raises(RanDryError, match="no action for tick 8"):
        hung = threading.Event()
        threading.Timer(0.3, hung.set).start()
        run_in_real_time(controlled(empty="stop"), Robot(), lambda r: r.start and hung.wait(20) or counted(r), ticks=20)


def test_plans_that_fail():
    calls = []

    def plan(request):
        calls.append(request)
        if len(calls) % 2 == 0:
            raise RuntimeError("out of memory")
        return counted(request)

    robot, controller = Robot(end=30), controlled()
    ran = run_in_real_time(controller, robot, plan, ticks=1000)
    assert ran.ended and len(robot.actions) == 30
    assert set(ran.failures) <= {"RuntimeError: out of memory"} and controller.counts.refused == len(ran.failures)
    for first, message in ((lambda r: 1 / 0, "ZeroDivisionError"), (lambda r: counted(r)[:1], "no finite actions")):
        robot = Robot()
        with pytest.raises(RuntimeError, match=f"the first plan failed: {message}"):
            run_in_real_time(controlled(), robot, first, ticks=5)
        assert robot.actions == []


def test_a_robot_that_takes_too_long_is_counted():
    robot = Robot()

    def act(action):
        if len(robot.actions) == 3:
            time.sleep(0.05)
        return Robot.act(robot, action)

    robot.act = act
    ran = run_in_real_time(controlled(), robot, counted, ticks=8)
    assert ran.overruns >= 1 and len(robot.actions) == 8
