"""Numbers as frames of a video's latents, so that one video model denoises actions, futures and their value.

As Cosmos Policy does (arXiv 2601.16163): normalised numbers are repeated until they fill a latent frame, and read back
as the mean over their copies. Letters of shapes: B samples, C latent channels, N numbers of a frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.checks import whole

ACTIONS, FUTURE, VALUE = range(3)  # frames of a chunk, behind the observed one


def to_frame(numbers: Tensor, shape: Sequence[int]) -> Tensor:
    """``[B, N]`` as a latent frame ``[B, C, 1, y, x]``, number i in every N-th place from i on.

    Args:
        numbers: Normalised.
        shape: ``(C, y, x)`` of a latent frame.

    Raises:
        ValueError: no numbers, or more than a frame has places.
    """
    places = math.prod(shape)
    if numbers.ndim != 2 or not 1 <= numbers.shape[1] <= places:
        raise ValueError(
            f"to_frame: numbers must be [B, 1 to {places}], the places of a latent frame {tuple(shape)}, got "
            f"{list(numbers.shape)}; take shorter chunks"
        )
    copies = -(-places // numbers.shape[1])
    return numbers.repeat(1, copies)[:, :places].unflatten(1, tuple(shape))[:, :, None]


def from_frame(frame: Tensor, count: int) -> Tensor:
    """``[B, count]``, the mean over the copies of each number: the reverse of :func:`to_frame`.

    Args:
        frame: ``[B, C, 1, y, x]``.
        count: N.

    Raises:
        ValueError: another shape, or a count that is not from 1 to the places of the frame.
    """
    if frame.ndim != 5 or frame.shape[2] != 1:
        raise ValueError(f"from_frame: frame must be [B, C, 1, y, x], got {list(frame.shape)}")
    flat = frame.flatten(1)
    count = whole("from_frame: count", count, 1, flat.shape[1])
    number = torch.arange(flat.shape[1], device=frame.device) % count
    summed = flat.new_zeros(len(flat), count).index_add(1, number, flat)
    return summed / torch.bincount(number, minlength=count)


def policy_frames(video: Tensor, action: Tensor, value: Tensor) -> Tensor:
    """The frames that a clip is learned as: ``[observed, actions, future, value]``.

    Args:
        video: ``[B, C, 1 + K, y, x]``, the observed frame and those that K times n actions lead to.
        action: ``[B, 1 + K, n, A]`` normalised; those of frame 0 are not read.
        value: ``[B]``, what the future is worth.

    Returns:
        ``[B, C, 4, y, x]``; of the future, frame K.
    """
    shape = (video.shape[1], *video.shape[3:])
    actions, values = to_frame(action[:, 1:].flatten(1), shape), to_frame(value[:, None], shape)
    return torch.cat([video[:, :, :1], actions, video[:, :, -1:], values], 2)
