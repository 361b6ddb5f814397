"""Index arrays of a plan or a frame index in one int32 buffer, so that they move to a device in one copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from .host import host_side, plain

Layout = tuple[tuple[int, ...], ...]


def _aligned(n: int) -> int:
    """Room for n ints: every view starts on 16 bytes, whatever the geometry, or Triton would compile anew."""
    return -(-n // 4) * 4


class Unwritten(NamedTuple):
    """An array that is written straight into its place in the buffer: fresh memory costs more than the numbers."""

    shape: tuple[int, ...]
    write: Callable[[np.ndarray], object]  # gets int32 memory of that shape, C-contiguous and not cleared


def pack(arrays: Sequence[np.ndarray | Unwritten]) -> tuple[Layout, Tensor]:
    """The shapes of the arrays, and a CPU buffer that holds them end to end."""
    layout = tuple(a.shape for a in arrays)
    buffer = np.empty(sum(_aligned(math.prod(shape)) for shape in layout), np.int32)
    at = 0
    for a in arrays:
        size = math.prod(a.shape)
        out = buffer[at : at + size].reshape(a.shape)
        if isinstance(a, Unwritten):
            a.write(out)
        else:
            out[...] = a
        buffer[at + size : at + _aligned(size)] = 0
        at += _aligned(size)
    return layout, torch.from_numpy(buffer)


def views(layout: Layout, buffer: Tensor) -> list[Tensor]:
    """The packed arrays, as views of the buffer on whatever device it is."""
    out, sizes = [], [math.prod(shape) for shape in layout]
    for shape, n, part in zip(layout, sizes, buffer.split([_aligned(n) for n in sizes]), strict=True):
        view = (part if part.numel() == n else part[:n]).view(shape)
        # lengths differ from batch to batch; a compiled graph must not specialise on them
        torch._dynamo.maybe_mark_dynamic(view, 0)
        out.append(view)
    return out


class Packed:
    """Packed arrays on some device: moved, copied and pickled as their one buffer. Immutable.

    ``about``: what else a subclass is made of, after layout and buffer.
    """

    def __init__(self, layout: Layout, buffer: Tensor, *about: Any) -> None:
        self._made_of = layout, about
        self.buffer = plain(buffer)

    @host_side
    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """The same on another device, in one copy."""
        layout, about = self._made_of
        return type(self)(layout, self.buffer.to(device, non_blocking=non_blocking), *about)

    def __reduce__(self) -> tuple:
        layout, about = self._made_of
        return type(self), (layout, self.buffer, *about)
