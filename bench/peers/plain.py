"""The glue of a block in plain PyTorch: what the fused ops are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from wam_models.model.blocks import at_least_float32


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rope: ``[..., S, H, D]`` by a table ``[S, D / 2, 2]``, interleaved pairs."""
    even, odd = at_least_float32(x).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table[:, None].unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
