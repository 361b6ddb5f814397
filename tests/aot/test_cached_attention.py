"""The cached_attention kernels compiled for sm_90: tensor cores, no spills, one compilation for all fills."""

import re

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from bench.static.launches import cached_combine, cached_part
from tests.aot.compile import Compiled, compile_sm90
from wam_kernels.cached_attention import config, kernel_triton

H100_SHARED = 232_448  # bytes that one block may use


def build_part(rows: int, D: int, dtype: str) -> Compiled:
    built = compile_sm90(cached_part(rows, D, dtype))
    assert built.products and built.repeated == (), "several warps compute the same part of a product"
    return built


@pytest.mark.parametrize("D", [64, 128])
def test_large_tiles_use_wgmma_without_spills(D):
    built = build_part(128, D, "bf16")
    assert built.spill_bytes == 0
    assert built.wgmma > 0 and not built.wgmma_serialised
    # the next steps' slots arrive in 16-byte copies behind the arithmetic
    copies = re.findall(r"cp\.async\.\w+\S* \[[^\]]*\], \[[^\]]*\], (\w+)", built.ptx)
    assert set(copies) == {"0x10"}
    # scores are scaled in an FFMA; what is left scales the sums
    assert all(loop.count["FMUL"] < D // 2 + 8 for loop in built.loops)
    # config.PROGRAMS counts on two programs an SM: shared memory (with 1 KB of the system's each) and registers
    assert 2 * (built.shared_bytes + 1024) <= 233_472 and built.registers <= 255


@pytest.mark.parametrize(
    "rows, D, dtype",
    [
        pytest.param(16, 128, "bf16", id="action-rows-alone"),
        pytest.param(16, 64, "fp16", id="action-rows-alone-D64"),
        pytest.param(128, 96, "bf16", id="D-not-a-power-of-two"),
        pytest.param(128, 32, "bf16", id="smallest-head"),
        pytest.param(128, 64, "fp32", id="float32"),
    ],
)
def test_other_launches_compile_without_spills(rows, D, dtype):
    built = build_part(rows, D, dtype)
    assert built.spill_bytes == 0
    assert built.shared_bytes <= H100_SHARED
    assert "mma" in built.ptx


def test_largest_launch_fits_in_shared_memory():
    # float32 at D = 128 spills, which costs speed only
    assert build_part(128, 128, "fp32").shared_bytes <= H100_SHARED


def test_combine_compiles_without_spills():
    assert compile_sm90(cached_combine(128)).spill_bytes == 0


def launch_key(q, cache, ranges, group_rows) -> str:
    """What Triton would look its compiled kernel up by, with the arguments that ``forward`` passes."""
    kernel = kernel_triton.cached_attention_part_kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    (B, S, H, D), N, R = q.shape, cache.shape[1], ranges.shape[2]
    launch = config.forward(max(group_rows), D, q.itemsize)
    part = torch.empty(8)  # only its address takes part
    _, specialization, options = bind(
        q, cache, cache, ranges, part, part, *q.stride()[:3], *cache.stride()[:3], *cache.stride()[:3],
        *group_rows, *[0] * (4 - len(group_rows)), 1, B, S, N, H, len(group_rows), R, D**-0.5,
        **kernel_triton.launch_constants(launch, D, q.dtype),
        num_warps=launch.num_warps, num_stages=launch.num_stages, debug=False,
    )  # fmt: skip
    return str((specialization, sorted(options.items())))


def test_one_key_for_all_fills_chunks_caches_and_batches():
    keys = set()
    for B, H, N, R, rows in (
        (1, 8, 2304, 3, (128, 16)),
        (2, 8, 8784, 1, (64, 8)),
        (3, 24, 177, 5, (800, 33)),
        (1, 8, 177, 1, (70,)),
        (1, 1, 16, 1, (64, 1, 0, 1)),
    ):
        q = torch.empty(B, sum(rows), H, 64, dtype=torch.bfloat16)
        buffer = torch.empty(2, 2, B, N, H, 64, dtype=torch.bfloat16)
        fills = torch.zeros(B * len(rows) * R * 2 + 3, dtype=torch.int32)
        for fill in range(4):  # ranges anywhere in a buffer of many layers' or stages' ranges
            ranges = fills[fill : fill + B * len(rows) * R * 2].view(B, len(rows), R, 2)
            keys |= {launch_key(q, buffer[layer, 0], ranges, rows) for layer in range(2)}
    assert len(keys) == 1


def test_a_key_is_sensitive():
    # the test above would pass on a constant: another head dim or tile is another kernel
    def key(D, rows):
        q = torch.empty(1, sum(rows), 8, D, dtype=torch.bfloat16)
        cache, ranges = (
            torch.empty(1, 160, 8, D, dtype=torch.bfloat16),
            torch.zeros(1, len(rows), 1, 2, dtype=torch.int32),
        )
        return launch_key(q, cache, ranges, rows)

    assert len({key(64, (128, 16)), key(128, (128, 16)), key(64, (16, 16))}) == 3
