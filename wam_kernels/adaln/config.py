"""Launch choices of the adaLN kernels, and what is known about each.

Nothing here has been timed on a GPU yet: warps follow from ahead-of-time compilation for sm_90 (``tests/aot``).
"""

from ..runtime.tuning import tuned

MAX_D = 8192

# Tile of the second pass: segments that are loaded together, and channels.
SUM_SEGMENTS, SUM_CHANNELS = 16, 128

# Elements of a chunk that the CPU backend works on at a time, and of a run that gets chunks of its own; per thread.
CPU_CHUNK, CPU_LONG_RUN = 262144, 32768


# Forward: a program walks this many neighbouring tokens at most, so that the modulation is read once for them; fewer
# where that would leave less than PROGRAMS programs, 8 for each SM of an H100.
TOKENS_OF_PROGRAM, PROGRAMS = 8, 1056

# Shared memory for the next token's rows (Triton), at most: what an SM of the smallest GPU (8.6, 8.9, 12.0) has for one
# program, 99 KB, less what the sums take.
STAGED_BYTES = 65536


def tokens_of_program(tokens: int) -> int:
    """For ``tokens`` of all batch elements together."""
    return max(1, min(TOKENS_OF_PROGRAM, tokens // PROGRAMS))


def stages(D: int, itemsize: int) -> int:
    """2 where the next token's rows, up to four, are copied into shared memory behind a token's arithmetic, else 1."""
    return 2 if 4 * block_d(D) * itemsize <= STAGED_BYTES else 1


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
