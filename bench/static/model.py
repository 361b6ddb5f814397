"""Clocks of an H100 for one turn of a loop, and the speed that they allow. Everything here is predicted.

Counted of a step, and of all warps of a block that run it: instructions issued (one a clock for each of four
schedulers), products on tensor cores (4,096 FLOP a clock by wgmma, half of that by mma.sync), MUFU (16 lanes a clock),
integer, logic and comparison (64 lanes), bytes through shared memory (128 a clock: operands of products, loads, stores
and what copies bring) and bytes from L2 (5.5 TB/s for all SMs).

The chain is what a warpgroup alone needs for a turn, in the order of its code: an instruction takes ``CPI`` clocks, one
that waits for others (barriers, fences, products, copies) ``WAIT`` more, and products run behind until a wait asks for
them. Blocks that share an SM hide each other's chains; warpgroups of one block do so unless a barrier in the loop keeps
them in step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .sass import Instruction, Loop

CLOCK = 1.7e9  # a second, under load; assumed
SMS = 132
WGMMA_FLOPS, MMA_FLOPS = 4096, 2048  # of an SM in a clock
L2_BYTES = 5.5e12 / SMS / CLOCK  # of an SM in a clock; of the literature
MEMORY_BYTES = 3.0e12 / SMS / CLOCK  # likewise, of a copy that was measured and published
SHARED_BYTES = 128  # in a clock
REGISTERS, SHARED, SHARED_OF_SYSTEM = 65_536, 233_472, 1024  # of an SM; of shared memory for each block

# Two numbers are fitted to published speeds, see `python -m bench.suites static`: FlashAttention-3's 700 TFLOP/s of a
# loop that the tensor cores limit, and FlexAttention's 385 of a loop as Triton makes it (128 x 64 by 8 warps).
TENSOR_SHARE = 700e12 / (WGMMA_FLOPS * SMS * CLOCK)
WAIT = 245.0
CPI = 2.0  # assumed: results are there after four clocks, and two chains of a warp take turns
WAITS = ("BAR.", "DEPBAR", "MEMBAR", "WARPGROUP.DEPBAR", "SYNCS.PHASECHK")

ALU = (
    "IADD3", "VIADD", "LOP3", "PLOP3", "LEA", "SHF", "SHL", "SHR", "ISETP", "FSETP", "FMNMX", "IMNMX", "VIMNMX", "SEL",
    "FSEL", "PRMT", "F2FP", "I2FP", "POPC", "BREV", "FLO", "R2P", "P2R", "IABS", "SGXT", "BMSK", "VOTE",
)  # fmt: skip


def is_alu(i: Instruction) -> bool:
    return i.group in ALU


def is_mufu(i: Instruction) -> bool:
    return i.group in ("MUFU", "F2F", "F2I", "I2F")


def product_flops(i: Instruction) -> int:
    """Of a warpgroup for HGMMA, of a warp for HMMA; 0 for another instruction."""
    if wide := re.match(r"HGMMA\.64x(\d+)x(\d+)", i.name):
        return 2 * 64 * int(wide[1]) * int(wide[2])
    if small := re.match(r"HMMA\.(16)(8)(\d+)", i.name):
        return 2 * 16 * 8 * int(small[3])
    return 0


def tensor_clocks(i: Instruction) -> float:
    """Of an SM, for a warpgroup."""
    flops = product_flops(i)
    return flops / WGMMA_FLOPS if i.group == "HGMMA" else 4 * flops / MMA_FLOPS


def _width(name: str) -> int:
    """Bytes of a lane."""
    found = re.search(r"\.(?:U|S)?(8|16|32|64|128)(?:\.|$)", name)
    return int(found[1]) // 8 if found else 4


def shared_bytes(i: Instruction) -> int:
    """That an instruction moves through shared memory: of a warpgroup for products, of a warp for others."""
    if wide := re.match(r"HGMMA\.64x(\d+)x(\d+)", i.name):
        rows = 64 if i.operands.split(",")[1].strip().startswith("gdesc") else 0  # else the first operand is registers
        return (rows + int(wide[1])) * int(wide[2]) * 2
    if found := re.search(r"(?:LD|ST)SM\.\d+\.MT?88(?:\.(\d))?", i.name):
        return 128 * int(found[1] or 1)
    return 32 * _width(i.name) if i.group in ("LDS", "STS", "LDGSTS") else 0


@dataclass(frozen=True)
class Block:
    """How a kernel runs: the threads of a block that multiply, and what of it fits on an SM.

    Args:
        warps: That run the step; four are a warpgroup.
        threads: Of the block, all of them.
        registers: Of a thread; with ``setmaxnreg`` those that it is launched with.
        shared: Bytes.
        copied: Bytes that a step brings from L2 for the whole block; None: what its own copies say.
    """

    warps: int
    threads: int
    registers: int
    shared: int
    copied: int | None = None

    @property
    def an_sm(self) -> int:
        """Blocks that live on an SM."""
        of_warp = -(-self.registers * 32 // 256) * 256
        return min(
            REGISTERS // (of_warp * self.threads // 32),
            SHARED // (self.shared + SHARED_OF_SYSTEM),
            2048 // self.threads,
        )


@dataclass(frozen=True)
class Step:
    """Clocks of an SM for one turn of a block, by what they are spent on, and what follows."""

    instructions: int  # of a warp
    flops: int  # of the block
    clocks: Mapping[str, float]

    @property
    def limit(self) -> str:
        return max(self.clocks, key=lambda name: self.clocks[name])

    @property
    def tflops(self) -> float:
        """Predicted, of computed pairs."""
        return self.flops / max(self.clocks.values()) * CLOCK * SMS / 1e12


def chain_clocks(loop: Loop, together: int = 1, wait: float = WAIT) -> float:
    """Of a turn that nothing else hides; ``together`` warpgroups do the same at the same time.

    The time between two turns once the pipeline is full. Groups of products end in order; a wait leaves the newest n.
    """
    now = tensor = mufu = 0.0
    ends: list[float] = []  # of the groups of products that are under way
    begins: list[float] = []
    for _ in range(4):
        begins.append(now)
        for i in loop.body:
            now += max(CPI, together) + (wait if i.name.startswith(WAITS) else 0)
            if is_mufu(i):
                mufu = max(mufu, now) + 8 * together  # 4 lanes a clock of a scheduler
                now = max(now, mufu - 8 * together)
            elif i.group == "HGMMA":
                tensor = max(tensor, now) + tensor_clocks(i) * together
                if "gsb0" in i.operands:
                    ends.append(tensor)
            elif i.name.startswith("WARPGROUP.DEPBAR"):
                left = int(i.operands.rpartition("0x")[2], 16)
                if len(ends) > left:
                    now = max(now, ends[len(ends) - 1 - left])
                    ends = ends[len(ends) - left :]
    return begins[-1] - begins[-2]


def predict(loop: Loop, block: Block, wait: float = WAIT) -> Step:
    """What limits a step of a kernel, and its speed while nothing else does."""

    def total(of: Callable[[Instruction], float]) -> float:
        return sum(of(i) for i in loop.body)

    groups, warps = block.warps / 4, block.warps
    wide = loop.count("HGMMA") > 0
    flops = total(product_flops) * (groups if wide else warps)
    own_copies = total(lambda i: 32 * _width(i.name) if i.group == "LDGSTS" else 0) * warps
    copied = own_copies if block.copied is None else block.copied
    operands = total(lambda i: shared_bytes(i) if i.group == "HGMMA" else 0) * groups
    others = total(lambda i: shared_bytes(i) if i.group != "HGMMA" else 0) * warps
    together = warps // 4 if loop.count("BAR.") else 1
    clocks = {
        "tensor cores": total(tensor_clocks) * groups / TENSOR_SHARE,
        "issue": len(loop.body) * warps / 4,
        "MUFU": total(is_mufu) * warps * 2,
        "ALU": total(is_alu) * warps / 2,
        "shared memory": (operands + others + (copied if block.copied is not None else 0)) / SHARED_BYTES,
        "L2": copied / L2_BYTES,
    }
    if wide:  # how mma.sync overlaps is in scoreboards, which are not read
        clocks["chain"] = chain_clocks(loop, together, wait) / block.an_sm
    return Step(len(loop.body), int(flops), clocks)


def predict_row(loop: Loop, warps: int, compulsory: float) -> dict[str, float]:
    """Clocks of an SM for a row by a block of ``warps``, of a kernel that multiplies nothing.

    The longest way through the code is counted, with what is done once a frame and options that nobody takes: no row
    takes more.

    Args:
        loop: What a row takes.
        warps: Of the block.
        compulsory: Bytes of a row that must cross the memory's bus.
    """
    return {
        "issue": len(loop.body) * warps / 4,
        "MUFU": sum(map(is_mufu, loop.body)) * warps * 2,
        "ALU": sum(map(is_alu, loop.body)) * warps / 2,
        "shared memory": sum(map(shared_bytes, loop.body)) * warps / SHARED_BYTES,
        "memory": compulsory / MEMORY_BYTES,
    }
