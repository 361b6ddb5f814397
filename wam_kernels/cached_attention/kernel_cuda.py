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
STREAMED_TILE_ROWS = 3 * TILE_ROWS


def _heads(t: Tensor) -> tuple[int, int, int, int]:
    return t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    ranges: Tensor,
    group_rows: Sequence[int],
    scale: float,
    streamed: bool = False,
) -> tuple[Tensor, Tensor]:
    """out ``[B, S, H, D]`` contiguous, lse ``[B, H, S]`` float32. Two launches; nothing waits for the device.

    ``streamed``: the part kernel by TMA and wgmma, for compute capability 9.0 alone. It also takes a cache whose number
    of heads divides H.
    """
    (B, S, H, D), (_, N, key_heads, _) = q.shape, k_cache.shape
    out, lse = q.new_empty(q.shape), q.new_empty((B, H, S), dtype=torch.float32)
    tiles = sum(-(-rows // TILE_ROWS) for rows in group_rows)
    if streamed:
        # batch elements that share a cache: one of them stands for all, as TMA knows no stride of 0
        shared = B > 1 and k_cache.stride(0) == v_cache.stride(0) == 0
        parts, queries_of_row = config.streamed_splits(-(-tiles // 3) * B * H, N), B if shared else 1
    else:
        parts, queries_of_row = config.splits(tiles * B * H, N), 1
    out_part = q.new_empty((parts, B, H, S, D), dtype=torch.float32)
    lse_part = q.new_empty((parts, B, H, S), dtype=torch.float32)
    cuda.launch(
        "cached_attention_forward", q, shape=(B, S, N, H, key_heads, D), q=_heads(q), k_cache=_heads(k_cache),
        v_cache=_heads(v_cache), ranges=ranges.data_ptr(), ranges_of_group=ranges.shape[2], group_rows=list(group_rows),
        out_part=out_part.data_ptr(), lse_part=lse_part.data_ptr(), parts=parts, queries_of_row=queries_of_row,
        streamed=streamed, out=out.data_ptr(), lse=lse.data_ptr(), scale=scale,
    )  # fmt: skip
    return out, lse
