"""CUDA sources run on the CPU: csrc/ada_layer_norm.cu against float64, and the emulation against its own promises."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from .ada_layer_norm import DTYPES, SHAPES, assert_correct, make_case

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the host emulation is compiled with g++")


@pytest.fixture(scope="module")
def compile_emulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")

    def compile_one(source: Path) -> ctypes.CDLL:
        library = folder / f"{source.stem}.so"
        subprocess.run(
            ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared",
             # a 16-byte access off its alignment or an index outside an array ends the process with a message
             "-fsanitize=alignment,bounds", "-fno-sanitize-recover",
             "-DWAM_HOST_EMULATION", f"-I{CSRC}", "-x", "c++", source, "-o", library],
            check=True,
        )  # fmt: skip
        return ctypes.CDLL(str(library))

    return compile_one


@pytest.fixture(scope="module")
def emulated(compile_emulated):
    library = compile_emulated(HERE / "emulated_ada_layer_norm.cpp")
    library.ada_layer_norm.restype = ctypes.c_char_p
    address, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.ada_layer_norm.argtypes = [*[address] * 5, i64, i64, i32, ctypes.c_float, ctypes.c_int, ctypes.c_int]
    return library


def run_emulated(library: ctypes.CDLL, *, downwards: bool = False, **arguments) -> str | None:
    arguments["dtype"] = DTYPES.index(arguments["dtype"])
    error = library.ada_layer_norm(*arguments.values(), downwards)
    return error and error.decode()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, channels, frame_rows", SHAPES)
def test_ada_layer_norm(emulated, rows, channels, frame_rows, dtype):
    case = make_case(rows, channels, frame_rows, dtype)
    assert run_emulated(emulated, **case.arguments()) is None
    assert_correct(case)

    # Threads in the other order: the same bits, unless a barrier is missing.
    expected = case.y.clone()
    case.y.fill_(torch.nan)
    assert run_emulated(emulated, downwards=True, **case.arguments()) is None
    assert torch.equal(case.y, expected)


def test_ada_layer_norm_rows_need_not_be_in_frame_order(emulated):
    case = make_case(9, 64, (1, 4, 3, 1), "float32")
    case.frame_of_row.copy_(case.frame_of_row.flip(0))
    assert run_emulated(emulated, **case.arguments()) is None
    assert_correct(case)


@pytest.mark.parametrize("index", [-1, 3, 2**31 - 1])
def test_ada_layer_norm_answers_an_index_outside_the_tables_with_nan(emulated, index):
    case = make_case(5, 64, (2, 2, 1), "float32")
    case.frame_of_row[3] = index
    assert run_emulated(emulated, **case.arguments()) is None
    assert case.y[3].isnan().all() and case.y[[0, 1, 2, 4]].isfinite().all()


WIDTHS = "must be a multiple of 8 from 8 to 8192"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"channels": 12}, f"channels {WIDTHS}, got 12; normalise other widths in PyTorch"),
        ({"channels": 8200}, f"channels {WIDTHS}, got 8200; normalise other widths in PyTorch"),
        ({"rows": 2**31}, "rows must be from 0 to 2147483647, got 2147483648; split the call"),
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"x": 0}, "x must be a device address, got 0"),
        ({"y": 8200}, "y must be aligned to 16 bytes, got address 8200; pass a contiguous copy"),
    ],
)
def test_ada_layer_norm_refusals_name_the_argument(emulated, change, message):
    case = make_case(5, 64, (5,), "float32")
    assert run_emulated(emulated, **case.arguments() | change) == f"ada_layer_norm: {message}"


def test_16_bit_conversions(emulated):
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
    library = compile_emulated(HERE / "faulty_kernels.cu")
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
