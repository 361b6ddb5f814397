"""FlexAttention mask functions (``mask_mod``), evaluated on every pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_ROWS = 512  # queries that a mask_mod is evaluated for at a time


def evaluate(
    mask_mod: MaskMod, lengths: tuple[int, int], batch: int, heads: int, device: torch.device
) -> Iterator[tuple[int, np.ndarray]]:
    """(first query, bool ``[batch or 1, rows, T]``) of one block of queries after the other."""
    name = "plan_from_mask_mod"
    S, T = lengths
    b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    h = torch.arange(heads, device=device).view(1, -1, 1, 1)
    k = torch.arange(T, device=device).view(1, 1, 1, -1)
    for first in range(0, S, _ROWS):
        q = torch.arange(first, min(S, first + _ROWS), device=device).view(1, 1, -1, 1)
        mask = mask_mod(b, h, q, k)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{name}: mask_mod must return a bool tensor, got {got}")
        shape = batch, heads, q.shape[2], T
        if mask.ndim > 4 or any(n not in (1, want) for n, want in zip(mask.shape[::-1], shape[::-1], strict=False)):
            raise ValueError(
                f"{name}: mask_mod must return what broadcasts to {list(shape)} like its arguments, got "
                f"{list(mask.shape)}"
            )
        while mask.ndim < 4:
            mask = mask[None]
        # an axis that mask_mod does not read still has size 1, and needs no second look
        other = mask != mask[:, :1]
        if other.any():
            at_b, at_h, at_q, at_k = (int(i) for i in other.nonzero()[0])
            raise ValueError(
                f"{name}: mask_mod must not depend on the head, but heads 0 and {at_h} differ at (b={at_b}, "
                f"q={first + at_q}, k={at_k}); make a plan for each group of heads"
            )
        mask = mask[:, 0].expand(mask.shape[0], q.shape[2], T)
        yield first, mask.cpu().numpy()
