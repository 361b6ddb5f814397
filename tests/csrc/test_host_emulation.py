"""The host emulation against its own promises: 16-bit conversions, barriers, shuffles, the order of threads."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent


def test_16_bit_conversions(emulation):
    emulated = emulation.control
    codes = np.arange(2**16, dtype=np.uint16)
    bf16, fp16 = np.empty(codes.size, np.float32), np.empty(codes.size, np.float32)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (bf16, fp16)]
    emulated.decode(ctypes.c_uint16(0), ctypes.c_int(codes.size), *pointers)
    np.testing.assert_array_equal(fp16, codes.view(np.float16).astype(np.float32))
    torch_bf16 = torch.from_numpy(codes.view(np.int16)).view(torch.bfloat16)
    np.testing.assert_array_equal(bf16, torch_bf16.float().numpy())

    # All that 16 bits hold, the float32 halfway between neighbours (ties), and one ulp to either side of it.
    finite = fp16[np.isfinite(fp16)], bf16[np.isfinite(bf16)]
    values = []
    for held in map(np.unique, finite):
        middle = ((held[1:].astype(np.float64) + held[:-1]) / 2).astype(np.float32)
        values += [held, middle, np.nextafter(middle, np.float32(-np.inf)), np.nextafter(middle, np.float32(np.inf))]
    v = np.concatenate([*values, np.float32([0.0, -0.0, np.inf, -np.inf, 65519.9, 65520.0, 3.4e38])])
    to_bf16, to_fp16 = np.empty(v.size, np.uint16), np.empty(v.size, np.uint16)
    emulated.encode(*(ctypes.c_void_p(a.ctypes.data) for a in (v,)), ctypes.c_int(v.size),
                    *(ctypes.c_void_p(a.ctypes.data) for a in (to_bf16, to_fp16)))  # fmt: skip
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(to_fp16, v.astype(np.float16).view(np.uint16))
    np.testing.assert_array_equal(to_bf16, torch.from_numpy(v).bfloat16().view(torch.int16).numpy().view(np.uint16))


NONE, EXITS_BEFORE_BLOCK_BARRIER, LANE_EXITS_BEFORE_SHUFFLE, PARTIAL_MASK, NO_BARRIER = range(5)


@pytest.fixture(scope="module")
def rotate(compile_emulated):
    library = ctypes.CDLL(str(compile_emulated("faulty_kernels.so", [HERE / "faulty_kernels.cu"])))
    library.run.restype = ctypes.c_char_p

    def run(fault: int, *, threads: int = 96, downwards: bool = False):
        values = np.arange(1, 65, dtype=np.float32)
        error = library.run(ctypes.c_void_p(values.ctypes.data), fault, threads, downwards)
        return values, error and error.decode()

    return run


ROTATED = np.roll(np.arange(1, 65, dtype=np.float32), -1)


# A missing barrier comes first: a run before it would leave the right values in shared memory.
def test_a_missing_barrier_shows_in_the_order_of_threads(rotate):
    upwards, error_up = rotate(NO_BARRIER)
    downwards, error_down = rotate(NO_BARRIER, downwards=True)
    assert error_up is None and error_down is None
    assert not np.array_equal(upwards, downwards)


@pytest.mark.parametrize("downwards", [False, True])
@pytest.mark.parametrize("fault", [NONE, EXITS_BEFORE_BLOCK_BARRIER])
def test_a_block_barrier_waits_for_all_threads_that_have_not_exited(rotate, fault, downwards):
    values, error = rotate(fault, downwards=downwards)
    assert error is None
    np.testing.assert_array_equal(values, ROTATED)


def test_a_shuffle_without_all_its_lanes_is_reported(rotate):
    message = r"cannot go on: 64 threads wait in __syncthreads, 31 in a warp barrier or shuffle, 1 have exited"
    assert message in rotate(LANE_EXITS_BEFORE_SHUFFLE)[1]
    # and the next launch starts afresh
    np.testing.assert_array_equal(rotate(NONE)[0], ROTATED)


def test_what_is_not_emulated_is_refused(rotate):
    assert "must name all 32 lanes, got a partial mask" in rotate(PARTIAL_MASK)[1]
    assert "a block must have 32, 64, ... 1024 threads, got 65" in rotate(NONE, threads=65)[1]
