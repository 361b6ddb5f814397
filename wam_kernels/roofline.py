"""Compulsory FLOPs and bytes of the ops, and the least time in which hardware of a data sheet can do them.

Everything here is estimated, from formulas: nothing is measured and no tensor is made. FLOPs are those of matrix
products, an addition and a multiplication counted apart; element-wise arithmetic (under 3 FLOPs a byte in the norms)
takes less time than its bytes and is left out. Bytes are what must cross the memory's bus: every input once, every
output once, nothing in between. The formulas are those of the ops' READMEs (section Roofline).

PyTorch's ``FlopCounterMode`` counts matrix products alone. Importing this module tells it those of the registered
attentions, over visible pairs; the norms have none, and like PyTorch's own element-wise operators count as 0 there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import block_attention as _defines_block_attention  # noqa: F401 - torch.ops.wam has the ops from then on
from . import cached_attention as _defines_cached_attention  # noqa: F401


@dataclass(frozen=True)
class DeviceModel:
    """Rates and memory of a data sheet; no program reaches the rates."""

    reported: str  # the name that the driver has for it
    tensor_flops: float  # a second, dense products of bf16 numbers with float32 sums
    float32_flops: float  # a second, products of float32 numbers without tensor cores
    bandwidth: float  # bytes a second, of the device's memory
    memory: float  # bytes of it
    source: str
    link: float = 0.0  # bytes a second that come in from the other GPUs of its machine; 0: the data sheet has no NVLink

    def __str__(self) -> str:
        return (
            f"{self.tensor_flops / 1e12:.0f} TFLOP/s in bf16, {self.bandwidth / 1e12:.2f} TB/s, "
            f"{self.memory / 1e9:.0f} GB ({self.source})"
        )


# by the name that the command line takes
DEVICE_MODELS: Mapping[str, DeviceModel] = MappingProxyType(
    {
        "h100": DeviceModel("NVIDIA H100 80GB HBM3", 989e12, 67e12, 3.35e12, 80e9, "NVIDIA H100 SXM data sheet", 450e9),
        "h200": DeviceModel("NVIDIA H200", 989e12, 67e12, 4.8e12, 141e9, "NVIDIA H200 SXM data sheet", 450e9),
        "h100-pcie": DeviceModel("NVIDIA H100 PCIe", 756e12, 51e12, 2.0e12, 80e9, "NVIDIA H100 PCIe data sheet"),
        "a100": DeviceModel(
            "NVIDIA A100-SXM4-80GB", 312e12, 19.5e12, 2.039e12, 80e9, "NVIDIA A100 80GB SXM data sheet", 300e9
        ),
        "l40s": DeviceModel("NVIDIA L40S", 362e12, 91.6e12, 0.864e12, 48e9, "NVIDIA L40S data sheet"),
        "rtx4090": DeviceModel(
            "NVIDIA GeForce RTX 4090", 165e12, 82.6e12, 1.008e12, 24e9, "NVIDIA Ada GPU architecture whitepaper"
        ),
    }
)


DEFAULT_DEVICE_MODEL = "h100"  # of estimates on a machine without a GPU


def device_model(name: str) -> DeviceModel:
    """A row of ``DEVICE_MODELS``.

    Raises:
        ValueError: an unknown name; the message has the known ones.
    """
    if name not in DEVICE_MODELS:
        raise ValueError(f"device model must be one of {tuple(DEVICE_MODELS)}, got {name!r}")
    return DEVICE_MODELS[name]


def device_model_of(reported: str) -> str | None:
    """The name in ``DEVICE_MODELS`` of the GPU that a driver reports as ``reported``; None: no row is of this one.

    The whole name must fit: of one series, boards with other memory differ in speed.
    """
    return next((name for name, row in DEVICE_MODELS.items() if row.reported == reported), None)


@dataclass(frozen=True)
class Cost:
    """What some work must compute and move, estimated."""

    flops: int = 0  # on tensor cores
    bytes: int = 0
    float32_flops: int = 0  # of float32 products, without tensor cores

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.float32_flops + other.float32_flops)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.flops * times, self.bytes * times, self.float32_flops * times)

    def _seconds(self, on: DeviceModel) -> tuple[float, float]:
        return self.flops / on.tensor_flops + self.float32_flops / on.float32_flops, self.bytes / on.bandwidth

    def ms(self, on: DeviceModel) -> float:
        """The roofline: the larger of the times of arithmetic and of memory."""
        return 1e3 * max(self._seconds(on))

    def bound(self, on: DeviceModel) -> str:
        """``"arithmetic"`` or ``"memory"``, whichever takes longer."""
        arithmetic, memory = self._seconds(on)
        return "arithmetic" if arithmetic > memory else "memory"


def linear(rows: int, width_in: int, width_out: int, itemsize: int, weight_itemsize: int | None = None) -> Cost:
    """A linear map forward: its weights, of another itemsize where they are quantised, input and output once each."""
    weights = width_in * width_out * (itemsize if weight_itemsize is None else weight_itemsize)
    return Cost(2 * rows * width_in * width_out, weights + itemsize * rows * (width_in + width_out))


def block_attention(
    pairs: int, tokens: int, heads: int, head_dim: int, itemsize: int, *, backward: bool = False
) -> Cost:
    """Over ``pairs`` visible pairs of ``tokens`` tokens, both over the batch; as many key heads as query heads."""
    tensors, sums = (8, 8) if backward else (4, 4)
    flops = (10 if backward else 4) * heads * head_dim * pairs
    return Cost(flops, tensors * tokens * heads * head_dim * itemsize + sums * tokens * heads)


def cached_attention(pairs: int, queries: int, keys: int, heads: int, head_dim: int, itemsize: int) -> Cost:
    """``queries`` rows over ``keys`` visible slots (of all row sets together), all over the batch."""
    return Cost(4 * heads * head_dim * pairs, 2 * (keys + queries) * heads * head_dim * itemsize + 4 * queries * heads)


def qk_norm_rope(tokens: int, heads: int, head_dim: int, itemsize: int, *, backward: bool = False) -> Cost:
    """q and k of ``tokens`` tokens, and a float32 table row for each; no products."""
    tensors = 6 if backward else 4
    return Cost(0, tokens * (tensors * heads * head_dim * itemsize + 4 * head_dim))


def ada_layer_norm(tokens: int, rows: int, width: int, itemsize: int, *, backward: bool = False) -> Cost:
    """``tokens`` tokens with ``rows`` float32 rows of modulation, both over the batch; no products."""
    return Cost(0, width * (3 * itemsize * tokens + 12 * rows if backward else 2 * itemsize * tokens + 8 * rows))


def gate_residual_ada_layer_norm(tokens: int, rows: int, width: int, itemsize: int, *, backward: bool = False) -> Cost:
    """As :func:`ada_layer_norm`, with gate and residual, adaptive."""
    return Cost(0, width * (6 * itemsize * tokens + 20 * rows if backward else 4 * itemsize * tokens + 12 * rows))


# ---- formulas of PyTorch's counter: get_raw, because visible pairs are in the index tensors ----


def _backward_flops(pairs_of_queries: int, pairs_of_keys: int, pairs: int) -> int:
    """For each head and channel: two products of what any gradient needs, one of dq, two of dk and dv."""
    return 2 * (2 * pairs + pairs_of_queries + 2 * pairs_of_keys)


def _keys_of_runs(runs: Tensor) -> Tensor:
    """int64 ``[N]``: keys of each, see :class:`wam_kernels.plan.runs.Runs`."""
    return (runs[:, 4::2] - runs[:, 3::2]).long().clamp(min=0).sum(1)


@register_flop_formula(torch.ops.wam.block_attention, get_raw=True)
def _block_attention_flops(q: Tensor, k: Tensor, v: Tensor, *args, out_val=None, **kwargs) -> int:
    # the plan's tensors end with its runs with a gradient and its runs; then shared, step, scale, impl
    runs, shared = args[-5:-3]
    pairs = ((runs[:, 2] - runs[:, 1]) * _keys_of_runs(runs)).sum()
    return 4 * q.shape[2] * q.shape[3] * int(pairs) * (q.shape[0] if shared else 1)


@register_flop_formula(torch.ops.wam.block_attention_backward, get_raw=True)
def _block_attention_backward_flops(dout: Tensor, dlse: Tensor, q: Tensor, *args, out_val=None, **kwargs) -> int:
    gradient, runs, shared = args[-6:-3]
    gradient = gradient if gradient.shape[0] else runs
    queries, attended, kept = runs[:, 2] - runs[:, 1], _keys_of_runs(runs), _keys_of_runs(gradient)
    some = gradient[:, 2] > gradient[:, 1]
    of_queries, of_keys, pairs = (
        (queries * n).sum() for n in (attended * some, kept, torch.where(some, attended, kept))
    )
    flops = _backward_flops(int(of_queries), int(of_keys), int(pairs))
    return flops * q.shape[2] * q.shape[3] * (q.shape[0] if shared else 1)


@register_flop_formula(torch.ops.wam.block_attention_boxes, get_raw=True)
def _boxes_flops(q: Tensor, k: Tensor, v: Tensor, *args, out_val=None, **kwargs) -> int:
    pairs, shared, _ = args[-3:]
    visible, *_ = pairs.view(torch.int64).flatten().tolist()
    return 4 * q.shape[2] * q.shape[3] * visible * (q.shape[0] if shared else 1)


@register_flop_formula(torch.ops.wam.block_attention_boxes_backward, get_raw=True)
def _boxes_backward_flops(dout: Tensor, dlse: Tensor, q: Tensor, *args, out_val=None, **kwargs) -> int:
    pairs, shared, _ = args[-3:]
    _, of_queries, of_keys, any_of_them = pairs.view(torch.int64).flatten().tolist()
    flops = _backward_flops(of_queries, of_keys, any_of_them)
    return flops * q.shape[2] * q.shape[3] * (q.shape[0] if shared else 1)


@register_flop_formula(torch.ops.wam.cached_attention, get_raw=True)
def _cached_attention_flops(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, group_rows, *args, out_val=None, **kwargs
) -> int:
    visible = (ranges[..., 1] - ranges[..., 0]).long().clamp(min=0).sum((0, 2))
    pairs = sum(rows * slots for rows, slots in zip(group_rows, visible.tolist(), strict=True))
    return 4 * q.shape[2] * q.shape[3] * pairs
