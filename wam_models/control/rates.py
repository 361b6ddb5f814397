"""Actions at another rate than the data's: n a frame there, T a frame of the robot."""

from __future__ import annotations

import numpy as np

KINDS = ("absolute", "relative")


def at_rate(actions: np.ndarray, frames: int, per_frame: int, kind: str, before: np.ndarray | None) -> np.ndarray:
    """The same motion in ``frames * per_frame`` actions.

    Args:
        actions: ``[K, A]``, equally long each, of so many frames together.
        frames: How many.
        per_frame: Actions of a frame that are wanted.
        kind: ``"absolute"``: an action says where to be at its end, and what is between is on a line;
            ``"relative"``: it says by how much to move, and parts of it add up to it.
        before: ``[A]``, the action before the first; None where there is none. Of absolute actions alone.

    Returns:
        Of the dtype of ``actions``; they themselves where the rate is the same.
    """
    count, wanted = len(actions), frames * per_frame
    if count == wanted:
        return actions
    first = np.zeros_like(actions[:1])
    if kind == "absolute":
        first = actions[:1] if before is None else before[None].astype(actions.dtype)
    path = np.concatenate([first, np.cumsum(actions, 0) if kind == "relative" else actions]).astype(np.float64)
    ends = np.arange(1, wanted + 1) * (count / wanted)
    found = np.stack([np.interp(ends, np.arange(count + 1), number) for number in path.T], 1)
    if kind == "relative":
        found = np.diff(found, axis=0, prepend=0)
    return found.astype(actions.dtype)
