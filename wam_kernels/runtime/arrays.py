"""Lists of lists as flat arrays."""

import numpy as np


def starts(counts: np.ndarray) -> np.ndarray:
    """Where each of ``counts`` things begins when they are laid end to end."""
    return counts.cumsum() - counts


def expand(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``[f, f+1, .. f+n-1]`` for every (f, n), end to end; int32 ``[sum(counts)]``."""
    out = np.repeat((first - starts(counts)).astype(np.int32), counts)
    out += np.arange(out.size, dtype=np.int32)
    return out


def members(counts: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of all things, grouped into ``counts``, are in groups ``which``; and how many are in each of those."""
    chosen = counts[which]
    return expand(starts(counts)[which], chosen), chosen
