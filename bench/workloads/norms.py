"""Norms and their sizes."""

from __future__ import annotations

from bench.harness import Options


def repeats_of(rows: int, options: Options) -> int:
    """How often a norm of that many rows is timed: on a CPU a large one takes seconds."""
    if options.device == "cuda" or rows < 1000:
        return 10 if options.quick else 50
    return 3 if rows < 5000 else 2
