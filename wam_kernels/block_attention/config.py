"""Launch choices for block attention, and what is known about each.

Nothing here has been timed on a GPU yet: the choices follow from the counted efficiency of the tiles (``plan.py``)
and from ahead-of-time compilation for sm_90 (``tests/aot``): registers, spills, and the tensor-core instruction.
"""

from dataclasses import dataclass

MAX_D = 256


@dataclass(frozen=True)
class Config:
    """Triton launch options of one kernel."""

    num_warps: int
    num_stages: int


def block_d(D: int) -> int:
    """Head dim padded to what ``tl.dot`` takes: a power of two, at least 16."""
    return max(16, 1 << (D - 1).bit_length())


def forward(tile_rows: int, D: int) -> Config:
    # 4 warps: one warpgroup owns the 64 rows of a wgmma tile
    return Config(num_warps=4, num_stages=3 if block_d(D) <= 64 else 2)


def backward(tile_rows: int, D: int) -> Config:
    # two accumulators of [64, D] and three [64, 64] products live at once: 8 warps from D = 128 on, or they spill
    return Config(num_warps=8 if block_d(D) >= 128 else 4, num_stages=2 if block_d(D) <= 128 else 1)
