"""A sample of an interaction program with context: tokens behind it that are given and that every token attends to."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .programs import STREAMS
from .rules import RuleGeometry, Runs
from .visibility import NOISY, Geometry, dense_mask, tokens


@lru_cache(maxsize=64)
def with_context(geometry: Geometry, context: int, states: bool = False) -> RuleGeometry:
    """``[V_noisy | V_clean | A_noisy | A_clean | context | states]``: the first four attend to each other as in the
    geometry.

    All of them attend to the context, which attends to itself alone: like a clean token it never attends to a noisy
    one, so its keys and values are the same for every chunk. With ``states`` there is a token for each chunk from
    chunk 0 on, to which the noisy tokens of the chunk attend, and it to itself alone.
    """
    # every token of a frame attends to the same, so one stands for all
    one = Geometry(**vars(geometry) | {"video_tokens": 1, "action_tokens": 1})
    frames, listed = one.length, tokens(one)
    chunks = int(listed.chunk.max(initial=-1)) + 1 if states else 0
    attends = np.zeros((frames + 1 + chunks,) * 2, bool)
    attends[:frames, :frames] = dense_mask(one)
    attends[: frames + 1, frames] = True
    attends[:frames, frames + 1 :] = (listed.noise == NOISY)[:, None] & (listed.chunk[:, None] == np.arange(chunks))
    attends[frames + 1 :, frames + 1 :] = np.eye(chunks, dtype=bool)
    per_frame = [geometry.video_tokens, geometry.video_tokens, geometry.action_tokens, geometry.action_tokens, context]
    counts = [*one.segment_lengths, 1, chunks]
    number = np.arange(frames + 1 + chunks)
    runs = Runs(
        count=np.repeat([*per_frame, 1], counts), segment=np.repeat([0, 0, 1, 1, 2, 3], counts), frame=number,
        block=number, sample=np.zeros_like(number),
    )  # fmt: skip
    segments = (*STREAMS, "context", "state")
    return RuleGeometry("with_context", segments, runs, runs, lambda q, k: attends[q.frame, k.frame])
