"""The CPU path: the whole op over one chunk of tokens after another, so that float32 temporaries stay in cache.

    forward   r = x + gate y, rounded;  n = LN(r);  h = n (1 + scale) + shift
    backward  g = dh (1 + scale);  t = dr + LN'(g; r);  dx = t;  dy = gate t
              dgate = sum t y;  dshift = sum dh;  dscale = sum dh n      over the tokens of a row of the modulation

A chunk is a few consecutive segments of equal length (``wam_kernels.frame_index``), viewed as [n, run, D]: its
modulation is [n, 1, D] and broadcasts, its sums over dim 1 are [n, D] and are added to their rows in order. Nothing is saved
between forward and backward but inputs and r, and nothing of the size of x is allocated but outputs. Work is float32
(float64 for float64).

B batch elements, S tokens, F rows of the modulation, D channels.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from . import config


def _chunks(segments: Tensor, D: int) -> Iterator[tuple[slice, tuple[int, int, int], Tensor]]:
    """Tokens of each chunk, the shape that splits them into its segments, and the segments' rows."""
    first, end, row = segments.numpy().T
    if first.size == 0:
        return
    run = end - first
    budget = config.CPU_CHUNK * torch.get_num_threads()
    starts = np.flatnonzero(np.diff(run, prepend=-1))
    rows = torch.from_numpy(row.astype(np.int64))
    for a, b in zip(starts, np.append(starts[1:], run.size), strict=True):
        length = int(run[a])
        step = max(1, budget // (length * D))
        for i in range(a, b, step):
            j = min(i + step, b)
            yield slice(int(first[i]), int(end[j - 1])), (int(j - i), length, D), rows[i:j]


def _modulation(rows_FD: Tensor, table_D: Tensor | None, rows: Tensor) -> Tensor:
    """``[n, 1, D]`` for the rows of a chunk."""
    value = rows_FD.index_select(0, rows)
    return (value if table_D is None else value.add_(table_D))[:, None]


def forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    gate_table: Tensor | None, shift_table: Tensor | None, scale_table: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, segments: Tensor, eps: float,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    B, _, D = x.shape
    acc = torch.promote_types(x.dtype, torch.float32)
    if weight is not None:
        weight, bias = weight.to(acc), bias.to(acc)
    r = None if y is None else x.new_empty(x.shape)
    h = None if scale is None and weight is None else x.new_empty(x.shape)
    for tokens, shape, rows in _chunks(segments, D):
        for b in range(B):
            row = x[b, tokens]
            if y is not None:
                row = _add_update(row, y[b, tokens], gate, gate_table, b, rows, shape, acc, out=r[b, tokens])
            if h is None:
                continue
            normed, _, _ = torch.native_layer_norm(row.to(acc), (D,), weight, bias, eps)
            if weight is not None:
                h[b, tokens] = normed
                continue
            factor = 1 + _modulation(scale[b], scale_table, rows)
            shift_n1D = _modulation(shift[b], shift_table, rows)
            torch.addcmul(shift_n1D, normed.view(shape), factor, out=h[b, tokens].view(shape))
    return r, h


def _add_update(row, y, gate, gate_table, b, rows, shape, acc, out: Tensor) -> Tensor:
    if gate is None:
        return torch.add(row, y, out=out)
    row, y = (t.to(acc).view(shape) for t in (row, y))
    torch.addcmul(row, y, _modulation(gate[b], gate_table, rows), out=out.view(shape))
    return out


def backward(
    dr: Tensor | None, dh: Tensor | None, r: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, gate_table: Tensor | None, scale_table: Tensor | None, weight: Tensor | None,
    segments: Tensor, row_begin: Tensor, eps: float,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx, dy, dgate, dshift, dscale, dweight, dbias as in ``kernel_triton.backward``."""
    like = dr if dh is None else dh
    B, _, D = like.shape
    acc = torch.promote_types(like.dtype, torch.float32)

    def zeros(wanted: bool, *shape: int) -> Tensor | None:
        return like.new_zeros(shape, dtype=acc) if wanted else None

    adaptive, affine, gated = dh is not None and scale is not None, dh is not None and scale is None, gate is not None
    F = row_begin.shape[0] - 1
    dgate, dshift, dscale = zeros(gated, B, F, D), zeros(adaptive, B, F, D), zeros(adaptive, B, F, D)
    dweight, dbias = zeros(affine, D), zeros(affine, D)
    dx = None if dh is None else like.new_empty(like.shape)
    dy = None if gate is None else like.new_empty(like.shape)
    if affine:
        weight = weight.to(acc)
    for tokens, shape, rows in _chunks(segments, D):
        for b in range(B):
            total = None if dr is None else dr[b, tokens].to(acc)
            if dh is not None:
                g, row = dh[b, tokens].to(acc), r[b, tokens].to(acc)
                normed, mean, rstd = torch.native_layer_norm(row, (D,), None, None, eps)
                normed *= g
                if adaptive:
                    dshift[b].index_add_(0, rows, g.view(shape).sum(1))
                    dscale[b].index_add_(0, rows, normed.view(shape).sum(1))
                    g = (g.view(shape) * (1 + _modulation(scale[b], scale_table, rows))).view(row.shape)
                else:
                    dbias += g.sum(0)
                    dweight += normed.sum(0)
                    g = g * weight
                through = torch.ops.aten.native_layer_norm_backward(
                    g, row, (D,), mean, rstd, None, None, [True, False, False]
                )[0]
                total = through if total is None else through.add_(total)
                dx[b, tokens] = total
            if gated:
                total = total.view(shape)
                torch.mul(total, _modulation(gate[b], gate_table, rows), out=dy[b, tokens].view(shape))
                dgate[b].index_add_(0, rows, (total * y[b, tokens].view(shape)).sum(1))
    return dx, dy, dgate, dshift, dscale, dweight, dbias
