"""The CPU path: PyTorch's flash kernel over the visible slots alone; nothing masked is ever computed.

Groups with the same ranges are one call, and so are samples. One contiguous run of slots is a view of the cache;
several are copied side by side, heads first, which also makes the rows of a head dense. On one busy core of an AMD
EPYC (144 queries, three ranges, 8 x 64 and 24 x 128, float32 and bf16, 400 to 8,784 slots) that took 0.7 to 1.1 times
as long as a call for each range merged by their lse. GEMMs over the ranges, as in block_attention, took 0.9 to 1.7
times as long in float32 and over 30 times in bf16.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_Slices = list[tuple[int, int]]


def _runs(group: list[list[int]], b: int, g: int, slots: int) -> tuple[tuple[int, int], ...]:
    """The non-empty ranges of a group in slot order, neighbours joined."""
    runs: _Slices = []
    for start, end in sorted((start, end) for start, end in group if start < end):
        if start < 0 or end > slots:
            raise ValueError(f"cached_attention: ranges[{b}, {g}] must lie in the {slots} slots, got [{start}, {end})")
        if runs and start < runs[-1][1]:
            raise ValueError(
                f"cached_attention: ranges[{b}, {g}] must not overlap, got one up to {runs[-1][1]} and [{start}, {end})"
            )
        _append(runs, start, end)
    return tuple(runs)


def _append(slices: _Slices, start: int, end: int) -> None:
    """Add a slice, to the last one if it follows on."""
    if slices and slices[-1][1] == start:
        slices[-1] = slices[-1][0], end
    else:
        slices.append((start, end))


def _calls(
    ranges: Tensor, group_rows: Sequence[int], slots: int, queries_of_row: int
) -> Iterator[tuple[slice, slice, _Slices, _Slices]]:
    """(samples, their rows of the cache, rows of q, slots) of every call; fully masked rows are left out."""
    samples = [
        [_runs(group, b, g, slots) for g, group in enumerate(groups)] for b, groups in enumerate(ranges.tolist())
    ]
    alike = queries_of_row == 1 and all(groups == samples[0] for groups in samples)
    for b, groups in enumerate(samples[:1] if alike else samples):
        rows: dict[tuple, _Slices] = {}
        start = 0
        for runs, count in zip(groups, group_rows, strict=True):
            if runs and count:
                _append(rows.setdefault(runs, []), start, start + count)
            start += count
        for runs, parts in rows.items():
            at = b // queries_of_row
            chosen = (slice(None),) * 2 if alike else (slice(b, b + 1), slice(at, at + 1))
            yield *chosen, parts, list(runs)


def _take(t: Tensor, slices: _Slices) -> Tensor:
    """``[B, H, n, D]``: the tokens of all slices; a view when there is one slice."""
    parts = [t[:, start:end].transpose(1, 2) for start, end in slices]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out ``[B, H, s, D]`` and lse ``[B, H, s]`` of rows over the slots, all ``[B, H, *, D]``."""
    # the public scaled_dot_product_attention runs this too, but keeps the lse to itself
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    # NaN where an lse is 0, infinite or NaN: a third of the cost of asking for each, and calls are short
    if not math.isnan(lse.div(lse).sum().item()):
        return out, lse
    doubtful = (lse == 0) | ~lse.isfinite()
    # it gives 0 for rows whose scores are all NaN or -inf, and in bf16 also where one is inf
    acc = lse.dtype
    s = (q.to(acc) * scale) @ k.to(acc).mT
    right = torch.logsumexp(s, -1)
    p = torch.exp(s - right.masked_fill(right == float("-inf"), 0.0)[..., None])
    out = torch.where(doubtful[..., None], (p @ v.to(acc)).to(q.dtype), out)
    return out, torch.where(doubtful, right, lse)


# under autocast PyTorch would take the products in bf16
def forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, ranges: Tensor, group_rows: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """out ``[B, S, H, D]`` contiguous, lse ``[B, H, S]``."""
    with torch.autocast("cpu", enabled=False):
        B, S, H, _ = q.shape
        calls = list(_calls(ranges, group_rows, k_cache.shape[1], B // k_cache.shape[0])) if q.numel() else []
        results = []
        for samples, cached, rows, slots in calls:
            operands = _take(q[samples], rows), _take(k_cache[cached], slots), _take(v_cache[cached], slots)
            out_BHsD, lse_BHs = _attend(*operands, scale)
            results.append((out_BHsD.transpose(1, 2), lse_BHs))
        if [call[:3] for call in calls] == [(slice(None), slice(None), [(0, S)])]:  # one call made everything
            return results[0][0].contiguous(), results[0][1].contiguous()

        out = q.new_zeros(q.shape)
        lse = q.new_full((B, H, S), float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
        for (samples, _, rows, _), (out_BsHD, lse_BHs) in zip(calls, results, strict=True):
            counts = [end - start for start, end in rows]
            for (start, end), o, s in zip(rows, out_BsHD.split(counts, 1), lse_BHs.split(counts, 2), strict=True):
                out[samples, start:end] = o
                lse[samples, :, start:end] = s
        return out, lse
