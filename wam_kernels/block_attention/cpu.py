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
    """``[B, S, H, D]`` to contiguous ``[G = B * H, S, D]``: GEMMs over a head then read one dense matrix."""
    return t.transpose(1, 2).to(dtype).contiguous().flatten(0, 1)


def _unheads(t: Tensor, like: Tensor) -> Tensor:
    B, _, H, _ = like.shape
    return t.unflatten(0, (B, H)).transpose(1, 2).to(like.dtype).contiguous()


def forward(q: Tensor, k: Tensor, v: Tensor, runs: Tensor, shared: bool, scale: float) -> tuple[Tensor, Tensor]:
    B, S, H, _ = q.shape
    acc = torch.promote_types(q.dtype, torch.float32)
    q_GSD, k_GSD, v_GSD = (_heads(t, acc) for t in (q, k, v))
    out_GSD = torch.zeros_like(q_GSD)
    lse_GS = q_GSD.new_full((B * H, S), float("-inf"))
    for b, queries, keys in _runs(runs):
        g = slice(None) if shared else slice(b * H, (b + 1) * H)
        q_run = _take(q_GSD[g], queries) * scale
        s = q_run.new_empty(*q_run.shape[:2], sum(hi - lo for lo, hi in keys))
        parts = s.split([hi - lo for lo, hi in keys], -1)
        for (lo, hi), s_r in zip(keys, parts, strict=True):
            torch.bmm(q_run, k_GSD[g, lo:hi].mT, out=s_r)
        m = s.amax(-1, keepdim=True)
        total = s.sub_(m).exp_().sum(-1, keepdim=True)
        out_run = torch.zeros_like(q_run)
        for (lo, hi), p_r in zip(keys, parts, strict=True):
            out_run.baddbmm_(p_r, v_GSD[g, lo:hi])
        _put(out_GSD[g], queries, out_run / total)
        _put(lse_GS[g], queries, (m + total.log())[..., 0])
    return _unheads(out_GSD, q), lse_GS.unflatten(0, (B, H))


def backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, runs: Tensor,
    shared: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    H, acc = q.shape[2], lse.dtype
    q_GSD, k_GSD, v_GSD, dout_GSD = (_heads(t, acc) for t in (q, k, v, dout))
    dq_GSD, dk_GSD, dv_GSD = (torch.zeros_like(q_GSD) for _ in range(3))
    lse_GS = lse.flatten(0, 1)
    delta_GS = (dout_GSD * _heads(out, acc)).sum(-1) - dlse.flatten(0, 1)
    for b, queries, keys in _runs(runs):
        g = slice(None) if shared else slice(b * H, (b + 1) * H)
        q_run, dout_run = _take(q_GSD[g], queries) * scale, _take(dout_GSD[g], queries)
        lse_run, delta_run = (_take(t[g], queries)[..., None] for t in (lse_GS, delta_GS))
        dq_run = torch.zeros_like(q_run)
        for lo, hi in keys:
            k_r, v_r = k_GSD[g, lo:hi], v_GSD[g, lo:hi]
            p = torch.baddbmm(lse_run, q_run, k_r.mT, beta=-1).exp_()
            dv_GSD[g, lo:hi].baddbmm_(p.mT, dout_run)
            ds = torch.baddbmm(delta_run, dout_run, v_r.mT, beta=-1).mul_(p)
            dq_run.baddbmm_(ds, k_r, alpha=scale)
            dk_GSD[g, lo:hi].baddbmm_(ds.mT, q_run)
        _put(dq_GSD[g], queries, dq_run)
    return tuple(_unheads(t, like) for t, like in ((dq_GSD, q), (dk_GSD, k), (dv_GSD, v)))
