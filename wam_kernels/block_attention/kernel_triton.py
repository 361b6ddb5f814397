"""Attention under a plan in Triton, forward and backward, one kernel family for all programs.

    forward   s = scale q k^T over the visible keys;  out = softmax(s) v;  lse = logsumexp(s)
    backward  p = exp(s - lse);  ds = p (dout v^T - delta);  delta = rowsum(dout out) - dlse
              dq = scale ds k;  dk = scale ds^T q;  dv = p^T dout

One program instance owns a tile of rows of one head (queries for the forward and dq, keys for dk and dv) or, where that
does not fit into registers or shared memory, one of its PIECES equal pieces. It walks the tile's steps
(``wam_kernels.plan``): first the full steps, which need no mask, then the partial ones, where a row attends to token t
iff lo <= t < hi for one of its RANGES ranges. Tiles come heaviest first. No atomics: every output row is written by one
instance in a fixed order, so results are the same from run to run.

Each loop asks for the tokens of its next step one step ahead. Rows then wait for no index that is loaded in the same
step, and with three stages the rows of the next two steps are on their way while one is computed.

Scores and sums are float32; p and ds are rounded to the input dtype before their products, outputs at the store.
Softmax works in base 2: LOG2E is folded into the scale. Tokens are gathered by row, so token strides are free.

0 * NaN is NaN, so what is masked is selected and not multiplied: p, ds, and at the end the fully masked rows, which
get 0. What is left is the product with a step's tokens: a NaN or Inf in one of them, which some row of the tile attends
to, may reach all rows of the tile, and no others (``wam_kernels.plan`` says which rows share one).

Query head h reads key head h // GROUP; a key tile's program walks its steps once for each of its GROUP query heads.

S query tokens, H query heads, D channels, R rows of the tile, T tokens of a step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.backends import check_grid, on_its_device
from . import config

LOG2E = tl.constexpr(1.4426950408889634)
# Where a running maximum starts: with -inf, a row without a visible token so far would make NaN of -inf - -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)

# Numbers that change with the geometry must not key a compilation of their own. Strides do take part in the key: what
# counts is that they are multiples of 16, which makes 16-byte loads legal, and that holds for every length S.
_PER_CALL = ["S", "H", "scale"]


@triton.jit
def _row_pointers(base, tokens, stride_s, d):
    # int64 before the stride multiply: S * H * D passes 2**31 on packed batches
    return base + tokens.to(tl.int64)[:, None] * stride_s + d[None, :]


@triton.jit
def _first_token(full_ptr, step, end):
    """Of a full step; past the last one 0, which nothing uses."""
    return tl.load(full_ptr + step, mask=step < end, other=0)


@triton.jit
def _listed_tokens(part_ptr, step, end, BLOCK_P: tl.constexpr):
    """Of a partial step; past the last one -1, which nothing uses."""
    return tl.load(part_ptr + step * BLOCK_P + tl.arange(0, BLOCK_P), mask=step < end, other=-1)


@triton.jit
def _turn(i, steps, GROUP: tl.constexpr):
    """(query head of the group, step) of turn i, which is one of GROUP times ``steps``."""
    if GROUP == 1:
        return 0, i
    else:
        return i // steps, i % steps


@triton.jit
def _visible(bounds_ptr, bounds_row, tokens, RANGES: tl.constexpr):
    """bool [R, T]: is ``tokens`` (T) in one of the ranges of each row? -1 never is, for lo >= 0."""
    visible = tl.full([bounds_row.shape[0], tokens.shape[0]], 0, tl.int1)
    for r in tl.static_range(RANGES):
        lo = tl.load(bounds_ptr + (bounds_row * RANGES + r) * 2)
        hi = tl.load(bounds_ptr + (bounds_row * RANGES + r) * 2 + 1)
        visible |= (lo[:, None] <= tokens[None, :]) & (tokens[None, :] < hi[:, None])
    return visible


@triton.jit
def _attends_to_any(bounds_ptr, bounds_row, RANGES: tl.constexpr):
    """bool [R]: is one of the ranges of each row not empty?"""
    some = tl.full([bounds_row.shape[0]], 0, tl.int1)
    for r in tl.static_range(RANGES):
        lo = tl.load(bounds_ptr + (bounds_row * RANGES + r) * 2)
        some |= lo < tl.load(bounds_ptr + (bounds_row * RANGES + r) * 2 + 1)
    return some


@triton.jit
def _positive_scale(q, scale):
    """q and a factor that takes q k to base 2, above 0 whatever the sign of ``scale``, which goes into q.

    So the largest product is the largest score, and -inf, which marks what is masked, stays -inf: a scale of 0 becomes
    the smallest normal number.
    """
    return tl.where(scale < 0, -q, q), tl.maximum(tl.abs(scale) * LOG2E, 1.1754943508222875e-38)


@triton.jit
def _online_softmax(s, to_base2, m, total, acc, v, PRECISION: tl.constexpr):
    """Fold one step of q k (-inf where masked) into the running max (base 2), sum and weighted values."""
    # scaled after the maximum, and below in the same instruction as the subtraction
    m_new = tl.maximum(m, tl.max(s, 1) * to_base2)
    p = tl.exp2(s * to_base2 - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return m_new, total, acc


@triton.jit(do_not_specialize=_PER_CALL)
def block_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    tiles_ptr, rows_ptr, bounds_row_ptr, bounds_ptr, full_ptr, part_ptr,
    stride_q_b, stride_q_s, stride_q_h, stride_k_b, stride_k_s, stride_k_h,
    stride_v_b, stride_v_s, stride_v_h, stride_out_b, stride_out_s, stride_out_h,
    S, H, scale,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    PIECES: tl.constexpr, RANGES: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    piece, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile = piece // PIECES
    # a plan of one batch element serves them all: the grid's third axis counts them
    b = (tl.load(tiles_ptr + tile * 5) + tl.program_id(2)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_d = (d < D)[None, :]
    rows = tl.load(rows_ptr + piece * BLOCK_R + tl.arange(0, BLOCK_R))
    bounds_row = tl.load(bounds_row_ptr + piece * BLOCK_R + tl.arange(0, BLOCK_R))
    is_row = (rows >= 0)[:, None]

    q = tl.load(
        _row_pointers(q_ptr + b * stride_q_b + h * stride_q_h, rows, stride_q_s, d), mask=is_row & in_d, other=0.0
    )
    q, to_base2 = _positive_scale(q, scale)
    k_base = k_ptr + b * stride_k_b + h // GROUP * stride_k_h
    v_base = v_ptr + b * stride_v_b + h // GROUP * stride_v_h
    m = tl.full([BLOCK_R], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)

    full_begin, full_end = tl.load(tiles_ptr + tile * 5 + 1), tl.load(tiles_ptr + tile * 5 + 2)
    first = _first_token(full_ptr, full_begin, full_end)
    for step in tl.range(full_begin, full_end):
        tokens = first + tl.arange(0, BLOCK_T)
        first = _first_token(full_ptr, step + 1, full_end)
        k = tl.load(_row_pointers(k_base, tokens, stride_k_s, d), mask=in_d, other=0.0)
        v = tl.load(_row_pointers(v_base, tokens, stride_v_s, d), mask=in_d, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        m, total, acc = _online_softmax(s, to_base2, m, total, acc, v, PRECISION)

    part_begin, part_end = tl.load(tiles_ptr + tile * 5 + 3), tl.load(tiles_ptr + tile * 5 + 4)
    listed = _listed_tokens(part_ptr, part_begin, part_end, BLOCK_P)
    for step in tl.range(part_begin, part_end):
        tokens = listed
        listed = _listed_tokens(part_ptr, step + 1, part_end, BLOCK_P)
        is_token = (tokens >= 0)[:, None]
        k = tl.load(_row_pointers(k_base, tokens, stride_k_s, d), mask=is_token & in_d, other=0.0)
        v = tl.load(_row_pointers(v_base, tokens, stride_v_s, d), mask=is_token & in_d, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = tl.where(_visible(bounds_ptr, bounds_row, tokens, RANGES), s, float("-inf"))
        m, total, acc = _online_softmax(s, to_base2, m, total, acc, v, PRECISION)

    # NaN scores leave m where it was, and scores past 2**31, where rounding m alone is more than exp2 can take, leave
    # total at 0
    nothing = (total == 0.0) & (m == LOWEST)
    total = tl.where(nothing, 1.0, tl.where(total == 0.0, float("nan"), total))
    acc = tl.where(nothing[:, None], 0.0, acc / total[:, None])
    lse = tl.where(nothing, float("-inf"), (m + tl.log2(total)) / LOG2E)
    out_base = out_ptr + b * stride_out_b + h * stride_out_h
    tl.store(_row_pointers(out_base, rows, stride_out_s, d), acc.to(out_ptr.dtype.element_ty), mask=is_row & in_d)
    tl.store(lse_ptr + (b * H + h) * S + rows, lse, mask=rows >= 0)


@triton.jit(do_not_specialize=_PER_CALL)
def block_attention_bwd_dq_kernel(
    dout_ptr, dlse_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dq_ptr, delta_ptr, lse2_ptr,
    tiles_ptr, rows_ptr, bounds_row_ptr, bounds_ptr, full_ptr, part_ptr,
    stride_dout_b, stride_dout_s, stride_dout_h, stride_q_b, stride_q_s, stride_q_h,
    stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_out_b, stride_out_s, stride_out_h,
    S, H, scale,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    PIECES: tl.constexpr, RANGES: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one query tile; also leaves delta and lse2, lse in base 2, both [B, H, S], for the dk, dv kernel.

    out and dq share strides.
    """
    piece, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile = piece // PIECES
    b = (tl.load(tiles_ptr + tile * 5) + tl.program_id(2)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_d = (d < D)[None, :]
    rows = tl.load(rows_ptr + piece * BLOCK_R + tl.arange(0, BLOCK_R))
    bounds_row = tl.load(bounds_row_ptr + piece * BLOCK_R + tl.arange(0, BLOCK_R))
    is_row = (rows >= 0)[:, None]

    q = tl.load(
        _row_pointers(q_ptr + b * stride_q_b + h * stride_q_h, rows, stride_q_s, d), mask=is_row & in_d, other=0.0
    )
    dout_base = dout_ptr + b * stride_dout_b + h * stride_dout_h
    dout = tl.load(_row_pointers(dout_base, rows, stride_dout_s, d), mask=is_row & in_d, other=0.0)
    out_at = b * stride_out_b + h * stride_out_h
    out = tl.load(_row_pointers(out_ptr + out_at, rows, stride_out_s, d), mask=is_row & in_d, other=0.0)
    at = (b * H + h) * S + rows
    lse = tl.load(lse_ptr + at, mask=rows >= 0, other=float("-inf"))
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1) - tl.load(dlse_ptr + at, mask=rows >= 0, other=0.0)
    tl.store(delta_ptr + at, delta, mask=rows >= 0)

    # a fully masked row, or one with scores of -inf alone, has lse -inf, and s - lse could be NaN; with 0 its p are 0
    nothing = lse == float("-inf")
    lse = tl.where(nothing, 0.0, lse * LOG2E)
    tl.store(lse2_ptr + at, lse, mask=rows >= 0)
    k_base = k_ptr + b * stride_k_b + h // GROUP * stride_k_h
    v_base = v_ptr + b * stride_v_b + h // GROUP * stride_v_h
    to_base2 = scale * LOG2E
    dq = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)

    full_begin, full_end = tl.load(tiles_ptr + tile * 5 + 1), tl.load(tiles_ptr + tile * 5 + 2)
    first = _first_token(full_ptr, full_begin, full_end)
    for step in tl.range(full_begin, full_end):
        tokens = first + tl.arange(0, BLOCK_T)
        first = _first_token(full_ptr, step + 1, full_end)
        k = tl.load(_row_pointers(k_base, tokens, stride_k_s, d), mask=in_d, other=0.0)
        v = tl.load(_row_pointers(v_base, tokens, stride_v_s, d), mask=in_d, other=0.0)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * to_base2 - lse[:, None])
        ds = p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    part_begin, part_end = tl.load(tiles_ptr + tile * 5 + 3), tl.load(tiles_ptr + tile * 5 + 4)
    listed = _listed_tokens(part_ptr, part_begin, part_end, BLOCK_P)
    for step in tl.range(part_begin, part_end):
        tokens = listed
        listed = _listed_tokens(part_ptr, step + 1, part_end, BLOCK_P)
        is_token = (tokens >= 0)[:, None]
        k = tl.load(_row_pointers(k_base, tokens, stride_k_s, d), mask=is_token & in_d, other=0.0)
        v = tl.load(_row_pointers(v_base, tokens, stride_v_s, d), mask=is_token & in_d, other=0.0)
        visible = _visible(bounds_ptr, bounds_row, tokens, RANGES)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * to_base2 - lse[:, None])
        ds = p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        # where masked it may be anything: a score may exceed lse by any amount
        ds = tl.where(visible, ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    dq_at = _row_pointers(dq_ptr + out_at, rows, stride_out_s, d)
    dq = tl.where(nothing[:, None], 0.0, dq * scale)
    tl.store(dq_at, dq.to(dq_ptr.dtype.element_ty), mask=is_row & in_d)


@triton.jit(do_not_specialize=_PER_CALL)
def block_attention_bwd_dkdv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr,
    tiles_ptr, rows_ptr, bounds_row_ptr, bounds_ptr, full_ptr, part_ptr,
    stride_dout_b, stride_dout_s, stride_dout_h, stride_q_b, stride_q_s, stride_q_h,
    stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_dk_b, stride_dk_s, stride_dk_h,
    S, H, scale,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    PIECES: tl.constexpr, RANGES: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key tile of one key head h: rows are keys, steps are queries, products are transposed.

    Only one of them, if DK or DV says so: two sums of 256 channels do not fit into registers. dk and dv share strides.
    Query heads and steps come in a fixed order, so their sum is the same from run to run.
    """
    piece, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile = piece // PIECES
    b = (tl.load(tiles_ptr + tile * 5) + tl.program_id(2)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_d = (d < D)[None, :]
    rows = tl.load(rows_ptr + piece * BLOCK_R + tl.arange(0, BLOCK_R))
    bounds_row = tl.load(bounds_row_ptr + piece * BLOCK_R + tl.arange(0, BLOCK_R))
    is_row = (rows >= 0)[:, None]

    k_base = k_ptr + b * stride_k_b + h * stride_k_h
    v_base = v_ptr + b * stride_v_b + h * stride_v_h
    k = tl.load(_row_pointers(k_base, rows, stride_k_s, d), mask=is_row & in_d, other=0.0)
    v = tl.load(_row_pointers(v_base, rows, stride_v_s, d), mask=is_row & in_d, other=0.0)
    to_base2 = scale * LOG2E
    dk = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)

    # one loop for all query heads of the group: nested ones would run dry at each head, and spill
    full_begin, full_end = tl.load(tiles_ptr + tile * 5 + 1), tl.load(tiles_ptr + tile * 5 + 2)
    first = _first_token(full_ptr, full_begin, full_end)
    for i in tl.range((full_end - full_begin) * GROUP):
        member, _ = _turn(i, full_end - full_begin, GROUP)
        _, later = _turn(i + 1, full_end - full_begin, GROUP)
        h_q = h * GROUP + member
        tokens = first + tl.arange(0, BLOCK_T)
        first = _first_token(full_ptr, full_begin + later, full_end)
        q_base = q_ptr + b * stride_q_b + h_q * stride_q_h
        dout_base = dout_ptr + b * stride_dout_b + h_q * stride_dout_h
        q = tl.load(_row_pointers(q_base, tokens, stride_q_s, d), mask=in_d, other=0.0)
        dout = tl.load(_row_pointers(dout_base, tokens, stride_dout_s, d), mask=in_d, other=0.0)
        row_at = (b * H + h_q) * S + tokens
        lse = tl.load(lse2_ptr + row_at)
        delta = tl.load(delta_ptr + row_at)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * to_base2 - lse[None, :])
        if DV:
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        if DK:
            ds = p * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    part_begin, part_end = tl.load(tiles_ptr + tile * 5 + 3), tl.load(tiles_ptr + tile * 5 + 4)
    listed = _listed_tokens(part_ptr, part_begin, part_end, BLOCK_P)
    for i in tl.range((part_end - part_begin) * GROUP):
        member, _ = _turn(i, part_end - part_begin, GROUP)
        _, later = _turn(i + 1, part_end - part_begin, GROUP)
        h_q = h * GROUP + member
        tokens = listed
        listed = _listed_tokens(part_ptr, part_begin + later, part_end, BLOCK_P)
        is_token = tokens >= 0
        q_base = q_ptr + b * stride_q_b + h_q * stride_q_h
        dout_base = dout_ptr + b * stride_dout_b + h_q * stride_dout_h
        q = tl.load(_row_pointers(q_base, tokens, stride_q_s, d), mask=is_token[:, None] & in_d, other=0.0)
        dout = tl.load(_row_pointers(dout_base, tokens, stride_dout_s, d), mask=is_token[:, None] & in_d, other=0.0)
        row_at = (b * H + h_q) * S + tokens
        lse = tl.load(lse2_ptr + row_at, mask=is_token, other=0.0)
        delta = tl.load(delta_ptr + row_at, mask=is_token, other=0.0)
        visible = _visible(bounds_ptr, bounds_row, tokens, RANGES)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * to_base2 - lse[None, :])
        p = tl.where(visible, p, 0.0)
        if DV:
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        if DK:
            ds = p * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :])
            ds = tl.where(visible, ds, 0.0)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    some = _attends_to_any(bounds_ptr, bounds_row, RANGES)[:, None]
    at = b * stride_dk_b + h * stride_dk_h
    if DK:
        dk = tl.where(some, dk * scale, 0.0).to(dk_ptr.dtype.element_ty)
        tl.store(_row_pointers(dk_ptr + at, rows, stride_dk_s, d), dk, mask=is_row & in_d)
    if DV:
        dv = tl.where(some, dv, 0.0).to(dv_ptr.dtype.element_ty)
        tl.store(_row_pointers(dv_ptr + at, rows, stride_dk_s, d), dv, mask=is_row & in_d)


def launch_constants(
    side: list[Tensor], full_step: int, q: Tensor, k: Tensor, launch: config.Config
) -> tuple[int, dict[str, object]]:
    """Programs of the grid's first axis, and what a launch is compiled for."""
    tiles, rows, _, bounds, _, part = side
    D, pieces = q.shape[-1], rows.shape[1] // launch.rows
    return tiles.shape[0] * pieces, {
        "D": D,
        "BLOCK_R": launch.rows,
        "BLOCK_T": full_step,
        "BLOCK_P": part.shape[1],
        "BLOCK_D": config.block_d(D),
        "PIECES": pieces,
        "RANGES": bounds.shape[1],
        "GROUP": q.shape[2] // k.shape[2],
        # float32 means float32: one tf32 product would miss the error budget by a factor of a thousand, three do not
        # (and "ieee" leaves the tensor cores: 64 x 64 tiles then spill 100 KB and take a minute to compile)
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def strides_of(*tensors: Tensor) -> list[int]:
    return [n for t in tensors for n in t.stride()[:3]]


@on_its_device
def forward(
    q: Tensor, k: Tensor, v: Tensor, queries: list[Tensor], full_step: int, shared: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out ``[B, S, H, D]`` contiguous, lse ``[B, H, S]`` float32; every element is written by some tile."""
    B, S, H, D = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty((B, H, S), dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    check_grid("block_attention", B=B if shared else 1, H=H)
    launch = config.forward(D, q.itemsize, queries[1].shape[1])
    programs, constants = launch_constants(queries, full_step, q, k, launch)
    block_attention_fwd_kernel[(programs, H, B if shared else 1)](
        q, k, v, out, lse, *queries, *strides_of(q, k, v, out), S, H, scale, **constants
    )
    return out, lse


@on_its_device
def backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    queries: list[Tensor], keys: list[Tensor], full_step: int, shared: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv in the shapes of q, k, v, contiguous. The launch for dk and dv reads what that for dq leaves.

    ``queries`` are those for dq: tiles of frozen ones have no steps, and leave delta and zeros.
    """
    B, S, H, D = q.shape
    if q.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    launch = config.dq(D, q.itemsize, queries[1].shape[1])
    programs, constants = launch_constants(queries, full_step, q, k, launch)
    block_attention_bwd_dq_kernel[(programs, H, B if shared else 1)](
        dout, dlse, q, k, v, out, lse, dq, delta, lse2, *queries, *strides_of(dout, q, k, v, out), S, H, scale,
        **constants,
    )  # fmt: skip
    launch = config.dkdv(D, q.itemsize, keys[1].shape[1])
    programs, constants = launch_constants(keys, full_step, q, k, launch)
    for outputs in config.dkdv_launches(D, q.itemsize):
        block_attention_bwd_dkdv_kernel[(programs, k.shape[2], B if shared else 1)](
            dout, q, k, v, lse2, delta, dk, dv, *keys, *strides_of(dout, q, k, v, dk), S, H, scale,
            **constants, **outputs,
        )  # fmt: skip
    return dq, dk, dv
