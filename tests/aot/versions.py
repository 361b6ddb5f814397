"""Compiles every Triton kernel under several versions of Triton for several GPUs, without one: `make test-triton`.

Every version is installed by pip in a folder of its own below ``--folder`` (0.5 GB each) and runs in a process of its
own, with the torch of this environment. Prints a row a kernel and version; ``-`` is a compilation that failed, with the
compiler's words at the end, and then the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("3.3.1", "3.4.0", "3.5.1", "3.6.0", "3.7.1")
CAPABILITIES = (80, 89, 90, 100, 120)

Row = dict  # version, capability, kernel; registers, stack, shared, or error


def compile_here(version: str, capability: int, only: str) -> Iterator[Row]:
    """In the process of one version. A kernel of several launches counts with its largest numbers."""
    from bench.static.launches import EVERY
    from tests.aot.compile import resources
    from wam_kernels.runtime.shared_memory import BLOCK_BYTES, compiling_for

    for kernel, launches in EVERY.items():
        if only not in kernel:
            continue
        row: Row = {"version": version, "capability": capability, "kernel": kernel}
        try:
            with compiling_for(capability):
                found = [resources(launch, capability) for launch in launches()]
        except Exception as error:  # whatever a version raises is what the table is for
            yield row | {"error": f"{type(error).__name__}: {error}"}
            continue
        numbers = {"registers": "registers", "stack": "stack_bytes", "shared": "shared_bytes"}
        row |= {key: max(getattr(r, name) for r in found) for key, name in numbers.items()}
        if row["shared"] > BLOCK_BYTES[capability]:
            row["error"] = f"{row['shared']} bytes of shared memory, where a block has {BLOCK_BYTES[capability]}"
        yield row


def installed(version: str, folder: Path) -> Path:
    target = folder / version
    if not (target / "triton").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target]
        subprocess.run([*pip, f"triton=={version}"], check=True)
    return target


def compile_under(version: str, capability: int, only: str, folder: Path) -> list[Row]:
    path = os.pathsep.join(map(str, (installed(version, folder), ROOT)))
    env = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder / "cache")}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.aot.versions", "--worker", version, "--capabilities", str(capability)]
    done = subprocess.run([*command, "--only", only], env=env, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def table(rows: Iterable[Row]) -> str:
    """Markdown: registers of a thread, and bytes of its stack where there are any, by kernel, version and GPU."""
    rows = list(rows)
    capabilities = sorted({row["capability"] for row in rows})
    cells = {(row["kernel"], row["version"], row["capability"]): _cell(row) for row in rows}
    lines = [("kernel", "Triton", *(f"sm_{c}" for c in capabilities)), ("---", "---", *["--:"] * len(capabilities))]
    for kernel, version in dict.fromkeys((row["kernel"], row["version"]) for row in rows):
        lines.append((kernel, version, *(cells.get((kernel, version, c), "") for c in capabilities)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: Row) -> str:
    if "error" in row:
        return "-"
    return f"{row['registers']}" + (f" + {row['stack']} B" if row["stack"] else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.aot.versions", description=__doc__)
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--capabilities", nargs="+", type=int, default=CAPABILITIES, help="90 is 9.0")
    parser.add_argument("--only", default="", help="kernels whose name has this")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv" / "triton")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        for row in compile_here(args.worker, args.capabilities[0], args.only):
            print(json.dumps(row), flush=True)
        return 0
    rows = [
        row
        for version in args.versions
        for capability in args.capabilities
        for row in compile_under(version, capability, args.only, args.folder)
    ]
    print(table(sorted(rows, key=lambda row: row["kernel"])))
    failed = [row for row in rows if "error" in row]
    for row in failed:
        print(f"\n{row['kernel']}, Triton {row['version']}, sm_{row['capability']}\n{row['error']}", file=sys.stderr)
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
