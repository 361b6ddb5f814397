"""Where tokens are: ``(frame, row, column)``, what rope rotates by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def video_positions(frames: Tensor, rows: int, columns: int) -> Tensor:
    """``(frame, row, column)`` of the tokens of frames ``[..., F]``, float64 ``[..., F * rows * columns, 3]``."""
    row, column = (torch.arange(n, dtype=torch.float64, device=frames.device) for n in (rows, columns))
    inside = torch.cartesian_prod(row, column).expand(*frames.shape, -1, 2)
    return torch.cat([frames.double()[..., None, None].expand(*inside.shape[:-1], 1), inside], -1).flatten(-3, -2)


def action_positions(frames: Tensor, tokens: int) -> Tensor:
    """Positions of action tokens, float64 ``[..., F * tokens, 3]``: spread between two frames, at row and column -1."""
    inside = torch.arange(1, tokens + 1, dtype=torch.float64, device=frames.device) / (tokens + 1)
    frame = (frames.double()[..., None] + inside).flatten(-2)[..., None]
    return F.pad(frame, (0, 2), value=-1.0)
