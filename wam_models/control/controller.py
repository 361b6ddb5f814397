"""What a robot does at each tick, and what is to be planned next. No clock: time is ticks, which the caller counts.

    tick    0         T         2T        3T
    frame   0         1         2         3         a frame is T ticks
    plan A  |-- executed --|~~ committed ~~|
    plan B            |== held fixed ======|-- new ---------|
                      ^ observation of B   ^ B is there

Plan B begins with the newest observation. What is executed while it is computed is fixed in it (``committed``), so it
goes on where plan A is left, wherever in it that is. A plan that comes later than was expected, or not at all, is
a matter of ``ControlConfig.late`` and ``empty``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import numpy as np

from ..runtime.checks import check_field, choice, number, whole
from .limits import Limiter
from .rates import KINDS, at_rate

LATENCIES = 8  # of the latest plans, whose largest is what the next one is expected to take

Observation = TypeVar("Observation")


class RanDryError(RuntimeError):
    """There is no action, and ``ControlConfig.empty`` says that the robot must not wait for one."""


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """How a robot is controlled.

    Args:
        kind: ``"absolute"`` actions say where to be, ``"relative"`` ones by how much to move.
        rate: Actions that the robot takes in a second.
        data_rate: Those of the data; None: the same.
        stale: Seconds that may have passed since the observation that an action comes from.
        late: Of a plan that comes after its committed actions are executed: ``"use"`` what is left of it, or
            ``"drop"`` it while the plan before it has actions.
        empty: Where there is no action that may be executed: ``"hold"``, or ``"stop"`` with an error.
        hold: The action that holds the robot: ``"repeat"`` the last one, ``"zero"``, or its numbers; None: repeat for
            absolute actions, zero for relative ones.
        low: Least of each number of an action, one for all or one each; None: no bound.
        high: Most of each.
        rate_limit: Most that each changes in a second.
        jerk_limit: Most that this rate changes in a second.

    Raises:
        ValueError: a value of the wrong type or outside its range; the message names the field.
    """

    kind: str
    rate: float
    data_rate: float | None = None
    stale: float = 2.0
    late: str = "use"
    empty: str = "hold"
    hold: str | tuple[float, ...] | None = None
    low: float | tuple[float, ...] | None = None
    high: float | tuple[float, ...] | None = None
    rate_limit: float | tuple[float, ...] | None = None
    jerk_limit: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_field(self, "kind", choice, KINDS)
        check_field(self, "rate", number, 1e-3, 1e5)
        if self.data_rate is not None:
            check_field(self, "data_rate", number, 1e-3, 1e5)
        check_field(self, "stale", number, 0)
        check_field(self, "late", choice, ("use", "drop"))
        check_field(self, "empty", choice, ("hold", "stop"))
        if isinstance(self.hold, str):
            check_field(self, "hold", choice, ("repeat", "zero"))
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), list):  # as JSON and TOML have it
                object.__setattr__(self, field.name, tuple(value))

    def ticks_per_frame(self, actions_per_frame: int) -> int:
        """T. Raises ValueError where a frame of the data is no whole number of the robot's actions."""
        ticks = actions_per_frame * self.rate / (self.data_rate or self.rate)
        if round(ticks) < 1 or abs(ticks - round(ticks)) > 1e-6:
            raise ValueError(
                f"ControlConfig: rate must make a frame of {actions_per_frame} actions at data_rate={self.data_rate} a "
                f"whole number of actions, got {ticks:g} at {self.rate:g}"
            )
        return round(ticks)


@dataclass
class Counts:
    """What happened.

    Attributes:
        ticks: Actions that the robot got.
        plans: That were taken over.
        late: Plans that came after their committed actions were executed.
        missed: Plans that came after the plan before them was used up, the deadline.
        dropped: Late plans that were not taken over, by choice or because all of their time had passed.
        refused: Plans that failed, or were no finite actions of the right shape.
        held: Actions that held the robot, for want of one that may be executed.
        stale: Of them, those where there was one, from an observation that was too old.
        limited: Actions that were not within the limits.
        begun: Episodes: the first, and one after each observation that was lost.
    """

    ticks: int = 0
    plans: int = 0
    late: int = 0
    missed: int = 0
    dropped: int = 0
    refused: int = 0
    held: int = 0
    stale: int = 0
    limited: int = 0
    begun: int = 0


@dataclass(frozen=True, eq=False)
class PlanRequest(Generic[Observation]):
    """A plan that is to be made. Actions are in the units and at the rate of the data, n a frame.

    Attributes:
        start: Tick of the newest observation, with which the plan begins.
        asked: Tick at which it was asked for.
        observations: K of them, the newest last.
        executed: float32 ``[K n, A]`` that led to them; None: an episode begins with the one observation.
        committed: float32 ``[m, A]``, the first actions of the plan.
        covered: Tick up to which the committed actions last.
    """

    start: int
    asked: int
    observations: list[Observation]
    executed: np.ndarray | None
    committed: np.ndarray
    covered: int


@dataclass(frozen=True, eq=False)
class _Plan:
    start: int  # tick of the observation that it is made from, and of its first action
    actions: np.ndarray  # float32 [ticks, A]

    @property
    def end(self) -> int:
        return self.start + len(self.actions)


class Controller(Generic[Observation]):
    """One robot. Calls must not overlap; between threads, take a lock.

    Args:
        config: How it is controlled.
        width: Numbers of an action, A.
        actions_per_frame: Of the data, n.
        horizon: Actions of a plan, F n.
        actions_per_token: Committed actions come in multiples of this.
        expected: Ticks that a plan is expected to take before any was measured.

    Attributes:
        tick: That comes next.
        counts: What happened so far.
        ticks_per_frame: T.
    """

    def __init__(
        self, config: ControlConfig, *, width: int, actions_per_frame: int, horizon: int, actions_per_token: int = 1,
        expected: int = 1,
    ) -> None:  # fmt: skip
        self.config, self.width = config, whole("Controller: width", width, 1)
        self.per_frame = whole("Controller: actions_per_frame", actions_per_frame, 1)
        self.frames = whole("Controller: horizon", horizon, actions_per_frame) // actions_per_frame
        self.per_token = whole("Controller: actions_per_token", actions_per_token, 1)
        self.ticks_per_frame = config.ticks_per_frame(actions_per_frame)
        self.limiter = Limiter(
            width, config.rate, low=config.low, high=config.high, rate=config.rate_limit, jerk=config.jerk_limit
        )
        self.tick, self.counts = 0, Counts()
        self._latencies = deque([whole("Controller: expected", expected, 0)], maxlen=LATENCIES)
        self._executed: deque[np.ndarray] = deque()  # those of the ticks from self._kept on
        self._kept = 0
        self._observed: dict[int, Observation] = {}  # by frame, from the one after the last that was planned from
        self._planned = -1  # the last frame that a plan was asked for from
        self._continues = False  # whether what plans has the history up to it
        self._plan: _Plan | None = None
        hold = config.hold or ("repeat" if config.kind == "absolute" else "zero")
        self._repeats = hold == "repeat"
        self._still = np.zeros(width, np.float32)
        if not isinstance(hold, str):
            self._still = np.asarray(hold, np.float32)
            if self._still.shape != (width,) or not np.isfinite(self._still).all():
                raise ValueError(f"ControlConfig: hold must be {width} finite numbers for this policy, got {hold}")

    @property
    def ready(self) -> bool:
        """Whether there was any plan: before it, the robot stands where it is."""
        return self._plan is not None

    # ---- the robot ----

    def action(self) -> np.ndarray:
        """float32 ``[A]``, for the tick that is due; the next call is for the next tick.

        Raises:
            RanDryError: there is none, and ``empty`` is ``"stop"``.
        """
        found = self._due()
        if found is None:
            if self.config.empty == "stop":
                raise RanDryError(
                    f"no action for tick {self.tick}: the plan has ended or its observation is too old, {self.counts}"
                )
            self.counts.held += 1
            last = self.limiter.last
            found = last if self._repeats and last is not None else self._still
        sent = self.limiter(found)
        self.counts.limited = self.limiter.changed
        self._executed.append(sent.copy())
        self.tick += 1
        self.counts.ticks += 1
        return sent

    def _due(self) -> np.ndarray | None:
        plan = self._plan
        if plan is None or not plan.start <= self.tick < plan.end:
            return None
        if (self.tick - plan.start) / self.config.rate > self.config.stale:
            self.counts.stale += 1
            return None
        return plan.actions[self.tick - plan.start]

    def observe(self, tick: int, observation: Observation) -> None:
        """What was observed before the action of ``tick``, the first of a frame; it may come late, twice or never.

        Raises:
            ValueError: a tick that is to come, or within a frame.
        """
        whole("Controller.observe: tick", tick, 0, self.tick)
        if tick % self.ticks_per_frame:
            raise ValueError(
                f"Controller.observe: tick must be a multiple of {self.ticks_per_frame}, a frame, got {tick}"
            )
        frame = tick // self.ticks_per_frame
        if frame > self._planned:
            self._observed[frame] = observation

    # ---- the planner ----

    def request(self) -> PlanRequest[Observation] | None:
        """What is to be planned now, once no other plan is on its way; None before there is a new observation."""
        if not self._observed:
            return None
        newest, T = max(self._observed), self.ticks_per_frame
        since = range(self._planned + 1, newest + 1)
        executed, observations = None, [self._observed[newest]]
        if self._continues and all(frame in self._observed for frame in since):
            observations = [self._observed[frame] for frame in since]
            start, end = self._planned * T, newest * T
            executed = at_rate(
                self._known(start, end), len(since), self.per_frame, self.config.kind, self._before(start)
            )
        else:
            self.counts.begun += 1
        self._planned, self._observed, self._continues = newest, {}, True
        committed, covered = self._committed(newest * T)
        while self._kept < newest * T - 1:  # one before it is where interpolation begins
            self._executed.popleft()
            self._kept += 1
        return PlanRequest(newest * T, self.tick, observations, executed, committed, covered)

    def deliver(self, request: PlanRequest[Observation], actions: Any) -> None:
        """A plan that was asked for: float32 ``[F n, A]`` in the units of the data, or the exception that came of it.

        What is no plan is counted and not used. The controller may ask for the next one.
        """
        self._latencies.append(self.tick - request.asked)
        shape = (self.frames * self.per_frame, self.width)
        plan = None
        if isinstance(actions, np.ndarray) and actions.shape == shape and actions.dtype.kind == "f":
            with np.errstate(over="ignore", invalid="ignore"):  # what is infinite then is refused
                of_robot = at_rate(
                    actions.astype(np.float32), self.frames, self.ticks_per_frame, self.config.kind,
                    self._before(request.start),
                )  # fmt: skip
            plan = _Plan(request.start, of_robot)
        if plan is None or not np.isfinite(plan.actions).all():
            self.counts.refused += 1
            self._continues = False  # what it has of the history is not known
            return
        left = self._plan is not None and self.tick < self._plan.end
        self.counts.missed += self._plan is not None and not left
        is_late = self._plan is not None and self.tick > request.covered
        self.counts.late += is_late
        if plan.end <= self.tick or (is_late and left and self.config.late == "drop"):
            self.counts.dropped += 1
            return
        self._plan = plan
        self.counts.plans += 1

    def _before(self, start: int) -> np.ndarray | None:
        """``[A]``, the action of the tick before ``start``."""
        found = self._known(start - 1, start)
        return found[0] if len(found) else None

    def _known(self, first: int, end: int) -> np.ndarray:
        """float32 ``[k, A]``, the actions of the ticks ``first`` to ``end - 1``: executed, else of the plan."""
        found = []
        for tick in range(max(first, self._kept), end):
            if tick < self.tick:
                found.append(self._executed[tick - self._kept])
            elif self._plan is not None and self._plan.start <= tick < self._plan.end:
                found.append(self._plan.actions[tick - self._plan.start])
            else:
                break
        return np.stack(found) if found else np.empty((0, self.width), np.float32)

    def _committed(self, start: int) -> tuple[np.ndarray, int]:
        """Actions of a plan that begins at ``start``, at the data's rate, that it will come too late to change."""
        T, n = self.ticks_per_frame, self.per_frame
        needed = self.tick - start + max(self._latencies)
        known = self._known(start, start + self.frames * T)
        frames = len(known) // T  # whole ones, of which there are actions at either rate
        if not frames:
            return np.empty((0, self.width), np.float32), start
        of_data = at_rate(known[: frames * T], frames, n, self.config.kind, self._before(start))
        wanted = -(-needed * n // T)  # rounded up
        count = min(-(-wanted // self.per_token) * self.per_token, len(of_data) // self.per_token * self.per_token)
        return of_data[:count], start + count * T // n
