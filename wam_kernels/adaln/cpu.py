"""The CPU path: the whole op over one chunk of tokens after another, so that float32 temporaries stay in cache.

    forward   r = x + gate y, rounded;  n = LN(r);  h = n (1 + scale) + shift
    backward  g = dh (1 + scale);  t = dr + LN'(g; r);  dx = t;  dy = gate t
              dgate = sum t y;  dshift = sum dh;  dscale = sum dh n      over the tokens of a row of the modulation

A chunk is n runs of one length, viewed as [n, run, D]: either a piece of one long run (n = 1), where 1 + scale and
shift are simply the weight and bias of PyTorch's LayerNorm, or many short runs, whose modulation [n, 1, D] broadcasts.
Sums over dim 1 are [n, D] and are added to their rows in order. Nothing is saved between forward and backward but
inputs and r, and nothing of the size of x is allocated but outputs. Work is float32 (float64 for float64).

B batch elements, S tokens, F rows of the modulation, D channels.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from . import config

Chunk = tuple[slice, tuple[int, int, int], Tensor]


def _starts(values: np.ndarray) -> np.ndarray:
    """Where each stretch of equal values begins."""
    return np.append(0, np.flatnonzero(values[1:] != values[:-1]) + 1)


def _chunks(row_of_token: Tensor, D: int) -> Iterator[Chunk]:
    """Tokens of each chunk, its shape [n, run, D], and the rows of its n runs."""
    rows_S = row_of_token.numpy()
    threads = torch.get_num_threads()
    tokens = max(1, config.CPU_CHUNK * threads // D)
    if rows_S.size == 0:
        return
    first = _starts(rows_S)
    run = np.append(first[1:], rows_S.size) - first
    row = torch.from_numpy(rows_S[first].astype(np.int64))
    # neighbouring runs of one length go together, as many as fit
    group = _starts(run).tolist()
    for i, end in zip(group, [*group[1:], run.size], strict=True):
        length = int(run[i])
        if length * D >= config.CPU_LONG_RUN * threads:
            for k in range(i, end):
                for a in range(int(first[k]), int(first[k]) + length, tokens):
                    b = min(a + tokens, int(first[k]) + length)
                    yield slice(a, b), (1, b - a, D), row[k : k + 1]
            continue
        step = max(1, tokens // length)
        for k in range(i, end, step):
            n = min(step, end - k)
            yield slice(int(first[k]), int(first[k]) + n * length), (n, length, D), row[k : k + n]


def _modulation(rows_FD: Tensor, table_D: Tensor | None, rows: Tensor) -> Tensor:
    """``[n, 1, D]`` for the runs of a chunk."""
    value = rows_FD.index_select(0, rows)
    return (value if table_D is None else value.add_(table_D))[:, None]


def forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    gate_table: Tensor | None, shift_table: Tensor | None, scale_table: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, row_of_token: Tensor, eps: float,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """r (None without y) and h (None without a norm)."""
    B, _, D = x.shape
    acc = torch.promote_types(x.dtype, torch.float32)
    r = None if y is None else x.new_empty(x.shape)
    h = None if scale is None and weight is None else x.new_empty(x.shape)
    if weight is not None:
        weight, bias = weight.to(acc), bias.to(acc)
    for tokens, shape, rows in _chunks(row_of_token, D):
        for b in range(B):
            row = x[b, tokens]
            if gate is not None:
                update, factor = y[b, tokens].to(acc).view(shape), _modulation(gate[b], gate_table, rows)
                out = r[b, tokens]
                torch.addcmul(row.to(acc).view(shape), update, factor, out=out.view(shape))
                row = out
            elif y is not None:
                row = torch.add(row, y[b, tokens], out=r[b, tokens])
            if h is None:
                continue
            if scale is not None:
                factor, offset = 1 + _modulation(scale[b], scale_table, rows), _modulation(shift[b], shift_table, rows)
                weight, bias = (factor[0, 0], offset[0, 0]) if shape[0] == 1 else (None, None)
            normed, _, _ = torch.native_layer_norm(row.to(acc), (D,), weight, bias, eps)
            if weight is None:
                torch.addcmul(offset, normed.view(shape), factor, out=h[b, tokens].view(shape))
            else:
                h[b, tokens] = normed
    return r, h


def backward(
    dr: Tensor | None, dh: Tensor | None, r: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, gate_table: Tensor | None, scale_table: Tensor | None, weight: Tensor | None,
    row_of_token: Tensor, row_begin: Tensor, eps: float,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx, dy, dgate, dshift, dscale, dweight, dbias, as in ``kernel_triton.backward``."""
    like = dr if dh is None else dh
    B, _, D = like.shape
    F = row_begin.shape[0] - 1
    acc = torch.promote_types(like.dtype, torch.float32)
    adaptive, affine = dh is not None and scale is not None, dh is not None and scale is None

    def zeros(wanted: bool, *shape: int) -> Tensor | None:
        return like.new_zeros(shape, dtype=acc) if wanted else None

    dgate, dshift, dscale = zeros(gate is not None, B, F, D), zeros(adaptive, B, F, D), zeros(adaptive, B, F, D)
    dweight, dbias = zeros(affine, D), zeros(affine, D)
    dx = None if dh is None else like.new_empty(like.shape)
    dy = None if gate is None else like.new_empty(like.shape)
    if affine:
        weight = weight.to(acc)
    for tokens, shape, rows in _chunks(row_of_token, D):
        for b in range(B):
            total = None if dr is None else dr[b, tokens]
            if dh is not None:
                g, row = dh[b, tokens].to(acc), r[b, tokens].to(acc)
                # PyTorch's backward multiplies the mean out and loses digits where it is large: take it off before
                row = row - row.mean(-1, keepdim=True)
                normed, mean, rstd = torch.native_layer_norm(row, (D,), None, None, eps)
                if adaptive:
                    factor = 1 + _modulation(scale[b], scale_table, rows)
                    weight = factor[0, 0] if shape[0] == 1 else None
                fused = weight is not None
                if not fused:
                    dshift[b].index_add_(0, rows, g.view(shape).sum(1))
                    dscale[b].index_add_(0, rows, normed.mul_(g).view(shape).sum(1))
                    g = (g.view(shape) * factor).view(row.shape)
                # the bias gives no more than its shape
                through, dw, db = torch.ops.aten.native_layer_norm_backward(
                    g, row, (D,), mean, rstd, weight, weight, [True, fused, fused]
                )
                if fused:
                    (dweight if affine else dscale[b, rows[0]]).add_(dw)
                    (dbias if affine else dshift[b, rows[0]]).add_(db)
                # the gate below takes what is not rounded: in half precision that is not dx itself
                out = dx[b, tokens] if acc == dx.dtype else through
                total = out.copy_(through) if total is None else torch.add(through, total, out=out)
                if out is through:
                    dx[b, tokens] = total
            if gate is not None:
                total = total.to(acc).view(shape)
                torch.mul(total, _modulation(gate[b], gate_table, rows), out=dy[b, tokens].view(shape))
                dgate[b].index_add_(0, rows, (total * y[b, tokens].view(shape)).sum(1))
    return dx, dy, dgate, dshift, dscale, dweight, dbias
