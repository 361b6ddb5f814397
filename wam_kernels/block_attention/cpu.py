"""The CPU path: GEMMs over the runs of a plan. Memory is linear in S; nothing masked is ever computed.

A *run* is a set of queries that attend to exactly the same keys, at most one contiguous slice per range: one stream of
one chunk, or both where their keys agree. So a run needs no mask: lay its slices end to end, score, softmax, multiply.

    forward   s = scale q k^T;  m = max s;  p = exp(s - m);  l = sum p;  out = p v / l;  lse = m + log l
    backward  p = exp(scale q k^T - lse);  dv += p^T dout;  ds = p (dout v^T - delta)
              dq = scale ds k;  dk += scale ds^T q;  delta = rowsum(dout out) - dlse

Nothing masked is multiplied, so a NaN stays with the rows that attend to it. A row whose scores are all -inf has out 0
and lse -inf, like a fully masked one.

A plan may stop gradients: then p and ds of a run go into dq whole, and into dk and dv with the keys that are left. A
run of frozen queries has no dq, and is left out where no key is left.

Runs are visited in order, so dk and dv sum in the same order every time. Work is float32 (float64 for float64).
Query heads that share a key head are laid under each other as more rows of one GEMM, which also sums their dk and dv.

G = B * H, rows of all heads; N = B * Hkv, rows of all key heads.
"""

import torch
from torch import Tensor

_Slices = list[tuple[int, int]]


def _ranges(bounds: list[int]) -> tuple[tuple[int, int], ...]:
    return tuple((lo, hi) for lo, hi in zip(bounds[::2], bounds[1::2], strict=True) if lo < hi)


def _runs(runs: Tensor) -> list[tuple[int, _Slices, _Slices]]:
    """(batch element, query slices, key slices) of every run; empty ranges dropped, blind queries left out."""
    return [(b, queries, keys) for b, queries, keys, _, _ in _gradient_runs(runs, runs)]


def _gradient_runs(runs: Tensor, gradient: Tensor) -> list[tuple[int, _Slices, _Slices, _Slices, bool]]:
    """As :func:`_runs`, the slices of the keys that get gradients, and whether the queries get any."""
    queries: dict[tuple, _Slices] = {}
    for (b, start, end, *bounds), (_, first, last, *kept) in zip(runs.tolist(), gradient.tolist(), strict=True):
        keys = _ranges(bounds)
        if keys:
            # a 16-row action run is a poor GEMM; joined to its chunk's video run it is nearly free
            queries.setdefault((b, keys, _ranges(kept), first < last), []).append((start, end))
    return [(b, slices, list(keys), list(kept), some) for (b, keys, kept, some), slices in queries.items()]


def _inside(keys: _Slices, kept: _Slices) -> tuple[_Slices, _Slices]:
    """``kept``, all of it in ``keys``, and its places where ``keys`` are laid end to end, slice by slice."""
    tokens, places, at = [], [], 0
    for begin, end in keys:
        for lo, hi in kept:
            lo, hi = max(lo, begin), min(hi, end)
            if lo < hi:
                tokens.append((lo, hi))
                places.append((at + lo - begin, at + hi - begin))
        at += end - begin
    return tokens, places


def _take(t: Tensor, slices: _Slices) -> Tensor:
    """The rows of all slices along dim 1; a view when there is one slice."""
    parts = [t[:, start:end] for start, end in slices]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _put(t: Tensor, slices: _Slices, rows: Tensor) -> None:
    for (start, end), part in zip(slices, rows.split([end - start for start, end in slices], 1), strict=True):
        t[:, start:end] = part


def _add(t: Tensor, slices: _Slices, rows: Tensor) -> None:
    for (start, end), part in zip(slices, rows.split([end - start for start, end in slices], 1), strict=True):
        t[:, start:end] += part


def _heads(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, S, H, D]`` to contiguous ``[G = B * H, S, D]``: GEMMs over a head then read one dense matrix."""
    return t.transpose(1, 2).to(dtype).contiguous().flatten(0, 1)


def _stack(t_GR: Tensor, heads: int) -> Tensor:
    """``[G, R, *]`` to ``[N, G / N * R, *]``: the rows of all query heads that share a key head."""
    return t_GR.reshape(heads, t_GR.shape[0] // max(1, heads) * t_GR.shape[1], *t_GR.shape[2:])


def _unheads(t: Tensor, like: Tensor) -> Tensor:
    B, _, H, _ = like.shape
    return t.unflatten(0, (B, H)).transpose(1, 2).to(like.dtype).contiguous()


def _finite(t: Tensor) -> Tensor:
    """-inf becomes 0: what all scores of a row are -inf beside, and -inf - -inf would be NaN."""
    return t.masked_fill(t == float("-inf"), 0)


# The sums stay in float32 under autocast too, which would take their products in bf16.
def forward(q: Tensor, k: Tensor, v: Tensor, runs: Tensor, shared: bool, scale: float) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", enabled=False):
        B, S, H, _ = q.shape
        Hkv = k.shape[2]
        acc = torch.promote_types(q.dtype, torch.float32)
        q_GSD, k_NTD, v_NTD = (_heads(t, acc) for t in (q, k, v))
        out_GSD = torch.zeros_like(q_GSD)
        lse_GS = q_GSD.new_full((B * H, S), float("-inf"))
        for b, queries, keys in _runs(runs):
            g, n = (slice(None) if shared else slice(b * heads, (b + 1) * heads) for heads in (H, Hkv))
            q_heads, k_run, v_run = _take(q_GSD[g], queries), _take(k_NTD[n], keys), _take(v_NTD[n], keys)
            s = (_stack(q_heads, k_run.shape[0]) * scale) @ k_run.mT
            m = _finite(s.amax(-1, keepdim=True))
            total = s.sub_(m).exp_().sum(-1, keepdim=True)
            _put(out_GSD[g], queries, (s @ v_run).div_(total.masked_fill(total == 0, 1)).view(q_heads.shape))
            _put(lse_GS[g], queries, (m + total.log()).view(q_heads.shape[:2]))
        return _unheads(out_GSD, q), lse_GS.unflatten(0, (B, H))


def backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, runs: Tensor,
    gradient: Tensor, shared: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv. ``gradient``: the runs, with what gets gradients (``Runs``); without rows where all does."""
    with torch.autocast("cpu", enabled=False):
        H, Hkv, acc = q.shape[2], k.shape[2], lse.dtype
        q_GSD, k_NTD, v_NTD, dout_GSD = (_heads(t, acc) for t in (q, k, v, dout))
        dq_GSD, dk_NTD, dv_NTD = (torch.zeros_like(t) for t in (q_GSD, k_NTD, v_NTD))
        lse_GS = _finite(lse).flatten(0, 1)
        delta_GS = (dout_GSD * _heads(out, acc)).sum(-1) - dlse.flatten(0, 1)
        for b, queries, keys, kept, of_queries in _gradient_runs(runs, gradient if gradient.shape[0] else runs):
            if not (kept or of_queries):
                continue
            g, n = (slice(None) if shared else slice(b * heads, (b + 1) * heads) for heads in (H, Hkv))
            q_heads, k_run, v_run = _take(q_GSD[g], queries), _take(k_NTD[n], keys), _take(v_NTD[n], keys)
            N = k_run.shape[0]
            q_run, dout_run = _stack(q_heads, N) * scale, _stack(_take(dout_GSD[g], queries), N)
            lse_run, delta_run = (_stack(_take(t[g], queries), N)[..., None] for t in (lse_GS, delta_GS))
            p = torch.baddbmm(lse_run, q_run, k_run.mT, beta=-1).exp_()
            ds = torch.baddbmm(delta_run, dout_run, v_run.mT, beta=-1).mul_(p)
            p_keys, ds_keys = p.mT, ds.mT
            if kept != keys:
                kept, places = _inside(keys, kept)
                p_keys, ds_keys = (_take(t, places) if kept else t for t in (p_keys, ds_keys))
            if kept:
                _add(dv_NTD[n], kept, p_keys @ dout_run)
                _add(dk_NTD[n], kept, ds_keys @ q_run)
            if of_queries:
                _put(dq_GSD[g], queries, (ds @ k_run).mul_(scale).view(q_heads.shape))
        return _unheads(dq_GSD, q), _unheads(dk_NTD, k), _unheads(dv_NTD, v)
