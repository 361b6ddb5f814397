"""Launch choices for block attention, and what is known about each.

Nothing here has been timed on a GPU yet: the choices follow from the counted efficiency of the tiles (``plan.py``)
and from ahead-of-time compilation for sm_90 (``tests/aot``): registers, spills, and the tensor-core instruction.
"""

from dataclasses import dataclass

from ..tuning import tuned

MAX_D = 256


@dataclass(frozen=True)
class Config:
    """Triton launch options of one kernel."""

    num_warps: int
    num_stages: int


def block_d(D: int) -> int:
    """Head dim padded to what ``tl.dot`` takes: a power of two, at least 16."""
    return max(16, 1 << (D - 1).bit_length())


@tuned("block_attention.forward")
def forward(D: int, itemsize: int) -> Config:
    # 4 warps: one warpgroup owns the 64 rows of a wgmma tile; from D = 256 on its accumulator needs two
    row = block_d(D) * itemsize  # bytes of one token of one operand
    return Config(num_warps=4 if block_d(D) <= 128 else 8, num_stages=3 if row <= 128 else 2 if row <= 512 else 1)


@tuned("block_attention.backward")
def backward(D: int, itemsize: int) -> Config:
    # two accumulators of [64, D] and three [64, 64] products live at once: 8 warps from D = 128 on, or they spill
    row = block_d(D) * itemsize
    return Config(num_warps=8 if block_d(D) >= 128 else 4, num_stages=2 if row <= 256 else 1)


def fits_triton(D: int, itemsize: int) -> bool:
    """float32 beyond D = 128 would need 256 KB of shared memory in the backward; an H100 block has 227."""
    return block_d(D) * itemsize <= 512
