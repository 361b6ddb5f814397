"""CPU threads of the commands: how long they spin at a barrier, and how many of them are worth having.

OpenMP's threads wait for each other at the end of every parallel loop, and GNU's spin there for a long time. As soon as
another process holds one of the cores, each loop lasts as long as that process keeps the core: a training step of the
demo's model took 10.6 s with two threads beside one busy process, and 0.25 s with one (two cores). Threads that soon go
to sleep take 0.3 s there, and cost short operations up to a third of their speed on an idle machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, MutableMapping
from functools import wraps

# Of GNU's OpenMP. Seconds a step beside a busy process: 0.28 for 0, 0.32 for 1,000, 0.68 for 10,000, 10 by default.
SPIN_COUNT = "1000"
GAIN = 1.5  # of all threads over one, below which one is taken
TRIAL_CALLS, SLOW = 4, 2.0  # work that takes SLOW seconds or more is tried once


def limit_spinning(environ: MutableMapping[str, str] = os.environ) -> None:
    """Threads at a barrier go to sleep soon, unless the user's environment sets how long to wait.

    Takes effect only before torch is loaded, because OpenMP reads its variables once.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(environ):
        environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def restores_threads(command: Callable) -> Callable:
    """``command`` may set the number of torch's threads; afterwards it is what it was."""

    @wraps(command)
    def run(*args, **kwargs):
        import torch

        before = torch.get_num_threads()
        try:
            return command(*args, **kwargs)
        finally:
            torch.set_num_threads(before)

    return run


def pick_threads(work: Callable[[], object]) -> int:
    """Set the number of torch's CPU threads to all, or to one where all are not half as fast again; returns it.

    Threads wait for each other, so all of them lose much as soon as anything else runs on a small machine. A small gain
    is not worth that. What ``OMP_NUM_THREADS`` says is left alone.

    Args:
        work: A representative piece of the work; called a few times.
    """
    import torch

    most = torch.get_num_threads()
    if most == 1 or "OMP_NUM_THREADS" in os.environ:
        return most
    torch.set_num_threads(1)
    one = _seconds(work)  # warms up too
    calls = TRIAL_CALLS if one < SLOW else 1
    one = min(one, *(_seconds(work) for _ in range(calls)))
    torch.set_num_threads(most)
    best = most if GAIN * min(_seconds(work) for _ in range(calls)) < one else 1
    torch.set_num_threads(best)
    return best


def set_threads(count: int) -> int:
    """As many of torch's CPU threads as ``count``, at most what there are; what ``OMP_NUM_THREADS`` says is left alone.

    Returns:
        How many there are now.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(count, torch.get_num_threads()))
    return torch.get_num_threads()


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
