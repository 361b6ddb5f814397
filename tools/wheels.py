"""``make wheel``: builds the wheels, installs each into an empty environment and tries it outside the clone.

    python -m tools.wheels [--python PYTHON ...] [--without-extension]

Without the extension one wheel serves every Python; with it, where nvcc is found, each Python has its own. Wheels go to
dist, environments to build/wheels. A wheel that fails a trial ends the run with its output.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST, ENVIRONMENTS = ROOT / "dist", ROOT / "build/wheels"
PYTHONS = ("python3.11", "python3.12", "python3.13")

ATTENTION = """
import torch
from wam_kernels import Geometry, block_attention, compile_plan
sizes = {"video_frames": 4, "video_tokens": 4, "action_frames": 4, "action_tokens": 2, "chunk_size": 2, "window": 4}
plan = compile_plan(Geometry(program="joint", **sizes))
q, k, v = (torch.randn(1, plan.length, 2, 16, requires_grad=True) for _ in range(3))
block_attention(q, k, v, plan).sum().backward()
assert q.grad.isfinite().all()
"""
EXTENSION = "import wam_kernels._C as C; assert C.architectures; print(C.architectures)"
# command, exit code, what it prints; `wam demo` has no data there, and says so
TRIALS: tuple[tuple[tuple[str, ...], int, str], ...] = (
    (("python", "-W", "error", "-c", ATTENTION), 0, ""),
    (("wam", "--version"), 0, "wam-kernels"),
    (("wam", "doctor"), 0, "no bench/results here"),
    (("wam", "mask", "--program", "joint", "--out", "mask.png"), 0, "density"),
    (("wam", "train", "--estimate", "--preset", "libero", "--device-model", "h100"), 0, "parameters"),
    (("wam", "bench"), 2, "clone"),
    (("wam", "demo"), 2, "clone"),
)


def run(command: list[str], where: Path, code: int = 0, **environment: str) -> str:
    """What it prints; SystemExit with that where it ends with another code."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run(command, cwd=where, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != code:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode} in place of {code}\n{done.stdout}")
    return done.stdout


def runs(python: str) -> bool:
    """Whether there is such a Python; a version manager may have its name alone."""
    return bool(shutil.which(python)) and not subprocess.run([python, "-c", ""], capture_output=True).returncode


def build(python: str, extension: bool) -> Path:
    for stale in ROOT.glob("build/lib*"):  # setuptools would put into the wheel what lies there
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "-q", "-w", folder, "."]
        run(command, ROOT, WAM_CUDA="1" if extension else "0")
        (wheel,) = Path(folder).iterdir()
        DIST.mkdir(exist_ok=True)
        return Path(shutil.move(wheel, DIST / wheel.name))


def try_out(python: str, wheel: Path) -> None:
    """Install ``wheel`` with the extra ``models`` into a new environment, and run :data:`TRIALS` in an empty folder."""
    place = ENVIRONMENTS / f"{Path(python).name}-{wheel.name.split('-', 2)[2].removesuffix('.whl')}"
    shutil.rmtree(place, ignore_errors=True)
    run([python, "-m", "venv", str(place)], ROOT)
    binaries = place / "bin"
    run([f"{binaries}/python", "-m", "pip", "-q", "install", f"{wheel}[models]"], ROOT)
    with tempfile.TemporaryDirectory() as folder:
        for (program, *arguments), code, expected in TRIALS:
            printed = run([f"{binaries}/{program}", *arguments], Path(folder), code, OMP_NUM_THREADS="1")
            if expected not in printed:
                raise SystemExit(f"{wheel.name}: {program} {' '.join(arguments)} printed no {expected!r}\n{printed}")
        if "none-any" not in wheel.name:
            run([f"{binaries}/python", "-c", EXTENSION], Path(folder))
    shutil.rmtree(place)
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, {len(TRIALS)} trials under {python}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.wheels", description=__doc__.partition("\n")[0])
    parser.add_argument("--python", action="append", metavar="PYTHON", help=f"default: those there are of {PYTHONS}")
    parser.add_argument("--without-extension", action="store_true", help="not those with CUDA kernels")
    args = parser.parse_args(argv)
    pythons = args.python or [python for python in PYTHONS if runs(python)] or [sys.executable]
    plain = build(pythons[0], extension=False)
    for python in pythons:
        try_out(python, plain)
    if args.without_extension:
        return
    if shutil.which("nvcc") is None and not {"CUDACXX", "CUDA_HOME"} & set(os.environ):
        print("no nvcc: no wheel with the CUDA extension")
        return
    for python in pythons:
        try_out(python, build(python, extension=True))


if __name__ == "__main__":
    main()
