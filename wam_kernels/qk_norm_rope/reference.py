"""RMSNorm and rope of q and k in plain PyTorch: the definition that every backend is tested against."""

import torch
from torch import Tensor


def norm_rope(
    x: Tensor, weight: Tensor, table: Tensor, head_dim: int, per_head: bool, interleaved: bool, eps: float
) -> Tensor:
    """``[B, S, inner]`` to ``[B, S, H, D]``; float32 inside (float64 for float64), rounded once. Differentiable."""
    acc = torch.promote_types(x.dtype, torch.float32)
    B, S, inner = x.shape
    heads = (B, S, inner // head_dim, head_dim)
    x = x.to(acc)
    if per_head:
        x = x.reshape(heads)
    normed = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(acc)).reshape(heads)
    if interleaved:
        first, second = normed.unflatten(-1, (head_dim // 2, 2)).unbind(-1)
    else:
        first, second = normed.split(head_dim // 2, -1)
    cos, sin = table.to(acc).unsqueeze(-3).unbind(-1)
    rotated = first * cos - second * sin, first * sin + second * cos
    return torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)


def qk_norm_rope(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor,
    head_dim: int, per_head: bool, interleaved: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = table, head_dim, per_head, interleaved, eps
    return norm_rope(q, weight_q, *options).to(q.dtype), norm_rope(k, weight_k, *options).to(k.dtype)
