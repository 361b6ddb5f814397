"""The error budgets of float32 hold with the arithmetic of tensor cores, which the interpreter's own products lack.

Triton makes a float32 product of three of tf32 (10 bits after the leading one), and a tensor core cuts its float32 sums
off where an adder would round. The error is therefore a few times that of a float32 product, and of one sign.
"""

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from tests.block_attention import checks as block_attention
from tests.cached_attention import checks as cached_attention

K = 8  # what one instruction adds up before it cuts off


def tf32(x: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties away from zero, as ``cvt.rna.tf32.f32``."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x1000) >> 13 << 13).astype(np.uint32).view(np.float32).reshape(x.shape)


def towards_zero(x: np.ndarray) -> np.ndarray:
    """float64 to float32."""
    nearest = x.astype(np.float32)
    return np.where(np.abs(nearest) > np.abs(x), np.nextafter(nearest, np.float32(0)), nearest)


def multiply(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    for k in range(0, a.shape[1], K):
        total = towards_zero(total + a[:, k : k + K].astype(np.float64) @ b[k : k + K].astype(np.float64))
    return total


@pytest.fixture(params=[3, 1])
def products(request, monkeypatch) -> int:
    """How many tf32 products make one of float32."""

    def create_dot(self, a, b, acc, *rest):
        assert a.data.dtype == b.data.dtype == np.float32
        a_high, b_high = tf32(a.data), tf32(b.data)
        total = np.zeros_like(acc.data)
        if request.param == 3:
            total = multiply(tf32(a.data - a_high), b_high, total)
            total = multiply(a_high, tf32(b.data - b_high), total)
        return interpreter.TensorHandle(multiply(a_high, b_high, total) + acc.data, acc.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    return request.param


def check(products: int, call) -> None:
    if products == 3:
        call()
    else:
        # the budget is no formality: a single product misses it
        with pytest.raises(AssertionError, match="exceeds"):
            call()


@pytest.mark.parametrize("D", [64, 128])
def test_block_attention(products, D):
    plan = block_attention.ragged_plan()
    inputs = block_attention.make_inputs(plan, plan.batch, 1, D, torch.float32)
    check(products, lambda: block_attention.check_against_reference(plan, inputs, "triton"))


def test_cached_attention(products):
    ranges = [[(90, 216), (0, 80), (216, 230)], [(90, 216), (216, 230)]]
    case = cached_attention.Case([ranges], (40, 16), 230, H=1, D=128)
    check(products, lambda: cached_attention.check_against_reference(case, "triton"))
