"""What every suite is asked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    device: str  # "cpu" or "cuda"
    quick: bool  # small sizes and few repeats
    seed: int
