"""What an episode proposes, and the choice between several."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Candidate:
    """A proposed chunk. A stream that the request did not need is None."""

    video: Tensor | None  # [B, C, chunk, y, x] float32
    action: Tensor | None  # [B, chunk, n, A] float32
    moment: uuid.UUID  # what it continues: an episode as it was between two changes, and its copies
    video_level: float = 0.0  # noise level at which the denoising of the video was stopped
    forwards: tuple[int, ...] = ()  # of the denoising, that were run for each rollout


def best(candidates: Sequence[Candidate], value: Callable[[Candidate], Tensor]) -> Candidate:
    """Of candidates that continue one episode, for each of its rollouts the one that is worth most.

    Args:
        candidates: From :meth:`Episode.propose_many`.
        value: Worth ``[B]`` of a candidate.

    Raises:
        ValueError: no candidates, or those of several moments; values of another shape, or NaN.
    """
    if not candidates or len({c.moment for c in candidates}) > 1:
        raise ValueError(f"best: candidates must continue one episode, got {len(candidates)} of them")
    worth = [value(c) for c in candidates]
    rollouts = len(candidates[0].forwards)
    for i, v in enumerate(worth):
        if not isinstance(v, Tensor) or list(v.shape) != [rollouts] or v.isnan().any():
            got = f"{v.tolist()}" if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"best: value must give {rollouts} numbers, one for each rollout, got {got} of {i}")
    chosen = torch.stack(worth).argmax(0).tolist()

    def picked(tensors: list[Tensor | None]) -> Tensor | None:
        held = [t for t in tensors if t is not None]
        return torch.stack([held[i][b] for b, i in enumerate(chosen)]) if held else None

    forwards = tuple(candidates[i].forwards[b] for b, i in enumerate(chosen))
    return replace(
        candidates[0], video=picked([c.video for c in candidates]), action=picked([c.action for c in candidates]),
        forwards=forwards,
    )  # fmt: skip
