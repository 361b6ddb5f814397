"""The kernels of csrc on both machines that can run them: emulated on any CPU, compiled on a GPU."""

import ctypes
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from filelock import FileLock

from bench.static.sass import Instruction, disassemble
from wam_kernels.runtime import cuda

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu"))
HOST = [
    "g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-DWAM_HOST_EMULATION",
    f"-I{ROOT / 'csrc'}",
]  # fmt: skip
# a 16-byte access off its alignment or an index outside an array ends the process with a message
EMULATED = [*HOST, "-O1", "-fsanitize=alignment,bounds", "-fno-sanitize-recover"]
GUARD = 64  # poisoned elements on both sides of an output: a store outside it lands here


@pytest.fixture(scope="session")
def compile_emulated(tmp_path_factory):
    """Compiles CUDA sources with g++ into a shared library, once for all workers of pytest-xdist; returns its path."""
    if shutil.which("g++") is None:
        pytest.skip("the host emulation is compiled with g++")
    workers = "PYTEST_XDIST_WORKER" in os.environ  # each has a folder in the run's own
    folder = (tmp_path_factory.getbasetemp().parent if workers else tmp_path_factory.getbasetemp()) / "emulated"
    folder.mkdir(exist_ok=True)

    def object_of(source: Path) -> Path:
        out = folder / f"{source.parent.name}_{source.name}.o"
        # launch.cpp and module.cpp of csrc hold no device code: nothing in them is worth optimising or watching
        flags = HOST if source.suffix == ".cpp" and ROOT / "csrc" in source.parents else EMULATED
        subprocess.run([*flags, *includes(source), "-x", "c++", "-c", source, "-o", out], check=True)
        return out

    def includes(source: Path) -> list[str]:
        if source.name != "module.cpp":
            return []
        import pybind11

        return ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]

    def compile_once(name: str, sources: list[Path]) -> Path:
        library = folder / name
        with FileLock(folder / f"{name}.lock"):
            if not library.exists():
                compile_all(library, sources)
        return library

    def compile_all(library: Path, sources: list[Path]):
        # one unit of all kernels, because most of the time goes to the headers that they share
        kernels = library.with_suffix(".cu")
        kernels.write_text("".join(f'#include "{source}"\n' for source in sources if source.suffix == ".cu"))
        with ThreadPoolExecutor(2) as two:
            objects = list(two.map(object_of, [kernels, *(source for source in sources if source.suffix != ".cu")]))
        subprocess.run([*EMULATED, "-shared", *objects, "-o", library.with_suffix(".part")], check=True)
        library.with_suffix(".part").rename(library)

    return compile_once


@dataclass(frozen=True)
class Emulation:
    extension: ModuleType  # as wam_kernels._C
    control: ctypes.CDLL  # emulated.cpp


@pytest.fixture(scope="session")
def emulation(compile_emulated) -> Emulation:
    library = compile_emulated("_C.so", [HERE / "emulated.cpp", *SOURCES])
    loader = importlib.machinery.ExtensionFileLoader("_C", str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
    loader.exec_module(module)
    return Emulation(module, ctypes.CDLL(str(library)))


class Machine:
    """Runs launchers, each time with NaN in every output and around it."""

    def __init__(self, device: str, control: ctypes.CDLL | None = None):
        self.device, self._control = device, control

    def run(self, function, *args, orders: int = 2):
        """The result of ``function``: the same, bit for bit, in every order of threads or at every call."""
        with poisoned_allocations():
            first = function(*args)
        try:
            for order in range(1, orders):
                self._take(order)
                with poisoned_allocations():
                    other = function(*args)
                for a, b in zip(first, other, strict=True):
                    assert (a is None) == (b is None)
                    # integers: NaN differs from itself
                    assert a is None or torch.equal(as_bytes(a), as_bytes(b)), "not deterministic"
        finally:
            self._take(0)
        return first

    def _take(self, order: int) -> None:
        """Order 0 is upwards; the others differ in the order of threads, and in when copies and products are done."""
        if self._control is not None:
            self._control.launch_downwards(order % 2)
            chance = (0.02, 0.5, 0.0005)[order // 3 % 3]
            self._control.sm90_order(order + 1, ctypes.c_double(chance), order % 3, order % 2)


def as_bytes(t: torch.Tensor) -> torch.Tensor:
    return t.cpu().contiguous().view(torch.uint8)


@contextmanager
def poisoned_allocations():
    """``Tensor.new_empty`` gives NaN between guards of NaN, which must still be there at the end."""
    guarded, new_empty = [], torch.Tensor.new_empty

    def poisoned(self, shape, dtype=None):
        n = prod(shape)
        buffer = torch.full((n + 2 * GUARD,), torch.nan, dtype=dtype or self.dtype, device=self.device)
        guarded.append(buffer)
        return buffer[GUARD : GUARD + n].view(shape)

    torch.Tensor.new_empty = poisoned
    try:
        yield
    finally:
        torch.Tensor.new_empty = new_empty
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    for buffer in guarded:
        assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all(), "stored outside an output"


def compiled_extension() -> ModuleType:
    try:
        return import_module("wam_kernels._C")
    except ModuleNotFoundError as error:
        pytest.skip(f"{error}: it is built at install time where nvcc is found, see setup.py")


@pytest.fixture(scope="session")
def built() -> Path:
    """The installed extension's file, of these sources."""
    path = Path(compiled_extension().__file__)
    late = [str(source.relative_to(ROOT)) for source in SOURCES if source.stat().st_mtime > path.stat().st_mtime]
    assert not late, f"{path.name} is older than {', '.join(late)}: build it again, with make or pip install"
    return path


@pytest.fixture(scope="session")
def machine_code(built) -> dict[str, list[Instruction]]:
    """Of every kernel for sm_90a, by mangled name."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs cuobjdump, which comes with triton")
    return disassemble(built)


@pytest.fixture(params=["emulated", "gpu"])
def machine(request, monkeypatch) -> Machine:
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        compiled_extension()
        return Machine("cuda")
    emulation = request.getfixturevalue("emulation")
    monkeypatch.setattr(cuda, "extension", lambda: emulation.extension)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    return Machine("cpu", emulation.control)
