"""Attention over cache slots in plain PyTorch: the definition that every backend is tested against."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.backends import product


def visible_slots(ranges: Tensor, slots: int) -> Tensor:
    """bool ``[B, G, N]``: which slots each group of each sample attends to. Ranges are cut off at 0 and N."""
    at = torch.arange(slots, device=ranges.device)
    start, end = ranges[..., None].unbind(-2)
    return ((start <= at) & (at < end)).any(-2)


def cached_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, ranges: Tensor, group_rows: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Dense: scores ``[B, H, rows, N]`` of one group at a time, float32 (float64 for float64 inputs). Any device."""
    acc = torch.promote_types(q.dtype, torch.float32)
    k_cache, v_cache = (t.repeat_interleave(q.shape[0] // max(t.shape[0], 1), 0) for t in (k_cache, v_cache))
    q_BHSD, k_BHND, v_BHND = (t.to(acc).transpose(1, 2) for t in (q, k_cache, v_cache))
    visible = visible_slots(ranges, k_cache.shape[1])[:, :, None]
    outs, lses = [], []
    for q_g, visible_B1N in zip(q_BHSD.split(list(group_rows), 2), visible.unbind(1), strict=True):
        # slots that were never written may hold NaN: masked out of the scores, and 0 * NaN kept out of the product
        scores = (product(q_g, k_BHND.mT) * scale).masked_fill(~visible_B1N[:, :, None], float("-inf"))
        lse = torch.logsumexp(scores, -1)
        # a fully masked row: keep its -inf out of the subtraction, where it would turn into NaN
        p = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
        outs.append(product(p, v_BHND.masked_fill(~visible_B1N[..., None], 0.0)))
        lses.append(lse)
    return torch.cat(outs, 2).transpose(1, 2).to(q.dtype).contiguous(), torch.cat(lses, 2)
