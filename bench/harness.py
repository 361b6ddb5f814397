"""Timing, checking, recording and printing shared by every ``bench_*.py``: a number is kept with what redoes it."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from wam_kernels.ops import OPS
from wam_models import doctor
from wam_models.doctor import driver_version, package_version

ROOT = Path(__file__).parent.parent
# `wam bench` collects the rows of its parts in a folder of its own before it decides what to keep.
RESULTS = Path(os.environ.get("WAM_BENCH_RESULTS") or Path(__file__).parent / "results")

# Every version that a row depends on is recorded; a package that is not installed is left out.
PACKAGES = ("triton", "numpy")
PEER_PACKAGES = (
    "flash-attn", "flash-attn-4", "flash-attn-3", "xformers", "flashinfer-python", "nvidia-cudnn-frontend",
    "liger-kernel", "quack-kernels", "openwam",
)  # fmt: skip

# Larger than the 50 MB (H100, H200) of L2 by enough that nothing of an arm's input survives between calls.
FLUSH_BYTES = 1 << 28
LEAD_CYCLES = 2_000_000  # about 1 ms, in which the host issues a call

CHECKED_AT_ONCE = 1 << 18  # numbers, see require_equal

Function = Callable[..., Sequence[Tensor]]  # an arm as a function of its inputs


# ---- measuring ----


def measure(
    arms: dict[str, Callable[[], object]],
    device: str,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Milliseconds of every arm: percentiles and the least. Arms take turns, so a busy moment hits them all.

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

    for fn in arms.values():
        fn()
    times = {name: [] for name in arms}
    for _ in range(repeats):
        for name, fn in arms.items():
            times[name].append(once(fn))
    return {name: percentiles(values) for name, values in times.items()}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """``ms`` is the median; the 20th, 80th and 95th percentile and the least stand beside it."""
    p = statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else list(values) * 19
    return {"ms_p20": p[3], "ms": p[9], "ms_p80": p[15], "ms_p95": p[18], "ms_min": min(values)}


def rotated(fn: Callable[..., object], inputs: Sequence[Sequence[object]]) -> Callable[[], object]:
    """A call of ``fn`` on the next of ``inputs`` each time; every arm that is made so sees the same sequence."""
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


@lru_cache
def ceilings(device: str) -> dict[str, float]:
    """What this machine reaches here and now: GB/s of a copy (read + write), GFLOP/s of bf16 and float32 products.

    Random data: a product of zeros draws less power and runs faster than any real one. float32 means float32 (no tf32).
    """
    generator = torch.Generator().manual_seed(0)
    cuda = device == "cuda"
    size, products = (1 << 31, {"bf16": 8192, "float32": 4096}) if cuda else (1 << 27, {"bf16": 256, "float32": 1024})
    source = torch.randint(0, 255, (1 << 20,), dtype=torch.uint8, generator=generator).to(device).repeat(size >> 20)
    target = torch.empty_like(source)
    repeats = 20 if cuda else 5
    ms = measure({"": partial(target.copy_, source)}, device, repeats)[""]["ms"]
    out = {"copy_GB/s": 2 * size / ms / 1e6}
    del source, target
    for name, n in products.items():
        a, b = (torch.randn(n, n, generator=generator).to(device) for _ in range(2))
        if name == "bf16":
            a, b = a.bfloat16(), b.bfloat16()
        ms = measure({"": lambda a=a, b=b: a @ b}, device, repeats)[""]["ms"]
        out[f"{name}_GFLOP/s"] = 2 * n**3 / ms / 1e6
    return {key: round(value, 1) for key, value in out.items()}


def bandwidth(t: dict[str, float], moved: int, device: str) -> dict[str, float]:
    """Columns of a memory-bound row: milliseconds (of ``measure``), and how fast ``moved`` bytes went."""
    speed = moved / t["ms"] / 1e6
    return {
        "MB": round(moved / 1e6, 2), **{key: round(value, 4) for key, value in t.items()}, "GB/s": round(speed, 1),
        "%_of_copy": round(100 * speed / ceilings(device)["copy_GB/s"], 1),
    }  # fmt: skip


def repeats_of(rows: int, options: Options) -> int:
    """How often a norm of that many rows is timed: on a CPU a large one takes seconds."""
    if options.device == "cuda" or rows < 1000:
        return 10 if options.quick else 50
    return 3 if rows < 5000 else 2


# ---- checking ----


def require_equal(name: str, actual: Tensor, expected: Tensor, rtol: float) -> None:
    """No speed is printed for a wrong answer.

    Raises:
        RuntimeError: another shape, relative error ``||a - b|| / ||b||`` above ``rtol``, or a value that is not finite.
    """
    if actual.shape != expected.shape:
        raise RuntimeError(f"bench: {name} is wrong: {list(actual.shape)} instead of {list(expected.shape)}")
    squares = torch.zeros(2, dtype=torch.float64, device=expected.device)  # of the differences, of the truth
    # in pieces: float64 copies of a large answer would take longer to get from the system than all the rest
    for a, b in zip(*(t.detach().flatten().split(CHECKED_AT_ONCE) for t in (actual, expected)), strict=True):
        squares[0] += (a.double() - b).square().sum()
        squares[1] += b.double().square().sum()
    error = squares[0].div(squares[1]).sqrt().item()
    if not error <= rtol:
        raise RuntimeError(f"bench: {name} is wrong: relative error {error:.2e}, allowed {rtol:.0e}; no speed for it")


def outputs_and_gradients(fn: Function, leaves: Sequence[Tensor], incoming: Sequence[Tensor]) -> list[Tensor]:
    """What ``fn(*leaves)`` returns, then the gradients of ``leaves`` for ``incoming``, one for each output."""
    outputs = fn(*leaves)
    return [*outputs, *torch.autograd.grad(outputs, leaves, incoming)]


def right_arms(
    arms: dict[str, Function], leaves: Sequence[Tensor], incoming: Sequence[Tensor], rtol: float
) -> tuple[dict[str, Function], dict[str, str]]:
    """The arms with the outputs and gradients of the first in float64, and of each other one what it did instead.

    Raises:
        RuntimeError: the first arm, which the others are measured against, or one of this repository, whose name begins
            with ``wam``, is wrong.
    """
    double = [t.detach().double().requires_grad_() for t in leaves]
    truth = outputs_and_gradients(next(iter(arms.values())), double, [t.double() for t in incoming])
    truth = [t.detach() for t in truth]
    right, failed = {}, {}
    for name, fn in arms.items():
        try:
            for n, (a, b) in enumerate(zip(outputs_and_gradients(fn, leaves, incoming), truth, strict=True)):
                require_equal(f"output or gradient {n} of {name}", a, b, rtol)
        except Exception as error:  # a peer may fail in any way; its error is what the row says
            if name.startswith("wam") or not right:
                raise
            failed[name] = first_line(error)
        else:
            right[name] = fn
    return right, failed


def own_backends(op: str, device: str) -> tuple[list[str], dict[str, str]]:
    """The backends of ``op`` that are measured on ``device`` and run here; of the others why not, as rows name them."""
    machine, ready, missing = doctor.probe(), [], {}
    for impl in OPS[op].gpu_backends if device == "cuda" else ("cpu",):
        if reason := doctor.missing(OPS[op].backends[impl], machine):
            missing[f"wam {impl}"] = f"not run here: {reason}"
        else:
            ready.append(impl)
    return ready, missing


# ---- recording ----


def environment(device: str) -> dict[str, object]:
    """Machine, versions, commit and date of a row."""

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "driver": driver_version() if device == "cuda" else None,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := package_version(name))},
        "peers": {name: found for name in PEER_PACKAGES if (found := package_version(name))},
    }


def record(name: str, rows: list[dict], device: str) -> Path:
    """Append rows to ``results/<name>.jsonl``; older rows stay, so the file is the history."""
    env = environment(device)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    with path.open("a") as f:
        f.writelines(json.dumps(env | row) + "\n" for row in rows)
    return path


@lru_cache
def _commit() -> str:
    # a machine that got the files without their history is told which commit they are
    if "WAM_BENCH_COMMIT" in os.environ or shutil.which("git") is None:
        return os.environ.get("WAM_BENCH_COMMIT", "unknown")

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    dirty = git("status", "--porcelain", "--", "wam_kernels", "wam_models", "csrc", "bench/*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+dirty" if dirty else "")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


# ---- the command line of a bench module ----


@dataclass(frozen=True)
class Options:
    """What every benchmark of this folder is asked."""

    device: str
    quick: bool
    seed: int


def main(
    name: str, description: str, bench: Callable[[Options], Iterable[dict]], argv: Sequence[str] | None = None
) -> None:
    """Run ``bench`` for its rows, record each under ``name`` as it comes, and print them as a table."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats; record nothing")
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--record", action="store_true", help="record even with --quick")
    keep.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, found none; use --device cpu")
    options = Options(device, args.quick, args.seed)
    collected = "WAM_BENCH_RESULTS" in os.environ  # `wam bench` prints and decides what to keep
    recorded = collected or args.record or not (args.quick or args.no_record)
    limits, rows = ceilings(device), []
    for row in bench(options):
        rows.append({"seed": args.seed, **row} | ({} if "error" in row else limits))
        if recorded:  # at once: a run that is cut off keeps what it has
            record(name, rows[-1:], device)
    if collected:
        return
    print(table(rows))
    print("ceilings of this machine, same run: " + ", ".join(f"{k} {v:,.1f}" for k, v in limits.items()))
    if recorded:
        print("recorded", RESULTS / f"{name}.jsonl")


# Columns that say how a row was made, and those that only matter to a program, stay out of a printed table.
HIDDEN = (
    "seed", "date", "commit", "device", "driver", "cuda", "threads", "load", "torch", "python", "triton", "numpy",
    "peers", "dtype", "heads", "ms_p20", "ms_p80", "ms_p95", "copy_GB/s", "bf16_GFLOP/s", "float32_GFLOP/s",
)  # fmt: skip


def table(rows: Sequence[dict]) -> str:
    """Rows in aligned columns, one block for each set of columns; a row with an ``error`` is a line of its own."""
    blocks: dict[tuple, list[dict]] = {}
    failed: dict[tuple[str, str], list[str]] = {}  # most reasons hold for every case of a machine
    for row in rows:
        if row.get("error"):
            failed.setdefault((row["arm"], row["error"]), []).extend(row.get("where") or ["all"])
        else:
            blocks.setdefault(tuple(key for key in row if key not in HIDDEN), []).append(row)
    lines = []
    for columns, block in blocks.items():
        cells = [list(columns), *([_cell(row[c]) for c in columns] for row in block)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        number = [all(isinstance(row[c], int | float) for row in block) for c in columns]
        for line in cells:
            parts = (t.rjust(w) if right else t.ljust(w) for t, w, right in zip(line, widths, number, strict=True))
            lines.append("  ".join(parts).rstrip())
        lines.append("")
    for (arm, error), where in failed.items():
        lines.append(f"no speed: {arm}: {error} ({len(where)} cases, first: {where[0]})")
    return "\n".join(lines).rstrip()


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def first_line(error: BaseException) -> str:
    """An exception as one line, for a row's ``error``."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
