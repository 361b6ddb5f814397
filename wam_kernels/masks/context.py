"""A sample of an interaction program with context: tokens behind it that are given and that every token attends to."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .programs import STREAMS
from .rules import RuleGeometry, Runs
from .visibility import Geometry, dense_mask


@lru_cache(maxsize=64)
def with_context(geometry: Geometry, context: int) -> RuleGeometry:
    """``[V_noisy | V_clean | A_noisy | A_clean | context]``: the first four attend to each other as in the geometry.

    All attend to the context, which attends to itself alone: like a clean token it never attends to a noisy one, so
    its keys and values are the same for every chunk.
    """
    # every token of a frame attends to the same, so one stands for all
    one = Geometry(**vars(geometry) | {"video_tokens": 1, "action_tokens": 1})
    frames = one.length
    attends = np.zeros((frames + 1, frames + 1), bool)
    attends[:frames, :frames] = dense_mask(one)
    attends[:, frames] = True
    per_frame = [geometry.video_tokens, geometry.video_tokens, geometry.action_tokens, geometry.action_tokens, context]
    counts = [*one.segment_lengths, 1]
    number = np.arange(frames + 1)
    runs = Runs(
        count=np.repeat(per_frame, counts), segment=np.repeat([0, 0, 1, 1, 2], counts), frame=number, block=number,
        sample=np.zeros_like(number),
    )  # fmt: skip
    segments = (*STREAMS, "context")
    return RuleGeometry("with_context", segments, runs, runs, lambda q, k: attends[q.frame, k.frame])
