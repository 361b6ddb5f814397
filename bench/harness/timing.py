"""Milliseconds and megabytes of calls that take turns."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)

# Larger than the 50 MB (H100, H200) of L2 by enough that nothing of a provider's input survives between calls.
FLUSH_BYTES = 1 << 28
LEAD_CYCLES = 2_000_000  # about 1 ms, in which the host issues a call


def measure(
    calls: Mapping[Key, Callable[[], object]],
    device: str,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, dict[str, float]]:
    """Milliseconds of every call: percentiles and the least. The calls take turns, so a busy moment hits them all.

    On a GPU the L2 cache is overwritten before every call, and device events are read, with the device kept waiting
    while the host issues the call: else a short kernel's time would be that of the Python before it. On a CPU it is
    ``clock``; ``time.thread_time`` leaves out what other processes took, and what other threads did.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None

    def once(fn: Callable[[], object]) -> float:
        if flush is not None:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            torch.cuda._sleep(LEAD_CYCLES)
            start.record()
            fn()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)
        begin = clock()
        fn()
        return (clock() - begin) * 1e3

    for fn in calls.values():
        fn()
    times: dict[Key, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, fn in calls.items():
            times[name].append(once(fn))
    return {name: percentiles(values) for name, values in times.items()}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """``ms`` is the median; the 20th, 80th and 95th percentile and the least stand beside it."""
    p = statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else list(values) * 19
    return {"ms_p20": p[3], "ms": p[9], "ms_p80": p[15], "ms_p95": p[18], "ms_min": min(values)}


def rotated(fn: Callable[..., object], inputs: Sequence[Sequence[object]]) -> Callable[[], object]:
    """A call of ``fn`` on the next of ``inputs`` each time; every provider that is called so gets the same sequence."""
    turn = cycle(inputs)
    return lambda: fn(*next(turn))


def peak_megabytes(fn: Callable[[], object], device: str) -> float:
    """Memory that one call needs beyond what was held before it: the peak of the device, or of the process on a CPU."""
    if device == "cuda":
        held = held_megabytes(device)
        torch.cuda.reset_peak_memory_stats()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e6 - held

    ctypes.CDLL(None).malloc_trim(0)  # memory that earlier calls freed must not hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # the kernel then counts the peak anew
    held = held_megabytes(device)
    fn()
    return _process_megabytes("VmHWM") - held


def held_megabytes(device: str) -> float:
    """What tensors hold on a GPU, or the process on a CPU."""
    return torch.cuda.memory_allocated() / 1e6 if device == "cuda" else _process_megabytes("VmRSS")


def _process_megabytes(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1e3
    raise RuntimeError(f"bench: /proc/self/status has no {field}; memory of a process is counted on Linux only")
