"""Bounds on what a robot is told: actions, how fast they change, and how fast that changes."""

from __future__ import annotations

import numpy as np


class Limiter:
    """The nearest action within the bounds, one after the other.

    The bounds of actions hold always; so does that of their rate between two actions; that of the jerk holds where the
    two others leave room for it, since a robot that comes fast upon a bound has to stop there.

    Args:
        width: Numbers of an action, A.
        ticks: Actions a second.
        low: Least of each number, one for all or ``[A]``; None: no bound.
        high: Most of each, likewise.
        rate: Most that each changes in a second.
        jerk: Most that this rate changes in a second.

    Attributes:
        last: float32 ``[A]``, the last action; None before the first.
        changed: Actions that were not within the bounds.

    Raises:
        ValueError: bounds of another width, that are not numbers or leave nothing between them; a rate or jerk of 0 or
            less.
    """

    def __init__(
        self, width: int, ticks: float, *, low: object = None, high: object = None, rate: object = None,
        jerk: object = None,
    ) -> None:  # fmt: skip
        self.low = _bound("low", low, width, -np.inf).astype(np.float32)
        self.high = _bound("high", high, width, np.inf).astype(np.float32)
        if (self.low > self.high).any():
            raise ValueError(f"Limiter: low must be at most high, got {low!r} and {high!r}")
        step, change = _bound("rate", rate, width, np.inf) / ticks, _bound("jerk", jerk, width, np.inf) / ticks**2
        if (step <= 0).any() or (change <= 0).any():
            raise ValueError(f"Limiter: rate and jerk must be positive, got {rate!r} and {jerk!r}")
        self._step, self._change = step, change
        self.last: np.ndarray | None = None
        self._move = np.zeros(width)  # of the last action from the one before
        self.changed = 0

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """float32 ``[A]``, a copy; ``action`` is finite."""
        asked = np.asarray(action, np.float32)
        found = asked.astype(np.float64)
        if self.last is not None:
            last = self.last.astype(np.float64)
            move = np.clip(found - last, self._move - self._change, self._move + self._change)
            found = last + np.clip(move, -self._step, self._step)
        limited = np.clip(found.astype(np.float32), self.low, self.high)
        if self.last is not None:
            self._move = limited.astype(np.float64) - self.last
        self.last = limited
        # what rounding alone changes is within the bounds
        self.changed += not np.allclose(limited, asked, rtol=1e-6, atol=1e-7)
        return limited.copy()


def _bound(name: str, given: object, width: int, none: float) -> np.ndarray:
    """float64 ``[A]``."""
    try:
        found = np.broadcast_to(np.asarray(none if given is None else given, np.float64), width)
    except (TypeError, ValueError):
        found = np.full(1, np.nan)
    if np.isnan(found).any() or (given is not None and not np.isfinite(found).all()):
        raise ValueError(f"Limiter: {name} must be a finite number, or {width} of them, got {given!r}")
    return found
