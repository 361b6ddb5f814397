"""``wam doctor``: what this machine offers, which op runs on which backend here and why not elsewhere, and what has
been measured of it on such a device.

The ops are the rows of ``wam_kernels.ops``; what was measured is in ``bench/results`` of a clone.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from wam_kernels.ops import OPS, Backend, Need, Op
from wam_kernels.roofline import DEFAULT_DEVICE_MODEL, DEVICE_MODELS, device_model_of
from wam_kernels.runtime.cuda import architecture_names, architectures, extension, refusal


@dataclass(frozen=True)
class GPU:
    name: str
    capability: tuple[int, int]
    gib: float

    def __str__(self) -> str:
        return f"{self.name}, compute capability {self.capability[0]}.{self.capability[1]}, {self.gib:.0f} GiB"


@dataclass(frozen=True)
class Machine:
    """What was found; ``None`` or empty means not there."""

    versions: dict[str, str | None]  # of Python packages
    gpus: tuple[GPU, ...]
    driver: str | None
    nvcc: str | None
    extension_error: str | None  # why wam_kernels._C does not load
    architectures: tuple[str, ...]  # that it was compiled for
    interpreted: bool  # TRITON_INTERPRET=1
    cpu: str
    cpu_cores: int  # those this process may use
    cpu_threads: int  # those torch uses
    vector_isa: str
    load: float  # processes that ran or waited for a core, mean of the last minute
    results: Path | None  # bench/results of a clone


# ---- Needs: what looks at the machine and says what is missing, or None.


def _triton(m: Machine) -> str | None:
    return None if m.versions["triton"] else "triton is not installed; run: pip install triton"


def _gpu_or_interpreter(m: Machine) -> str | None:
    return None if m.gpus or m.interpreted else "no CUDA device; TRITON_INTERPRET=1 runs it slowly on CPU tensors"


def _extension(m: Machine) -> str | None:
    return m.extension_error and "wam_kernels._C does not load, see above"


def _kernels(need: Need, m: Machine) -> str | None:
    if not m.gpus:
        return f"needs a GPU of {need.value}, found no CUDA device"
    refusals = [refusal((need,), m.architectures, gpu.capability, gpu.name) for gpu in m.gpus]
    return None if None in refusals else refusals[0]


NEEDS: dict[Need, Callable[[Machine], str | None]] = {
    Need.TRITON: _triton,
    Need.GPU_OR_INTERPRETER: _gpu_or_interpreter,
    Need.EXTENSION: _extension,
    Need.BUILT_FOR: partial(_kernels, Need.BUILT_FOR),
    Need.SM90: partial(_kernels, Need.SM90),
}


def missing(backend: Backend, machine: Machine) -> str | None:
    """Why ``backend`` does not run there, or None."""
    return next((reason for need in backend.needs if (reason := NEEDS[need](machine))), None)


def _what(op: Op, impl: str) -> str:
    backend = op.backends[impl]
    devices = " and ".join(device.upper() for device, default in op.default.items() if default == impl)
    if devices:
        return f"{backend.what}; the default for {devices} tensors"
    return f"{backend.what}, when asked for" if backend.needs else backend.what


# ---- Looking.


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def driver_version() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"Module\D*([\d.]+)", path.read_text()) if path.is_file() else None
    return found and found[1]


def _nvcc() -> str | None:
    path = shutil.which("nvcc")
    if path is None:
        return None
    output = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"V([\d.]+)", output)
    return f"{found[1] if found else 'of unknown version'} ({path})"


def _extension_error() -> str | None:
    try:
        extension()
    except RuntimeError as error:
        return str(error)
    return None


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", path.read_text(), re.MULTILINE) if path.is_file() else None
    return found[1] if found else platform.machine()


def _results() -> Path | None:
    folder = Path(__file__).resolve().parents[1] / "bench/results"
    return folder if folder.is_dir() else None


def _gpus() -> Iterable[GPU]:
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        yield GPU(properties.name, (properties.major, properties.minor), properties.total_memory / 2**30)


def probe() -> Machine:
    error = _extension_error()
    return Machine(
        versions={name: package_version(name) for name in ("wam-kernels", "torch", "triton", "numpy")},
        gpus=tuple(_gpus()),
        driver=driver_version(),
        nvcc=_nvcc(),
        extension_error=error,
        architectures=() if error else architectures(),
        interpreted=os.environ.get("TRITON_INTERPRET") == "1",
        cpu=_cpu_name(),
        cpu_cores=len(os.sched_getaffinity(0)),
        cpu_threads=torch.get_num_threads(),
        vector_isa=torch.backends.cpu.get_cpu_capability(),
        load=os.getloadavg()[0],
        results=_results(),
    )


# ---- Showing.


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    # the last column is ragged
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1] + [0]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)) for row in rows)


def _device_model(machine: Machine) -> str:
    """What ``--estimate`` takes here unless told otherwise."""
    if not machine.gpus:
        return f"of estimates: {DEFAULT_DEVICE_MODEL}, {DEVICE_MODELS[DEFAULT_DEVICE_MODEL]}; there is no GPU here"
    name = device_model_of(machine.gpus[0].name)
    if name is None:
        return f"of estimates: none is of this GPU; give --device-model, one of {', '.join(DEVICE_MODELS)}"
    return f"of estimates: {name}, {DEVICE_MODELS[name]}"


def crowded(machine: Machine) -> str | None:
    """Advice where torch's threads and what else runs do not fit on the cores together; else None."""
    if machine.cpu_threads < 2 or machine.load <= machine.cpu_cores - machine.cpu_threads + 0.5:
        return None
    return (
        f"warning: {machine.load:.1f} processes keep {machine.cpu_cores} cores busy, and torch would use "
        f"{machine.cpu_threads} threads: threads that wait for a core held by another process can make a step many "
        "times slower. wam train, rollout and demo choose their threads by trial; a script of your own: "
        "OMP_NUM_THREADS=1, or OMP_WAIT_POLICY=PASSIVE set before torch is imported"
    )


PREDICTED_FOR = "H100"  # the GPU of the rows in static.jsonl


def _rows(results: Path, suite: str) -> list[dict]:
    path = results / f"{suite}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _count(rows: list[dict]) -> str:
    return f"{len(rows)}, newest {max(row['date'] for row in rows)[:10]}" if rows else "none"


def recorded(machine: Machine, results: Path) -> list[tuple[str, ...]]:
    """For every op and device of the machine: rows measured on such a device, predicted ones, and how to get some."""
    table: list[tuple[str, ...]] = [("op", "device", "rows measured", "predicted", "to measure")]
    predictions = [row for row in _rows(results, "static") if row.get("predicted")]
    devices = dict.fromkeys([*(gpu.name for gpu in machine.gpus), machine.cpu])
    for op in OPS.values():
        rows = _rows(results, op.package)
        predicted = [row for row in predictions if row["op"] == op.package]
        for device in devices:
            has = PREDICTED_FOR in device and predicted
            here = [row for row in rows if row["device"] == device]
            flag = " --device cpu" if machine.gpus and device == machine.cpu else ""
            command = f"python -m bench.suites {op.package}{flag}"
            table.append((op.name, device, _count(here), _count(predicted) if has else "none", command))
    return table


def _recorded_section(machine: Machine) -> str:
    if machine.results is None:
        return (
            "Measured\n  no bench/results here: the benchmarks live in a clone of the repository, whose page "
            "docs/benchmarks.md has what they found"
        )
    how = (
        f"  All suites: wam bench; on a GPU machine: tools/gpu/gpu.sh. Predictions are for an {PREDICTED_FOR}, from "
        "machine code: python -m bench.suites static"
    )
    return f"Measured on such a device, in bench/results\n{_table(recorded(machine, machine.results))}\n{how}"


def report(machine: Machine) -> str:
    facts = [("python", platform.python_version())]
    facts += [(name, found or "not installed") for name, found in machine.versions.items()]
    facts += [
        (
            "cpu",
            f"{machine.cpu}, {machine.cpu_cores} cores, {machine.cpu_threads} threads, {machine.vector_isa}, "
            f"load {machine.load:.1f}",
        ),
        ("gpu", "; ".join(map(str, machine.gpus)) or "no CUDA device"),
        ("device model", _device_model(machine)),
        ("driver", machine.driver or "no NVIDIA driver"),
        ("nvcc", machine.nvcc or "not on PATH"),
        ("wam_kernels._C", machine.extension_error or f"loads; built for {architecture_names(machine.architectures)}"),
    ]
    ops = [("op", "impl", "runs here", "why")]
    for op in OPS.values():
        for impl, backend in op.backends.items():
            reason = missing(backend, machine)
            ops.append((op.name, impl, "no" if reason else "yes", reason or _what(op, impl)))
    warning = crowded(machine)
    sections = [f"This machine\n{_table(facts)}", f"Ops\n{_table(ops)}", _recorded_section(machine)]
    return "\n\n".join(sections if warning is None else [*sections, warning])


def run(args: argparse.Namespace) -> None:
    print(report(probe()))
