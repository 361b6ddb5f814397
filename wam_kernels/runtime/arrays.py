"""Lists of lists as flat arrays."""

import numpy as np


def starts(counts: np.ndarray) -> np.ndarray:
    """Where each of ``counts`` things begins when they are laid end to end."""
    return counts.cumsum() - counts


def expand(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``[f, f+1, .. f+n-1]`` for every (f, n), end to end; int64 ``[sum(counts)]``."""
    out = (first - starts(counts)).repeat(counts)
    out += np.arange(out.size)
    return out


def members(counts: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of all things, grouped into ``counts``, are in groups ``which``; and how many are in each of those."""
    chosen = counts.take(which)
    return expand(starts(counts).take(which), chosen), chosen
