"""Which modulation row each token reads, as the tensors that the adaLN kernels walk.

Timesteps are drawn per frame, so the shift, scale and gate of a block are ``[B, F, D]`` and all tokens of a frame read
the same row. The forward looks a token's row up. The backward sums over the tokens of a row in two fixed steps: tokens
are cut into *segments*, stretches of at most ``SEGMENT`` tokens with one row, that are summed on their own; then the
segments of a row are added in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .runtime import index_buffer
from .runtime.checks import MAX_INT, integer, integers
from .runtime.host import device_of, eager, host_side, plain

# The sums of a segment cost one write and one read of float32 rows, so short segments cost traffic: with 16 tokens
# about an eighth of a bf16 backward. Long ones leave too few programs to fill a GPU. Not yet measured on one.
SEGMENT = 16


class FrameIndex:
    """Modulation row of every token, shared by the batch elements. Immutable; made by one of its constructors.

    Attributes:
        length: Tokens S of one batch element.
        frames: Rows F of the modulation tensors ``[B, F, D]``.
        row_of_token: int32 ``[S]``.
        segments: int32 ``[N, 3]``: first token, end, row. In token order; every token is in exactly one.
        row_begin: int32 ``[F + 1]``: the segments of row f are ``row_segments[row_begin[f] : row_begin[f + 1]]``.
        row_segments: int32 ``[N]``: the segments of each row, in token order.
        run: int32 ``[1]``: tokens of every row, if rows 0, 1, ... F - 1 follow one another with equally many; else 0.
        tokens_a_row: The value of ``run``, for the host.
        token_rows: Whether token s reads row s: there is a row for every token.
        device: Where these tensors are; those of an op must be there too.
    """

    FIELDS = ("row_of_token", "segments", "row_begin", "row_segments", "run")
    row_of_token: Tensor
    segments: Tensor
    row_begin: Tensor
    row_segments: Tensor
    run: Tensor

    def __init__(self, layout: tuple[tuple[int, ...], ...], buffer: Tensor, tokens_a_row: int) -> None:
        self._layout, self.buffer = layout, plain(buffer)
        self.tokens_a_row, self.token_rows = tokens_a_row, tokens_a_row == 1
        self.length, self.frames = layout[0][0], layout[2][0] - 1
        for name, view in zip(self.FIELDS, index_buffer.views(layout, self.buffer), strict=True):
            setattr(self, name, view)

    @classmethod
    @eager
    def from_runs(
        cls,
        lengths: Sequence[int],
        rows: Sequence[int] | None = None,
        frames: int | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> FrameIndex:
        """Run i has ``lengths[i]`` tokens, all of row ``rows[i]``. Cached.

        Args:
            lengths: Tokens of each run, in order; 0 is allowed.
            rows: Row of each run, default 0, 1, 2, ...; runs may share one, as noisy and clean copies do.
            frames: Rows F of the modulation tensors, default the highest row + 1.
            device: Where the index tensors go.

        Raises:
            ValueError: a length or row that is no integer or negative, another number of rows than of lengths, a row
                >= ``frames``, or more tokens than int32 counts.
        """
        op = "FrameIndex.from_runs"
        lengths = integers(op, "lengths", lengths)
        rows = tuple(range(len(lengths))) if rows is None else integers(op, "rows", rows)
        if len(rows) != len(lengths):
            raise ValueError(f"{op}: rows must have one entry for each of {len(lengths)} lengths, got {len(rows)}")
        if sum(lengths) > MAX_INT:
            raise ValueError(f"{op}: lengths must sum to at most {MAX_INT}, got {sum(lengths)}")
        return compiled(lengths, rows, _frames(op, rows, frames), device_of(op, device))

    @classmethod
    def per_sample(cls, length: int, *, device: torch.device | str = "cpu") -> FrameIndex:
        """One row for all tokens: modulation ``[B, 1, D]``."""
        return cls.from_runs([length], [0], 1, device=device)

    @classmethod
    def per_token(cls, length: int, *, device: torch.device | str = "cpu") -> FrameIndex:
        """A row for every token: modulation ``[B, S, D]``."""
        return cls.from_runs([1] * integer("FrameIndex.per_token", "length", length), device=device)

    @classmethod
    def uniform(cls, length: int, frames: int, *, device: torch.device | str = "cpu") -> FrameIndex:
        """Token s reads row ``s // n`` of ``frames``, n the least number that gives every token a row. Cached.

        One row for a sample, a block, a frame or a token: whatever divides the tokens. The last rows may have fewer.
        """
        op = "FrameIndex.uniform"
        length, frames = integer(op, "length", length), integer(op, "frames", frames, least=1)
        return _uniform(length, frames, device_of(op, device))

    @classmethod
    @eager
    def from_tensor(
        cls, index: Tensor | np.ndarray, frames: int | None = None, *, device: torch.device | str = "cpu"
    ) -> FrameIndex:
        """The row of every token, any integer ``[S]`` tensor on the CPU (or array), in any order. Cached by value.

        Raises:
            ValueError: not a 1-D integer CPU tensor, a negative row, or a row >= ``frames``.
        """
        op = "FrameIndex.from_tensor"
        rows = integers(op, "index", index)
        return compiled((1,) * len(rows), rows, _frames(op, rows, frames), device_of(op, device))

    @property
    def device(self) -> torch.device:
        return self.buffer.device

    def tensors(self) -> list[Tensor]:
        """Everything a registered op reads, in the order of ``FIELDS``."""
        return [getattr(self, name) for name in self.FIELDS]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FrameIndex:
        """The same index on another device, in one copy; itself when it is there already."""
        return self if device == self.device else self._moved(device, non_blocking)

    @host_side
    def _moved(self, device: torch.device | str, non_blocking: bool) -> FrameIndex:
        device = device_of("FrameIndex.to", device)
        if device == self.device:
            return self
        return FrameIndex(self._layout, self.buffer.to(device, non_blocking=non_blocking), self.tokens_a_row)

    def __reduce__(self) -> tuple:
        return FrameIndex, (self._layout, self.buffer, self.tokens_a_row)

    def __repr__(self) -> str:
        return (
            f"FrameIndex(length={self.length}, frames={self.frames}, segments={self._layout[1][0]}, "
            f"device={self.device})"
        )


def _frames(op: str, rows: tuple[int, ...], frames: int | None) -> int:
    needed = max(rows, default=-1) + 1
    frames = integer(op, "frames", needed if frames is None else frames)
    if frames < needed:
        raise ValueError(f"{op}: frames must be at least {needed} (the highest row + 1), got {frames}")
    return frames


@lru_cache(maxsize=256)
def _uniform(length: int, frames: int, device: torch.device) -> FrameIndex:
    run = -(-length // frames)
    lengths = [max(0, min(run, length - i * run)) for i in range(frames)]
    return FrameIndex.from_runs(lengths, device=device)


def _run(row_of_token: np.ndarray, frames: int) -> int:
    if frames == 0 or row_of_token.size % frames:
        return 0
    run = row_of_token.size // frames
    return run if np.array_equal(row_of_token, np.repeat(np.arange(frames), run)) else 0


def forget_frame_indices() -> None:
    """Drop the indices that are cached, so that the next call builds its own: for measurements."""
    compiled.cache_clear()


@lru_cache(maxsize=64)
@host_side
def compiled(lengths: tuple[int, ...], rows: tuple[int, ...], frames: int, device: torch.device) -> FrameIndex:
    if device.type != "cpu":
        return compiled(lengths, rows, frames, torch.device("cpu")).to(device)
    row_of_token = np.repeat(np.array(rows, np.int32), np.array(lengths, np.int64))
    # stretches of one row, whether one run or several that touch, each cut into segments
    starts = np.flatnonzero(np.diff(row_of_token, prepend=-1))
    pieces = -(-np.diff(starts, append=row_of_token.size) // SEGMENT)
    piece = np.arange(pieces.sum()) - np.repeat(pieces.cumsum() - pieces, pieces)
    first = np.repeat(starts, pieces) + SEGMENT * piece
    end = np.append(first[1:], row_of_token.size)[: first.size]
    row, run = row_of_token[first], _run(row_of_token, frames)
    arrays = [
        row_of_token,
        np.stack([first, end, row], 1),
        np.searchsorted(np.sort(row), np.arange(frames + 1)),
        np.argsort(row, kind="stable"),
        np.array([run]),
    ]
    return FrameIndex(*index_buffer.pack(arrays), run)
