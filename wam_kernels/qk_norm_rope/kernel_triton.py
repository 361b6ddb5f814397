"""RMSNorm and rope of q and k in Triton, forward and backward, both tensors in one launch.

    forward   n = x rstd w;  rstd = (mean(x^2) + eps)^-1/2 over the row, or PER_HEAD over each head
              y_a = n_a cos - n_b sin;  y_b = n_a sin + n_b cos  for the pairs (a, b) = (2i, 2i + 1) if INTERLEAVED,
              else (i, i + D / 2)
    backward  dn = dy turned by the negative angles;  dw = sum over tokens of dn x rstd
              dx = rstd (dn w - x rstd mean(dn w x rstd))

Forward: one program owns one token of q (grid axis 1 = 0) or of k (1) and holds its row, all heads, in registers as two
[BLOCK_H, BLOCK_P] halves of pairs; or it copies one token of v (2), where a call that fills a cache brings it along.
Backward: one program owns a run of tokens of q or of k and sums their weight gradient in registers; the sums go to one
row of partials each, which a second kernel adds. No atomics, and a fixed order: results are the same from run to run.
Nothing but the inputs is kept for the backward.

Everything between load and store is float32: one rounding, at the store. Heads and pairs beyond H and D / 2 are masked
and hold 0, which adds nothing to any sum.

Rows of q, k, v, their gradients and the weights are dense; batch, token and head strides of the outputs' side are free.
The table is [tokens of all samples, D], or [S, D] shared by them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.backends import on_its_device
from . import config

# Numbers that change with the geometry must not key a compilation of their own.
_PER_CALL = ["S", "table_S", "tokens", "per_program", "programs", "eps"]


@triton.jit
def _load_pairs(
    row_ptr, stride_h,
    H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The pairs of a row [H, D] as two float32 [BLOCK_H, BLOCK_P]."""
    # int64 before the stride multiply: a cache that is laid out head by head has large head strides
    h = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    if INTERLEAVED:
        # one dense load, split in registers: a load of every second number would be 2 bytes wide instead of 16
        d = tl.arange(0, 2 * BLOCK_P)[None, :]
        x = tl.load(row_ptr + h * stride_h + d, mask=(h < H) & (d < D), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (BLOCK_H, BLOCK_P, 2)))
    else:
        p = tl.arange(0, BLOCK_P)[None, :]
        at = row_ptr + h * stride_h + p
        there = (h < H) & (p < D // 2)
        a = tl.load(at, mask=there, other=0.0).to(tl.float32)
        b = tl.load(at + D // 2, mask=there, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store_pairs(
    row_ptr, stride_h, a, b,
    H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The inverse of ``_load_pairs``; rounds to the dtype of ``row_ptr``."""
    h = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    if INTERLEAVED:
        d = tl.arange(0, 2 * BLOCK_P)[None, :]
        x = tl.reshape(tl.join(a, b), (BLOCK_H, 2 * BLOCK_P)).to(row_ptr.dtype.element_ty)
        tl.store(row_ptr + h * stride_h + d, x, mask=(h < H) & (d < D))
    else:
        p = tl.arange(0, BLOCK_P)[None, :]
        at = row_ptr + h * stride_h + p
        there = (h < H) & (p < D // 2)
        tl.store(at, a.to(row_ptr.dtype.element_ty), mask=there)
        tl.store(at + D // 2, b.to(row_ptr.dtype.element_ty), mask=there)


@triton.jit
def _load_weight(
    weight_ptr,
    H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    PER_HEAD: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Pairs of the weight: [1, BLOCK_P] if all heads share it, else [BLOCK_H, BLOCK_P]."""
    if PER_HEAD:
        a, b = _load_pairs(weight_ptr, 0, 1, D, 1, BLOCK_P, INTERLEAVED)
    else:
        a, b = _load_pairs(weight_ptr, D, H, D, BLOCK_H, BLOCK_P, INTERLEAVED)
    return a, b


@triton.jit
def _copy_row(
    from_ptr, to_ptr, stride_to_h, H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """A dense row [H, D] to one with any head stride."""
    h = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    d = tl.arange(0, 2 * BLOCK_P)[None, :]
    there = (h < H) & (d < D)
    tl.store(to_ptr + h * stride_to_h + d, tl.load(from_ptr + h * D + d, mask=there, other=0.0), mask=there)


@triton.jit
def _mean(x, H: tl.constexpr, D: tl.constexpr, PER_HEAD: tl.constexpr):
    """Mean over what one norm covers, from the sums of pairs [BLOCK_H, BLOCK_P]: [BLOCK_H, 1] or [1, 1]."""
    total = tl.sum(x, 1, keep_dims=True)
    if PER_HEAD:
        return total / D
    else:
        return tl.sum(total, 0, keep_dims=True) / (H * D)


@triton.jit(do_not_specialize=_PER_CALL)
def qk_norm_rope_fwd_kernel(
    q_ptr, k_ptr, v_ptr, weight_q_ptr, weight_k_ptr, table_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
    stride_q_b, stride_q_s, stride_k_b, stride_k_s, stride_v_b, stride_v_s,
    stride_q_out_b, stride_q_out_s, stride_q_out_h, stride_k_out_b, stride_k_out_s, stride_k_out_h,
    stride_v_out_b, stride_v_out_s, stride_v_out_h,
    S, table_S, eps,
    H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    PER_HEAD: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_V: tl.constexpr,
):  # fmt: skip
    """``table_S``: rows of a sample in the table, 0 where the batch shares one table."""
    token, side = tl.program_id(0), tl.program_id(1)
    # int64 before the stride multiply: B * S * H * D passes 2**31 on packed batches
    b, s = (token // S).to(tl.int64), (token % S).to(tl.int64)
    # two ifs: the outer one is settled when the kernel is compiled
    if HAS_V:  # noqa: SIM102
        if side == 2:
            v_row = v_ptr + b * stride_v_b + s * stride_v_s
            v_out_row = v_out_ptr + b * stride_v_out_b + s * stride_v_out_s
            _copy_row(v_row, v_out_row, stride_v_out_h, H, D, BLOCK_H, BLOCK_P)
            return
    if side == 0:
        x_ptr, weight_ptr = q_ptr + b * stride_q_b + s * stride_q_s, weight_q_ptr
        out_ptr, stride_out_h = q_out_ptr + b * stride_q_out_b + s * stride_q_out_s, stride_q_out_h
    else:
        x_ptr, weight_ptr = k_ptr + b * stride_k_b + s * stride_k_s, weight_k_ptr
        out_ptr, stride_out_h = k_out_ptr + b * stride_k_out_b + s * stride_k_out_s, stride_k_out_h

    x_a, x_b = _load_pairs(x_ptr, D, H, D, BLOCK_H, BLOCK_P, INTERLEAVED)
    w_a, w_b = _load_weight(weight_ptr, H, D, BLOCK_H, BLOCK_P, PER_HEAD, INTERLEAVED)
    cos, sin = _load_pairs(table_ptr + (b * table_S + s) * D, 0, 1, D, 1, BLOCK_P, True)
    rstd = tl.rsqrt(_mean(x_a * x_a + x_b * x_b, H, D, PER_HEAD) + eps)
    n_a, n_b = x_a * rstd * w_a, x_b * rstd * w_b
    _store_pairs(
        out_ptr, stride_out_h, n_a * cos - n_b * sin, n_a * sin + n_b * cos, H, D, BLOCK_H, BLOCK_P, INTERLEAVED
    )


@triton.jit(do_not_specialize=_PER_CALL)
def qk_norm_rope_bwd_kernel(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, weight_q_ptr, weight_k_ptr, table_ptr, dq_ptr, dk_ptr, partials_ptr,
    stride_dq_out_b, stride_dq_out_s, stride_dq_out_h, stride_dk_out_b, stride_dk_out_s, stride_dk_out_h,
    stride_q_b, stride_q_s, stride_k_b, stride_k_s,
    S, table_S, tokens, per_program, eps,
    H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    PER_HEAD: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """dx of a run of ``per_program`` tokens, and their weight gradient, one row of partials [2, programs, H D or D]."""
    program, side = tl.program_id(0), tl.program_id(1)
    if side == 0:
        dout_ptr, x_ptr, weight_ptr, dx_ptr = dq_out_ptr, q_ptr, weight_q_ptr, dq_ptr
        stride_dout_b, stride_dout_s, stride_dout_h = stride_dq_out_b, stride_dq_out_s, stride_dq_out_h
        stride_x_b, stride_x_s = stride_q_b, stride_q_s
    else:
        dout_ptr, x_ptr, weight_ptr, dx_ptr = dk_out_ptr, k_ptr, weight_k_ptr, dk_ptr
        stride_dout_b, stride_dout_s, stride_dout_h = stride_dk_out_b, stride_dk_out_s, stride_dk_out_h
        stride_x_b, stride_x_s = stride_k_b, stride_k_s

    w_a, w_b = _load_weight(weight_ptr, H, D, BLOCK_H, BLOCK_P, PER_HEAD, INTERLEAVED)
    dw_a = tl.zeros([BLOCK_H, BLOCK_P], tl.float32)
    dw_b = tl.zeros([BLOCK_H, BLOCK_P], tl.float32)
    first = program * per_program
    # two stages: the loads of the next token are in flight while this one reduces
    for i in tl.range(0, tl.minimum(per_program, tokens - first), num_stages=2):
        token = first + i
        b, s = (token // S).to(tl.int64), (token % S).to(tl.int64)
        dout_row = dout_ptr + b * stride_dout_b + s * stride_dout_s
        dy_a, dy_b = _load_pairs(dout_row, stride_dout_h, H, D, BLOCK_H, BLOCK_P, INTERLEAVED)
        x_row = x_ptr + b * stride_x_b + s * stride_x_s
        x_a, x_b = _load_pairs(x_row, D, H, D, BLOCK_H, BLOCK_P, INTERLEAVED)
        cos, sin = _load_pairs(table_ptr + (b * table_S + s) * D, 0, 1, D, 1, BLOCK_P, True)
        rstd = tl.rsqrt(_mean(x_a * x_a + x_b * x_b, H, D, PER_HEAD) + eps)
        x_a, x_b = x_a * rstd, x_b * rstd
        dn_a, dn_b = dy_a * cos + dy_b * sin, dy_b * cos - dy_a * sin
        dw_a += dn_a * x_a
        dw_b += dn_b * x_b
        dn_a, dn_b = dn_a * w_a, dn_b * w_b
        along = _mean(dn_a * x_a + dn_b * x_b, H, D, PER_HEAD)
        dx_row = dx_ptr + token.to(tl.int64) * (H * D)
        _store_pairs(
            dx_row, D, rstd * (dn_a - x_a * along), rstd * (dn_b - x_b * along), H, D, BLOCK_H, BLOCK_P, INTERLEAVED
        )

    row = side * tl.num_programs(0) + program
    if PER_HEAD:
        dw_a, dw_b = tl.sum(dw_a, 0, keep_dims=True), tl.sum(dw_b, 0, keep_dims=True)
        _store_pairs(partials_ptr + row * D, 0, dw_a, dw_b, 1, D, 1, BLOCK_P, INTERLEAVED)
    else:
        _store_pairs(partials_ptr + row * (H * D), D, dw_a, dw_b, H, D, BLOCK_H, BLOCK_P, INTERLEAVED)


@triton.jit(do_not_specialize=_PER_CALL)
def sum_partials_kernel(
    partials_ptr, dweight_q_ptr, dweight_k_ptr, programs,
    W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_W columns of one weight gradient: rows of partials in order, BLOCK_N at a time."""
    side = tl.program_id(1)
    w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    n = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    for start in range(0, programs, BLOCK_N):
        row = start + n
        at = partials_ptr + (side * programs + row)[:, None] * W + w[None, :]
        total += tl.load(at, mask=(row < programs)[:, None] & (w < W)[None, :], other=0.0)
    dweight = tl.sum(total, 0)
    if side == 0:
        tl.store(dweight_q_ptr + w, dweight.to(dweight_q_ptr.dtype.element_ty), mask=w < W)
    else:
        tl.store(dweight_k_ptr + w, dweight.to(dweight_k_ptr.dtype.element_ty), mask=w < W)


def _table_S(table: Tensor) -> int:
    return table.shape[1] if table.ndim == 4 else 0


def launch_constants(inner: int, head_dim: int, per_head: bool, interleaved: bool) -> dict[str, object]:
    H = inner // head_dim
    launch = config.launch(H, head_dim)
    return {
        "H": H, "D": head_dim, "BLOCK_H": launch.block_h, "BLOCK_P": launch.block_p,
        "PER_HEAD": per_head, "INTERLEAVED": interleaved, "num_warps": launch.num_warps,
    }  # fmt: skip


@on_its_device
def forward(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor,
    head_dim: int, per_head: bool, interleaved: bool, eps: float, q_out: Tensor, k_out: Tensor,
    v: Tensor | None = None, v_out: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills ``q_out``, ``k_out`` and, with v, ``v_out`` ``[B, S, H, D]``, whatever their strides but the last."""
    B, S, inner = q.shape
    if q.numel() == 0:
        return
    has_v = v is not None
    # the kernel without v reads nothing of what stands in for it
    if v is None or v_out is None:
        v, v_out = q, q_out
    qk_norm_rope_fwd_kernel[(B * S, 2 + has_v)](
        q, k, v, weight_q, weight_k, table, q_out, k_out, v_out,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *q_out.stride()[:3], *k_out.stride()[:3], *v_out.stride()[:3],
        S, _table_S(table), eps, HAS_V=has_v, **launch_constants(inner, head_dim, per_head, interleaved),
    )  # fmt: skip


@on_its_device
def backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor,
    head_dim: int, per_head: bool, interleaved: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk ``[B, S, inner]`` contiguous, dweight_q, dweight_k in the weights' dtype. Two launches."""
    B, S, inner = q.shape
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    if q.numel() == 0:
        return dq, dk, torch.zeros_like(weight_q), torch.zeros_like(weight_k)
    dweight_q, dweight_k = weight_q.new_empty(weight_q.shape), weight_k.new_empty(weight_k.shape)
    tokens, width = B * S, weight_q.numel()
    per_program = triton.cdiv(tokens, config.PROGRAMS)
    programs = triton.cdiv(tokens, per_program)
    partials = q.new_empty((2, programs, width), dtype=torch.float32)
    qk_norm_rope_bwd_kernel[(programs, 2)](
        dq_out, dk_out, q, k, weight_q, weight_k, table, dq, dk, partials,
        *dq_out.stride()[:3], *dk_out.stride()[:3], *q.stride()[:2], *k.stride()[:2],
        S, _table_S(table), tokens, per_program, eps, **launch_constants(inner, head_dim, per_head, interleaved),
    )  # fmt: skip
    sum_partials_kernel[(triton.cdiv(width, config.REDUCE_COLUMNS), 2)](
        partials, dweight_q, dweight_k, programs,
        W=width, BLOCK_N=config.REDUCE_ROWS, BLOCK_W=config.REDUCE_COLUMNS,
    )  # fmt: skip
    return dq, dk, dweight_q, dweight_k
