"""Power-law EMA of the weights.

Karras et al., "Analyzing and improving the training dynamics of diffusion models" (2024): step s has a weight of about
s ** exponent, so the average always spans the same part of the run, wherever that ends.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .ranks import local


@torch.no_grad()
def update_average(average: Mapping[str, Tensor], current: Mapping[str, Tensor], step: int, exponent: float) -> None:
    """Moves the average, in place, towards the weights after step ``step`` (from 1); exponent 0 copies them."""
    decay = (1 - 1 / step) ** (exponent + 1) if exponent else 0.0
    names = list(average)
    torch._foreach_lerp_([local(average[n]) for n in names], [local(current[n]) for n in names], 1 - decay)
