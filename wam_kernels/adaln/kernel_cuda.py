"""Gated residual and adaptive LayerNorm, the CUDA kernels.

``csrc/adaln/kernels.cu`` has the formulas and what a block owns.
Tensors go to the extension as (address, batch stride, row stride), absent ones as zeros. Launched on the current stream
of their device; errors come from csrc and name the argument.
"""

import torch
from torch import Tensor

from ..runtime import cuda
from . import config

_ABSENT = (0, 0, 0)


def _rows(name: str, t: Tensor | None) -> tuple[int, int, int]:
    if t is None:
        return _ABSENT
    if t.stride(-1) != 1:
        raise ValueError(
            f"adaln (impl='cuda'): {name} must have last-dim stride 1, got {t.stride(-1)}; pass a contiguous copy"
        )
    return t.data_ptr(), t.stride(0), t.stride(1)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _float(t: Tensor | None) -> Tensor | None:
    """A norm's weight or bias may have the dtype of x, a table of the modulation any dtype."""
    return None if t is None else t.float().contiguous()


def _modulation(name: str, t: Tensor | None) -> tuple[int, int, int]:
    if t is not None and t.dtype != torch.float32:
        raise ValueError(
            f"adaln (impl='cuda'): {name} must be torch.float32, got {t.dtype}; use impl='triton', or {name}.float()"
        )
    return _rows(name, t)


def forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    gate_table: Tensor | None, shift_table: Tensor | None, scale_table: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, row_of_token: Tensor, eps: float,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """r (None without y) and h (None without a norm), ``[B, S, D]`` contiguous. One launch."""
    B, S, D = x.shape
    rows = scale if gate is None else gate
    r = None if y is None else x.new_empty(x.shape)
    h = None if scale is None and weight is None else x.new_empty(x.shape)
    weight, bias, gate_table, shift_table, scale_table = map(
        _float, (weight, bias, gate_table, shift_table, scale_table)
    )
    cuda.launch(
        "adaln_forward", x, shape=(B, S, 0 if rows is None else rows.shape[1], D),
        x=_rows("x", x), y=_rows("y", y), gate=_modulation("gate", gate), shift=_modulation("shift", shift),
        scale=_modulation("scale", scale), gate_table=_address(gate_table), shift_table=_address(shift_table),
        scale_table=_address(scale_table), weight=_address(weight), bias=_address(bias),
        row_of_token=_address(row_of_token), r=_rows("r", r), h=_rows("h", h), has_norm=h is not None,
        tokens_per_block=config.tokens_of_program(B * S), eps=eps,
    )  # fmt: skip
    return r, h


def backward(
    dr: Tensor | None, dh: Tensor | None, r: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, gate_table: Tensor | None, scale_table: Tensor | None, weight: Tensor | None,
    segments: Tensor, row_begin: Tensor, row_segments: Tensor, eps: float, token_rows: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx, dy ``[B, S, D]``; dgate, dshift, dscale ``[B, F, D]`` and dweight, dbias ``[D]`` float32; None if absent.

    dx is None where dh is (it equals dr then), dy where gate is (it equals dx). Without dh, r, scale and weight take no
    part. Two launches, three with weight and gate; all rows and sums are written, ``token_rows`` or not.
    """
    like = dr if dh is None else dh
    assert like is not None
    B, S, D = like.shape
    N, F = segments.shape[0], row_begin.shape[0] - 1
    if dh is None:
        r = scale = scale_table = weight = None
    adaptive, affine = scale is not None, weight is not None

    def sums(*shape: int) -> Tensor:
        return like.new_empty(shape, dtype=torch.float32)

    dx = None if dh is None else like.new_empty(like.shape)
    dy = None if gate is None else like.new_empty(like.shape)
    dgate = None if gate is None else sums(B, F, D)
    dshift, dscale = (sums(B, F, D) if adaptive else None for _ in range(2))
    dweight, dbias = (sums(D) if affine else None for _ in range(2))
    partials = sums(B, N, (gate is not None) + 2 * (dh is not None), D)
    weight, gate_table, scale_table = map(_float, (weight, gate_table, scale_table))
    cuda.launch(
        "adaln_backward", like, shape=(B, S, F, D),
        dr=_rows("dr", dr), dh=_rows("dh", dh), r=_rows("r", r), y=_rows("y", None if gate is None else y),
        gate=_rows("gate", gate), scale=_rows("scale", scale), gate_table=_address(gate_table),
        scale_table=_address(scale_table), weight=_address(weight), segments=_address(segments), segment_count=N,
        row_begin=_address(row_begin), row_segments=_address(row_segments), dx=_rows("dx", dx), dy=_rows("dy", dy),
        dgate=_address(dgate), dshift=_address(dshift), dscale=_address(dscale), dweight=_address(dweight),
        dbias=_address(dbias), partials=_address(partials), has_norm=dh is not None, eps=eps,
    )  # fmt: skip
    return dx, dy, dgate, dshift, dscale, dweight, dbias
