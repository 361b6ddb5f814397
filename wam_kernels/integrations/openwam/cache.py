"""The package's call-local denoising cache, with one key/value buffer per layer that steps write in place.

The package keeps the keys and values of each stream apart, copies all of them at every layer and step to put the fresh
ones in, and joins the streams. Here a layer has one buffer for both streams; a step writes its own tokens' slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from open_wam.models.common import denoising_cache
from torch import Tensor

from .._patching import NotOurs
from .visibility import Visibility


@dataclass
class LayerCache:
    """Keys and values of one layer, ``[B, slots, H, D]``: a slot for every required token, one stream after another."""

    slots: int = 0
    positions: Tensor | None = None  # int64: slots of the tokens that are computed now
    next_positions: Tensor | None = None  # ... and at every later step, where these are fewer
    key: Tensor | None = None
    value: Tensor | None = None
    text: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by stream

    def write(self, key: Tensor, value: Tensor) -> None:
        """Keys and values of the tokens at ``positions``."""
        if self.key is None or self.value is None:
            self.key, self.value = self._empty(key), self._empty(value)
        assert self.positions is not None
        self.key.index_copy_(1, self.positions, key)
        self.value.index_copy_(1, self.positions, value)
        if self.next_positions is not None:
            self.positions = self.next_positions

    def copy_from(self, other: LayerCache, source: Tensor, target: Tensor, slots: int) -> None:
        """Begin with some of another cache's keys and values."""
        assert other.key is not None and other.value is not None
        self.slots = slots
        self.key, self.value = (
            self._empty(t).index_copy_(1, target, t.index_select(1, source)) for t in (other.key, other.value)
        )

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_empty(like.shape[0], self.slots, *like.shape[2:])


@dataclass
class TokenCache(denoising_cache.InvariantTokenCache):
    """The package's cache of one stream of one layer, which keeps the hidden states, and the layer's buffer."""

    layer: LayerCache = field(kw_only=True)


@dataclass
class Direct:
    """Stands for the package's token cache where the block gets just the tokens that it is to compute."""

    layer: LayerCache

    def select(self, tensor: Tensor | None, *, dim: int = 1) -> Tensor | None:
        return tensor

    def output(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


def bind(original, cache: denoising_cache.DenoisingCache, *, profile, **options) -> None:
    """``DenoisingCache.bind``: what is checked and derived per token pair there is read off the runs here."""
    visible = profile.self_attention_block_mask
    if not isinstance(visible, Visibility):
        raise NotOurs("a denoising cache of a profile that OpenWAM's pipeline did not prepare")
    original(cache, profile=replace(profile, self_attention_visibility=visible.rule), **options)
    offsets = [0]
    for part in cache.layers[0]:
        offsets.append(offsets[-1] + part.computed_indices.numel())
    slots = torch.arange(offsets[-1], device=cache.key_indices.device)
    active = torch.cat([c.active_positions + at for c, at in zip(cache.layers[0], offsets[:-1], strict=True)])
    layers = []
    for streams in cache.layers:
        layer = LayerCache(offsets[-1], slots, next_positions=active)
        layers.append(tuple(TokenCache(**_shallow(part), layer=layer) for part in streams))
    cache.layers = tuple(layers)


def is_ours(cache: denoising_cache.DenoisingCache | None) -> bool:
    """It was bound to a visibility of ours."""
    return cache is not None and cache.bound and isinstance(cache.layers[0][0], TokenCache)


def _shallow(cache) -> dict:
    return {f.name: getattr(cache, f.name) for f in fields(cache)}


def dependency_closure(original, profile, queries: Tensor) -> Tensor:
    """``attention_dependency_closure`` from the runs."""
    visible = profile.self_attention_block_mask
    if not isinstance(visible, Visibility) or queries.ndim != 1 or queries.dtype != torch.bool or not queries.any():
        raise NotOurs("dependencies of a profile that OpenWAM's pipeline did not prepare")
    return visible.closure(queries)


def select_mask(original, block_mask, query_indices: Tensor, key_indices: Tensor | None = None):
    """``select_block_mask`` for a visibility of ours."""
    if block_mask is None:
        return None
    if not isinstance(block_mask, Visibility):
        raise NotOurs("a part of a block mask of OpenWAM's own")
    return block_mask.select(query_indices, key_indices) if query_indices.numel() else None
