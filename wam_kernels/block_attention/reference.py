"""Attention under a plan in plain PyTorch: the definition that every backend is tested against."""

import torch
from torch import Tensor


def block_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense: scores ``[B, H, S, S]`` in float32 (float64 for float64 inputs). Differentiable, any device."""
    acc = torch.promote_types(q.dtype, torch.float32)
    q_BHSD, k_BHSD, v_BHSD = (t.to(acc).transpose(1, 2) for t in (q, k, v))
    scores = (q_BHSD @ k_BHSD.mT * scale).masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    # a row that sees nothing: keep its -inf out of the subtraction, where it would turn into NaN
    finite = lse.masked_fill(lse == float("-inf"), 0.0)
    p = torch.exp(scores - finite[..., None])
    return (p @ v_BHSD).transpose(1, 2).to(q.dtype), lse
