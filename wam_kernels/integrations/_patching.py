"""What every integration shares: replacing methods of one model so that they can be put back, and refusing in the open.

Only instances are changed: a patched method is an attribute of the module object, bound to it, so a deep copy of a
patched model runs on its own weights. Parameters, buffers and state-dict keys are never touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..block_attention import block_attention
from ..block_attention.config import MAX_D, fits_triton
from ..plan import Plan, compile_plan
from ..ranges import Ranges

ON_UNSUPPORTED = ("error", "original")


class Unsupported(ValueError):
    """A model, mask or shape that this library has no path for. Raised before anything is computed."""


class Patch:
    """What was replaced in one model. Made by :func:`wam_kernels.integrations.patch`.

    Attributes:
        system: Whose model it is.
        replaced: ``(owner, name)`` of every replaced method, in order.
    """

    def __init__(self, system: str, on_unsupported: str) -> None:
        self.system, self.on_unsupported = system, on_unsupported
        self.replaced: list[tuple[Any, str]] = []
        self._old: list[Any] = []
        self._warned: set[str] = set()

    def method(self, owner: nn.Module, name: str, new: Callable) -> None:
        """``owner.name(...)`` becomes ``new(owner, ...)``; where that raises Unsupported, the original may run."""
        if name in vars(owner):
            raise Unsupported(
                f"patch: {type(owner).__name__}.{name} must be the class's own method, but this instance has another "
                "one already; undo the other patch first"
            )

        def guarded(module: nn.Module, *args, **kwargs):
            try:
                return new(module, *args, **kwargs)
            except Unsupported as reason:
                self.refuse(reason)
            return getattr(type(module), name)(module, *args, **kwargs)

        guarded.__name__ = name
        self.attribute(owner, name, MethodType(guarded, owner))

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """``owner.name`` becomes ``value``; ``owner`` is a module object of PyTorch or of Python."""
        self._old.append(vars(owner).get(name, self))  # itself stands for: there was none
        self.replaced.append((owner, name))
        setattr(owner, name, value)

    def refuse(self, reason: Unsupported) -> None:
        """Raise, or warn once and let the caller go on with the original code, as the user chose."""
        if self.on_unsupported == "error":
            raise reason
        if str(reason) not in self._warned:
            self._warned.add(str(reason))
            warnings.warn(f"{reason}; the original code of {self.system} runs instead", stacklevel=3)

    def undo(self) -> None:
        """Put everything back, the last replacement first."""
        for (owner, name), old in zip(reversed(self.replaced), reversed(self._old), strict=True):
            if old is self:
                delattr(owner, name)
            else:
                setattr(owner, name, old)
        self.replaced, self._old = [], []

    def __repr__(self) -> str:
        names = sorted({f"{type(owner).__name__}.{name}" for owner, name in self.replaced})
        return f"Patch({self.system}: {', '.join(names)}; {len(self.replaced)} replaced)"


class MaskPlans:
    """Plans of dense boolean masks ``[Sq, Sk]`` that a model builds at run time.

    A mask is converted to the ranges that it spells out, so the plan is equal to it, not alike. That takes a copy to
    the host, so it is done once for each mask seen: the same tensor is recognised by identity, an equal one by
    comparing it, on its device, with the ones before.
    """

    KEPT = 16  # masks remembered for each shape; a model has a handful

    def __init__(self) -> None:
        self._by_tensor: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._by_shape: dict[tuple, list[tuple[Tensor, Plan]]] = {}

    def __deepcopy__(self, memo: dict) -> MaskPlans:
        return self  # only caches: copies of a model may share them

    def plan(self, mask: Tensor, device: torch.device) -> Plan:
        """The plan of ``mask``, on ``device``.

        Raises:
            Unsupported: not a boolean ``[Sq, Sk]``, or one that needs more key columns than a plan has.
        """
        if mask.dtype != torch.bool or mask.ndim != 2:
            raise Unsupported(f"patch: attention_mask must be torch.bool [Sq, Sk], got {mask.dtype} {list(mask.shape)}")
        version, plan = self._by_tensor.get(mask, (None, None))
        if version != mask._version:
            plan = self._find(mask)
            self._by_tensor[mask] = (mask._version, plan)
        return plan.to(device)

    def _find(self, mask: Tensor) -> Plan:
        known = self._by_shape.setdefault((*mask.shape, mask.device), [])
        for earlier, plan in known:
            if torch.equal(earlier, mask):
                return plan
        plan = plan_of_mask(mask)
        known.append((mask.clone(), plan))
        del known[: -self.KEPT]
        return plan


def plan_of_mask(mask: Tensor | np.ndarray) -> Plan:
    """The plan that equals a dense boolean mask ``[Sq, Sk]``.

    Raises:
        Unsupported: it needs more key columns than a plan has, or it is empty.
    """
    mask = mask.cpu().numpy() if isinstance(mask, Tensor) else mask
    try:
        return compile_plan(Ranges.from_mask(mask))
    except ValueError as error:
        raise Unsupported(f"patch: no plan for an attention_mask of shape {list(mask.shape)}: {error}") from error


class Tables:
    """Rope tables ``[.., S, D / 2, 2]`` of the complex frequencies that a model passes, once for each tensor."""

    def __init__(self) -> None:
        self._tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __deepcopy__(self, memo: dict) -> Tables:
        return self

    def of(self, freqs: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """``make(freqs)`` in float32, contiguous, without a gradient."""
        version, table = self._tables.get(freqs, (None, None))
        if version != freqs._version:
            table = make(freqs.detach()).float().contiguous()
            self._tables[freqs] = (freqs._version, table)
        return table


def require_kernel(system: str, q: Tensor) -> None:
    """There is a fast path for the heads of ``q`` ``[..., D]`` where it lives.

    Raises:
        Unsupported: the head dim, or the head dim in this dtype on a GPU.
    """
    D = q.shape[-1]
    if D % 8 or not 8 <= D <= MAX_D:
        raise Unsupported(
            f"patch: {system} has heads of {D} channels; block_attention takes multiples of 8 up to {MAX_D}"
        )
    if q.device.type == "cuda" and not (q.itemsize <= 4 and fits_triton(D, q.itemsize)):
        raise Unsupported(
            f"patch: {system} has heads of {D} channels in {q.dtype}, for which there is no GPU kernel; run it in "
            "bfloat16"
        )


def attend(system: str, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None) -> Tensor:
    """``block_attention`` ``[B, S, H, D]``, refused as Unsupported where it has no kernel or the plan does not fit."""
    require_kernel(system, q)
    lengths = (q.shape[1], k.shape[1])
    if lengths != (plan.length, plan.key_length):
        raise Unsupported(
            f"patch: {system} has {lengths[0]} queries and {lengths[1]} keys, but its mask is for {plan.length} and "
            f"{plan.key_length}"
        )
    return block_attention(q, k, v, plan.to(q.device), scale=scale)
