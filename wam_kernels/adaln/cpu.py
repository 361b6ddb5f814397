"""The CPU path: PyTorch's own loops over chunks of tokens, so that float32 temporaries stay in cache.

    forward   r = x + gate y, rounded;  n = LN(r);  h = n (1 + scale) + shift
    backward  c = r - mean(r);  g = dh (1 + scale);  t = dr + LN'(g; c);  dx = t;  dy = gate t
              dgate = sum t y;  dshift = sum dh;  dscale = sum dh c rstd      over the tokens of a row of the modulation

A chunk is n runs of equally many tokens, viewed as [b, n, run, D], so that the modulation [b, n, 1, D] broadcasts and
sums over a run are sums over dim 2. Small tensors are one chunk, batch and all. A long run is a chunk of its own (or
several): then 1 + scale and shift are simply the weight and bias of PyTorch's LayerNorm. Sums are added to their rows
in order. Nothing is saved between forward and backward but inputs and r, and nothing of the size of x is allocated but
outputs. Work is float32 (float64 for float64).

B batch elements, S tokens, F rows of the modulation, D channels.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import config

_ALL = slice(None)


class _Chunk(NamedTuple):
    batch: slice
    tokens: slice
    shape: tuple[int, int, int, int]  # b, n, run, D
    rows: slice | Tensor  # of the n runs
    whole: bool  # the chunk is all there is
    full: bool  # all tokens of its rows are in it

    def of(self, t: Tensor) -> Tensor:
        """The chunk of a tensor [B, S, D], as [b, n, run, D]."""
        return (t if self.whole else t[self.batch, self.tokens]).view(self.shape)

    def of_rows(self, t: Tensor) -> Tensor:
        """The chunk's rows of a modulation [B, F, D], as [b, n, 1, D], float32 at least."""
        if isinstance(self.rows, Tensor):
            rows = t[self.batch].index_select(1, self.rows)
        else:
            rows = t if self.whole else t[self.batch, self.rows]
        return _accurate(rows.unsqueeze(2))

    def added_to_rows(self, total: Tensor | None, value: Tensor, like: Tensor | None) -> Tensor:
        """A sum [B, F, D], None for zeros, with [b, n, D], or [D] of one run, added to the chunk's rows.

        The sum is for the rows ``like``: in their dtype where no row is added to twice, else float32 at least.
        """
        value = value.view(*self.shape[:2], -1)
        if self.whole:
            return value
        if total is None:
            assert like is not None
            total = value.new_zeros(like.shape, dtype=like.dtype if self.full else value.dtype)
        if isinstance(self.rows, Tensor):
            total[self.batch].index_add_(1, self.rows, value)
        elif self.full:
            total[self.batch, self.rows] = value
        else:
            total[self.batch, self.rows].add_(value)
        return total


def _accurate(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _starts(values: np.ndarray) -> np.ndarray:
    """Where each stretch of equal values begins."""
    return np.append(0, np.flatnonzero(values[1:] != values[:-1]) + 1)


def _groups(row_of_token: Tensor, run: int, F: int) -> Iterator[tuple[int, int, int, slice | Tensor]]:
    """Neighbouring runs of one length: first token, number of runs, their length, their rows."""
    if run:
        yield 0, F, run, slice(0, F)
        return
    rows_S = row_of_token.numpy()
    first = _starts(rows_S)
    length = np.append(first[1:], rows_S.size) - first
    rows = torch.from_numpy(rows_S[first].astype(np.int64))
    group = _starts(length).tolist()
    for i, end in zip(group, [*group[1:], length.size], strict=True):
        yield int(first[i]), end - i, int(length[i]), rows[i:end]


def _chunks(like: Tensor, row_of_token: Tensor, run: Tensor, F: int) -> Iterator[_Chunk]:
    B, S, D = like.shape
    if like.numel() == 0:
        return
    threads = torch.get_num_threads()
    most = max(1, config.CPU_CHUNK * threads // D)
    in_order = int(run.item()) > 0
    for first, count, length, rows in _groups(row_of_token, int(run.item()), F):
        long = length * D >= config.CPU_LONG_RUN * threads
        if not long and B * count * length <= most:
            tokens = slice(first, first + count * length)
            whole = count * length == S and isinstance(rows, slice)
            yield _Chunk(_ALL, tokens, (B, count, length, D), rows, whole, in_order)
            continue
        # whole runs together, as many as fit, or one run in pieces
        runs, piece = (1, min(length, most)) if long or length > most else (most // length, length)
        for b in range(B):
            for k in range(0, count, runs):
                n = min(runs, count - k)
                of_runs = slice(k, k + n) if isinstance(rows, slice) else rows[k : k + n]
                start = first + k * length
                for i in range(0, length, piece):
                    m = min(piece, length - i)
                    tokens = slice(start + i, start + i + m) if n == 1 else slice(start, start + n * length)
                    full = in_order and m == length
                    yield _Chunk(slice(b, b + 1), tokens, (1, n, m, D), of_runs, False, full)


def forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    gate_table: Tensor | None, shift_table: Tensor | None, scale_table: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, row_of_token: Tensor, run: Tensor, eps: float,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """r (None without y) and h (None without a norm)."""
    D = x.shape[-1]
    acc = torch.promote_types(x.dtype, torch.float32)
    r = None if y is None else x.new_empty(x.shape)
    h = None if scale is None and weight is None else x.new_empty(x.shape)
    if weight is not None and bias is not None:
        weight, bias = weight.to(acc), bias.to(acc)
    rows = scale if gate is None else gate
    one = 1 if scale_table is None else 1 + _accurate(scale_table)
    for chunk in _chunks(x, row_of_token, run, 0 if rows is None else rows.shape[1]):
        row = chunk.of(x)
        if y is not None and r is not None:
            update, out = chunk.of(y), chunk.of(r)
            if gate is None:
                row = torch.add(row, update, out=out)
            else:
                gates = _plus(chunk.of_rows(gate), gate_table)
                row = torch.addcmul(row.to(acc), update.to(acc), gates, out=out)
        if h is None:
            continue
        factor = offset = None
        if scale is not None and shift is not None:
            factor, offset = chunk.of_rows(scale) + one, _plus(chunk.of_rows(shift), shift_table)
            weight, bias = (factor.view(D), offset.reshape(D)) if factor.numel() == D else (None, None)
        normed = torch.native_layer_norm(row.to(acc), (D,), weight, bias, eps)[0]
        whole = chunk.whole and acc == x.dtype
        if weight is None and factor is not None and offset is not None:
            torch.addcmul(offset, normed, factor, out=normed if whole else chunk.of(h))
        elif not whole:
            chunk.of(h).copy_(normed)
        if whole:
            h = normed.view(x.shape)
    return r, h


def _plus(rows: Tensor, table: Tensor | None) -> Tensor:
    return rows if table is None else rows + table


def backward(
    dr: Tensor | None, dh: Tensor | None, r: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, gate_table: Tensor | None, scale_table: Tensor | None, weight: Tensor | None,
    row_of_token: Tensor, row_begin: Tensor, run: Tensor, eps: float, token_rows: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx, dy, dgate, dshift, dscale, dweight, dbias, as in ``kernel_triton.backward``."""
    like = dr if dh is None else dh
    assert like is not None
    B, _, D = like.shape
    F = row_begin.shape[0] - 1
    acc = torch.promote_types(like.dtype, torch.float32)
    adaptive, affine = dh is not None and scale is not None, dh is not None and scale is None

    def zeros(*shape: int) -> Tensor:
        return like.new_zeros(shape, dtype=acc)

    dgate = dshift = dscale = None
    if like.numel() == 0:
        dgate, dshift, dscale = (zeros(B, F, D) for _ in range(3))
    # dshift is dh where every token has a row of its own
    sums_shift = adaptive and not token_rows
    dweight, dbias = (zeros(D), zeros(D)) if affine else (None, None)
    dx = None if dh is None else like.new_empty(like.shape)
    dy = None if gate is None else like.new_empty(like.shape)
    weight = weight.to(acc) if weight is not None and affine else None
    one = 1 + _accurate(scale_table) if adaptive and scale_table is not None else 1
    for chunk in _chunks(like, row_of_token, run, F):
        # outputs are then the buffers that were worked in
        whole = chunk.whole and acc == like.dtype
        total = None if dr is None else chunk.of(dr)
        if dh is not None:
            assert r is not None and dx is not None
            # PyTorch's backward multiplies the mean out and loses digits where it is large: take it off before
            row, g = chunk.of(r).to(acc), chunk.of(dh).to(acc)
            row = row - row.mean(-1, keepdim=True)
            rstd = torch.linalg.vector_norm(row, dim=-1, keepdim=True).square_().div_(D).add_(eps).rsqrt_()
            factor = None if scale is None else chunk.of_rows(scale) + one
            if factor is not None and factor.numel() > D:
                if sums_shift:
                    dshift = chunk.added_to_rows(dshift, g.sum(2), scale)
                product = torch.mul(g, row)
                dscale = chunk.added_to_rows(dscale, product.mul_(rstd).sum(2), scale)
                through = _layer_norm_backward(torch.mul(g, factor, out=product), row, rstd, None)[0]
            else:
                through, dw, db = _layer_norm_backward(g, row, rstd, weight if factor is None else factor.view(D))
                if factor is not None:
                    dscale = chunk.added_to_rows(dscale, dw, scale)
                    dshift = chunk.added_to_rows(dshift, db, scale) if sums_shift else None
                else:
                    assert dweight is not None and dbias is not None
                    dweight += dw
                    dbias += db
            # the gate below takes what is not rounded: in half precision that is not dx itself
            if whole:
                total = through if total is None else through.add_(total)
                dx = total.view(dx.shape)
            else:
                out = chunk.of(dx) if acc == dx.dtype else through
                total = out.copy_(through) if total is None else torch.add(through, total, out=out)
                if out is through:
                    chunk.of(dx).copy_(total)
        if gate is not None:
            assert total is not None and y is not None and dy is not None
            total = total.to(acc)
            product = total * chunk.of(y)
            dgate = chunk.added_to_rows(dgate, product.sum(2), gate)
            factor = _plus(chunk.of_rows(gate), gate_table)
            out = torch.mul(total, factor, out=product if whole else chunk.of(dy))
            dy = out.view(like.shape) if whole else dy
    dgate, dshift, dscale = (
        g if g is None or rows is None else g.to(rows.dtype)
        for g, rows in ((dgate, gate), (dshift, scale), (dscale, scale))
    )
    return dx, dy, dgate, dshift, dscale, dweight, dbias


def _layer_norm_backward(g: Tensor, centred: Tensor, rstd: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of the input, and with a weight of it and of the bias, at rows whose mean is 0."""
    wanted = [True, weight is not None, weight is not None]
    # the bias gives no more than its shape
    return torch.ops.aten.native_layer_norm_backward.default(
        g, centred, (g.shape[-1],), torch.zeros_like(rstd), rstd, weight, weight, wanted
    )
