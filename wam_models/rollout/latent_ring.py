"""The accepted frames of an episode, and which of them were observed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wam_kernels.masks.visibility import VIDEO

from .frames import FRAME_DIM, with_frames


class LatentRing:
    """Video latents and actions of each rollout's last accepted frames; frame f lies in place ``f % frames``.

    Args:
        like: Of each stream, a tensor of all rollouts with the shape (but for the frames), dtype and device to hold.
        frames: How many frames of each rollout are held.

    Attributes:
        next_frame: For each rollout, how many frames were accepted.
        observed: For each rollout, how many of them were observed; the rest is predicted.
        latents: Of each stream, ``[B, C, frames, y, x]`` and ``[B, frames, n, A]``; and states ``[B, frames, S]``.
    """

    def __init__(self, like: Mapping[int, Tensor], frames: int) -> None:
        self.frames = frames
        self.latents = {s: t.new_zeros(with_frames(s, t.shape, frames)) for s, t in like.items()}
        batch = like[VIDEO].shape[0]
        self.next_frame, self.observed = [0] * batch, [0] * batch

    def frame(self, stream: int, rollout: int, frame: int) -> Tensor:
        """Where a frame of a rollout lies, a view."""
        return self.latents[stream][rollout].select(FRAME_DIM[stream] - 1, frame % self.frames)

    def write(self, chunk: Mapping[int, Tensor], firsts: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Accept the first ``counts[b]`` frames of a chunk as the frames ``firsts[b]`` and following.

        Returns:
            The frames after them, which are the next from now on.
        """
        for stream, latents in chunk.items():
            for b, (first, count) in enumerate(zip(firsts, counts, strict=True)):
                for i in range(count):
                    self.frame(stream, b, first + i).copy_(latents[b].select(FRAME_DIM[stream] - 1, i))
        self.next_frame = [first + count for first, count in zip(firsts, counts, strict=True)]
        return self.next_frame

    def read(self, firsts: Sequence[int], counts: Sequence[int], size: int) -> dict[int, Tensor]:
        """A chunk of ``size`` frames that begins with the ``counts[b]`` frames from ``firsts[b]``; the rest is 0."""
        chunk = {s: t.new_zeros(with_frames(s, t.shape, size)) for s, t in self.latents.items()}
        for stream, latents in chunk.items():
            for b, (first, count) in enumerate(zip(firsts, counts, strict=True)):
                for i in range(count):
                    latents[b].select(FRAME_DIM[stream] - 1, i).copy_(self.frame(stream, b, first + i))
        return chunk

    def last(self, rollout: int, first: int) -> dict[int, Tensor]:
        """Copies of a rollout's accepted frames from ``first``: ``[C, T, y, x]`` and ``[T, n, A]``."""
        device = self.latents[VIDEO].device
        places = torch.arange(first, self.next_frame[rollout], device=device) % self.frames
        return {s: t[rollout].index_select(FRAME_DIM[s] - 1, places) for s, t in self.latents.items()}

    def restart(self, rollouts: Sequence[int]) -> None:
        """No frame of these rollouts is accepted any more."""
        for b in rollouts:
            self.next_frame[b] = self.observed[b] = 0

    def mark_observed(self, counts: Sequence[int]) -> None:
        """All accepted frames of the rollouts that observed any just now, ``counts[b]``, are observed ones."""
        changes = zip(self.next_frame, self.observed, counts, strict=True)
        self.observed = [reached if count else known for reached, known, count in changes]
