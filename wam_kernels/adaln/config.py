"""Launch choices of the adaLN kernels, and what is known about each.

Nothing here has been timed on a GPU yet: warps follow from ahead-of-time compilation for sm_90 (``tests/aot``).
"""

from ..runtime.tuning import tuned

MAX_D = 8192

# Tile of the second pass: segments that are loaded together, and channels.
SUM_SEGMENTS, SUM_CHANNELS = 16, 128

# Elements of a chunk that the CPU backend works on at a time, and of a run that gets chunks of its own; per thread.
CPU_CHUNK, CPU_LONG_RUN = 262144, 32768


def block_d(D: int) -> int:
    """Channels padded to the power of two that a Triton tensor has."""
    return max(128, 1 << (D - 1).bit_length())


@tuned("adaln.forward_warps")
def forward_warps(D: int) -> int:
    # 16 channels a thread: two 16-byte loads of bf16 in flight for each tensor
    return min(16, max(1, block_d(D) // 512))


@tuned("adaln.backward_warps")
def backward_warps(D: int) -> int:
    # a row of three sums, two factors and four inputs lives in registers: 16 channels a thread leave no spills
    return min(32, max(1, block_d(D) // 512))
