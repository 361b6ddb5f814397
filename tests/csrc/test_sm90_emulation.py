"""The emulation of Hopper against its own promises: what TMA and wgmma compute, and what it says of each fault."""

import ctypes
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
NONE = 0
# fault -> what the emulation says; None: no error, but numbers that are not there yet
FAULTS = {
    "no wait for the copy": None,
    "no wait for the product": None,
    "no proxy fence": "wgmma reads what the generic proxy wrote, without fence.proxy.async",
    "no product fence": "wgmma without wgmma.fence",
    "not initialised": "an mbarrier is not initialised",
    "too many arrivals": "more arrivals at an mbarrier than it counts",
    "too many bytes": "deadlock: 128 threads wait in an mbarrier",
    "too few bytes": "TMA brings more bytes than its mbarrier expects",
    "nobody waits": None,
    "unaligned": "a swizzled box must begin at a multiple of 1024 bytes",
    "different products": "threads of a warpgroup issue different products",
    "too many registers": "wait in setmaxnreg",
    "missing thread": "deadlock",
    "wrong phase": None,
}


@pytest.fixture(scope="module")
def products(compile_emulated):
    library = ctypes.CDLL(str(compile_emulated("faulty_sm90.so", [HERE / "faulty_sm90.cu"])))
    library.run.restype = ctypes.c_char_p
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()

    def run(fault: int, seed: int = 0, rows: int = 64):
        s, o = torch.full((2, 64, 64), torch.nan)
        error = library.run(
            *(ctypes.c_void_p(t.data_ptr()) for t in (a, b, s, o)), ctypes.c_int(rows), ctypes.c_int(fault),
            ctypes.c_int(seed),
        )  # fmt: skip
        return a.double(), b.double(), s, o, error and error.decode()

    return run


@pytest.mark.parametrize("seed", range(6))
def test_products_of_swizzled_operands(products, seed):
    a, b, s, o, error = products(NONE, seed)
    assert error is None
    torch.testing.assert_close(s.double(), a @ b.T, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(o.double(), s.bfloat16().double() @ b, atol=1e-3, rtol=1e-5)


def test_rows_outside_of_a_tensor_are_zeros(products):
    a, b, s, _, error = products(NONE, rows=50)
    assert error is None and not s[50:].any()
    torch.testing.assert_close(s[:50].double(), a[:50] @ b.T, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("number, name", [*enumerate(FAULTS, 1)], ids=FAULTS)
def test_a_fault_shows(products, number, name):
    """In every order of threads, or as numbers that are not there in at least one."""
    results = [products(number, seed) for seed in range(6)]
    printed = FAULTS[name]
    if printed is not None:
        assert all(error is not None and printed in error for *_, error in results), [r[-1] for r in results]
    elif name == "nobody waits":  # unless the copy is done at once
        assert any(error is not None and "copies are under way at the end" in error for *_, error in results)
    else:
        assert any(error is not None or o.isnan().any() for _, _, _, o, error in results)
