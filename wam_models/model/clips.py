"""Clips one after another in one sequence: where the tokens of each lie, and what they attend to.

A stream holds ``[noisy clip 1 | noisy clip 2 | ... | clean clip 1 | clean clip 2 | ...]``, so that everything but
attention takes the clips as one batch element with more frames. A plan has a clip after the other; the pieces change
places around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from wam_kernels import Plan, Ranges, block_attention, compile_plan


class ClipText(NamedTuple):
    """Text of clips as the cross-attention of one stream takes it: every token attends to its own clip's."""

    tokens: Tensor  # [clips, L, D]
    plan: Plan  # of the stream's tokens over all of those
    pieces: tuple[int, ...]  # the stream's tokens, stretch by stretch
    texts: tuple[int, ...]  # the clip of each stretch

    @classmethod
    def of(cls, tokens: Tensor, pieces: Sequence[int], texts: Sequence[int]) -> ClipText:
        """For stretches of so many tokens, each of one clip."""
        pieces, texts = tuple(pieces), tuple(texts)
        return cls(tokens, _text_plan(pieces, texts, tokens.shape[0], tokens.shape[1], tokens.device), pieces, texts)

    def cut(self, start: int, stop: int) -> ClipText:
        """For the tokens of the stream from ``start`` to ``stop`` alone."""
        ends = list(accumulate(self.pieces))
        left = [max(0, min(stop, end) - max(start, end - n)) for n, end in zip(self.pieces, ends, strict=True)]
        return self.of(self.tokens, left, self.texts)


class ClipOrder(NamedTuple):
    """Pieces of a sequence, stream after stream, and the order that puts clip after clip."""

    sizes: tuple[int, ...]  # tokens of each piece
    order: tuple[int, ...]  # numbers of the pieces, clip after clip

    def by_clip(self, tokens: Tensor) -> Tensor:
        """``[1, S, ...]`` with clip after clip."""
        pieces = tokens.split(self.sizes, 1)
        return torch.cat([pieces[i] for i in self.order], 1)

    def by_stream(self, tokens: Tensor) -> Tensor:
        """The reverse of :meth:`by_clip`."""
        pieces = tokens.split([self.sizes[i] for i in self.order], 1)
        places = sorted(range(len(self.order)), key=self.order.__getitem__)
        return torch.cat([pieces[i] for i in places], 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, impl: str | None) -> Tensor:
        """``block_attention`` of a plan of one clip after another, over tokens that lie stream after stream."""
        q, k, v = (self.by_clip(t) for t in (q, k, v))
        return self.by_stream(block_attention(q, k, v, plan, impl=impl))


@lru_cache(maxsize=64)
def clip_order(clips: tuple[int, ...], tokens: tuple[int, ...], copies: int, context: tuple[int, ...]) -> ClipOrder:
    """The order for clips of so many frames.

    Args:
        clips: Frames of each clip.
        tokens: Tokens of a frame of each denoised stream.
        copies: 2 with a clean copy, else 1.
        context: Tokens that a clip has of each given stream.
    """
    sizes, of_clip = list[int](), list[int]()
    for per_frame in tokens:
        for _ in range(copies):
            sizes += [frames * per_frame for frames in clips]
            of_clip += range(len(clips))
    for count in context:
        sizes += [count] * len(clips)
        of_clip += range(len(clips))
    return ClipOrder(tuple(sizes), tuple(sorted(range(len(sizes)), key=of_clip.__getitem__)))


@lru_cache(maxsize=64)
def _text_plan(
    pieces: tuple[int, ...], texts: tuple[int, ...], clips: int, text_tokens: int, device: torch.device
) -> Plan:
    ends = torch.tensor(pieces).cumsum(0)
    q = torch.stack([ends - torch.tensor(pieces), ends], 1)
    k = torch.tensor([[i * text_tokens, (i + 1) * text_tokens] for i in texts])
    return compile_plan(Ranges(q, k, int(ends[-1]), clips * text_tokens), device=device)
