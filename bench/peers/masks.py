"""The visibility of a plan in the forms that other libraries take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from bench.workloads.attention import Workload
from wam_kernels import Plan, tokens, visible
from wam_kernels.masks.visibility import Tokens

from .availability import Unavailable


def bounds(plan: Plan) -> Tensor:
    """The ranges of keys that every token of the first batch element attends to: int32 ``[S, ranges, 2]``."""
    runs = plan.runs.cpu()
    out = torch.zeros(plan.length, (runs.shape[1] - 3) // 2, 2, dtype=torch.int32)
    for run in runs[runs[:, 0] == 0]:
        out[run[1] : run[2]] = run[3:].view(-1, 2)
    return out.to(plan.device)


def dense_mask(plan: Plan) -> Tensor:
    """The mask of the first batch element, bool ``[1, 1, S, S]``, made on the plan's device: fast enough to be fair."""
    keys = torch.arange(plan.length, dtype=torch.int32, device=plan.device)
    mask = torch.zeros(plan.length, plan.length, dtype=torch.bool, device=plan.device)
    for range_of_rows in bounds(plan).unbind(1):
        lo, hi = range_of_rows[:, :, None].unbind(1)
        mask |= (lo <= keys) & (keys < hi)
    return mask[None, None]


def blocks(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """The mask cut where some row's range begins or ends: sizes of row and column blocks, and which attends to which.

    Inside a block all is visible or nothing, so a kernel for variable blocks masks nothing. CPU tensors: int32
    ``[rows]``, int32 ``[columns]``, bool ``[rows, columns]``.
    """
    limits = bounds(plan).cpu().long()
    columns = torch.unique(torch.cat([torch.tensor([0, plan.length]), limits.flatten()]))
    changes = 1 + (limits[1:] != limits[:-1]).flatten(1).any(1).nonzero().flatten()
    rows = torch.cat([torch.tensor([0]), changes, torch.tensor([plan.length])])
    lo, hi = limits[rows[:-1]].unbind(-1)  # [rows, ranges]
    begin = columns[:-1]
    attended = ((lo[:, :, None] <= begin) & (begin < hi[:, :, None])).any(1)
    return rows.diff().int(), columns.diff().int(), attended


def ranges_mask_mod(limits: Tensor) -> Callable:
    """FlexAttention's form of the mask: reads two numbers for each range of a row."""

    def mask_mod(b, h, q, kv):
        attends = (kv < 0) | (q < 0)
        for r in range(limits.shape[1]):
            attends = attends | ((limits[q, r, 0] <= kv) & (kv < limits[q, r, 1]))
        return attends

    return mask_mod


def openwam_mask_mod(work: Workload, device: torch.device) -> Callable:
    """
    Raises:
        Unavailable: samples of different rules.
    """
    rule = {(g.program, g.history, g.window, g.conditional_history, g.prefix_frames) for g in work.samples}
    if len(rule) > 1:
        raise Unavailable("OpenWAM's mask has one rule for all samples of a batch")
    geometry = work.samples[0]
    per_sample = [tokens(g) for g in work.samples]
    columns = {
        name: torch.from_numpy(np.concatenate([getattr(t, name) for t in per_sample])).to(device)
        for name in ("stream", "noise", "frame", "chunk", "block", "is_key")
    }
    sample = torch.repeat_interleave(torch.tensor([g.length for g in work.samples])).to(device)

    def mask_mod(b, h, q, kv):
        # the predicate's arithmetic is that of tensors, too
        of_q, of_kv = (Tokens(**{name: cast(Any, column[i]) for name, column in columns.items()}) for i in (q, kv))
        return visible(geometry, of_q, of_kv) & (sample[q] == sample[kv])

    return mask_mod
