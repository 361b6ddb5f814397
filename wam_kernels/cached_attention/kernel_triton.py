"""Attention over ranges of a cache in Triton: partial results over parts of the keys, then their sum.

    part      s = scale q k^T over its slots;  out_p = softmax(s) v;  lse_p = logsumexp(s)
    combine   lse = logsumexp_p(lse_p);  out = sum_p exp(lse_p - lse) out_p

One program of the first kernel owns one tile of rows of one group, one head and one part. A group's ranges, one after
the other, are a list of its visible slots; part p of P takes the p-th share of that list, whole steps but for the last.
So the parts are balanced at every fill of the cache, and the grid depends on shapes only: one CUDA graph serves all
fills. Inside a range every step is BLOCK_N neighbouring slots and needs no mask; a range's last step may be shorter
and is masked, loads included, so no slot outside the ranges is ever read. The second kernel adds the parts in order.
No atomics: the same bits from run to run.

Scores and sums are float32; p is rounded to the input dtype before its product, out at the store. Softmax works in
base 2: LOG2E is folded into the scale, and lse_p is in base 2 until the combine.

S rows, N slots, D channels, M rows of a tile, G groups (of rows_0, rows_1, ... rows), R ranges of a group.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.backends import check_grid, on_its_device
from . import config

LOG2E = tl.constexpr(1.4426950408889634)
# Where a running maximum starts: with -inf, scores of -inf alone would make NaN of -inf - -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)

# Numbers that change with the chunk or the cache must not key a compilation of their own, nor the place of the ranges
# in a larger buffer. Strides do take part in the key: that they are multiples of 16 makes 16-byte loads legal.
_PER_CALL = [
    "ranges_ptr", "rows_0", "rows_1", "rows_2", "rows_3", "queries_of_row", "B", "S", "N", "H", "G", "R", "scale",
]  # fmt: skip


@triton.jit
def _tile_rows(tile, group_rows, BLOCK_M: tl.constexpr):
    """(group, first row, end of the group's rows) of a tile; the tiles of a group stand side by side."""
    group, first, end = 0, 0, 0
    tiles_before, rows_before = 0, 0
    for g in tl.static_range(len(group_rows)):
        tiles = tl.cdiv(group_rows[g], BLOCK_M)
        here = (tiles_before <= tile) & (tile < tiles_before + tiles)
        group = tl.where(here, g, group)
        first = tl.where(here, rows_before + (tile - tiles_before) * BLOCK_M, first)
        end = tl.where(here, rows_before + group_rows[g], end)
        tiles_before += tiles
        rows_before += group_rows[g]
    return group, first, end


@triton.jit
def _range(bounds_ptr, r, N):
    """(start, length) of range r, cut off at 0 and N."""
    start = tl.maximum(tl.load(bounds_ptr + 2 * r), 0)
    return start, tl.maximum(tl.minimum(tl.load(bounds_ptr + 2 * r + 1), N) - start, 0)


@triton.jit
def _step(
    q, k_ptr, v_ptr, stride_k_n, stride_v_n, slot, end, to_base2, m, total, acc,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold the slots from ``slot``, MASKED: up to ``end``, into the running max (base 2), sum and weighted values."""
    slots = slot + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)[None, :]
    # int64 before the stride multiply: slots * H * D of a long cache
    at = slots.to(tl.int64)[:, None]
    there = (slots < end)[:, None] & (d < D) if MASKED else d < D
    k = tl.load(k_ptr + at * stride_k_n + d, mask=there, other=0.0)
    v = tl.load(v_ptr + at * stride_v_n + d, mask=there, other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        s = tl.where((slots < end)[None, :], s, float("-inf"))
    # scaled after the maximum, and below in the same instruction as the subtraction
    m_new = tl.maximum(m, tl.max(s, 1) * to_base2)
    p = tl.exp2(s * to_base2 - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return m_new, total, acc


@triton.jit(do_not_specialize=_PER_CALL)
def cached_attention_part_kernel(
    q_ptr, k_ptr, v_ptr, ranges_ptr, out_part_ptr, lse_part_ptr,
    stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_n, stride_k_h, stride_v_b, stride_v_n, stride_v_h,
    rows_0, rows_1, rows_2, rows_3, queries_of_row, B, S, N, H, G, R, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # int64 before the stride multiplies
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    part, parts = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    group, first_row, end_row = _tile_rows(tl.program_id(0), (rows_0, rows_1, rows_2, rows_3), BLOCK_M)
    rows, d = first_row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    is_element = (rows < end_row)[:, None] & (d < D)[None, :]

    # this part's share of the visible slots
    bounds_ptr = ranges_ptr + (b * G + group) * R * 2
    visible = 0
    for r in tl.range(R):
        _, length = _range(bounds_ptr, r, N)
        visible += length
    share = tl.cdiv(tl.cdiv(visible, BLOCK_N), parts) * BLOCK_N
    begin = part.to(tl.int32) * share

    q_at = q_ptr + b * stride_q_b + h * stride_q_h + rows.to(tl.int64)[:, None] * stride_q_s + d[None, :]
    q = tl.load(q_at, mask=is_element, other=0.0)
    cache_row = b // queries_of_row
    k_ptr += cache_row * stride_k_b + h * stride_k_h
    v_ptr += cache_row * stride_v_b + h * stride_v_h
    # the sign goes into q: then the largest product is the largest score, and -inf, which marks what is masked, stays
    # -inf, also at scale 0, which becomes the smallest normal number
    q = tl.where(scale < 0, -q, q)
    to_base2 = tl.maximum(tl.abs(scale) * LOG2E, 1.1754943508222875e-38)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    before = 0  # visible slots of the ranges before this one
    for r in tl.range(R):
        start, length = _range(bounds_ptr, r, N)
        slot = start + tl.maximum(begin - before, 0)
        end = start + tl.minimum(begin + share - before, length)
        full = tl.maximum(end - slot, 0) // BLOCK_N * BLOCK_N
        for at in tl.range(slot, slot + full, BLOCK_N):
            m, total, acc = _step(
                q, k_ptr, v_ptr, stride_k_n, stride_v_n, at, end, to_base2, m, total, acc,
                D, BLOCK_N, BLOCK_D, PRECISION, MASKED=False,
            )  # fmt: skip
        if slot + full < end:
            m, total, acc = _step(
                q, k_ptr, v_ptr, stride_k_n, stride_v_n, slot + full, end, to_base2, m, total, acc,
                D, BLOCK_N, BLOCK_D, PRECISION, MASKED=True,
            )  # fmt: skip
        before += length

    # a part without slots, or with scores of -inf alone: lse -inf, weight 0 in the combine. NaN scores leave m where it
    # was, and scores past 2**31, where rounding m alone is more than exp2 can take, leave total at 0
    nothing = (total == 0.0) & (m == LOWEST)
    total = tl.where(nothing, 1.0, tl.where(total == 0.0, float("nan"), total))
    lse = tl.where(nothing, float("-inf"), m + tl.log2(total))
    row_of_part = ((part * B + b) * H + h) * S + rows
    out_at = out_part_ptr + row_of_part[:, None] * D + d[None, :]
    tl.store(out_at, acc / total[:, None], mask=is_element)
    tl.store(lse_part_ptr + row_of_part, lse, mask=rows < end_row)


@triton.jit(do_not_specialize=["B", "S", "H", "parts"])
def cached_attention_combine_kernel(
    out_part_ptr, lse_part_ptr, out_ptr, lse_ptr, B, S, H, parts,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns a tile of rows of one head; out is contiguous."""
    bh = tl.program_id(1).to(tl.int64)
    rows, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    is_row, is_element = rows < S, (rows < S)[:, None] & (d < D)[None, :]
    row_of_part = bh * S + rows
    stride_part = (B * H).to(tl.int64) * S

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for part in tl.range(parts):
        m = tl.maximum(m, tl.load(lse_part_ptr + part * stride_part + row_of_part, mask=is_row, other=float("-inf")))
    # a fully masked row keeps m = -inf; exp2(-inf - -inf) would be NaN
    m = tl.where(m == float("-inf"), 0.0, m)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.range(parts):
        at = part * stride_part + row_of_part
        weight = tl.exp2(tl.load(lse_part_ptr + at, mask=is_row, other=float("-inf")) - m)
        total += weight
        acc += weight[:, None] * tl.load(out_part_ptr + at[:, None] * D + d[None, :], mask=is_element, other=0.0)

    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    lse = tl.where(nothing, float("-inf"), (m + tl.log2(total)) / LOG2E)
    b, h = bh // H, bh % H
    out_at = out_ptr + ((b * S + rows)[:, None] * H + h) * D + d[None, :]
    tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=is_element)
    tl.store(lse_ptr + bh * S + rows, lse, mask=is_row)


COMBINE_ROWS = 16


@on_its_device
def forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, ranges: Tensor, group_rows: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """out ``[B, S, H, D]`` contiguous, lse ``[B, H, S]`` float32. Two launches; nothing waits for the device."""
    (B, S, H, D), N, (_, G, R, _) = q.shape, k_cache.shape[1], ranges.shape
    out, lse = q.new_empty(q.shape), q.new_empty((B, H, S), dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    check_grid("cached_attention", **{"B * H": B * H})
    launch = config.forward(max(group_rows), D, q.itemsize)
    tiles = sum(triton.cdiv(rows, launch.block_m) for rows in group_rows)
    parts = config.splits(tiles * B * H, N)
    out_part = q.new_empty((parts, B, H, S, D), dtype=torch.float32)
    lse_part = q.new_empty((parts, B, H, S), dtype=torch.float32)
    cached_attention_part_kernel[(tiles, B * H, parts)](
        q, k_cache, v_cache, ranges, out_part, lse_part,
        *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
        *group_rows, *[0] * (config.MAX_GROUPS - G), B // k_cache.shape[0], B, S, N, H, G, R, scale,
        **launch_constants(launch, D, q.dtype), num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    cached_attention_combine_kernel[(triton.cdiv(S, COMBINE_ROWS), B * H)](
        out_part, lse_part, out, lse, B, S, H, parts,
        D=D, BLOCK_M=COMBINE_ROWS, BLOCK_D=config.block_d(D), num_warps=4,
    )  # fmt: skip
    return out, lse


def launch_constants(launch: config.Config, D: int, dtype: torch.dtype) -> dict[str, object]:
    return {
        "D": D,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_D": config.block_d(D),
        # float32 means float32: one tf32 product would miss the error budget by a factor of a thousand, three do not
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }
