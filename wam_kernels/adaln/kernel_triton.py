"""Gated residual and adaptive LayerNorm in Triton, forward and backward, one kernel family for all variants.

    forward   r = x + gate y, rounded;  n = (r - mean) rstd;  h = n (1 + scale) + shift,  or  n weight + bias
    backward  g = dh (1 + scale);  t = dr + rstd (g - mean(g) - n mean(g n));  dx = t;  dy = gate t
              dgate = sum t y;  dshift = sum dh;  dscale = sum dh n      over the tokens of a row of the modulation

Forward: one program owns a few neighbouring tokens of one batch element (``config.tokens_of_program``) and walks them.
It keeps the modulation in registers while the row f stays the same. Backward: one program owns one segment (at most 16
tokens of one modulation row, see ``wam_kernels.frame_index``) of one batch element; it walks the segment's tokens,
recomputes their statistics from r, and keeps the sums in registers, to store them once as partials [B, N, sums, D]. A
second kernel adds the partials of each row in order: one program owns some channels of one row. There are no atomics,
so results are the same from run to run. In both, the next token's rows are on their way into shared memory while a
token is computed: STAGES of ``tl.range``.

TOKEN_ROWS: token s reads row s of the modulation. There is nothing to sum then: a backward program owns a few
neighbouring tokens, as in the forward, and stores dgate and dscale of each in the dtype of the rows; dshift is dh.

Arithmetic is float32. Rounding to the dtype of x happens at the stores of r, h, dx and dy, and nowhere else; the norm
is of the rounded r. HAS_Y, HAS_GATE and NORM (0 none, 1 shift and scale, 2 weight and bias) leave out what a variant
lacks; absent pointers are None. ``ada_layer_norm`` is HAS_Y = False, with x in the place of r.

B batch elements, S tokens, F rows of the modulation, D channels, N segments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.backends import check_grid, on_its_device
from . import config

NONE, ADAPTIVE, AFFINE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# numbers that change with the geometry must not key a compilation of their own
_PER_CALL = ["N", "S", "tokens_of_program", "eps"]


@triton.jit
def _load_row(ptr, at, d, in_d):
    """Channels of the row that starts at ``at``, as float32, 0 beyond D."""
    return tl.load(ptr + at + d, mask=in_d, other=0.0).to(tl.float32)


@triton.jit
def _modulation(rows_ptr, table_ptr, at, d, in_d, HAS_TABLE: tl.constexpr):
    value = _load_row(rows_ptr, at, d, in_d)
    if HAS_TABLE:
        value += _load_row(table_ptr, 0, d, in_d)
    return value


@triton.jit
def _normalise(row, in_d, eps, D: tl.constexpr):
    """(row - mean) * rstd, 0 beyond D, and rstd. The variance is taken around the mean, which loses no digits."""
    centred = tl.where(in_d, row - tl.sum(row, 0) / D, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 0) / D + eps)
    return centred * rstd, rstd


@triton.jit(do_not_specialize=_PER_CALL)
def gate_residual_norm_fwd_kernel(
    x_ptr, y_ptr, r_ptr, h_ptr, gate_ptr, shift_ptr, scale_ptr,
    gate_table_ptr, shift_table_ptr, scale_table_ptr, weight_ptr, bias_ptr, row_of_token_ptr,
    stride_x_b, stride_x_s, stride_y_b, stride_y_s, stride_r_b, stride_r_s,
    stride_gate_b, stride_gate_f, stride_shift_b, stride_shift_f, stride_scale_b, stride_scale_f,
    S, tokens_of_program, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_Y: tl.constexpr, HAS_GATE: tl.constexpr, NORM: tl.constexpr,
    HAS_GATE_TABLE: tl.constexpr, HAS_SHIFT_TABLE: tl.constexpr, HAS_SCALE_TABLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """r and h share strides."""
    # int64 before the first stride multiply: S * D passes 2**31 on packed batches
    first, b = tl.program_id(0).to(tl.int64) * tokens_of_program, tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    f = tl.full([], -1, tl.int64)  # the row that gate, shift and factor are of
    gate = tl.zeros([BLOCK_D], tl.float32)
    shift = tl.zeros([BLOCK_D], tl.float32)
    factor = tl.zeros([BLOCK_D], tl.float32)
    if NORM == AFFINE:
        shift = _load_row(bias_ptr, 0, d, in_d)
        factor = _load_row(weight_ptr, 0, d, in_d)

    for s in tl.range(first, tl.minimum(first + tokens_of_program, S), num_stages=STAGES):
        r = _load_row(x_ptr, b * stride_x_b + s * stride_x_s, d, in_d)
        if HAS_Y:
            y = _load_row(y_ptr, b * stride_y_b + s * stride_y_s, d, in_d)
        if HAS_GATE or NORM == ADAPTIVE:
            f_of_token = tl.load(row_of_token_ptr + s).to(tl.int64)
            if f_of_token != f:
                f = f_of_token
                if HAS_GATE:
                    at_gate = b * stride_gate_b + f * stride_gate_f
                    gate = _modulation(gate_ptr, gate_table_ptr, at_gate, d, in_d, HAS_GATE_TABLE)
                if NORM == ADAPTIVE:
                    at_shift = b * stride_shift_b + f * stride_shift_f
                    shift = _modulation(shift_ptr, shift_table_ptr, at_shift, d, in_d, HAS_SHIFT_TABLE)
                    at_scale = b * stride_scale_b + f * stride_scale_f
                    factor = 1.0 + _modulation(scale_ptr, scale_table_ptr, at_scale, d, in_d, HAS_SCALE_TABLE)

        row_at = b * stride_r_b + s * stride_r_s
        if HAS_Y:
            if HAS_GATE:
                y *= gate
            r_rounded = (r + y).to(r_ptr.dtype.element_ty)
            tl.store(r_ptr + row_at + d, r_rounded, mask=in_d)
            r = r_rounded.to(tl.float32)
        if NORM != NONE:
            normed, _ = _normalise(r, in_d, eps, D)
            tl.store(h_ptr + row_at + d, (normed * factor + shift).to(h_ptr.dtype.element_ty), mask=in_d)


@triton.jit(do_not_specialize=_PER_CALL)
def gate_residual_norm_bwd_kernel(
    dr_ptr, dh_ptr, r_ptr, y_ptr, dx_ptr, dy_ptr, gate_ptr, scale_ptr,
    gate_table_ptr, scale_table_ptr, weight_ptr, segments_ptr, partials_ptr, dgate_ptr, dscale_ptr,
    stride_dr_b, stride_dr_s, stride_dh_b, stride_dh_s, stride_r_b, stride_r_s, stride_y_b, stride_y_s,
    stride_dx_b, stride_dx_s, stride_gate_b, stride_gate_f, stride_scale_b, stride_scale_f,
    N, S, tokens_of_program, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_DR: tl.constexpr, HAS_GATE: tl.constexpr, NORM: tl.constexpr,
    HAS_GATE_TABLE: tl.constexpr, HAS_SCALE_TABLE: tl.constexpr, TOKEN_ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partials are dgate (if HAS_GATE), then dshift and dscale (if NORM). dx and dy share strides.

    TOKEN_ROWS: no segments; dgate and dscale are [B, S, D], and partials are for AFFINE's sums alone.
    """
    n, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    if TOKEN_ROWS:
        first = n * tokens_of_program
        end = tl.minimum(first + tokens_of_program, S)
        f = first
    else:
        first, end = tl.load(segments_ptr + n * 3).to(tl.int64), tl.load(segments_ptr + n * 3 + 1).to(tl.int64)
        f = tl.load(segments_ptr + n * 3 + 2).to(tl.int64)

    if HAS_GATE and not TOKEN_ROWS:
        gate = _modulation(gate_ptr, gate_table_ptr, b * stride_gate_b + f * stride_gate_f, d, in_d, HAS_GATE_TABLE)
        dgate = tl.zeros([BLOCK_D], tl.float32)
    if NORM == ADAPTIVE and not TOKEN_ROWS:
        at_scale = b * stride_scale_b + f * stride_scale_f
        factor = 1.0 + _modulation(scale_ptr, scale_table_ptr, at_scale, d, in_d, HAS_SCALE_TABLE)
    if NORM == AFFINE:
        factor = _load_row(weight_ptr, 0, d, in_d)
    if NORM != NONE:
        dshift = tl.zeros([BLOCK_D], tl.float32)
        dscale = tl.zeros([BLOCK_D], tl.float32)

    for s in tl.range(first, end, num_stages=STAGES):
        # all loads of a token are asked for before its reductions, whose barriers nothing moves across
        total = tl.zeros([BLOCK_D], tl.float32)
        if HAS_DR:
            total = _load_row(dr_ptr, b * stride_dr_b + s * stride_dr_s, d, in_d)
        if HAS_GATE:
            y = _load_row(y_ptr, b * stride_y_b + s * stride_y_s, d, in_d)
        if NORM != NONE:
            dh = _load_row(dh_ptr, b * stride_dh_b + s * stride_dh_s, d, in_d)
            r = _load_row(r_ptr, b * stride_r_b + s * stride_r_s, d, in_d)
        if TOKEN_ROWS:
            if HAS_GATE:
                at_gate = b * stride_gate_b + s * stride_gate_f
                gate = _modulation(gate_ptr, gate_table_ptr, at_gate, d, in_d, HAS_GATE_TABLE)
            if NORM == ADAPTIVE:
                at_scale = b * stride_scale_b + s * stride_scale_f
                factor = 1.0 + _modulation(scale_ptr, scale_table_ptr, at_scale, d, in_d, HAS_SCALE_TABLE)
        if NORM != NONE:
            normed, rstd = _normalise(r, in_d, eps, D)
            if TOKEN_ROWS and NORM == ADAPTIVE:
                dscale_of_token = (dh * normed).to(dscale_ptr.dtype.element_ty)
                tl.store(dscale_ptr + (b * S + s) * D + d, dscale_of_token, mask=in_d)
            else:
                dshift += dh
                dscale += dh * normed
            g = dh * factor
            total += rstd * (g - tl.sum(g, 0) / D - normed * (tl.sum(g * normed, 0) / D))
            tl.store(dx_ptr + b * stride_dx_b + s * stride_dx_s + d, total.to(dx_ptr.dtype.element_ty), mask=in_d)
        if HAS_GATE:
            if TOKEN_ROWS:
                dgate_of_token = (total * y).to(dgate_ptr.dtype.element_ty)
                tl.store(dgate_ptr + (b * S + s) * D + d, dgate_of_token, mask=in_d)
            else:
                dgate += total * y
            dy = (total * gate).to(dy_ptr.dtype.element_ty)
            tl.store(dy_ptr + b * stride_dx_b + s * stride_dx_s + d, dy, mask=in_d)

    HAS_DGATE: tl.constexpr = HAS_GATE and not TOKEN_ROWS
    HAS_DNORM: tl.constexpr = NORM == AFFINE or NORM == ADAPTIVE and not TOKEN_ROWS
    SUMS: tl.constexpr = (1 if HAS_DGATE else 0) + (2 if HAS_DNORM else 0)
    if SUMS:
        partial_ptr = partials_ptr + (b * N + n) * SUMS * D + d
        if HAS_DGATE:
            tl.store(partial_ptr, dgate, mask=in_d)
            partial_ptr += D
        if HAS_DNORM:
            tl.store(partial_ptr, dshift, mask=in_d)
            tl.store(partial_ptr + D, dscale, mask=in_d)


@triton.jit
def _sum_of_row(partials_ptr, row_segments_ptr, out_ptr, out_at, begin, end, stride, d, in_d,
                BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    total = tl.zeros([BLOCK_D], tl.float32)
    for i in tl.range(begin, end, BLOCK_N):
        at = i + tl.arange(0, BLOCK_N)
        n = tl.load(row_segments_ptr + at, mask=at < end, other=0).to(tl.int64)
        mask = (at < end)[:, None] & in_d[None, :]
        total += tl.sum(tl.load(partials_ptr + n[:, None] * stride + d[None, :], mask=mask, other=0.0), 0)
    tl.store(out_ptr + out_at + d, total.to(out_ptr.dtype.element_ty), mask=in_d)


@triton.jit(do_not_specialize=_PER_CALL)
def row_sums_kernel(
    partials_ptr, dgate_ptr, dshift_ptr, dscale_ptr, row_begin_ptr, row_segments_ptr, N,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_GATE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_D channels of one row of one batch element; a row without tokens gets zeros."""
    f, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < D
    begin, end = tl.load(row_begin_ptr + f), tl.load(row_begin_ptr + f + 1)
    SUMS: tl.constexpr = (1 if HAS_GATE else 0) + (2 if NORM != NONE else 0)
    stride = SUMS * D
    partials_ptr += b * N * stride
    out_at = (b * tl.num_programs(0) + f) * D
    if HAS_GATE:
        _sum_of_row(partials_ptr, row_segments_ptr, dgate_ptr, out_at, begin, end, stride, d, in_d, BLOCK_N, BLOCK_D)
        partials_ptr += D
    if NORM != NONE:
        _sum_of_row(partials_ptr, row_segments_ptr, dshift_ptr, out_at, begin, end, stride, d, in_d, BLOCK_N, BLOCK_D)
        _sum_of_row(
            partials_ptr + D, row_segments_ptr, dscale_ptr, out_at, begin, end, stride, d, in_d, BLOCK_N, BLOCK_D
        )


def strides_of(*tensors: Tensor | None) -> list[int]:
    """Batch and token (or row) strides; an absent tensor has none."""
    return [n for t in tensors for n in ((0, 0) if t is None else t.stride()[:2])]


@on_its_device
def forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    gate_table: Tensor | None, shift_table: Tensor | None, scale_table: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, row_of_token: Tensor, eps: float,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """r (None without y) and h (None without a norm), ``[B, S, D]`` contiguous."""
    B, S, D = x.shape
    check_grid("adaln", B=B)
    norm = ADAPTIVE if scale is not None else AFFINE if weight is not None else NONE
    r = None if y is None else x.new_empty(x.shape)
    h = None if norm == NONE else x.new_empty(x.shape)
    if x.numel() == 0:
        return r, h
    tokens = config.tokens_of_program(B * S)
    gate_residual_norm_fwd_kernel[(triton.cdiv(S, tokens), B)](
        x, y, r, h, gate, shift, scale, gate_table, shift_table, scale_table, weight, bias, row_of_token,
        *strides_of(x, y, h if r is None else r, gate, shift, scale), S, tokens, eps,
        D=D, BLOCK_D=config.block_d(D), HAS_Y=y is not None, HAS_GATE=gate is not None, NORM=norm.value,
        HAS_GATE_TABLE=gate_table is not None, HAS_SHIFT_TABLE=shift_table is not None,
        HAS_SCALE_TABLE=scale_table is not None, STAGES=config.stages(D, x.itemsize),
        num_warps=config.forward_warps(D),
    )  # fmt: skip
    return r, h


@on_its_device
def backward(
    dr: Tensor | None, dh: Tensor | None, r: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, gate_table: Tensor | None, scale_table: Tensor | None, weight: Tensor | None,
    segments: Tensor, row_begin: Tensor, row_segments: Tensor, eps: float, token_rows: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dx, dy ``[B, S, D]``; dgate, dshift, dscale ``[B, F, D]`` in the dtype of the rows; dweight, dbias ``[D]``
    float32; None if absent.

    dx is None where dh is (it equals dr then), dy where gate is (it equals dx). Without dh, r, scale and weight take no
    part. Two launches; all rows and sums are written. With ``token_rows``, token s reads row s: dshift is None too (it
    equals dh), and there is one launch without weight.
    """
    like = dr if dh is None else dh
    assert like is not None
    if token_rows:
        return _token_rows_backward(dr, dh, r, y, gate, scale, gate_table, scale_table, weight, eps)
    B, S, D = like.shape
    N, F = segments.shape[0], row_begin.shape[0] - 1
    norm = NONE if dh is None else ADAPTIVE if scale is not None else AFFINE
    dx = None if dh is None else like.new_empty(like.shape)
    dy = None if gate is None else like.new_empty(like.shape)
    dgate = None if gate is None else like.new_empty((B, F, D), dtype=gate.dtype)
    of_norm = torch.float32 if norm != ADAPTIVE or scale is None else scale.dtype
    dshift, dscale = (None if dh is None else like.new_empty((B, F, D), dtype=of_norm) for _ in range(2))
    sums = (gate is not None) + 2 * (dh is not None)
    partials = like.new_empty((B, N, sums, D), dtype=torch.float32)
    flags = {"D": D, "HAS_GATE": gate is not None, "NORM": norm.value}
    if like.numel():
        gate_residual_norm_bwd_kernel[(N, B)](
            dr, dh, r, y, dx, dy, gate, scale, gate_table, scale_table, weight, segments, partials, None, None,
            *strides_of(dr, dh, r, y, dy if dx is None else dx, gate, scale), N, S, 0, eps,
            BLOCK_D=config.block_d(D), HAS_DR=dr is not None, HAS_GATE_TABLE=gate_table is not None,
            HAS_SCALE_TABLE=scale_table is not None, TOKEN_ROWS=False, STAGES=config.stages(D, like.itemsize), **flags,
            num_warps=config.backward_warps(D),
        )  # fmt: skip
    if B * F:
        row_sums_kernel[(F, B, triton.cdiv(D, config.SUM_CHANNELS))](
            partials, dgate, dshift, dscale, row_begin, row_segments, N,
            BLOCK_N=config.SUM_SEGMENTS, BLOCK_D=config.SUM_CHANNELS, **flags, num_warps=4,
        )  # fmt: skip
    if norm == AFFINE:
        assert dscale is not None and dshift is not None
        # every token has weight and bias in common: their gradients are the sums of all rows
        return dx, dy, dgate, None, None, dscale.sum((0, 1)), dshift.sum((0, 1))
    return dx, dy, dgate, dshift, dscale, None, None


def _token_rows_backward(
    dr: Tensor | None, dh: Tensor | None, r: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, gate_table: Tensor | None, scale_table: Tensor | None, weight: Tensor | None, eps: float,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """As :func:`backward`, for a row of the modulation for every token."""
    like = dr if dh is None else dh
    assert like is not None
    B, S, D = like.shape
    norm = NONE if dh is None else ADAPTIVE if scale is not None else AFFINE
    tokens = config.tokens_of_program(B * S)
    programs = triton.cdiv(S, tokens)
    dx = None if dh is None else like.new_empty(like.shape)
    dy = None if gate is None else like.new_empty(like.shape)
    dgate = None if gate is None else like.new_empty(like.shape, dtype=gate.dtype)
    dscale = like.new_empty(like.shape, dtype=scale.dtype) if norm == ADAPTIVE and scale is not None else None
    partials = like.new_empty((B, programs, 2, D), dtype=torch.float32) if norm == AFFINE else None
    if like.numel():
        gate_residual_norm_bwd_kernel[(programs, B)](
            dr, dh, r, y, dx, dy, gate, scale, gate_table, scale_table, weight, None, partials, dgate, dscale,
            *strides_of(dr, dh, r, y, dy if dx is None else dx, gate, scale), programs, S, tokens, eps,
            D=D, BLOCK_D=config.block_d(D), HAS_DR=dr is not None, HAS_GATE=gate is not None, NORM=norm.value,
            HAS_GATE_TABLE=gate_table is not None, HAS_SCALE_TABLE=scale_table is not None, TOKEN_ROWS=True,
            STAGES=config.stages(D, like.itemsize), num_warps=config.backward_warps(D),
        )  # fmt: skip
    if partials is None:
        return dx, dy, dgate, None, dscale, None, None
    dbias, dweight = partials.sum((0, 1))
    return dx, dy, dgate, None, None, dweight, dbias
