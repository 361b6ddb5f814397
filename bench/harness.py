"""Timing and recording shared by every ``bench_*.py``: a number is kept with what redoes it."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def measure(arms: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of every arm: 20th, 50th and 80th percentile. Arms take turns, so a busy moment hits them all."""

    def once(fn: Callable[[], object]) -> float:
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            fn()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)
        begin = time.perf_counter()
        fn()
        return (time.perf_counter() - begin) * 1e3

    for fn in arms.values():
        fn()
    times = {name: [] for name in arms}
    for _ in range(repeats):
        for name, fn in arms.items():
            times[name].append(once(fn))
    out = {}
    for name, values in times.items():
        p = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
        out[name] = {"ms_p20": p[1], "ms": p[4], "ms_p80": p[7], "ms_min": min(values)}
    return out


def peak_megabytes(fn: Callable[[], object], device: str) -> float:
    """Memory that one call needs beyond what was held before it: the peak of the device, or of the process on a CPU."""
    if device == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fn()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - held) / 1e6

    def status(field: str) -> float:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) / 1e3
        raise RuntimeError(f"bench: /proc/self/status has no {field}; peak memory needs Linux")

    ctypes.CDLL(None).malloc_trim(0)  # memory that earlier calls freed must not hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # the kernel then counts the peak anew
    held = status("VmRSS")
    fn()
    return status("VmHWM") - held


def require_equal(name: str, actual: Tensor, expected: Tensor, rtol: float) -> None:
    """No speed is printed for a wrong answer.

    Raises:
        RuntimeError: relative error ``||a - b|| / ||b||`` above ``rtol``, or a value that is not finite.
    """
    error = ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
    if not error <= rtol:
        raise RuntimeError(f"bench: {name} is wrong: relative error {error:.2e}, allowed {rtol:.0e}; no speed for it")


def environment(device: str) -> dict[str, object]:
    """Machine, versions, commit and date of a row."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    dirty = git("status", "--porcelain", "--", "wam_kernels", "wam_models", "csrc", "bench/*.py")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": git("rev-parse", "--short", "HEAD") + ("+dirty" if dirty else ""),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def record(name: str, rows: list[dict], device: str) -> Path:
    """Append rows to ``results/<name>.jsonl``; older rows stay, so the file is the history."""
    env = environment(device)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with path.open("a") as f:
        f.writelines(json.dumps(env | row) + "\n" for row in rows)
    return path


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
