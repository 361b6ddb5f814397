"""Attention over ranges of a cache, the CUDA kernels: ``csrc/cached_attention/kernels.cu`` says what a block owns.

Tensors go to the extension as (address, batch stride, token stride, head stride). Launched on the current stream of
their device; errors come from csrc and name the argument.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime import cuda
from . import config

TILE_ROWS = 64  # kTileRows of csrc


def _heads(t: Tensor) -> tuple[int, int, int, int]:
    return t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)


def takes_stream(k_cache: Tensor, v_cache: Tensor, ranges: Tensor) -> bool:
    """Whether a call takes the part kernel by TMA: on compute capability 9.0, if TMA and its plan can name everything.

    So many ranges of a group and so many slots; no stride of 0, except that all samples may share both caches.
    """
    caches = (k_cache, v_cache)
    return (
        cuda.is_hopper(k_cache.device)
        and ranges.shape[2] <= config.MAX_STREAMED_RANGES
        and k_cache.shape[1] <= config.MAX_STREAMED_SLOTS
        and all(t.stride(i) > 0 or t.shape[i] == 1 for t in caches for i in (1, 2))
        and len({_shared(t) for t in caches}) == 1
    )


def _shared(cache: Tensor) -> bool:
    """Whether a view says that all samples have the same slots."""
    return cache.shape[0] > 1 and cache.stride(0) == 0


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    ranges: Tensor,
    group_rows: Sequence[int],
    scale: float,
    streamed: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """out ``[B, S, H, D]`` contiguous, lse ``[B, H, S]`` float32. Two launches; nothing waits for the device.

    ``streamed``: the part kernel by TMA and wgmma, for compute capability 9.0 alone, or that by mma.sync; by default as
    :func:`takes_stream` says. The former also takes a cache whose number of heads divides H.
    """
    if streamed is None:
        streamed = takes_stream(k_cache, v_cache, ranges)
    (B, S, H, D), (cache_rows, N, key_heads, _) = q.shape, k_cache.shape
    queries_of_row = B if _shared(k_cache) else B // max(cache_rows, 1)
    out, lse = q.new_empty(q.shape), q.new_empty((B, H, S), dtype=torch.float32)
    tiles = sum(-(-rows // TILE_ROWS) for rows in group_rows)
    if streamed:
        parts = config.streamed_splits(-(-tiles // 3) * B * H, N)
    else:
        parts = config.splits(tiles * B * H, N)
    out_part = q.new_empty((parts, B, H, S, D), dtype=torch.float32)
    lse_part = q.new_empty((parts, B, H, S), dtype=torch.float32)
    cuda.launch(
        "cached_attention_forward", q, shape=(B, S, N, H, key_heads, D), q=_heads(q), k_cache=_heads(k_cache),
        v_cache=_heads(v_cache), ranges=ranges.data_ptr(), ranges_of_group=ranges.shape[2], group_rows=list(group_rows),
        out_part=out_part.data_ptr(), lse_part=lse_part.data_ptr(), parts=parts, queries_of_row=queries_of_row,
        streamed=streamed, out=out.data_ptr(), lse=lse.data_ptr(), scale=scale,
    )  # fmt: skip
    return out, lse
