"""Launch choices for qk_norm_rope, and what is known about each.

Nothing here has been timed on a GPU yet. The Triton choices follow from counting registers and from ahead-of-time
compilation for sm_90 (``tests/aot``): 16-byte accesses, no spills at 24 x 128 and 16 x 128.
"""

from dataclasses import dataclass

from ..runtime.tuning import tuned

MAX_INNER = 8192
MAX_HEAD_DIM = 256

# CPU: numbers of one chunk of rows, per thread; 2 MB a buffer in float32. Milliseconds, the least of 25 calls that took
# turns on a busy AMD EPYC (512 KB of L2 a core, 32 MB of L3), forward and backward:
#
#     tokens x width, threads    2**17         2**18         2**19         2**20
#     2,176 x 3,072,  1          21.6, 55.8    18.0, 47.9    15.9, 39.6    15.8, 52.4
#     2,176 x 3,072,  2          12.3, 53.8     9.5, 50.6     8.5, 46.8     8.0, 34.6
#     4,896 x 512,    1           8.0, 17.6     6.5, 13.0     5.6, 12.3     5.6, 14.0
#     4,896 x 512,    2           4.6,  9.9     3.5,  8.0     3.3,  8.0     3.2,  8.4
#
# 2**16 takes about 1.4 times as long as 2**17: what a call of PyTorch costs counts for more than a core's L2 cache.
CPU_CHUNK = 2**19

# Backward: programs of each of q and k, so also rows of partial weight gradients. 96 to 116 registers (sm_90, 24 x 128)
# let two programs of 8 warps live on an SM, so 2 x 128 fill the 132 SMs of an H100 in one wave; at 8,704 x 3,072
# writing and reading the partials adds 2 % to the traffic. A constant, not the number of SMs: the order of summation is
# then the same on every GPU.
PROGRAMS = 128

# Second pass: a tile of partials, rows x columns.
REDUCE_ROWS, REDUCE_COLUMNS = 64, 32


@dataclass(frozen=True)
class Config:
    """Triton launch options of the forward and the backward kernel."""

    block_h: int
    block_p: int
    num_warps: int


@tuned("qk_norm_rope.launch")
def launch(heads: int, head_dim: int) -> Config:
    """Heads and pairs padded to powers of two; 16 numbers of a row to a thread: two 16-byte loads in bf16."""
    block_h, block_p = _power_of_two(heads), _power_of_two(head_dim // 2)
    return Config(block_h, block_p, num_warps=min(16, max(1, 2 * block_h * block_p // (16 * 32))))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
