"""The CPU path: GEMMs over the runs of a plan. Memory is linear in S; nothing masked is ever computed.

A *run* is a set of queries that see exactly the same keys, at most one contiguous slice per range: one stream of one
chunk, or both where their keys agree. So a run needs no mask: score its slices, softmax over them, multiply.

    forward   s_r = scale q k_r^T;  m = max s;  p_r = exp(s_r - m);  l = sum p;  out = sum_r p_r v_r / l;  lse = m + log l
    backward  p_r = exp(scale q k_r^T - lse);  dv_r += p_r^T dout;  ds_r = p_r (dout v_r^T - delta)
              dq = scale sum_r ds_r k_r;  dk_r += scale ds_r^T q;  delta = rowsum(dout out) - dlse

Runs are visited in order, so dk and dv sum in the same order every time. Work is float32 (float64 for float64).
"""

import torch
from torch import Tensor

_Slices = list[tuple[int, int]]


def _runs(runs: Tensor) -> list[tuple[int, _Slices, _Slices]]:
    """(batch element, query slices, key slices) of every run; empty ranges dropped, blind queries left out."""
    queries: dict[tuple, _Slices] = {}
    for b, start, end, *bounds in runs.tolist():
        keys = tuple((lo, hi) for lo, hi in zip(bounds[::2], bounds[1::2], strict=True) if lo < hi)
        if keys:
            # a 16-row action run is a poor GEMM; joined to its chunk's video run it is nearly free
            queries.setdefault((b, keys), []).append((start, end))
    return [(b, slices, list(keys)) for (b, keys), slices in queries.items()]


def _take(t: Tensor, slices: _Slices) -> Tensor:
    """The rows of all slices along dim 1; a view when there is one slice."""
    parts = [t[:, start:end] for start, end in slices]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _put(t: Tensor, slices: _Slices, rows: Tensor) -> None:
    for (start, end), part in zip(slices, rows.split([end - start for start, end in slices], 1), strict=True):
        t[:, start:end] = part


def _heads(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, S, H, D]`` to contiguous ``[B, H, S, D]``: GEMMs over a head then read one dense matrix."""
    return t.transpose(1, 2).to(dtype).contiguous()


def forward(q: Tensor, k: Tensor, v: Tensor, runs: Tensor, shared: bool, scale: float) -> tuple[Tensor, Tensor]:
    B, S, H, D = q.shape
    acc = torch.promote_types(q.dtype, torch.float32)
    q_BHSD, k_BHSD, v_BHSD = (_heads(t, acc) for t in (q, k, v))
    out_BHSD = torch.zeros_like(q_BHSD)
    lse = q_BHSD.new_full((B, H, S), float("-inf"))
    for plan_b, queries, keys in _runs(runs):
        for b in range(B) if shared else (plan_b,):
            q_run = _take(q_BHSD[b], queries) * scale
            s = q_run.new_empty(H, q_run.shape[1], sum(hi - lo for lo, hi in keys))
            parts = s.split([hi - lo for lo, hi in keys], -1)
            for (lo, hi), s_r in zip(keys, parts, strict=True):
                torch.bmm(q_run, k_BHSD[b, :, lo:hi].mT, out=s_r)
            m = s.amax(-1, keepdim=True)
            total = s.sub_(m).exp_().sum(-1, keepdim=True)
            out_run = torch.zeros_like(q_run)
            for (lo, hi), p_r in zip(keys, parts, strict=True):
                out_run.baddbmm_(p_r, v_BHSD[b, :, lo:hi])
            _put(out_BHSD[b], queries, out_run / total)
            _put(lse[b], queries, (m + total.log())[..., 0])
    return out_BHSD.transpose(1, 2).to(q.dtype).contiguous(), lse


def backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, runs: Tensor,
    shared: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, S, H, D = q.shape
    acc = lse.dtype
    q_BHSD, k_BHSD, v_BHSD, dout_BHSD = (_heads(t, acc) for t in (q, k, v, dout))
    dq_BHSD, dk_BHSD, dv_BHSD = (torch.zeros_like(q_BHSD) for _ in range(3))
    delta = (dout_BHSD * _heads(out, acc)).sum(-1) - dlse
    for plan_b, queries, keys in _runs(runs):
        for b in range(B) if shared else (plan_b,):
            q_run, dout_run = _take(q_BHSD[b], queries) * scale, _take(dout_BHSD[b], queries)
            lse_run, delta_run = (_take(t[b], queries)[..., None] for t in (lse, delta))
            dq_run = torch.zeros_like(q_run)
            for lo, hi in keys:
                k_r, v_r = k_BHSD[b, :, lo:hi], v_BHSD[b, :, lo:hi]
                p = torch.baddbmm(lse_run, q_run, k_r.mT, beta=-1).exp_()
                dv_BHSD[b, :, lo:hi].baddbmm_(p.mT, dout_run)
                ds = torch.baddbmm(delta_run, dout_run, v_r.mT, beta=-1).mul_(p)
                dq_run.baddbmm_(ds, k_r, alpha=scale)
                dk_BHSD[b, :, lo:hi].baddbmm_(ds.mT, q_run)
            _put(dq_BHSD[b], queries, dq_run)
    return tuple(t.transpose(1, 2).to(q.dtype).contiguous() for t in (dq_BHSD, dk_BHSD, dv_BHSD))
