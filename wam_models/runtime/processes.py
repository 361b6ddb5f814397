"""Processes that end when the one that started them does, however that ended."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait


def end_with_parent() -> None:
    """In a process of :mod:`multiprocessing`: end at once when its parent is gone, also when that was killed.

    Otherwise a worker of a pool that was killed finishes what it does, and what waits in the pool's queue, and writes
    where a second run has begun.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("end_with_parent must be called in a process that multiprocessing started")

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()
