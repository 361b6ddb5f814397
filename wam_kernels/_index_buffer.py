"""Index arrays of a plan or a frame index in one int32 buffer, so that they move to a device in one copy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Layout = tuple[tuple[int, ...], ...]


def _aligned(n: int) -> int:
    """Room for n ints: every view starts on 16 bytes, whatever the geometry, or Triton would compile anew."""
    return -(-n // 4) * 4


def pack(arrays: Sequence[np.ndarray]) -> tuple[Layout, Tensor]:
    """The shapes of the arrays, and a CPU buffer that holds them end to end."""
    buffer = np.zeros(sum(_aligned(a.size) for a in arrays), np.int32)
    at = 0
    for a in arrays:
        buffer[at : at + a.size] = a.ravel()
        at += _aligned(a.size)
    return tuple(a.shape for a in arrays), torch.from_numpy(buffer)


def views(layout: Layout, buffer: Tensor) -> list[Tensor]:
    """The packed arrays, as views of the buffer on whatever device it is."""
    out, at = [], 0
    for shape in layout:
        n = math.prod(shape)
        view = buffer[at : at + n].view(shape)
        # lengths differ from batch to batch; a compiled graph must not specialise on them
        torch._dynamo.maybe_mark_dynamic(view, 0)
        out.append(view)
        at += _aligned(n)
    return out
