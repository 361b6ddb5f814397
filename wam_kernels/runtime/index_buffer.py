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


def aligned(n: int) -> int:
    """Room for n ints: every view starts on 16 bytes, whatever the geometry, or Triton would compile anew."""
    return -(-n // 4) * 4


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
    layout = tuple(shape for shapes in shapes_of for shape in shapes)
    buffer = np.empty(sum(aligned(math.prod(shape)) for shape in layout), np.int32)
    at = 0
    for a, shapes in zip(arrays, shapes_of, strict=True):
        sizes = [math.prod(shape) for shape in shapes]
        end = at + sum(map(aligned, sizes))
        out = buffer[at:end] if isinstance(a, Together) else buffer[at : at + sizes[0]].reshape(a.shape)
        if isinstance(a, np.ndarray):
            out[...] = a
        else:
            a.write(out)
        for size in sizes:
            buffer[at + size : at + aligned(size)] = 0
            at += aligned(size)
    return layout, torch.from_numpy(buffer)


def views(layout: Layout, buffer: Tensor) -> list[Tensor]:
    """The packed arrays, as views of the buffer on whatever device it is."""
    out, at = [], buffer.storage_offset()
    for shape in layout:
        strides = [1]  # of a contiguous array
        for n in shape[:0:-1]:
            strides.insert(0, strides[0] * max(1, n))
        view = buffer.as_strided(shape, strides, at)
        # lengths differ from batch to batch; a compiled graph must not specialise on them
        torch._dynamo.maybe_mark_dynamic(view, 0)
        out.append(view)
        at += aligned(math.prod(shape))
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
