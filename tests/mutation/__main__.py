"""Plants every bug of ``mutants.py`` in the kernels for Hopper, one at a time, and says which the emulation finds.

    python -m tests.mutation [--only TEXT] [--write]

Each mutant is compiled with g++ and run on three small plans in a process of its own, in several orders, against
float64. ``--write`` keeps the table in ``README.md`` of this folder. Takes about ten seconds a mutant.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from tests.mutation.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-w", "-fPIC", "-DWAM_HOST_EMULATION"]
# one dtype and head dim of every kernel, forward and backward apart: most of a mutant's time is its compilation
UNITS = {
    "forward": """
#include "block_attention/forward.cuh"
void wam::block_attention_forward_kernel(const BlockAttentionParams& p, DType dtype, void* stream) {
  block_attention_detail::launch_forward<__nv_bfloat16, 64>(p, dtype, stream);
}
""",
    "backward": """
#include "block_attention/backward.cuh"
void wam::block_attention_backward_kernels(const BlockAttentionParams& p, DType dtype, void* stream) {
  block_attention_detail::launch_backward<__nv_bfloat16, 64>(p, dtype, stream);
}
""",
}
MODULE = """
#include "block_attention/bindings.h"
PYBIND11_MODULE(_C, m) { wam::block_attention_bindings::register_functions(m); }
"""


def compile_object(source: Path, csrc: Path, *flags: str) -> Path:
    out = source.with_suffix(".o")
    subprocess.run(["g++", *FLAGS, f"-I{csrc}", *flags, "-x", "c++", "-c", source, "-o", out], check=True)
    return out


def bindings(folder: Path) -> list[Path]:
    """Objects that every mutant is linked with: they hold no device code."""
    import pybind11

    module, launch = folder / "module.cpp", folder / "launch.cpp"
    module.write_text(MODULE)
    launch.write_text('#include "block_attention/launch.cpp"\n')
    include = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    control = folder / "control.cpp"
    control.write_text(f'#include "{ROOT / "tests/csrc/emulated.cpp"}"\n')
    csrc = ROOT / "csrc"
    return [compile_object(module, csrc, *include), compile_object(launch, csrc), compile_object(control, csrc, "-O1")]


def compile_unit(folder: Path, unit: str, csrc: Path) -> Path:
    source = folder / f"{unit}.cu"
    source.write_text(UNITS[unit])
    return compile_object(source, csrc, "-O1")


def built(folder: Path, objects: list[Path], units: dict[str, Path], mutant: Mutant | None) -> Path:
    """A module with the kernels of ``mutant``; ``units`` are those without one."""
    if mutant is not None:
        csrc = folder / "csrc"
        shutil.rmtree(csrc, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", csrc)
        path = csrc / "block_attention" / mutant.file
        path.write_text(planted(path.read_text(), mutant))
        changed = [unit for unit in UNITS if mutant.file in (f"{unit}.cuh", "pipeline.cuh")]
        units = units | {unit: compile_unit(folder, unit, csrc) for unit in changed}
    library = folder / "_C.so"
    subprocess.run(["g++", "-shared", *objects, *units.values(), "-o", library], check=True)
    return library


def planted(text: str, mutant: Mutant) -> str:
    for old, new in mutant.edits:
        if old not in text:
            raise SystemExit(f"{mutant.file} no longer has what {mutant.name!r} replaces: {old!r}")
        # the first one behind the kernel's own head: dq and dkdv share a file
        at = text.index({"dkdv": "struct DkdvShared"}.get(mutant.kernel, ""))
        at = text.index(old, at)
        text = text[:at] + new + text[at + len(old) :]
    return text


def outcome(library: Path, kernel: str) -> str:
    """What the run reported of a wrong module; empty where it found nothing."""
    command = [sys.executable, "-m", "tests.mutation.cases", str(library), kernel]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    if done.returncode == -signal.SIGXCPU:
        return "no end"
    return (done.stdout.strip().splitlines() or [f"the process ended with {done.returncode}"])[-1][:120]


def table(rows: list[tuple[Mutant, str]]) -> str:
    lines = ["| kernel | planted bug | found by |", "| --- | --- | --- |"]
    for mutant, reported in rows:
        lines.append(
            f"| {mutant.kernel} | {mutant.name} | {reported or '**nothing**: ' + (mutant.equivalent or '-')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose kernel and name hold this")
    parser.add_argument("--write", action="store_true", help="keep the table in README.md")
    args = parser.parse_args()
    rows: list[tuple[Mutant, str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        objects, right = bindings(folder), folder / "right"
        right.mkdir()
        units = {unit: compile_unit(right, unit, ROOT / "csrc") for unit in UNITS}
        if reported := outcome(built(folder, objects, units, None), "all"):
            raise SystemExit(f"the kernels fail without a planted bug: {reported}")
        for mutant in MUTANTS:
            if args.only in f"{mutant.kernel}: {mutant.name}":
                reported = outcome(built(folder, objects, units, mutant), mutant.kernel)
                rows.append((mutant, reported))
                print(
                    f"{'found' if reported else 'NOT FOUND'}: {mutant.kernel}: {mutant.name} ({reported})", flush=True
                )
    missed = [mutant for mutant, reported in rows if not reported and not mutant.equivalent]
    summary = (
        f"{sum(bool(reported) for _, reported in rows)} of {len(rows)} found, {len(missed)} missed that should not be"
    )
    print(summary)
    if args.write:
        readme = HERE / "README.md"
        head = readme.read_text().partition("\n## Result\n")[0]
        readme.write_text(f"{head}\n## Result\n\n{summary}.\n\n{table(rows)}\n")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
