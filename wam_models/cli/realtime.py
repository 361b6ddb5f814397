"""``wam rollout --realtime``: a simulator as a robot that does not wait; the next chunk is planned while it acts."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence

import numpy as np

from ..control import ControlConfig, Controller, run_in_real_time
from ..control.controller import PlanRequest
from ..control.runner import Ran, planner
from ..rollout.config import RolloutConfig
from ..rollout.policy import Policy
from ..rollout.robots import RobotBatch
from ..runtime.config_files import with_settings
from ..runtime.json_fields import from_fields
from ..runtime.threads import pick_threads
from ..simulator import Simulator, control_freq, load
from ..simulator.named import is_adapter
from ..simulator.protocol import Observation, checked_outcome, observed

SIMULATED_CHUNKS = 40


class _Robot:
    """A simulator, tick by tick."""

    def __init__(self, simulator: Simulator, name: str, seed: int) -> None:
        self.simulator, self.name = simulator, name
        self.actions, self.success = 0, False
        self.failure: str | None = None
        simulator.reset(simulator.initial_state(seed))

    def observe(self) -> Observation:
        return observed(self.simulator, self.name)

    def act(self, action: np.ndarray) -> bool:
        outcome = checked_outcome(f"{self.name}.act", self.simulator.act(action))
        self.actions += 1
        self.success, self.failure = outcome.success, outcome.failure
        return outcome.success or outcome.failure is not None or self.actions >= self.simulator.horizon


def play_in_real_time(
    policy: Policy, config: RolloutConfig, name: str, *, settings: Sequence[str] = (), chunks: int = SIMULATED_CHUNKS,
    seed: int = 0, delay: float = 0.0,
) -> tuple[Controller[Observation], _Robot, Ran, RobotBatch]:  # fmt: skip
    """An episode of a simulator that acts at its own rate, whether there is a plan or not.

    Args:
        policy: Whose plans are executed.
        config: Of its rollout.
        name: As of ``--simulator``.
        settings: As of ``--control``.
        chunks: At most.
        seed: Of the initial state and of the noise.
        delay: Seconds that each plan takes longer than it does, as of a larger model.

    Raises:
        ValueError: an adapter of two methods, or settings that there are not.
    """
    simulator = load(name, policy.cameras)
    if is_adapter(simulator):
        raise ValueError("--realtime must have a simulator that acts action by action, got an adapter of two methods")
    values = with_settings({"kind": "relative", "rate": control_freq(simulator)}, settings)
    control = from_fields(ControlConfig, values, "--control", defaults=True)
    robots = RobotBatch(policy, config, seed=seed)
    if policy.model.device.type == "cpu":
        pick_threads(robots.warm_up)
    began = time.perf_counter()
    robots.warm_up()  # two plans
    expected = math.ceil(((time.perf_counter() - began) / 2 + delay) * control.rate)
    controller: Controller[Observation] = Controller(
        control, width=len(policy.action_mean), actions_per_frame=policy.actions_per_frame, horizon=robots.horizon,
        actions_per_token=policy.actions_per_token, expected=expected,
    )  # fmt: skip
    robot, plan = _Robot(simulator, name, seed), planner(robots, simulator.instruction, seed=seed)

    def delayed(request: PlanRequest[Observation]) -> np.ndarray:
        time.sleep(delay)
        return plan(request)

    ticks = chunks * config.chunk_size * controller.ticks_per_frame
    return controller, robot, run_in_real_time(controller, robot, delayed, ticks=ticks), robots


def roll_out_in_real_time(args: argparse.Namespace, policy: Policy, config: RolloutConfig) -> int:
    controller, robot, ran, robots = play_in_real_time(
        policy, config, args.simulator, settings=args.control, chunks=args.chunks or SIMULATED_CHUNKS, seed=args.seed
    )
    simulator, control = robot.simulator, controller.config
    counts, seconds = controller.counts, ran.plan_seconds
    why = f": {robot.failure}" if robot.failure else ""
    print(f'simulator      {args.simulator}: "{simulator.instruction}"')
    print(f"program        {config.program}, {config.steps} denoising steps, {policy.model.device}")
    print(f"real time      {counts.ticks} actions at {control.rate:g} Hz, {ran.overruns} sent more than one late")
    print(f"task           {'done' if robot.success else 'not done'}{why}")
    p50, p95 = np.percentile(seconds, [50, 95])
    print(f"plans          {counts.plans} of {robots.horizon} actions, p50 {p50:.4f} s, p95 {p95:.4f} s")
    print(
        f"deadlines      {counts.missed} missed, {counts.late} plans late, {counts.dropped} dropped, "
        f"{counts.refused} failed"
    )
    print(f"actions        {counts.held} held the robot, {counts.stale} of them too old; {counts.limited} limited")
    for failure in dict.fromkeys(ran.failures):
        print(f"failed plan    {failure}")
    return 0
