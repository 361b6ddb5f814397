"""What every integration shares: replacing methods of one model so that they can be put back, and refusing in the open.

Only instances are changed: a patched method is an attribute of the module object, bound to it, so a deep copy of a
patched model runs on its own weights. Parameters, buffers and state-dict keys are never touched.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import lru_cache
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..block_attention import block_attention
from ..block_attention.config import MAX_D, fits_triton
from ..plan import Plan, compile_plan
from ..qk_norm_rope import qk_norm_rope
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
        self._attributes: list[tuple[Any, str, Any]] = []
        self._functions: list[tuple[str, str, nn.Module]] = []
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
        self._attributes.append((owner, name, vars(owner).get(name, self)))  # itself stands for: there was none
        self.replaced.append((owner, name))
        setattr(owner, name, value)

    def function(self, module_name: str, name: str, key: nn.Module, new: Callable) -> None:
        """The function ``name`` of a Python module becomes ``new`` where its first argument is ``key``.

        For systems whose models call a module-level function: the module gets a function that looks at its first
        argument, and gets its own back when no model is patched any more.
        """
        namespace = sys.modules[module_name]
        dispatch = getattr(namespace, name, None)
        if dispatch is None:
            raise Unsupported(f"patch: {self.system}'s module {module_name} must have {name}, but it has none")
        if not isinstance(dispatch, _Dispatch):
            dispatch = _Dispatch(dispatch)
            setattr(namespace, name, dispatch)

        def guarded(*args, **kwargs):
            try:
                return new(*args, **kwargs)
            except Unsupported as reason:
                self.refuse(reason)
            return dispatch.original(*args, **kwargs)

        dispatch.by_key[key] = guarded
        self._functions.append((module_name, name, key))
        self.replaced.append((key, name))

    def refuse(self, reason: Unsupported) -> None:
        """Raise, or warn once and let the caller go on with the original code, as the user chose."""
        if self.on_unsupported == "error":
            raise reason
        if str(reason) not in self._warned:
            self._warned.add(str(reason))
            warnings.warn(f"{reason}; the original code of {self.system} runs instead", stacklevel=3)

    def undo(self) -> None:
        """Put everything back, the last replacement first."""
        for owner, name, old in reversed(self._attributes):
            if old is self:
                delattr(owner, name)
            else:
                setattr(owner, name, old)
        for module_name, name, key in self._functions:
            namespace = sys.modules[module_name]
            dispatch = getattr(namespace, name)
            if isinstance(dispatch, _Dispatch):
                dispatch.by_key.pop(key, None)
                if not dispatch.by_key:
                    setattr(namespace, name, dispatch.original)
        self.replaced, self._attributes, self._functions = [], [], []

    def __repr__(self) -> str:
        names = sorted({f"{type(owner).__name__}.{name}" for owner, name in self.replaced})
        return f"Patch({self.system}: {', '.join(names)}; {len(self.replaced)} replaced)"


class _Dispatch:
    """A module-level function that is another one for some first arguments."""

    def __init__(self, original: Callable) -> None:
        self.original = original
        self.by_key: WeakKeyDictionary[nn.Module, Callable] = WeakKeyDictionary()

    def __call__(self, key: nn.Module, *args, **kwargs):
        return self.by_key.get(key, self.original)(key, *args, **kwargs)


class MaskPlans:
    """Plans of dense masks ``[Sq, Sk]``, or ``[B, Sq, Sk]``, that a model builds at run time.

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
        """The plan of a boolean mask ``[Sq, Sk]``, on ``device``.

        Raises:
            Unsupported: not a boolean ``[Sq, Sk]``, or one that needs more key columns than a plan has.
        """
        if mask.dtype != torch.bool or mask.ndim != 2:
            raise Unsupported(f"patch: attention_mask must be torch.bool [Sq, Sk], got {mask.dtype} {list(mask.shape)}")
        return self._of(mask, device, lambda m: m)

    def plan_of_bias(self, bias: Tensor, device: torch.device) -> Plan:
        """The plan of an additive mask ``[B, 1, Sq, Sk]``: 0 is visible, -1e30 and less is not.

        Raises:
            Unsupported: another shape, a value in between (a bias, which a plan cannot express), or too many columns.
        """
        if not bias.is_floating_point() or bias.ndim != 4 or bias.shape[1] != 1:
            raise Unsupported(
                f"patch: attention_mask must be additive [B, 1, Sq, Sk], got {bias.dtype} {list(bias.shape)}"
            )

        def visible(b: Tensor) -> Tensor:
            seen = b[:, 0] == 0
            if not (seen | (b[:, 0] <= -1e30)).all():
                raise Unsupported(
                    "patch: attention_mask must hold 0 and at most -1e30, but it is a bias of other values"
                )
            return seen

        return self._of(bias, device, visible)

    @torch.compiler.disable  # a compiled model breaks its graph here; the plan is what goes on
    def _of(self, mask: Tensor, device: torch.device, visible: Callable[[Tensor], Tensor]) -> Plan:
        version, plan = self._by_tensor.get(mask, (None, None))
        if version != mask._version:
            plan = self._find(visible(mask))
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
    """The plan that equals a dense boolean mask ``[Sq, Sk]``, or ``[B, Sq, Sk]``.

    Raises:
        Unsupported: it needs more key columns than a plan has, or it is empty.
    """
    mask = mask.cpu().numpy() if isinstance(mask, Tensor) else mask
    try:
        if mask.ndim == 2:
            return compile_plan(Ranges.from_mask(mask))
        samples = [Ranges.from_mask(m) for m in mask]
        return compile_plan(samples[0] if len(set(samples)) == 1 else samples)
    except ValueError as error:
        raise Unsupported(f"patch: no plan for an attention_mask of shape {list(mask.shape)}: {error}") from error


class Tables:
    """Rope tables ``[.., S, D / 2, 2]`` of the complex frequencies that a model passes, once for each tensor."""

    def __init__(self) -> None:
        self._tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __deepcopy__(self, memo: dict) -> Tables:
        return self

    @torch.compiler.disable
    def of(self, freqs: Tensor, make: Callable[[Tensor], Tensor], key: tuple = ()) -> Tensor:
        """``make(freqs)`` in float32, contiguous, without a gradient; ``key`` holds what else it depends on."""
        tables = self._tables.setdefault(freqs, {})
        version, table = tables.get(key, (None, None))
        if version != freqs._version:
            table = make(freqs.detach()).float().contiguous()
            tables[key] = (freqs._version, table)
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
    if not q.dtype == k.dtype == v.dtype:
        raise Unsupported(f"patch: {system}'s q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    lengths = (q.shape[1], k.shape[1])
    if lengths != (plan.length, plan.key_length):
        raise Unsupported(
            f"patch: {system} has {lengths[0]} queries and {lengths[1]} keys, but its mask is for {plan.length} and "
            f"{plan.key_length}"
        )
    return block_attention(q, k, v, plan.to(q.device), scale=scale)


def norm_rope(
    system: str, q: Tensor, k: Tensor, norm_q: nn.Module, norm_k: nn.Module, table: Tensor, **options
) -> tuple[Tensor, ...]:
    """``qk_norm_rope`` with the weights of the model's two norms, refused as Unsupported where the op refuses them.

    ``q`` and ``k`` ``[B, S, inner]`` as they leave their projections; returns ``[B, S, H, D]``.
    """
    for norm in (norm_q, norm_k):
        if norm.weight.dtype not in (q.dtype, torch.float32):
            raise Unsupported(
                f"patch: {system}'s {type(norm).__name__} must be {q.dtype} like q, or float32, got {norm.weight.dtype}"
            )
    if k.dtype != q.dtype:
        raise Unsupported(f"patch: {system}'s keys must be {q.dtype} like its queries, got {k.dtype}")
    return qk_norm_rope(q, k, norm_q.weight, norm_k.weight, table, eps=norm_q.eps, **options)


@lru_cache(maxsize=256)
def device_ranges(ranges: tuple[tuple[int, int], ...], batch: int, device: torch.device) -> Tensor:
    """int32 ``[batch, 1, R, 2]``; a rollout comes back to the same few lists, so this seldom copies anything."""
    one = torch.tensor(ranges or [(0, 0)], dtype=torch.int32, device=device)
    return one.expand(batch, 1, -1, 2).contiguous()
