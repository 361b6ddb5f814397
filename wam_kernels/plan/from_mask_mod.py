"""Adapter: a FlexAttention mask function (``mask_mod``) as a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..masks.mask_mod import MaskMod, evaluate
from ..masks.ranges import Ranges
from ..runtime.checks import integer
from ..runtime.host import device_of, eager
from .compile import Sample, compile_plan
from .plan import Plan


@eager
def plan_from_mask_mod(
    mask_mod: MaskMod,
    geometry: Sample | Sequence | int | tuple[int, int],
    *,
    batch: int = 1,
    heads: int = 1,
    device: torch.device | str = "cpu",
    max_length: int = 32_768,
) -> Plan:
    """The plan that equals a FlexAttention ``mask_mod``, checked on every pair, or a refusal that names a pair.

    Evaluates ``mask_mod`` on all pairs, a block of queries at a time: memory is linear in the tokens, time is not. Do
    it once and keep the plan.

    Args:
        mask_mod: ``mask_mod(b, h, q_idx, kv_idx)``, integer tensors that broadcast, to bool, as for ``flex_attention``.
        geometry: What the mask is believed to be, as :func:`wam_kernels.compile_plan` takes it: its plan is returned if
            ``mask_mod`` says the same of every pair. Or the lengths, S or (S, T): then the plan is read off
            ``mask_mod``.
        batch: Batch elements that ``mask_mod`` is evaluated for. It may depend on b; then the plan has as many.
        heads: Heads that ``mask_mod`` is evaluated for. It may not depend on h.
        device: Where ``mask_mod`` is evaluated (where the tensors that it reads are) and where the plan goes.
        max_length: Longest S or T to evaluate.

    Raises:
        ValueError: ``mask_mod`` differs from ``geometry`` (the message has the first pair), depends on the head, is not
            boolean, cuts the keys into more columns than a plan has, or is longer than ``max_length``.

    Source: ``create_block_mask`` of ``torch.nn.attention.flex_attention``.
    """
    name = "plan_from_mask_mod"
    device, batch, heads = device_of(name, device), integer(name, "batch", batch, 1), integer(name, "heads", heads, 1)
    given: Any = geometry if isinstance(geometry, tuple | list) else (geometry, geometry)
    by_length = len(given) == 2 and any(isinstance(n, int | float | np.number | np.ndarray | Tensor) for n in given)
    known = None if by_length else compile_plan(cast("Sample | Sequence", geometry), device=device)
    if known is None:
        queries, keys = (integer(name, "geometry", n, 1) for n in given)
        lengths = queries, keys
    else:
        lengths = known.length, known.key_length
        if known.batch not in (1, batch):
            raise ValueError(f"{name}: batch must be {known.batch} like geometry, got {batch}")
    if max(lengths) > integer(name, "max_length", max_length, 1, most=None):
        raise ValueError(
            f"{name}: geometry must have at most max_length={max_length} tokens, because every pair is evaluated, got "
            f"{max(lengths)}; raise max_length if the time is no matter"
        )
    pieces: list[list[Ranges]] = []
    for first, mask in evaluate(mask_mod, lengths, batch, heads, device):
        if known is not None:
            _same(name, mask, _rows_of(known, first, first + mask.shape[1]), first)
        else:
            pieces.append([Ranges.from_mask(m) for m in mask])
    if known is not None:
        return known
    samples = []
    for rows in zip(*pieces, strict=True):  # of one batch element
        starts = np.cumsum([0, *(r.length for r in rows)])
        q_ranges = np.concatenate([r.q_ranges + start for r, start in zip(rows, starts, strict=False)])
        samples.append((Ranges(q_ranges, np.concatenate([r.k_ranges for r in rows]), *lengths),))
    return compile_plan(samples if len(samples) > 1 else samples[0][0], device=device)


def _rows_of(plan: Plan, begin: int, end: int) -> np.ndarray:
    """bool ``[plan.batch, end - begin, T]``: what these queries attend to, read off the plan."""
    mask = np.zeros((plan.batch, end - begin, plan.key_length), bool)
    for b, lo, hi, *bounds in plan.runs.tolist():
        lo, hi = max(lo, begin) - begin, min(hi, end) - begin
        if lo < hi:
            for k_lo, k_hi in zip(bounds[::2], bounds[1::2], strict=True):
                mask[b, lo:hi, k_lo:k_hi] = True
    return mask


def _same(name: str, mask: np.ndarray, expected: np.ndarray, first: int) -> None:
    mask, expected = np.broadcast_arrays(mask, expected)
    different = np.argwhere(mask != expected)
    if len(different):
        b, q, k = (int(i) for i in different[0])
        raise ValueError(
            f"{name}: mask_mod must equal geometry, but at (b={b}, q={first + q}, k={k}) mask_mod says {mask[b, q, k]} "
            f"and geometry {expected[b, q, k]}; pass the lengths instead to take mask_mod as it is"
        )
