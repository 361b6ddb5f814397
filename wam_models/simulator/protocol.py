"""What a simulator offers to ``wam rollout``, ``wam record`` and ``wam eval``, and the checks of what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Protocol

import numpy as np

METHODS = ("initial_state", "reset", "observe", "act")
ATTRIBUTES = ("instruction", "horizon", "control_freq", "action_names", "state_names")


@dataclass(frozen=True, eq=False)
class Observation:
    """What the robot observes between two actions.

    Args:
        state: Float32 ``[S]``, in the units of the data set: ``observation.state``.
        pictures: Camera to uint8 ``[H, W, 3]``: ``observation.images.CAMERA``. Empty where nothing is rendered.
    """

    state: np.ndarray
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How an episode stands after an action.

    Args:
        success: The task is done; the episode ends.
        failure: Why the episode cannot succeed any more, which ends it; None while it can.
    """

    success: bool
    failure: str | None = None


class Simulator(Protocol):
    """One robot, one task; an episode is a function of its initial state and the actions.

    Attributes:
        instruction: The task in words.
        horizon: Actions after which an episode that has not succeeded has failed.
        control_freq: Actions a second of simulated time.
        action_names: One for each number of an action.
        state_names: One for each number of ``Observation.state``.

    A simulator whose task has a scripted expert also has ``expert() -> np.ndarray``, the expert's next action, float32
    ``[A]``; ``wam record`` needs it. One whose pictures take long may have ``state() -> np.ndarray``, the state of
    ``observe()`` without its pictures, which is asked for where no picture is needed.
    """

    instruction: str
    horizon: int
    control_freq: float
    action_names: tuple[str, ...]
    state_names: tuple[str, ...]

    def initial_state(self, seed: int) -> dict[str, Any]:
        """Draw an initial state, the same for the same seed; of what JSON holds, so that it can be stored."""
        ...

    def reset(self, initial_state: dict[str, Any]) -> None:
        """Begin an episode at such a state, whatever was done before."""
        ...

    def observe(self) -> Observation:
        """As it is now. Asked for once a frame, so pictures are rendered here and nowhere else."""
        ...

    def act(self, action: np.ndarray) -> Outcome:
        """Execute one action, float32 ``[A]`` in the units of the data set."""
        ...


@dataclass(frozen=True, eq=False)
class Executed:
    """What came of some actions."""

    observations: list[Observation]  # after every k-th action
    actions: int  # that were executed, fewer than given where the episode ended
    outcome: Outcome  # after the last of them


def execute(simulator: Simulator, actions: np.ndarray, every: int, where: str) -> Executed:
    """Execute float32 ``[K, A]`` actions until the episode ends, with an observation after each ``every``-th.

    Raises:
        ValueError: what the simulator returns is wrong; whatever it raises goes on.
    """
    observations, outcome, count = [], Outcome(False), 0
    for count, action in enumerate(actions, 1):
        outcome = checked_outcome(f"{where}.act", simulator.act(action.copy()))
        if count % every == 0:
            observations.append(observed(simulator, where))
        elif outcome.success or outcome.failure:
            observed(simulator, where, pictures=False)  # numbers that are not finite are no success
        if outcome.success or outcome.failure:
            break
    return Executed(observations, count, outcome)


def observed(simulator: Simulator, where: str, *, pictures: bool = True) -> Observation:
    """The checked observation; without ``pictures``, none are rendered where the simulator has ``state()``.

    Raises:
        ValueError: what the simulator returns is wrong; whatever it raises goes on.
    """
    states = len(simulator.state_names)
    state = None if pictures else getattr(simulator, "state", None)
    if state is None:
        return checked_observation(f"{where}.observe", simulator.observe(), states)
    return checked_observation(f"{where}.state", Observation(state()), states)


def lacking(simulator: object) -> list[str]:
    """The methods and attributes of :class:`Simulator` that an object does not have."""
    methods = [name for name in METHODS if not callable(getattr(simulator, name, None))]
    return methods + [name for name in ATTRIBUTES if not hasattr(simulator, name)]


def checked_observation(where: str, found: object, states: int | None = None) -> Observation:
    """A copy of an observation, after what a simulator can get wrong was looked for.

    Args:
        where: Begins the messages.
        found: What ``observe`` returned.
        states: Numbers of the state; None for any.

    Raises:
        ValueError: no observation, a state of another shape or with numbers that are not finite, or pictures that are
            not uint8 ``[H, W, 3]``.
    """
    if not isinstance(found, Observation):
        raise ValueError(f"{where} must return an Observation, got {type(found).__name__}")
    state = np.array(found.state, dtype=np.float32)
    if state.ndim != 1 or (states is not None and len(state) != states):
        expected = "[S]" if states is None else f"[{states}], one number for each of state_names"
        raise ValueError(f"{where} must return a state {expected}, got {list(state.shape)}")
    if not np.isfinite(state).all():
        numbers = np.flatnonzero(~np.isfinite(state)).tolist()
        raise ValueError(f"{where} must return a finite state, got {state[numbers[0]]} in its numbers {numbers}")
    pictures = {name: np.array(picture) for name, picture in found.pictures.items()}
    for name, picture in pictures.items():
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
            raise ValueError(
                f"{where} must return pictures as uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)} of {name}"
            )
    return Observation(state, pictures)


def checked_outcome(where: str, found: object) -> Outcome:
    """An outcome with Python's own bool.

    Raises:
        ValueError: no outcome, or one with values of other types.
    """
    if not isinstance(found, Outcome):
        raise ValueError(f"{where} must return an Outcome, got {type(found).__name__}")
    if not isinstance(found.success, bool | np.bool_) or not isinstance(found.failure, str | None):
        raise ValueError(f"{where} must return Outcome(success: bool, failure: str or None), got {found}")
    return Outcome(bool(found.success), found.failure)


def checked_frequency(where: str, found: object, low: float, high: float) -> float:
    """``found`` as a float.

    Raises:
        ValueError: no number from ``low`` to ``high``.
    """
    number = isinstance(found, Real) and not isinstance(found, bool)
    if not number or not low <= found <= high:  # type: ignore[operator]
        raise ValueError(
            f"{where} must be actions a second, a positive number, got {found!r}; between {low:g} and {high:g}"
        )
    return float(found)  # type: ignore[arg-type]


def raised(error: Exception) -> str:
    """An exception of a simulator, in one line."""
    return f"{type(error).__name__}: {error}; WAM_TRACEBACK=1 shows where"
