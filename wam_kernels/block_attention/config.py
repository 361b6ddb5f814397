"""Launch choices for block attention, and what is known about each.

Nothing here has been timed on a GPU yet: the choices follow from the counted efficiency of the tiles (``plan.py``)
and from ahead-of-time compilation for sm_90 (``tests/aot``): registers, spills, and the tensor-core instruction.
"""

from dataclasses import dataclass

from ..tuning import tuned

MAX_D = 256

# Which backend impl=None takes for each device type.
DEFAULT_IMPL = {"cpu": "cpu", "cuda": "triton"}


@dataclass(frozen=True)
class Config:
    """Triton launch options of one kernel."""

    num_warps: int
    num_stages: int


def block_d(D: int) -> int:
    """Head dim padded to what ``tl.dot`` takes: a power of two, at least 16."""
    return max(16, 1 << (D - 1).bit_length())


@tuned("block_attention.forward")
def forward(D: int, itemsize: int, rows: int) -> Config:
    # 4 warps: one warpgroup owns 64 rows, those of a wgmma tile; from D = 256 on its accumulator needs two.
    # 3 stages, where they fit: two steps are on their way behind the one that is computed, and as many blocks live on
    # an SM as with 2 (three at D = 64, two at D = 128)
    row = block_d(D) * itemsize  # bytes of one token of one operand
    return Config(num_warps=4 if block_d(D) <= 128 and rows <= 64 else 8, num_stages=_stages(row, itemsize))


@tuned("block_attention.backward")
def backward(D: int, itemsize: int, rows: int) -> Config:
    # two accumulators of [64, D] and three [64, 64] products live at once: 8 warps from 256 bytes a row on, or they
    # spill. Registers let one block live on an SM there, so its copies must hide behind its own products: 3 stages
    row = block_d(D) * itemsize
    return Config(num_warps=8 if row >= 256 or rows > 64 else 4, num_stages=_stages(row, itemsize) if row <= 256 else 1)


def _stages(row: int, itemsize: int) -> int:
    # float32: twice the bytes and three products, so that a third stage costs a block of the SM
    return 3 if row <= (256 if itemsize == 2 else 128) else 2 if row <= 512 else 1


def fits_triton(D: int, itemsize: int) -> bool:
    """float32 beyond D = 128 would need 256 KB of shared memory in the backward; an H100 block has 227."""
    return block_d(D) * itemsize <= 512
