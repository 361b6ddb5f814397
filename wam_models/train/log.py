"""The log of a run, a row a step: what it says of the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

STREAMS = ("video", "action")


def recent(log: Sequence[Mapping[str, Any]], stream: str, steps: int = 30, first: bool = False) -> float | None:
    """Mean loss of a stream over the last (or first) ``steps`` rows that have one; None where none has."""
    values = [row[f"{stream}_loss"] for row in (log[:steps] if first else log[-steps:])]
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def loss_ends(
    log: Sequence[Mapping[str, Any]], most: int = 30
) -> tuple[int, dict[str, tuple[float | None, float | None]]]:
    """How many steps are compared, none of them twice, and each stream's mean loss over the first and the last."""
    steps = min(most, max(1, len(log) // 2))
    return steps, {s: (recent(log, s, steps, first=True), recent(log, s, steps)) for s in STREAMS}
