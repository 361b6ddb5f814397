"""Machine code of compiled kernels: the registers it takes, and what a step of its loops costs."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

WARPS = 4  # of a warpgroup
TENSOR_FLOPS = 4096  # bf16 and fp16 of an SM in a clock, an addition and a multiplication counted apart


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with what follows its dots
    operands: str


@dataclass(frozen=True)
class Step:
    """One turn of an innermost loop that multiplies on tensor cores; clocks are those of an SM for one warpgroup."""

    body: tuple[Instruction, ...]

    def count(self, prefix: str) -> int:
        return sum(i.name.startswith(prefix) for i in self.body)

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


def cuobjdump(*arguments: str | Path, folder: Path | None = None) -> str:
    if find_spec("triton") is None:
        pytest.skip("needs cuobjdump, which comes with triton")
    import triton

    command = [Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout


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


def cubins(path: Path, architecture: str, folder: Path) -> list[Path]:
    """The parts of a library that are for one architecture, as files in ``folder``."""
    cuobjdump("-xelf", f".{architecture}.", path.resolve(), folder=folder)
    return sorted(folder.glob("*.cubin"))


def parse(path: Path) -> dict[str, list[Instruction]]:
    """By mangled name: the kernels of a cubin."""
    text = cuobjdump("-sass", path)
    kernels: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if name := re.search(r"Function : (\S+)", line):
            body = kernels.setdefault(name.group(1), [])
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line):
            body.append(Instruction(int(found.group(1), 16), found.group(2), found.group(3).strip()))
    return kernels


def registers_of(body: list[Instruction]) -> int:
    """As many as the highest that is named needs."""
    return 1 + max(int(number) for i in body for number in re.findall(r"\bR(\d+)\b", i.operands))


def steps(body: list[Instruction]) -> list[Step]:
    """The innermost loops with a product, in the order of their code."""
    index = {instruction.address: i for i, instruction in enumerate(body)}
    loops = []
    for i, instruction in enumerate(body):
        target = instruction.name.startswith("BRA") and re.search(r"0x([0-9a-f]+)", instruction.operands)
        if target and int(target.group(1), 16) in index and int(target.group(1), 16) <= instruction.address:
            loops.append((index[int(target.group(1), 16)], i + 1))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    found = [Step(tuple(body[begin:end])) for begin, end in inner]
    return [step for step in found if step.products]
