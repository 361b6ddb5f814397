"""Modulation rows of OpenWAM: computed once for each distinct timestep instead of once for each token.

The package repeats every frame's timestep to its tokens before the time embedding, and so has one row per token. Here
the embedding runs on the distinct timesteps. The package still gets its ``[B, S, 6, D]`` tensor, which carries the few
rows and the index as an attribute; the blocks use those where they are. A copy that the package makes has no attribute,
and is read row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import FrameIndex
from .._patching import NotOurs

_ATTRIBUTE = "_wam_frame_rows"


class FrameRows(NamedTuple):
    """``rows`` ``[B or 1, F, 6, D]``, and which of them each token reads."""

    rows: Tensor
    frame_index: FrameIndex


def frame_rows(expanded: Tensor) -> FrameRows:
    """The rows that a ``[B, S, 6, D]`` modulation was expanded from, or itself with a row for every token."""
    tagged = getattr(expanded, _ATTRIBUTE, None)
    return FrameRows(expanded, per_token(expanded.shape[1], expanded.device)) if tagged is None else tagged


def tag(expanded: Tensor, rows: Tensor, token_rows: Tensor) -> Tensor:
    """Let an expanded modulation say that token s has row ``token_rows[s]`` of ``rows``."""
    index = FrameIndex.from_tensor(token_rows.cpu(), rows.shape[1], device=expanded.device)
    setattr(expanded, _ATTRIBUTE, FrameRows(rows, index))
    return expanded


def tag_joined(expanded: Tensor, parts: Sequence[FrameRows]) -> None:
    """Tag a modulation that is the given ones end to end, then zeros: padding."""
    if any(part.frame_index is per_token(part.frame_index.length, expanded.device) for part in parts):
        return  # nothing to gain
    rows = torch.cat([*(part.rows for part in parts), parts[0].rows.new_zeros(1, 1, *expanded.shape[2:])], 1)
    first = np.cumsum([0, *(part.rows.shape[1] for part in parts)]).tolist()
    tokens = [part.frame_index.row_of_token.cpu() + at for part, at in zip(parts, first[:-1], strict=True)]
    padding = expanded.shape[1] - sum(t.numel() for t in tokens)
    tag(expanded, rows, torch.cat([*tokens, tokens[0].new_full((padding,), first[-1])]))


@lru_cache(maxsize=16)
def per_token(length: int, device: torch.device) -> FrameIndex:
    """A row for every token."""
    return FrameIndex.per_token(length, device=device)


def embed_time(original, conditioner, timesteps: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Time embedding ``[B, S, D]`` and modulation ``[B, S, 6, D]`` of timesteps ``[B, S]``, by distinct timestep."""
    if timesteps.shape[0] == 1:  # the same, and much faster
        distinct, token_rows = torch.unique(timesteps[0], return_inverse=True)
        distinct = distinct[None]
    else:
        distinct, token_rows = torch.unique(timesteps, dim=1, return_inverse=True)
    if 2 * distinct.shape[1] > timesteps.shape[1]:
        raise NotOurs("timesteps of which hardly two tokens share one")
    embedding, modulation = original(conditioner, distinct, dtype=dtype)
    # indexing, not index_select: its gradient adds up in a fixed order on GPUs too
    return embedding[:, token_rows], tag(modulation[:, token_rows], modulation, token_rows)
