"""An evaluation of the policy while it is trained, which leaves the training as it would have been without."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..rollout.policy import Policy
from ..runtime.checks import check_field, whole


@dataclass(frozen=True, eq=False)
class PeriodicEvaluation:
    """What is measured after every so many steps.

    Args:
        every: Steps between evaluations; they are at its multiples, in a resumed run as well.
        evaluate: Called with the policy of averaged weights and the step; what it returns, anything for JSON, stands in
            the step's row of the log. Where it raises, the row says so and the training goes on.
        score: Of what ``evaluate`` has returned, the greater the better; the step of the best is saved and stays. None
            where there is no best.
        settings: Anything for JSON; stored with the checkpoint, as ``metadata.training.evaluation``, so that a resume
            can measure the same.

    Raises:
        ValueError: ``every`` is no whole number of at least 1.
    """

    every: int
    evaluate: Callable[[Policy, int], Mapping[str, Any]]
    score: Callable[[Mapping[str, Any]], float | None] = lambda found: None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_field(self, "every", whole, 1)

    def run(self, policy: Policy, step: int) -> dict[str, Any]:
        """What ``evaluate`` finds, or ``{"error": ...}``, and the ``seconds`` that it took."""
        began = time.perf_counter()
        try:
            with torch.no_grad():
                found = dict(self.evaluate(policy, step))
        except Exception as error:  # whatever it is, it is not worth the training
            found = {"error": f"{type(error).__name__}: {error}"}
        return found | {"seconds": time.perf_counter() - began}
