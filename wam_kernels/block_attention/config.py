"""Launch choices for block attention, and what is known about each.

Nothing here has been timed on a GPU yet: the choices follow from the counted efficiency of the tiles (``plan``)
and from ahead-of-time compilation for sm_90 (``tests/aot``): registers, spills, the tensor-core instruction, and which
warps compute which part of a product.
"""

from dataclasses import dataclass

from ..runtime.shared_memory import SMALL_BLOCK, block_bytes, compute_capability
from ..runtime.tuning import tuned

MAX_D = 256
MAX_CUDA_D = 128  # of csrc


@dataclass(frozen=True)
class Config:
    """Triton launch options of one kernel: rows of a program, which divide those of a tile, warps and stages."""

    rows: int
    num_warps: int
    num_stages: int


def block_d(D: int) -> int:
    """Head dim padded to what ``tl.dot`` takes: a power of two, at least 16."""
    return max(16, 1 << (D - 1).bit_length())


# Most rows and stages where a block has 99 KB of shared memory (compute capability 8.6, 8.9, 12.0), by kernel, bytes of
# a row and of a number; what an H100 gets fits there in the other sizes. By compilation for 8.9 (`tests/aot`).
SMALL_BLOCKS = {
    ("forward", 256, 2): (64, 3), ("dq", 256, 2): (64, 2), ("dkdv", 256, 2): (128, 2),
    ("forward", 512, 2): (64, 1), ("dq", 512, 2): (32, 1), ("dkdv", 512, 2): (32, 1),
    ("forward", 256, 4): (64, 2), ("dq", 256, 4): (64, 2), ("dkdv", 256, 4): (64, 2),
    ("forward", 512, 4): (64, 1), ("dq", 512, 4): (32, 1), ("dkdv", 512, 4): (32, 1),
}  # fmt: skip


@tuned("block_attention.forward")
def forward(D: int, itemsize: int, rows: int) -> Config:
    # 3 stages, where they fit: two steps are on their way behind the one that is computed, and as many blocks live on
    # an SM as with 2 (three at D = 64, two at D = 128)
    row = block_d(D) * itemsize  # bytes of one token of one operand
    return _config("forward", row, itemsize, rows, _stages(row, itemsize))


@tuned("block_attention.dq")
def dq(D: int, itemsize: int, rows: int) -> Config:
    # 64 rows of 256 bytes by 4 warps take all registers of two blocks an SM, whose shared memory holds 2 stages of both
    row = block_d(D) * itemsize
    return _config("dq", row, itemsize, rows, min(_backward_stages(row, itemsize), 3 if row < 256 else 2))


@tuned("block_attention.dkdv")
def dkdv(D: int, itemsize: int, rows: int) -> Config:
    # 128 rows by 8 warps: one block lives on an SM, so its copies must hide behind its own products: 3 stages
    row = block_d(D) * itemsize
    if rows == 128 and row == 256 and itemsize == 2 and compute_capability() // 10 in (8, 12):
        # products are mma.sync, whose operands lie in registers too: beside them the sums of 128 rows spill 64 to 152
        # bytes of a thread, those of 64 rows by as many warps none (docs/triton_versions.md), for which q and dout are
        # read twice as often
        return Config(64, num_warps=8, num_stages=2)
    return _config("dkdv", row, itemsize, rows, _backward_stages(row, itemsize))


def dkdv_launches(D: int, itemsize: int) -> tuple[dict[str, bool], ...]:
    """Which of dk and dv each launch of their kernel makes. Beyond 256 bytes a row the sums of both do not fit into
    registers: apart they cost five products for four, and no spills.
    """
    if block_d(D) * itemsize <= 256:
        return ({"DK": True, "DV": True},)
    return {"DK": False, "DV": True}, {"DK": True, "DV": False}


def _config(kernel: str, row: int, itemsize: int, rows: int, num_stages: int) -> Config:
    rows = rows if row <= 256 else min(rows, 64)
    if block_bytes() <= SMALL_BLOCK:
        most_rows, most_stages = SMALL_BLOCKS.get((kernel, row, itemsize), (rows, num_stages))
        rows, num_stages = min(rows, most_rows), min(num_stages, most_stages)
    # one warpgroup for each 64 rows, those of a wgmma tile: a second one would compute the same rows of q k once more
    return Config(rows, num_warps=4 if rows <= 64 else 8, num_stages=num_stages)


def _stages(row: int, itemsize: int) -> int:
    # float32: twice the bytes and three products, so that a third stage costs a block of the SM
    return 3 if row <= (256 if itemsize == 2 else 128) else 2 if row <= 512 else 1


def _backward_stages(row: int, itemsize: int) -> int:
    # the longest float32 rows, two operands of 64 beside those of a step, leave no room for a second stage
    return 1 if row > 256 and itemsize == 4 else _stages(row, itemsize)


def fits_triton(D: int, itemsize: int) -> bool:
    """float32 beyond D = 128 would need 256 KB of shared memory in the backward; an H100 block has 227."""
    return block_d(D) * itemsize <= 512
