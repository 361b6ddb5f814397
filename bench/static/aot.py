"""Triton kernels compiled for an H100 without one; Triton's cache keeps what it compiled before.

Not in a process with TRITON_INTERPRET=1: there ``triton.jit`` makes interpreted functions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from .launches import Launch
from .sass import Instruction, disassemble, tool

H100 = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Compiled:
    body: tuple[Instruction, ...]
    registers: int
    shared: int


def compile_sm90(launch: Launch) -> Compiled:
    """The machine code of a launch."""
    built = triton.compile(launch.source(), target=H100, options=launch.options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(built.asm["cubin"])
        (body,) = disassemble(path, None).values()
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True)
    (registers,) = re.findall(r"REG:(\d+)", usage.stdout)
    return Compiled(tuple(body), int(registers), built.metadata.shared)
