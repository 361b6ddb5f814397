"""Small calls on a CPU: PyTorch's own ops at the least cost of a call.

There a call costs more than its arithmetic. So :func:`takes` is one quick look, and what it does not take goes the long
way: full checks with their errors, the choice of a backend, the registered op.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from ..runtime.host import host_side
from .config import MAX_D

# x, y, gate, shift, scale, gate_table, shift_table, scale_table, weight, bias
_Given = Tensor | None
Tensors = tuple[Tensor, _Given, _Given, _Given, _Given, _Given, _Given, _Given, _Given, _Given]

_KINDS = Tensor, nn.Parameter  # no other subclass: a fake tensor has a long way of its own
# of x: those of the modulation, of which the first is what is computed in
_OF_ROWS = torch.float32, torch.bfloat16, torch.float16
_DTYPES = {torch.float64: (torch.float64,), **dict.fromkeys(_OF_ROWS, _OF_ROWS)}

# Elements of a sample from which a norm for each sample costs less than another pass over all of them.
_LONG = 2**17


def takes(tensors: Tensors, tokens: int, rows: int, eps: float, most: int) -> bool:
    """Whether :func:`forward` takes a call: outside a graph, on a CPU, and all goes together.

    Of up to ``most`` elements of a sample, and of any size where there is no more than one LayerNorm for a sample.
    """
    x, y, gate, shift, scale, gate_table, shift_table, scale_table, weight, bias = tensors
    if torch.compiler.is_compiling() or type(x) not in _KINDS or not x.is_cpu:
        return False
    dtype, shape = x.dtype, x.shape
    if len(shape) != 3 or dtype not in _DTYPES or type(eps) is not float or not 0 <= eps < 1:
        return False
    (B, S, D), one_norm = shape, y is None and rows == 1
    if S != tokens or D % 8 or not 8 <= D <= MAX_D or S * D > most and not one_norm or not x.numel():
        return False
    if (scale is None) != (shift is None) or (weight is None) != (bias is None) or y is None and gate is not None:
        return False
    if weight is not None if scale is not None else not (y is not None and shift_table is scale_table is None):
        return False
    of_rows, of_channels, same, floats = (B, rows, D), (D,), (dtype,), _DTYPES[dtype]
    for t, wanted, dtypes in (
        (shift, of_rows, floats), (scale, of_rows, floats), (gate, of_rows, floats), (y, shape, same),
        (gate_table, of_channels, floats), (shift_table, of_channels, floats), (scale_table, of_channels, floats),
        (weight, of_channels, (floats[0], dtype)), (bias, of_channels, (floats[0], dtype)),
    ):  # fmt: skip
        if t is not None and (
            type(t) not in _KINDS or t.shape != wanted or t.dtype not in dtypes or not t.is_cpu or t.stride(-1) != 1
        ):
            return False
    if shift is not None and scale is not None and shift.dtype is not scale.dtype:
        return False
    if gate is None and gate_table is not None or torch._C._are_functorch_transforms_active():
        return False
    # the strides of these are those of results
    return x.is_contiguous() and (y is None or y.is_contiguous())


def forward(
    tensors: Tensors, row_of_token: Tensor | None, tokens_a_row: int, eps: float
) -> tuple[Tensor, Tensor | None]:
    """As ``reference.gate_residual_norm``."""
    x, y, gate, shift, scale, gate_table, shift_table, scale_table, weight, bias = tensors
    shape, dtype, rows = x.shape, x.dtype, scale if gate is None else gate
    D, acc = shape[-1], _DTYPES[dtype][0]
    # a row of some tokens gets a dim of its own; one row of all, or of each token, is broadcast as it is
    frames = tokens_a_row > 1 and rows is not None and rows.shape[1] > 1
    tokens = (shape[0], -1, tokens_a_row, D) if frames else shape

    def of_token(rows_BFD: Tensor) -> Tensor:
        if not tokens_a_row and row_of_token is not None:
            return rows_BFD.index_select(1, row_of_token)
        return rows_BFD.unsqueeze(2) if frames else rows_BFD

    def split(t: Tensor) -> Tensor:
        return t.view(tokens) if frames else t

    def joined(t: Tensor) -> Tensor:
        return _in(t.view(shape) if frames else t, dtype)

    if y is not None:
        if gate is None:
            x = x + y
        else:
            gates = of_token(_plus(gate, gate_table, acc))
            x = joined(_sum(split(_in(x, acc)), split(_in(y, acc)), gates))
    # the norm is of r as it was rounded
    row = _in(x, acc)
    if weight is not None and bias is not None:
        return x, _in(torch.layer_norm(row, (D,), _in(weight, acc), _in(bias, acc), eps), dtype)
    if scale is None or shift is None:
        return x, None
    factor, offset = _plus(scale, scale_table, acc) + 1, _plus(shift, shift_table, acc)
    if factor.numel() == D:  # PyTorch's affine norm is as fast as any
        return x, _in(torch.layer_norm(row, (D,), factor.view(D), offset.reshape(D), eps), dtype)
    if factor.shape[1] == 1 and shape[1] * D > _LONG:
        samples = zip(row, factor.squeeze(1), offset.squeeze(1), strict=True)
        return x, _in(torch.stack([torch.layer_norm(t, (D,), w, b, eps) for t, w, b in samples]), dtype)
    # with a weight, be it of ones, PyTorch's loop is vectorised: 1.7 to 2.0 times as fast as without (2.13)
    normed = split(torch.layer_norm(row, (D,), _ones(D, acc), None, eps))
    return x, joined(_sum(of_token(offset), normed, of_token(factor), normed))


def _in(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, which costs a call of PyTorch where nothing is to be done."""
    return t if t.dtype is dtype else t.to(dtype)


def _plus(rows: Tensor, table: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows = _in(rows, dtype)
    return rows if table is None else rows + _in(table, dtype)


def _sum(a: Tensor, b: Tensor, c: Tensor, out: Tensor | None = None) -> Tensor:
    """``a + b c``, contiguous like ``b``; into ``out`` where there is no graph."""
    if torch.is_grad_enabled():
        # the backward of addcmul is a pass longer for each of b and c
        return (b * c).add_(a)
    return torch.addcmul(a, b, c, out=out)


@lru_cache(maxsize=64)
@host_side
def _ones(D: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(D, dtype=dtype)
