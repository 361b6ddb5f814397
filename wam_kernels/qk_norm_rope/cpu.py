"""The CPU path: the same formulas over chunks of rows that stay in cache, no float32 copy of q or k, no graph.

    forward   xh = x rstd;  y = R(xh w);  rstd = (mean(x^2) + eps)^-1/2;  R turns pairs by the table's angles
    backward  dn = R^T(dy);  dw = sum dn xh;  dx = rstd (dn w - xh mean(dn w xh))

Chunks are visited in order, so weight gradients sum in the same order every time (with as many threads: they set the
size of a chunk). Work is float32 (float64 for float64) in buffers that all chunks share; results are rounded when they
are copied out.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .config import CPU_CHUNK


def _chunk_rows(x: Tensor) -> int:
    # every operation splits its chunk over all threads: the cache and the cost of a barrier are theirs together
    return max(1, CPU_CHUNK * torch.get_num_threads() // x.shape[-1])


def _chunks(x: Tensor) -> Iterator[tuple[int, slice]]:
    """(batch element, tokens) of every chunk."""
    B, S, _ = x.shape
    step = _chunk_rows(x)
    for b in range(B):
        for start in range(0, S, step):
            yield b, slice(start, min(start + step, S))


def _buffers(x: Tensor, head_dim: int, count: int) -> tuple[Tensor, ...]:
    _, S, inner = x.shape
    acc = torch.promote_types(x.dtype, torch.float32)
    rows = min(S, _chunk_rows(x))
    return tuple(x.new_empty((rows, inner // head_dim, head_dim), dtype=acc) for _ in range(count))


def _rstd(x_nHD: Tensor, per_head: bool, eps: float) -> Tensor:
    """``[n, H, 1]`` or ``[n, 1, 1]``."""
    dims = (-1,) if per_head else (-2, -1)
    n = x_nHD.shape[-1] * (1 if per_head else x_nHD.shape[-2])
    norm = torch.linalg.vector_norm(x_nHD, dim=dims, keepdim=True)
    return norm.square_().div_(n).add_(eps).rsqrt_()


def _rotate(x_nHD: Tensor, scratch_nHD: Tensor, table_nP2: Tensor, interleaved: bool, back: bool) -> None:
    """Turn the pairs of ``x`` in place, by the angles or ``back`` by their negatives."""
    if interleaved:
        turn = torch.view_as_complex(table_nP2)[:, None]
        torch.view_as_complex(x_nHD.unflatten(-1, (-1, 2))).mul_(turn.conj_physical() if back else turn)
        return
    cos, sin = table_nP2[:, None].unbind(-1)
    first, second = x_nHD.chunk(2, -1)
    kept = scratch_nHD[..., : first.shape[-1]].copy_(first)
    sign = -1 if back else 1
    first.mul_(cos).addcmul_(second, sin, value=-sign)
    second.mul_(cos).addcmul_(kept, sin, value=sign)


def forward(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor,
    head_dim: int, per_head: bool, interleaved: bool, eps: float, q_out: Tensor, k_out: Tensor,
    v: Tensor | None = None, v_out: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills ``q_out``, ``k_out`` and, with v, ``v_out`` ``[B, S, H, D]``, whatever their strides but the last."""
    if v is not None:
        v_out.copy_(v.unflatten(-1, (-1, head_dim)))
    if q.numel() == 0:
        return
    buffers = _buffers(q, head_dim, 1 if interleaved else 2)
    table = table.to(buffers[0].dtype).expand(q.shape[0], -1, -1, -1)
    for x, weight, out in ((q, weight_q, q_out), (k, weight_k, k_out)):
        weight = weight.to(table.dtype).view(-1, head_dim)
        for b, tokens in _chunks(x):
            n = tokens.stop - tokens.start
            y, scratch = buffers[0][:n], buffers[-1][:n]
            y.view(n, -1).copy_(x[b, tokens])
            y.mul_(_rstd(y, per_head, eps)).mul_(weight)
            _rotate(y, scratch, table[b, tokens], interleaved, back=False)
            out[b, tokens].copy_(y)


def backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor,
    head_dim: int, per_head: bool, interleaved: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk ``[B, S, inner]``, dweight_q, dweight_k in the weights' dtype."""
    buffers = _buffers(q, head_dim, 3)
    acc = buffers[0].dtype
    table = table.to(acc).expand(q.shape[0], -1, -1, -1)
    dims = (-1,) if per_head else (-2, -1)
    group = head_dim if per_head else q.shape[-1]
    dxs, dweights = [], []
    for x, dout, weight in ((q, dq_out, weight_q), (k, dk_out, weight_k)):
        dx = x.new_empty(x.shape)
        w_HD = weight.to(acc).view(-1, head_dim)
        dw_HD = torch.zeros_like(w_HD)
        for b, tokens in _chunks(x):
            n = tokens.stop - tokens.start
            xh, g, t = (buffer[:n] for buffer in buffers)
            xh.view(n, -1).copy_(x[b, tokens])
            rstd = _rstd(xh, per_head, eps)
            xh.mul_(rstd)
            g.copy_(dout[b, tokens])
            _rotate(g, t, table[b, tokens], interleaved, back=True)
            torch.mul(g, xh, out=t)
            dw_HD += t.sum((0, 1) if per_head else 0)
            projection = t.mul_(w_HD).sum(dims, keepdim=True).div_(group)
            g.mul_(w_HD).addcmul_(xh, projection, value=-1).mul_(rstd)
            dx[b, tokens].copy_(g.view(n, -1))
        dxs.append(dx)
        dweights.append(dw_HD.view(-1).to(weight.dtype))
    return *dxs, *dweights
