"""Compile a Triton kernel for sm_90 without a GPU and read what the compiler made of it.

Not in a process with TRITON_INTERPRET=1: there ``triton.jit`` makes interpreted functions.
"""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma: int
    wgmma_serialised: bool
    copies_behind: tuple[int, ...]  # of each pipelined loop: groups of copies that may still be under way when it computes
    ptx: str


def compile_sm90(kernel, types: dict[str, str], constants: dict, *, num_warps: int, num_stages: int) -> Compiled:
    """``types`` maps every non-constexpr argument to Triton's name of its type (``*bf16``, ``i32``, ``fp32``)."""
    names = [p.name for p in kernel.params]
    missing = [n for n in names if n not in types and n not in constants]
    assert not missing, f"no type for {missing}"
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    # what the launcher's tensors guarantee: 16-byte bases, and token and head strides that are multiples of 16
    free = {p.name for p in kernel.params if p.do_not_specialize}
    aligned = [n for n in names if n not in constants and n not in free and types[n] != "fp32"]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = built.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        Path(path).write_text(ptx)
        report = subprocess.run(
            [_BIN / "ptxas", "-v", "-arch=sm_90a", path, "-o", os.path.join(folder, "kernel.cubin")],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    return Compiled(
        registers=int(re.search(r"Used (\d+) registers", report).group(1)),
        spill_bytes=sum(spills),
        shared_bytes=built.metadata.shared,
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        wgmma_serialised="C7511" in report or "C7510" in report,
        copies_behind=_copies_behind(built.asm["ttgir"]),
        ptx=ptx,
    )


def _copies_behind(ttgir: str) -> tuple[int, ...]:
    """What each loop that waits for copies leaves under way while it computes; 0: nothing is copied behind it."""
    bodies = [loop.partition("scf.yield")[0] for loop in ttgir.split("scf.for")[1:]]
    return tuple(int(n) for body in bodies for n in re.findall(r"async_wait .*num = (\d+)", body))
