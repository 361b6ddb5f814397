"""Compile a Triton kernel for sm_90 without a GPU and read what the compiler made of it.

Not in a process with TRITON_INTERPRET=1: there ``triton.jit`` makes interpreted functions.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from bench.static.launches import Launch

H100 = GPUTarget("cuda", 90, 32)
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Loop:
    """Machine instructions of one turn, by name without what follows a dot: ``FFMA``, ``HGMMA``, ``LDL``."""

    count: Counter[str]

    @property
    def total(self) -> int:
        return sum(self.count.values())

    @property
    def spills(self) -> int:
        return self.count["LDL"] + self.count["STL"]


@dataclass(frozen=True)
class Compiled:
    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma: int
    wgmma_serialised: bool
    copies_behind: tuple[
        int, ...
    ]  # of each pipelined loop: groups of copies that may still be under way when it computes
    products: int  # tl.dot
    repeated: tuple[str, ...]  # those of which several warps compute the same part
    ptx: str
    cubin: bytes

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The innermost ones that a tensor core is used in."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernel.cubin")
            path.write_bytes(self.cubin)
            return _loops(_run("nvdisasm", "-c", path).stdout)


def compile_sm90(launch: Launch) -> Compiled:
    built = triton.compile(launch.source(), target=H100, options=launch.options)
    ptx = built.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path, cubin = os.path.join(folder, "kernel.ptx"), os.path.join(folder, "kernel.cubin")
        Path(path).write_text(ptx)
        report = _run("ptxas", "-v", "-arch=sm_90a", path, "-o", cubin).stderr
        binary = Path(cubin).read_bytes()
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    ttgir = built.asm["ttgir"]
    return Compiled(
        registers=int(re.search(r"Used (\d+) registers", report).group(1)),
        spill_bytes=sum(spills),
        shared_bytes=built.metadata.shared,
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        wgmma_serialised="C7511" in report or "C7510" in report,
        copies_behind=_copies_behind(ttgir),
        products=len(_products(ttgir)),
        repeated=_repeated(ttgir),
        ptx=ptx,
        cubin=binary,
    )


@dataclass(frozen=True)
class Resources:
    registers: int
    stack_bytes: int  # of a thread; what does not fit in registers lies there
    shared_bytes: int


def resources(launch: Launch, capability: int) -> Resources:
    """What Triton's own compilation for a compute capability (90 is 9.0) takes, by any version of Triton."""
    built = triton.compile(launch.source(), target=GPUTarget("cuda", capability, 32), options=launch.options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(built.asm["cubin"])
        report = _run("cuobjdump", "--dump-resource-usage", path).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", report).groups()
    return Resources(int(registers), int(stack), built.metadata.shared)


def repeated_products(launch: Launch) -> tuple[str, ...]:
    """``Compiled.repeated`` alone, for a tenth of the time: the compiler is stopped where layouts are settled."""
    ttgir, _ = _before("make_llir", launch)
    assert _products(ttgir), "no tl.dot was found: has Triton another name for it?"
    return _repeated(ttgir)


def shared_bytes(launch: Launch, capability: int = 90) -> int:
    """``Compiled.shared_bytes`` alone, without ptxas, which takes most of the time where registers spill."""
    return _before("make_ptx", launch, capability)[1]["shared"]


def _before(stage: str, launch: Launch, capability: int = 90) -> tuple[str, dict]:
    """What a stage of the compiler is given: the program so far, and what is known about it."""

    class Stopped(Exception):
        pass

    def stop(_backend, module, metadata, *_):
        raise Stopped(str(module), metadata)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CUDABackend, stage, stop)
        # the cache may have it compiled to the end
        patch.setattr(triton.knobs.compilation, "always_compile", True)
        with pytest.raises(Stopped) as stopped:
            triton.compile(launch.source(), target=GPUTarget("cuda", capability, 32), options=launch.options)
    return stopped.value.args


def _run(tool: str, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([_BIN / tool, *args], capture_output=True, text=True, check=True)


def _loops(sass: str) -> tuple[Loop, ...]:
    """What lies between a label and a branch back to it, without another such pair inside, if it multiplies tiles."""
    names, labels, loops = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label.group(1)] = len(names)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\w+)[\w.]*\s*(.*?);", line):
            names.append(found.group(1))
            target = re.search(r"`\((\.L_x_\d+)\)", found.group(2))
            if found.group(1) == "BRA" and target and target.group(1) in labels:
                loops.append((labels[target.group(1)], len(names)))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    counts = [Counter(names[begin:end]) for begin, end in inner]
    return tuple(Loop(c) for c in counts if c["HGMMA"] or c["HMMA"])


def _products(ttgir: str) -> list[tuple[str, str, str]]:
    """Rows, columns and name of the layout of each result."""
    return re.findall(r"(?:warp_group_dot|tt\.dot) .*-> tensor<(\d+)x(\d+)xf32, #(\w+)>", ttgir)


def _repeated(ttgir: str) -> tuple[str, ...]:
    """Products whose warps reach beyond the result, and so come round to parts that another warp computes as well."""
    layouts = {
        name: [[int(n) for n in re.search(rf"{key} = \[([\d, ]+)\]", fields).group(1).split(",")][:2]
               for key in ("warpsPerCTA", "instrShape")]
        for name, fields in re.findall(r"#(\w+) = #ttg.nvidia_mma<\{(.*)\}>", ttgir)
    }  # fmt: skip
    return tuple(
        f"[{rows}, {columns}] by warps {warps} of {shape}"
        for rows, columns, layout in _products(ttgir)
        for warps, shape in [layouts[layout]]
        if warps[0] * shape[0] > int(rows) or warps[1] * shape[1] > int(columns)
    )


def _copies_behind(ttgir: str) -> tuple[int, ...]:
    """What each loop that waits for copies leaves under way while it computes; 0: nothing is copied behind it."""
    bodies = [loop.partition("scf.yield")[0] for loop in ttgir.split("scf.for")[1:]]
    return tuple(int(n) for body in bodies for n in re.findall(r"async_wait .*num = (\d+)", body))
