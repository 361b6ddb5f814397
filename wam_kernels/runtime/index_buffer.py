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


ALIGNED = 4  # ints: every view starts on 16 bytes, whatever the geometry, or Triton would compile anew


def aligned(n: int) -> int:
    """Room for n ints."""
    return -(-n // ALIGNED) * ALIGNED


class Unwritten(NamedTuple):
    """An array that is written straight into its place in the buffer: fresh memory costs more than the numbers."""

    shape: tuple[int, ...]
    write: Callable[[np.ndarray], object]  # gets int32 memory of that shape, C-contiguous and not cleared


class Together(NamedTuple):
    """Arrays that one call writes: it gets the int32 memory of all, end to end, each with ``aligned`` room."""

    shapes: tuple[tuple[int, ...], ...]
    write: Callable[[np.ndarray], object]


Entry = np.ndarray | Unwritten | Together


def pack(arrays: Sequence[Entry]) -> tuple[Layout, Tensor]:
    """The shapes of the arrays, and a CPU buffer that holds them end to end."""
    shapes_of = [a.shapes if isinstance(a, Together) else (a.shape,) for a in arrays]
    sizes_of = [[math.prod(shape) for shape in shapes] for shapes in shapes_of]
    buffer = np.empty(sum(aligned(size) for sizes in sizes_of for size in sizes), np.int32)
    at = 0
    for a, sizes in zip(arrays, sizes_of, strict=True):
        if isinstance(a, Together):
            a.write(buffer[at : at + sum(map(aligned, sizes))])
        elif isinstance(a, Unwritten):
            a.write(buffer[at : at + sizes[0]].reshape(a.shape))
        else:
            buffer[at : at + sizes[0]].reshape(a.shape)[...] = a
        for size in sizes:
            if size % ALIGNED:
                buffer[at + size : at + aligned(size)] = 0
            at += aligned(size)
    return tuple(shape for shapes in shapes_of for shape in shapes), torch.from_numpy(buffer)


def views(layout: Layout, buffer: Tensor) -> list[Tensor]:
    """The packed arrays, as views of the buffer on whatever device it is."""
    out, at = [], buffer.storage_offset()
    for shape in layout:
        strides = [1]  # of a contiguous array
        for n in shape[:0:-1]:
            strides.insert(0, strides[0] * (n or 1))
        view = buffer.as_strided(shape, strides, at)
        # lengths differ from batch to batch; a compiled graph must not specialise on them
        torch._dynamo.maybe_mark_dynamic(view, 0)
        out.append(view)
        at += aligned(shape[0] * strides[0])
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
