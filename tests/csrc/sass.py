"""Machine code of compiled kernels: the registers it takes, and what a step of its loops costs."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.static.sass import Body, Loop, loops_with, tool

WARPS = 4  # of a warpgroup
TENSOR_FLOPS = 4096  # bf16 and fp16 of an SM in a clock, an addition and a multiplication counted apart


class Step(Loop):
    """One turn of an innermost loop that multiplies by wgmma; clocks are those of an SM for one warpgroup."""

    @property
    def instructions(self) -> int:
        return len(self.body)

    @property
    def products(self) -> list[int]:
        """Columns of every product of 64 rows by 16."""
        return [int(m.group(1)) for i in self.body if (m := re.match(r"HGMMA\.64x(\d+)x16", i.name))]

    @property
    def tensor_clocks(self) -> int:
        return sum(64 * n * 16 * 2 for n in self.products) // TENSOR_FLOPS

    @property
    def mufu_clocks(self) -> int:
        return self.count("MUFU") * 32 * WARPS // 16  # 16 a clock of an SM

    @property
    def local_accesses(self) -> int:
        return self.count("LDL") + self.count("STL")

    @property
    def waits(self) -> list[int]:
        """How many groups of products each wait leaves under way."""
        waits = (re.search(r"0x(\d+)$", i.operands) for i in self.body if i.name.startswith("WARPGROUP.DEPBAR"))
        return [int(m.group(1)) for m in waits if m]

    @property
    def exponentials_between_waits(self) -> int:
        """Exponentials after the first wait and before the second: taken while products are under way."""
        at = [i for i, instruction in enumerate(self.body) if instruction.name.startswith("WARPGROUP.DEPBAR")]
        return sum(i.name.startswith("MUFU.EX2") for i in self.body[at[0] : at[1]]) if len(at) > 1 else 0


@dataclass(frozen=True)
class Resources:
    architecture: str
    name: str  # mangled
    registers: int
    stack: int  # bytes of a thread; what does not fit in registers lies there
    shared: int


def cuobjdump(*arguments: str | Path) -> str:
    if find_spec("triton") is None:
        pytest.skip("needs cuobjdump, which comes with triton")
    return subprocess.run([tool("cuobjdump"), *arguments], capture_output=True, text=True, check=True).stdout


def resources(path: Path) -> list[Resources]:
    """Of every kernel for every architecture in a library."""
    found, architecture, name = [], "", ""
    for line in cuobjdump("--dump-resource-usage", path).splitlines():
        if match := re.match(r"arch = (\S+)", line):
            architecture = match.group(1)
        elif match := re.match(r" Function (\S+):", line):
            name = match.group(1)
        elif match := re.match(r"\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            found.append(Resources(architecture, name, *map(int, match.groups())))
    return found


def registers_of(body: Body) -> int:
    """As many as the highest that is named needs."""
    return 1 + max(int(number) for i in body for number in re.findall(r"\bR(\d+)\b", i.operands))


def steps(body: Body) -> list[Step]:
    """The innermost loops with a product by wgmma, in the order of their code."""
    return [Step(loop.body) for loop in loops_with(body, ("HGMMA",))]
