"""Devices, numbers and things that are no tensors, the same for every op."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.geometries import small
from wam_kernels import (
    FrameIndex,
    ada_layer_norm,
    block_attention,
    cached_attention,
    compile_plan,
    gate_residual_ada_layer_norm,
    qk_norm_rope,
    varlen_attention,
)
from wam_kernels.ops import TRITON, Backend, Op
from wam_kernels.runtime.backends import select_backend

PLAN, INDEX = compile_plan(small()), FrameIndex.from_runs([2, 3])
PAIRS = [(0, 3)]


def _block(device: str, **arguments):
    return block_attention(plan=PLAN.to(device), return_lse=True, **arguments)


def _varlen(device: str, **arguments):
    return varlen_attention(q_ranges=PAIRS, k_ranges=PAIRS, return_lse=True, **arguments)


def _cached(device: str, **arguments):
    return cached_attention(group_rows=(2, 1), return_lse=True, **arguments)


def _norm(device: str, **arguments):
    return (ada_layer_norm(index=INDEX.to(device), **arguments),)


def _gate_norm(device: str, **arguments):
    return gate_residual_ada_layer_norm(index=INDEX.to(device), **arguments)


def _rope(device: str, **arguments):
    return qk_norm_rope(head_dim=8, **arguments)


def _shapes(names: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names.split(), shape)


# the op, its shapes, and whether it is differentiable
OPS = {
    "block_attention": (_block, _shapes("q k v", 2, PLAN.length, 2, 8), True),
    "varlen_attention": (_varlen, _shapes("q k v", 4, 2, 8), True),
    "cached_attention": (
        _cached,
        _shapes("q", 2, 3, 2, 8) | _shapes("k_cache v_cache", 2, 6, 2, 8) | _shapes("ranges", 2, 2, 1, 2),
        False,
    ),
    "ada_layer_norm": (
        _norm,
        _shapes("x", 2, 5, 8) | _shapes("shift scale", 2, 2, 8) | _shapes("shift_table scale_table", 8),
        True,
    ),
    "gate_residual_ada_layer_norm": (
        _gate_norm,
        _shapes("x y", 2, 5, 8) | _shapes("gate shift scale", 2, 2, 8) | _shapes("gate_table", 8),
        True,
    ),
    "qk_norm_rope": (
        _rope,
        _shapes("q k", 2, 3, 16) | _shapes("weight_q weight_k", 16) | _shapes("table", 3, 4, 2),
        True,
    ),
    "qk_norm_rope-out": (
        lambda device, q_out, k_out, **arguments: _rope(device, out=(q_out, k_out), **arguments),
        _shapes("q k", 2, 3, 16) | _shapes("weight_q weight_k", 16) | _shapes("table", 3, 4, 2)
        | _shapes("q_out k_out", 2, 3, 2, 8),
        False,
    ),
}  # fmt: skip
each_op = pytest.mark.parametrize("name", OPS)


def make(name: str, device: str = "cpu") -> tuple[Callable, dict[str, Tensor]]:
    call, shapes, differentiable = OPS[name]
    tensors = {}
    for argument, shape in shapes.items():
        dtype = torch.int32 if argument == "ranges" else torch.float32
        requires_grad = differentiable and argument != "table"
        tensors[argument] = torch.ones(shape, dtype=dtype, device=device, requires_grad=requires_grad)
    return lambda **arguments: call(device, **(tensors | arguments)), tensors


def described(name: str, device: str, impl: str | None) -> list[tuple]:
    """Shapes and dtypes of outputs and gradients."""
    call, tensors = make(name, device)
    outputs = call(impl=impl)
    leaves = [t for t in tensors.values() if t.requires_grad]
    grads = torch.autograd.grad(sum(t.sum() for t in outputs), leaves) if leaves else []
    assert {t.device.type for t in (*outputs, *grads)} == {device}
    return [(t.shape, t.dtype) for t in (*outputs, *grads)]


@pytest.mark.parametrize("impl", [None, "reference", "triton"])
@each_op
def test_meta_device(name, impl):
    assert described(name, "meta", impl) == described(name, "cpu", None)


@pytest.mark.parametrize("device", ["xpu", "mps"])
def test_devices_without_kernels_get_the_reference(device):
    backends = {
        "reference": Backend("", (torch.float32, torch.float64)),
        "cpu": Backend("", (torch.float32,)),
        "triton": Backend("", (torch.float32,), TRITON, "D up to 128"),
    }
    row = Op("op", "op", backends, ("op",))

    def select(impl, device, dtype=torch.float32, beyond=None):
        x = SimpleNamespace(device=torch.device(device), dtype=dtype)
        return select_backend("op", row, impl, {"triton": beyond}, x=x)

    assert select(None, device) == select("reference", device) == "reference"
    assert select(None, "cuda") == "triton" and select(None, "cpu") == "cpu"
    # where the default cannot take the call
    assert select(None, "cuda", torch.float64) == select(None, "cuda", beyond="D=256") == "reference"
    for impl in ("cpu", "triton"):
        with pytest.raises(ValueError, match=f"op: impl='{impl}' needs .*, got {device}; use impl=None"):
            select(impl, device)
    with pytest.raises(ValueError, match="op: impl='triton' takes D up to 128, got D=256; use impl='reference'"):
        select("triton", "cuda", beyond="D=256")
    with pytest.raises(ValueError, match="op: x must be float32 for impl='triton', got torch.float64; use impl=None"):
        select("triton", "cuda", torch.float64)


@pytest.mark.parametrize("impl", [None, "reference", "cpu"])
def test_dtypes_that_no_backend_takes(impl):
    x = torch.ones(1, PLAN.length, 1, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"q must be bfloat16, .* got torch.int32; use q.to\(torch.bfloat16\)"):
        block_attention(x, x, x, PLAN, impl=impl)


@each_op
def test_a_dtype_that_promotes_to_none(name):
    call, tensors = make(name)
    narrow = {k: t.detach().to(torch.float8_e4m3fn) for k, t in tensors.items() if t.is_floating_point()}
    with pytest.raises(ValueError, match="must be .*, got torch.float8_e4m3fn"):
        call(**narrow)


@each_op
def test_arrays_are_no_tensors(name):
    call, tensors = make(name)
    call()
    for argument, t in tensors.items():
        got = rf"{name.removesuffix('-out')}: (out\[.\]|{argument}) must be a torch.Tensor, got"
        with pytest.raises(TypeError, match=f"{got} ndarray; use torch.from_numpy"):
            call(**{argument: t.detach().numpy()})
        with pytest.raises(TypeError, match=f"{got} list; use torch.tensor"):
            call(**{argument: t.tolist()})
    with pytest.raises(TypeError, match="must be a torch.Tensor, got NoneType"):
        call(**{next(iter(tensors)): None})


@each_op
def test_numbers(name):
    call, _ = make(name)
    argument = {"varlen_attention": "softmax_scale"}.get(name, "scale" if "attention" in name else "eps")
    for one in (1, np.int64(1), np.float32(1)):
        torch.testing.assert_close(call(**{argument: one}), call(**{argument: 1.0}), rtol=0, atol=0)
    negative = [-1e-6] if argument == "eps" else []
    for bad in (float("nan"), float("inf"), 10**400, np.float64("nan"), "1", True, torch.tensor(1.0), *negative):
        with pytest.raises(ValueError, match=rf"{name.removesuffix('-out')}: {argument} must be a (finite )?number"):
            call(**{argument: bad})


@each_op
def test_impl_is_a_name(name):
    for impl in (["cpu"], 1, "CPU"):
        with pytest.raises(ValueError, match=r": impl must be None or one of \('reference', 'cpu'"):
            make(name)[0](impl=impl)
