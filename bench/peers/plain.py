"""The glue of a block in plain PyTorch: what the fused ops are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from wam_models.model.dual_expert import wide


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rope: ``[..., S, H, D]`` by a table ``[S, D / 2, 2]``, interleaved pairs."""
    even, odd = wide(x).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table[:, None].unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
