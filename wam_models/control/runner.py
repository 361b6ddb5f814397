"""The controller with a clock, and a thread that plans."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..rollout.robots import Request, RobotBatch
from .controller import Controller, PlanRequest

STOP = 10.0  # seconds that are waited for a plan that is still being made when the robot has stopped


class Observed(Protocol):
    """What the policy is told: as ``wam_models.simulator.Observation``."""

    @property
    def state(self) -> np.ndarray: ...

    @property
    def pictures(self) -> Mapping[str, np.ndarray]: ...


class Robot(Protocol):
    """What is controlled."""

    def observe(self) -> Any:
        """What a plan is made from; asked for before the first action and after each frame of them. Must not wait."""
        ...

    def act(self, action: np.ndarray) -> bool:
        """Begin with an action, float32 ``[A]``; whether the episode has ended. Must not wait."""
        ...


@dataclass
class Ran:
    """What a run was like, beside ``Controller.counts``.

    Attributes:
        ended: Whether the robot returned that, before all ticks were over.
        overruns: Actions that were sent more than a tick too late, because the robot or this machine took too long;
            those after them are as much later.
        plan_seconds: Of each plan.
        failures: Of plans that were none, in words.
    """

    ended: bool = False
    overruns: int = 0
    plan_seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def planner(robots: RobotBatch, prompt: str, *, place: int = 0, seed: int | None = None) -> Callable:
    """Makes the plans of a robot in this place, whose observations are :class:`Observed`."""

    def plan(request: PlanRequest[Observed]) -> np.ndarray:
        observed = request.observations
        states = np.stack([o.state for o in observed]) if robots.width else None
        pictures = {name: np.stack([o.pictures[name] for o in observed]) for name in robots.policy.cameras}
        found = robots.act(
            {
                place: Request(
                    prompt=prompt, states=states, pictures=pictures, executed=request.executed,
                    committed=request.committed if len(request.committed) else None, seed=seed,
                )
            }
        )[place]  # fmt: skip
        if isinstance(found, ValueError):
            raise found
        return found

    return plan


def run_in_real_time(
    controller: Controller,
    robot: Robot,
    plan: Callable[[PlanRequest], np.ndarray],
    *,
    ticks: int,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Ran:
    """Control a robot for so many ticks, or until it says that it has ended.

    The first plan is waited for; from then on the robot is never. Plans are made in a thread of their own.

    Args:
        controller: Fresh.
        robot: What is controlled.
        plan: Actions for a request.
        ticks: Actions, at most.
        clock: Seconds.
        sleep: Waits for so many.

    Raises:
        RuntimeError: the first plan failed.
        RanDryError: as :meth:`Controller.action` does.
    """
    ran, changed, stopped = Ran(), threading.Condition(), threading.Event()

    def make_plans() -> None:
        while True:
            with changed:
                while not stopped.is_set() and (request := controller.request()) is None:
                    changed.wait()
                if stopped.is_set():
                    return
            assert request is not None
            began, found = clock(), None
            try:
                found = plan(request)
            except Exception as error:  # of one plan: the controller goes on without it
                ran.failures.append(f"{type(error).__name__}: {error}")
            ran.plan_seconds.append(clock() - began)
            with changed:
                controller.deliver(request, found)
                changed.notify_all()

    thread = threading.Thread(target=make_plans, name="planner", daemon=True)
    with changed:
        controller.observe(0, robot.observe())
    thread.start()
    try:
        with changed:
            changed.wait_for(lambda: controller.ready or controller.counts.refused)
            if not controller.ready:
                why = ran.failures[-1] if ran.failures else "no finite actions of the right shape"
                raise RuntimeError(f"run_in_real_time: the first plan failed: {why}")
        period = 1 / controller.config.rate
        due = clock()
        for tick in range(1, ticks + 1):
            sleep(max(due - clock(), 0))
            late = clock() - due
            if late > period:
                ran.overruns += 1
                due += late
            with changed:
                action = controller.action()
            if robot.act(action):
                ran.ended = True
                break
            if tick % controller.ticks_per_frame == 0:
                observation = robot.observe()
                with changed:
                    controller.observe(tick, observation)
                    changed.notify_all()
            due += period
    finally:
        with changed:
            stopped.set()
            changed.notify_all()
        thread.join(STOP)
    return ran
