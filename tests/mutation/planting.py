"""Compiles kernels with a planted bug and runs them on their cases, in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import signal
import subprocess
import sysconfig
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pybind11
import torch

from tests.mutation.cases import Suite, plan_outcomes
from tests.mutation.mutants import PLANS, ROOT, SECTIONS, Mutant
from tests.mutation.table import Row, fingerprint

LIMIT_S = 60  # of CPU time: a wrong kernel may never end; a right one takes a quarter of it
FLAGS = ["g++", "-std=c++17", "-w", "-fPIC", "-DWAM_HOST_EMULATION"]
OPTIMISED = "-O1"
BLOCK = """
#include "block_attention/{file}"
namespace wam {{
void block_attention_forward_kernel(const BlockAttentionParams& p, DType dtype, void* stream) {{ {forward} }}
void block_attention_backward_kernels(const BlockAttentionParams& p, DType dtype, void* stream) {{ {backward} }}
}}
"""
CACHED = """
#include "cached_attention/kernels.cu"
void wam::cached_attention_streamed_part(const CachedAttentionParams&, DType, void*) {}
"""
MODULE = """
#include "{folder}/bindings.h"
PYBIND11_MODULE(_C, m) {{ wam::{folder}_bindings::register_functions(m); }}
"""


def source_of(kernel: str, head_dim: int) -> str:
    """One kernel for one dtype and head dim: most of a bug's time is its compilation."""
    if kernel == "streamed":
        return '#include "cached_attention/streamed_sm90a.cu"\n'
    if kernel == "cached":
        return CACHED
    call = f"block_attention_detail::launch_{kernel}<__nv_bfloat16, {head_dim}>(p, dtype, stream);"
    forward = kernel == "forward"
    return BLOCK.format(
        file="forward.cuh" if forward else "backward.cuh",
        forward=call if forward else "",
        backward="" if forward else call,
    )


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Workshop:
    """A folder with what all bugs are linked with, and the cases."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.folder, self.suite = folder, Suite()
        self.objects: dict[str, list[Path]] = {}
        # what no bug is planted in, compiled once
        self.headers = folder / "headers.h"
        self.headers.write_text('#include "common/tensor_map.h"\n#include "common/tile_mma.cuh"\n')
        _compile(self.headers, "c++-header", self.headers.with_suffix(".h.gch"), OPTIMISED)

    def check_without_bugs(self, mutants: list[Mutant]) -> None:
        """Run the cases of these bugs on the kernels as they are.

        Raises:
            RuntimeError: one fails, so that none could tell a bug.
        """
        for kernel, head_dim in sorted({(kernel, mutant.head_dim) for mutant in mutants for kernel in mutant.kernels}):
            case, report = self._outcome(kernel, head_dim, None)
            if report:
                raise RuntimeError(f"mutation: {kernel} fails without a planted bug on the case {case!r}: {report}")

    def plant(self, mutant: Mutant) -> Row:
        """Run a bug on the cases of its kernels until one fails."""
        begin = _cpu_seconds()
        for kernel in mutant.kernels:
            case, report = self._outcome(kernel, mutant.head_dim, mutant)
            if report:
                case = f"{kernel}: {case}" if len(mutant.kernels) > 1 else case
                break
        return Row(mutant.kernel, mutant.bug, case, report, round(_cpu_seconds() - begin, 1), fingerprint(mutant))

    def _outcome(self, kernel: str, head_dim: int, mutant: Mutant | None) -> tuple[str, str]:
        """The first case that fails and what was reported; both empty where none does."""
        if kernel in PLANS:
            source = (ROOT / SECTIONS[kernel][0]).read_text() if mutant is None else mutant.planted()
            return _first_failure(plan_outcomes(kernel, source))
        return _first_failure(self.suite.outcomes(kernel, head_dim, self._library(kernel, head_dim, mutant)))

    def _library(self, kernel: str, head_dim: int, mutant: Mutant | None) -> Path:
        op = "cached_attention" if kernel in ("cached", "streamed") else "block_attention"
        if op not in self.objects:
            self.objects[op] = self._common_objects(op)
        own = self.folder / "planted"
        shutil.rmtree(own, ignore_errors=True)
        shutil.copytree(ROOT / "csrc" / op, own / op)
        if mutant is not None:
            (own / op / mutant.path.name).write_text(mutant.planted())
        source = own / "kernel.cu"
        source.write_text(source_of(kernel, head_dim))
        library = self.folder / "_C.so"
        compiled = _compile(source, "c++", source.with_suffix(".o"), OPTIMISED, "-include", self.headers, f"-I{own}")
        others = [self._combine_kernel()] if kernel == "streamed" else []
        # the planted one first: of inline functions that two hold, the linker takes the first
        subprocess.run(["g++", "-shared", compiled, *others, *self.objects[op], "-o", library], check=True)
        return library

    def _combine_kernel(self) -> Path:
        """What follows the streamed part kernel, as it is."""
        out = self.folder / "combine.o"
        if not out.exists():
            _compile(ROOT / "csrc/cached_attention/kernels.cu", "c++", out, OPTIMISED)
        return out

    def _common_objects(self, op: str) -> list[Path]:
        folder = self.folder / op
        folder.mkdir()
        sources = {
            "module.cpp": MODULE.format(folder=op),
            "launch.cpp": f'#include "{op}/launch.cpp"\n',
            "control.cpp": f'#include "{ROOT / "tests/csrc/emulated.cpp"}"\n',
        }
        for name, text in sources.items():
            (folder / name).write_text(text)
        includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
        return [_compile(folder / name, "c++", (folder / name).with_suffix(".o"), *includes) for name in sources]


def _compile(source: Path, language: str, out: Path, *flags: str | Path) -> Path:
    subprocess.run([*FLAGS, *flags, f"-I{ROOT / 'csrc'}", "-x", language, "-c", source, "-o", out], check=True)
    return out


def _first_failure(outcomes: Iterator[tuple[str, str]]) -> tuple[str, str]:
    """Step through ``outcomes`` in a forked process, which a bug may crash or hang."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_send_all, args=(outcomes, sender))
    child.start()
    sender.close()
    case = report = ""
    try:
        while not report:
            case, report = receiver.recv()
    except EOFError:  # the end: of all cases, or of the process
        pass
    child.join()
    if child.exitcode and not report:
        report = "no end" if child.exitcode == -signal.SIGXCPU else f"the process ends with {child.exitcode}"
    return (case, report) if report else ("", "")


def _send_all(outcomes: Iterator[tuple[str, str]], sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S + 10))
    for case, report in outcomes:
        sender.send((case, report))
        if report:
            return
