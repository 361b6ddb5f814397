"""The CPU path: PyTorch's own loops over chunks of tokens, no copy of q or k, no graph.

    forward   y = R(x w rstd);  rstd = (mean(x^2) + eps)^-1/2;  R turns pairs by the table's angles
    backward  u = R^T(dy) rstd;  t = u x;  dw = sum t;  dx = u w - x rstd^2 mean(t w)

Interleaved pairs are complex numbers, so R and rstd are one product. Halves of a head that pair up (Cosmos) are turned
by their cosines and sines. Small tensors are one chunk, batch and all. Chunks are visited in order, so weight gradients
sum in the same order every time (with as many threads: they set the size of a chunk). Work is float32 (float64 for
float64); results are rounded when they are copied out.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .config import CPU_CHUNK


class _Chunk(NamedTuple):
    """Some tokens of some batch elements."""

    batch: slice
    tokens: slice

    def of(self, t: Tensor, head_dim: int) -> Tensor:
        """The chunk of ``[B, S, inner]`` or ``[B, S, H, D]``, as ``[b, n, H, D]``."""
        part = t[self.batch, self.tokens]
        return part if part.ndim == 4 else part.view(*part.shape[:2], -1, head_dim)


_ALL = _Chunk(slice(None), slice(None))


def _chunks(x: Tensor) -> list[_Chunk]:
    B, S, inner = x.shape
    if x.numel() == 0:
        return []
    # every operation splits its chunk over all threads: the cache and the cost of a barrier are theirs together
    step = max(1, CPU_CHUNK * torch.get_num_threads() // inner)
    if B * S <= step:
        return [_ALL]
    return [_Chunk(slice(b, b + 1), slice(start, start + step)) for b in range(B) for start in range(0, S, step)]


def _rstd(x_bnHD: Tensor, per_head: bool, eps: float) -> Tensor:
    """``[b, n, H, 1]`` or ``[b, n, 1, 1]``."""
    dims = (-1,) if per_head else (-2, -1)
    n = x_bnHD.shape[-1] * (1 if per_head else x_bnHD.shape[-2])
    norm = torch.linalg.vector_norm(x_bnHD, dim=dims, keepdim=True)
    return norm.square_().div_(n).add_(eps).rsqrt_()


def _turned(x_bnHD: Tensor, table: Tensor, scale: Tensor, interleaved: bool, back: bool, out: Tensor) -> Tensor:
    """``out``, with the pairs of x turned by the angles, or ``back`` by their negatives, and multiplied by ``scale``.

    Args:
        table: ``[n, P, 2]`` or ``[b, n, P, 2]``.
        scale: As :func:`_rstd`.
        out: Of the dtype of x and dense but for its first dims; may be x itself.
    """
    table = table.unsqueeze(-3)
    if interleaved:
        turn = torch.view_as_complex(table) * scale
        if back:
            turn.conj_physical_()
        pairs = *x_bnHD.shape[:-1], -1, 2
        torch.mul(torch.view_as_complex(x_bnHD.view(pairs)), turn, out=torch.view_as_complex(out.view(pairs)))
        return out
    cos, sin = (table * scale.unsqueeze(-1)).unbind(-1)
    first, second = x_bnHD.chunk(2, -1)
    sign = -1 if back else 1
    left = torch.mul(first, cos).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., left.shape[-1] :]).addcmul_(first, sin, value=sign)
    out[..., : left.shape[-1]] = left
    return out


def _complex_strides(t: Tensor) -> bool:
    """Whether pairs of the last dim can be viewed as complex numbers in place."""
    *outer, _ = t.stride()
    return t.storage_offset() % 2 == 0 and math.gcd(*outer) % 2 == 0


def forward(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor,
    head_dim: int, per_head: bool, interleaved: bool, eps: float, q_out: Tensor, k_out: Tensor,
    v: Tensor | None = None, v_out: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills ``q_out``, ``k_out`` and, with v, ``v_out`` ``[B, S, H, D]``, whatever their strides but the last."""
    if v is not None and v_out is not None:
        v_out.copy_(v.unflatten(-1, (-1, head_dim)))
    acc = torch.promote_types(q.dtype, torch.float32)
    table = table.to(acc)
    for x, weight, out in ((q, weight_q, q_out), (k, weight_k, k_out)):
        w_HD = weight.to(acc).view(-1, head_dim)
        in_place = out.dtype == acc and _complex_strides(out)
        for chunk in _chunks(x):
            row, to = chunk.of(x, head_dim).to(acc), chunk.of(out, head_dim)
            y = torch.mul(row, w_HD, out=to) if in_place else row * w_HD
            of_tokens = table[(chunk.batch, chunk.tokens)[-table.ndim + 2 :]]
            _turned(y, of_tokens, _rstd(row, per_head, eps), interleaved, False, out=y)
            if not in_place:
                to.copy_(y)


def backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor,
    head_dim: int, per_head: bool, interleaved: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk ``[B, S, inner]``, dweight_q, dweight_k in the weights' dtype."""
    acc = torch.promote_types(q.dtype, torch.float32)
    table = table.to(acc)
    dims = (-1,) if per_head else (-2, -1)
    group = head_dim if per_head else q.shape[-1]
    dxs, dweights = [], []
    for x, dout, weight in ((q, dq_out, weight_q), (k, dk_out, weight_k)):
        dx = x.new_empty(x.shape)
        w_HD = weight.to(acc).view(-1, head_dim)
        dw_HD = torch.zeros_like(w_HD)
        for chunk in _chunks(x):
            row, dy = chunk.of(x, head_dim).to(acc), chunk.of(dout, head_dim).to(acc)
            if interleaved and not _complex_strides(dy):
                dy = dy.contiguous()
            rstd = _rstd(row, per_head, eps)
            of_tokens = table[(chunk.batch, chunk.tokens)[-table.ndim + 2 :]]
            u = _turned(dy, of_tokens, rstd, interleaved, True, out=row.new_empty(row.shape))
            product = u * row
            dw_HD += product.sum((0, 1, 2) if per_head else (0, 1))
            along = product.mul_(w_HD).sum(dims, keepdim=True).mul_(rstd.square_().div_(-group))
            u.mul_(w_HD).addcmul_(row, along)
            chunk.of(dx, head_dim).copy_(u)
        dxs.append(dx)
        dweights.append(dw_HD.view(-1).to(weight.dtype))
    (dq, dk), (dweight_q, dweight_k) = dxs, dweights
    return dq, dk, dweight_q, dweight_k
