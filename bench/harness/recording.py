"""A row is kept with what redoes it: machine, versions, commit, date."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import torch

from bench.rows import ROOT, Row, append
from wam_models.doctor import driver_version, package_version

# Every version that a row depends on is recorded; a package that is not installed is left out.
PACKAGES = ("triton", "numpy")
PEER_PACKAGES = (
    "flash-attn", "flash-attn-4", "flash-attn-3", "xformers", "flashinfer-python", "nvidia-cudnn-frontend",
    "liger-kernel", "quack-kernels", "openwam",
)  # fmt: skip


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


def record(name: str, rows: list[Row], device: str, folder: Path) -> Path:
    """Append rows to ``<name>.jsonl`` of ``folder``, with what redoes them."""
    env = environment(device)
    append(path := folder / f"{name}.jsonl", [env | row for row in rows])
    return path


@lru_cache
def _commit() -> str:
    # a machine that got the files without their history is told which commit they are
    if "WAM_BENCH_COMMIT" in os.environ or shutil.which("git") is None:
        return os.environ.get("WAM_BENCH_COMMIT", "unknown")

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    dirty = git("status", "--porcelain", "--", "wam_kernels", "wam_models", "csrc", "bench/**/*.py", "bench/*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+dirty" if dirty else "")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
