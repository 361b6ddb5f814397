"""Attention under a plan in plain PyTorch: the definition that every backend is tested against."""

import torch
from torch import Tensor


def block_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense: scores ``[B, H, S, T]`` in float32 (float64 for float64 inputs). Differentiable, any device."""
    acc = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2] if k.shape[2] else 1
    # query head h reads key head h // group
    k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    q_BHSD, k_BHTD, v_BHTD = (t.to(acc).transpose(1, 2) for t in (q, k, v))
    scores = (q_BHSD @ k_BHTD.mT * scale).masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    # a row that sees nothing: keep its -inf out of the subtraction, where it would turn into NaN
    finite = lse.masked_fill(lse == float("-inf"), 0.0)
    p = torch.exp(scores - finite[..., None])
    return (p @ v_BHTD).transpose(1, 2).to(q.dtype), lse
