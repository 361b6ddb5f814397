"""Frames of a stream as tensors: where they are counted, and whether they are what was asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wam_kernels.masks.visibility import ACTION, VIDEO

from ..runtime.checks import instance

STATE = 2  # beside the streams VIDEO and ACTION: the robot's states, which are told and not denoised
FRAME_DIM = {VIDEO: 2, ACTION: 1, STATE: 1}  # of [B, C, F, y, x], [B, F, n, A] and [B, F, S]


def with_frames(stream: int, shape: Sequence[int], frames: int) -> list[int]:
    """``shape`` with so many frames."""
    changed = list(shape)
    changed[FRAME_DIM[stream]] = frames
    return changed


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on the device, without waiting: from pageable memory a copy may wait for the GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def check_frames(name: str, tensor: Tensor, stream: int, frames: int, like: Tensor) -> None:
    """A tensor has the shape of ``like``, but for ``frames`` frames.

    Raises:
        TypeError: no tensor.
        ValueError: another shape, or less than 1 frame.
    """
    instance(name, tensor, Tensor)
    expected: list[object] = [*with_frames(stream, like.shape, frames)]
    if frames < 1 or list(tensor.shape) != expected:
        expected[FRAME_DIM[stream]] = frames if frames > 0 else "at least 1 frame"
        raise ValueError(f"{name} must have shape {expected}, got {list(tensor.shape)}")


def check_finite(
    name: str, tensor: Tensor, stream: int = VIDEO, counts: Sequence[int] | None = None, hint: str = ""
) -> None:
    """A tensor on the CPU is finite, of each rollout its first ``counts[b]`` frames; one on a GPU is not looked at.

    Raises:
        ValueError: it is not; the message names the samples.
    """
    if tensor.device.type != "cpu" or tensor.isfinite().all():
        return
    frames = tensor.isfinite().movedim(FRAME_DIM[stream], 1).flatten(2).all(2).tolist()
    counts = [tensor.shape[FRAME_DIM[stream]]] * len(frames) if counts is None else counts
    bad = [b for b, (row, count) in enumerate(zip(frames, counts, strict=True)) if not all(row[:count])]
    if bad:
        raise ValueError(f"{name} must be finite, got NaN or infinity in samples {bad}{hint}")
