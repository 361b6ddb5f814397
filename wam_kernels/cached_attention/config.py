"""Launch choices for cached_attention, and what is known about each.

Nothing here has been timed on a GPU yet: the choices are estimated from counted bytes and FLOPs (``README.md``) and
from ahead-of-time compilation for sm_90 (``tests/aot``, ``tests/csrc``): registers, spills, shared memory.
"""

from dataclasses import dataclass

MAX_D = 256
# Of the GPU kernels. Group sizes are arguments of a launch one by one, so that none keys a compilation.
MAX_KERNEL_D, MAX_GROUPS = 128, 4

# The keys are split until there are as many programs as an H100 holds at once: 132 SMs, two programs each. A constant,
# not the number of SMs of the machine, so that sums have the same order on every GPU.
PROGRAMS = 2 * 132
# Of the kernel by TMA, which has one block an SM; and what it takes: a lane reads a range, 26 bits name a slot.
STREAMED_BLOCKS = 132
MAX_STREAMED_RANGES, MAX_STREAMED_SLOTS = 32, 2**26 - 1
# A split of a full cache has at least as many slots; shorter ones cost more in partial results than they gain.
MIN_SLOTS = 256


@dataclass(frozen=True)
class Config:
    """Triton launch options: rows of a tile, slots of a step."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def block_d(D: int) -> int:
    """Head dim padded to what ``tl.dot`` takes: a power of two, at least 16."""
    return max(16, 1 << (D - 1).bit_length())


def forward(rows: int, D: int, itemsize: int) -> Config:
    """``rows`` of the largest group."""
    # 64 rows by 4 warps: one warpgroup owns a wgmma tile. 16 action rows alone take a tile of 16. float32 products are
    # three tf32 ones each: half the slots and rows, or they spill, under Triton 3.3 and 3.4 from 64 channels on
    row = block_d(D) * itemsize  # bytes of one slot of one operand
    block_m = min(32 if itemsize == 4 and row > 128 else 64, max(16, 1 << (max(rows, 1) - 1).bit_length()))
    return Config(block_m, 64 if itemsize == 2 else 32, num_warps=4, num_stages=3 if row <= 128 else 2)


def splits(programs: int, slots: int) -> int:
    """Into how many parts the visible slots are split: from shapes alone, so a CUDA graph keeps it at every fill.

    ``programs``: tiles x heads x samples of one part; ``slots`` of the cache.
    """
    return max(1, min(PROGRAMS // max(programs, 1), slots // MIN_SLOTS))


def streamed_splits(blocks: int, slots: int) -> int:
    """The same for the kernel by TMA; ``blocks``: its tiles x heads x samples of one part."""
    return max(1, min(STREAMED_BLOCKS // max(blocks, 1), slots // MIN_SLOTS))
