"""The log of a run, a row a step: what it says of the losses, and of the speed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from wam_kernels.roofline import DEVICE_MODELS, block_attention, device_model_of

from ..costs import Sizes, packed_products, packed_tokens
from ..objectives import OBJECTIVES
from ..runtime.checks import peak_memory

STREAMS = ("video", "action")
MEASURED = ("seconds", "tokens_per_second", "mfu", "peak_memory")  # what is another in a second run of the same
ERRORS = len(STREAMS) * 2 * len(OBJECTIVES)  # numbers of a step's error_sums
FORWARDS = 3  # that a step's FLOPs are counted as: its backward has two products for each of the forward


def losses(sums: Sequence[float]) -> dict[str, float | None]:
    """Of a row: of each stream its mean error over samples that count, and the same of each objective that was drawn.

    None stands for one without samples, or that is not finite.

    Args:
        sums: The ``ERRORS`` numbers of ``error_sums``.
    """
    row, of_objectives, many = dict[str, float | None](), dict[str, float | None](), len(OBJECTIVES)
    for i, stream in enumerate(STREAMS):
        errors, counts = sums[2 * i * many :][:many], sums[(2 * i + 1) * many :][:many]
        row[f"{stream}_loss"] = _mean(sum(errors), sum(counts))
        found = zip(OBJECTIVES, errors, counts, strict=True)
        of_objectives |= {f"{stream}_loss/{name}": _mean(error, n) for name, error, n in found if n}
    return row | of_objectives


def _mean(total: float, count: float) -> float | None:
    return total / count if count and math.isfinite(total) else None


class Meter:
    """Tokens, FLOPs and memory of the steps of a run.

    FLOPs are three times those of the forward by ``wam_models.costs``: what is computed again, and what a frozen part
    saves, is not counted, nor are the features of a bridge and the optimizers.

    Args:
        sizes: Of the model and what it is given.
        processes: That compute a step together.
        device: Where.
        bf16: Whether products are in bf16.
    """

    def __init__(self, sizes: Sizes, processes: int, device: torch.device, *, bf16: bool) -> None:
        self.sizes, self.device = sizes, device
        name = device_model_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        on = None if name is None else DEVICE_MODELS[name]
        self.peak = None if on is None else processes * (on.tensor_flops if bf16 else on.float32_flops)

    def flops(self, clips: int, frames: int, pairs: int) -> int:
        """Of a step with so many clips, latent frames and visible pairs in all."""
        c = self.sizes.model
        attention = block_attention(pairs, 0, c.heads, c.head_dim, self.sizes.itemsize).flops * c.layers
        return FORWARDS * (packed_products(self.sizes, clips, frames).flops + attention)

    def row(self, clips: int, frames: int, pairs: int, seconds: float) -> dict[str, Any]:
        """Of a step that took so long: ``tokens`` of all processes, ``tokens_per_second``, ``mfu``, the part of the
        hardware's peak that the FLOPs are (None where that is unknown), and ``peak_memory``, bytes of this process so
        far: on a GPU those of its tensors."""
        tokens, timed = packed_tokens(self.sizes, clips, frames), seconds > 0
        known = timed and self.peak is not None
        return {
            "tokens": tokens,
            "tokens_per_second": tokens / seconds if timed else None,
            "mfu": self.flops(clips, frames, pairs) / seconds / self.peak if known and self.peak else None,
            "peak_memory": peak_memory(self.device),
        }


def numbers(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row by name, those of objects in it as ``name/inner``; lists, texts and None left out."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, value


def recent(log: Sequence[Mapping[str, Any]], stream: str, steps: int = 30, first: bool = False) -> float | None:
    """Mean loss of a stream over the last (or first) ``steps`` rows that have one; None where none has."""
    values = [row[f"{stream}_loss"] for row in (log[:steps] if first else log[-steps:])]
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def loss_ends(
    log: Sequence[Mapping[str, Any]], most: int = 30
) -> tuple[int, dict[str, tuple[float | None, float | None]]]:
    """How many steps are compared, none of them twice, and each stream's mean loss over the first and the last."""
    steps = min(most, max(1, len(log) // 2))
    return steps, {s: (recent(log, s, steps, first=True), recent(log, s, steps)) for s in STREAMS}
