"""What every integration shares: recognising a model, replacing methods so that they can be put back, refusing.

Only instances are changed: a replaced method is an attribute of the module object. Copies and pickles of a patched
model are patched too, on their own weights. Parameters, buffers and state-dict keys are never touched.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..block_attention import block_attention
from ..block_attention.config import MAX_D, fits_triton
from ..masks.ranges import Ranges
from ..plan import Plan, compile_plan
from ..qk_norm_rope import qk_norm_rope
from ..runtime.host import eager, host_side, plain

ON_UNSUPPORTED = ("error", "original")


class Unsupported(ValueError):
    """A model, mask or shape that this library has no path for. Raised before anything is computed."""


# A module of the patched model: its class is not imported here, so nothing is known of the types of its parts.
Foreign = Any


# ---- recognising ----


def of_class(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules of a class of this name, or of one derived from it: FSDP2 derives ``FSDP<name>`` on the way."""
    return [m for m in model.modules() if any(cls.__name__ == name for cls in type(m).__mro__)]


def require_class(system: str, module: nn.Module, name: str) -> None:
    """The module behaves as the class that this library knows by ``name``.

    Raises:
        Unsupported: it is of another class, or of a derived one that overrides something; FSDP2's does not.
    """
    classes = type(module).__mro__
    known = next((cls for cls in classes if cls.__name__ == name), None)
    if known is None:
        raise Unsupported(f"patch: {system} must have a {name}, but has a {type(module).__name__} in its place")
    for derived in classes[: classes.index(known)]:
        changed = sorted(n for n in vars(derived) if not n.startswith("__") and n in vars(known))
        if changed:
            raise Unsupported(
                f"patch: {system}'s {name} must be as its package has it, but {derived.__name__} overrides {changed[0]}"
            )


def require_parts(system: str, module: nn.Module, parts: Sequence[str]) -> None:
    """The module has all that this library reads of it.

    Raises:
        Unsupported: it lacks something.
    """
    for part in parts:
        if not hasattr(module, part):
            raise Unsupported(f"patch: {system}'s {type(module).__name__} must have {part}, but it has none")


def require_norms(system: str, norm_q: Foreign, norm_k: Foreign, channels: int) -> None:
    """The norms of queries and keys are what ``qk_norm_rope`` computes.

    Raises:
        Unsupported: one is no RMSNorm of so many channels, has a bias or a weight around 0, or their eps differ.
    """
    for norm in (norm_q, norm_k):
        named = any("RMSNorm" in cls.__name__ for cls in type(norm).__mro__)
        weight = getattr(norm, "weight", None)
        plain_weight = isinstance(weight, Tensor) and tuple(weight.shape) == (channels,)
        if not named or not plain_weight or getattr(norm, "bias", None) is not None:
            raise Unsupported(
                f"patch: {system}'s norms of queries and keys must be RMSNorm with a weight of {channels} and no bias, "
                f"got {norm}"
            )
        if getattr(norm, "zero_centered_gamma", False):
            raise Unsupported(f"patch: {system}'s {type(norm).__name__} must have zero_centered_gamma=False, got True")
    if not isinstance(norm_q.eps, float) or norm_q.eps != norm_k.eps:
        raise Unsupported(
            f"patch: {system}'s norms of queries and keys must have one eps, got {norm_q.eps} and {norm_k.eps}"
        )


def _parameters(function: Callable, skip: int) -> list[str]:
    """Names of the parameters behind the first ``skip``, with their stars."""
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = list(inspect.signature(function).parameters.values())
    return [stars.get(p.kind, "") + p.name for p in parameters[skip:]]


def _require_signature(what: str, original: Callable, new: Callable, shared: int, skip: int) -> None:
    """``original`` takes what ``new`` takes behind its ``shared`` arguments; the first ``skip`` may have any name."""
    expected, got = _parameters(new, shared + skip), _parameters(original, skip)
    if got != expected:
        raise Unsupported(f"patch: {what} must take ({', '.join(expected)}), but takes ({', '.join(got)})")


# ---- replacing ----


class Policy:
    """What happens with the unsupported, and what has been warned of."""

    def __init__(self, system: str, on_unsupported: str) -> None:
        self.system, self.on_unsupported = system, on_unsupported
        self.warned: set[str] = set()

    def refuse(self, reason: Unsupported) -> None:
        """Raise, or warn once and let the caller go on with the original code, as the user chose."""
        if self.on_unsupported == "error":
            raise reason
        if str(reason) not in self.warned:
            self.warned.add(str(reason))
            warnings.warn(f"{reason}; the original code of {self.system} runs instead", stacklevel=4)


class Replacement:
    """Stands for a method of one module. Raises what ours refuses, or runs the original then."""

    def __init__(self, policy: Policy, owner: nn.Module, name: str, new: Callable, shared: tuple) -> None:
        self.policy, self.owner, self.name, self.new, self.shared = policy, owner, name, new, shared
        self._count_calls()

    def _count_calls(self) -> None:
        self._calls = [0]

        # runs where a graph is traced, and leaves nothing in it: no state that a compiled call would have to guard
        @torch.compiler.assume_constant_result
        def count() -> None:
            self._calls[0] += 1

        self._count = count

    @property
    def calls(self) -> int:
        """Calls that ran here so far. A compiled call is counted where it is traced, not where it runs."""
        return self._calls[0]

    @property
    def original(self) -> Callable:
        return getattr(type(self.owner), self.name)

    def _run(self, *args, **kwargs):
        try:
            out = self.new(*self.shared, *args, **kwargs)
        except Unsupported as reason:
            self.policy.refuse(reason)
        else:
            self._count()
            return out
        return self.original(*args, **kwargs)

    def __call__(self, *args, **kwargs):
        return self._run(self.owner, *args, **kwargs)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in ("_count", "_calls")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._count_calls()

    def removed(self) -> None:
        """It stands for nothing any more."""


class FunctionReplacement(Replacement):
    """Stands for a function of a Python module where its first argument is one module.

    The Python module gets a function that looks at its first argument, and its own back when no model is left.
    """

    def __init__(self, module_name: str, *args) -> None:
        super().__init__(*args)
        self.module_name = module_name
        self._install()

    def _install(self) -> None:
        namespace = sys.modules[self.module_name]
        dispatch = getattr(namespace, self.name)
        if not isinstance(dispatch, _Dispatch):
            dispatch = _Dispatch(self.name, dispatch)
            setattr(namespace, self.name, dispatch)
        dispatch.users.add(self.owner)

    @property
    def original(self) -> Callable:
        function = getattr(sys.modules[self.module_name], self.name)
        return function.original if isinstance(function, _Dispatch) else function

    def __call__(self, *args, **kwargs):
        return self._run(*args, **kwargs)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._install()

    def removed(self) -> None:
        namespace = sys.modules[self.module_name]
        dispatch = getattr(namespace, self.name)
        if isinstance(dispatch, _Dispatch):
            dispatch.users.discard(self.owner)
            if not dispatch.users:
                setattr(namespace, self.name, dispatch.original)


class _Dispatch:
    """A module-level function that is another one for some first arguments."""

    def __init__(self, name: str, original: Callable) -> None:
        self.name, self.original = name, original
        self.users: WeakSet[nn.Module] = WeakSet()

    def __call__(self, key: nn.Module, *args, **kwargs):
        return getattr(key, self.name, self.original)(key, *args, **kwargs)


class Patch:
    """What was replaced in one model. Made by :func:`wam_kernels.integrations.patch`.

    Its text counts the calls of each replaced method that ran on this library; one with 0 has not run yet.

    Attributes:
        system: Whose model it is.
        replaced: ``(owner, name)`` of every replaced method, in order.
    """

    def __init__(self, system: str, on_unsupported: str) -> None:
        self.system, self.policy = system, Policy(system, on_unsupported)
        self.replaced: list[tuple[nn.Module, str]] = []

    def method(self, owner: nn.Module, name: str, new: Callable, *shared: Any) -> None:
        """``owner.name(...)`` becomes ``new(*shared, owner, ...)``; if that raises Unsupported, the original may run.

        Args:
            owner: A module.
            name: A method of its class.
            new: A function of a module, so that copies and pickles of the model find it.
            shared: What several methods of a model share, caches above all.

        Raises:
            Unsupported: no such method, one with other parameters, or one that is replaced already.
        """
        what, original = f"{type(owner).__name__}.{name}", getattr(type(owner), name, None)
        if not callable(original):
            raise Unsupported(
                f"patch: {self.system}'s {type(owner).__name__} must have the method {name}, but has none"
            )
        _require_signature(what, original, new, len(shared), 1)
        self._put(owner, name, lambda: Replacement(self.policy, owner, name, new, shared))

    def function(self, module_name: str, name: str, key: nn.Module, new: Callable, *shared: Any) -> None:
        """The function ``name`` of a Python module becomes ``new(*shared, ...)`` where its first argument is ``key``.

        Raises:
            Unsupported: no such function, one with other parameters, or one that is replaced already.
        """
        original = getattr(sys.modules.get(module_name), name, None)
        if not callable(original):
            raise Unsupported(f"patch: {self.system}'s module {module_name} must have {name}, but it has none")
        original = original.original if isinstance(original, _Dispatch) else original
        _require_signature(f"{module_name}.{name}", original, new, len(shared), 0)
        self._put(key, name, lambda: FunctionReplacement(module_name, self.policy, key, name, new, shared))

    def _put(self, owner: nn.Module, name: str, make: Callable[[], Replacement]) -> None:
        if name in vars(owner):
            raise Unsupported(
                f"patch: {type(owner).__name__}.{name} must be the class's own method, but this instance has another "
                "one already; undo the other patch first"
            )
        setattr(owner, name, make())
        self.replaced.append((owner, name))

    def undo(self) -> None:
        """Put everything back."""
        for owner, name in self.replaced:
            put_back(owner, name)
        self.replaced = []

    @property
    def calls(self) -> dict[str, int]:
        """How many calls of each replaced method, over all its modules, ran on this library so far."""
        calls: dict[str, int] = {}
        for owner, name in self.replaced:
            replacement = vars(owner).get(name)
            what = f"{type(owner).__name__}.{name}"
            calls[what] = calls.get(what, 0) + (replacement.calls if isinstance(replacement, Replacement) else 0)
        return calls

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {count} calls so far" for name, count in sorted(self.calls.items()))
        return f"Patch({self.system}: {counts}; {len(self.replaced)} replaced)"


def replaced_in(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """``(owner, name)`` of everything in a model that stands replaced."""
    return [(m, name) for m in model.modules() for name, value in vars(m).items() if isinstance(value, Replacement)]


def put_back(owner: nn.Module, name: str) -> None:
    """The class's own method again, if ours still stands there."""
    replacement = vars(owner).get(name)
    if isinstance(replacement, Replacement):
        delattr(owner, name)
        replacement.removed()


class Cache:
    """A cache that copies and pickles of a model begin anew."""

    def __reduce__(self) -> tuple:
        return type(self), ()


# ---- masks and tables ----


class MaskPlans(Cache):
    """Plans of dense masks ``[Sq, Sk]``, or ``[B, Sq, Sk]``, that a model builds at run time.

    A mask is converted to the ranges that it spells out, so the plan is equal to it, not alike. That takes a copy to
    the host, done once for each mask tensor: the same tensor is recognised by identity as long as nobody writes to it.
    A copy of an equal mask finds its plan by the mask's digest, so no mask is kept. Inference tensors do not tell
    whether they were written to, so each of their calls goes by the digest.
    """

    KEPT = 32  # plans remembered; a model has a handful of masks

    def __init__(self) -> None:
        self._by_tensor: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._by_digest: OrderedDict[tuple, Plan] = OrderedDict()

    def __len__(self) -> int:
        """Plans that are remembered by digest."""
        return len(self._by_digest)

    def plan(self, mask: Tensor, device: torch.device) -> Plan:
        """The plan of a boolean mask ``[Sq, Sk]``, on ``device``.

        Raises:
            Unsupported: not a boolean ``[Sq, Sk]``, or one that needs more key columns than a plan has.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
            raise Unsupported(f"patch: attention_mask must be torch.bool [Sq, Sk], got {_kind(mask)}")
        return self._of(mask, device, lambda m: m)

    def plan_of_bias(self, bias: Tensor | None, device: torch.device) -> Plan:
        """The plan of an additive mask ``[B, 1, Sq, Sk]``: 0 is visible, -1e30 and less is not.

        Raises:
            Unsupported: another shape, a value in between (a bias, which a plan cannot express), or too many columns.
        """
        if not isinstance(bias, Tensor) or not bias.is_floating_point() or bias.ndim != 4 or bias.shape[1] != 1:
            raise Unsupported(f"patch: attention_mask must be additive [B, 1, Sq, Sk], got {_kind(bias)}")
        # one byte for each pair, and one copy to the host: 1 visible, 0 not, 2 neither
        return self._of(bias, device, lambda b: torch.where(b <= -1e30, 0, 2 - (b == 0).byte())[:, 0])

    @eager  # a compiled model breaks its graph here; the plan is what goes on
    def _of(self, mask: Tensor, device: torch.device, visible: Callable[[Tensor], Tensor]) -> Plan:
        if mask.is_inference():
            return self._find(visible(mask)).to(device)
        version, plan = self._by_tensor.get(mask, (None, None))
        if version != mask._version:
            plan = self._find(visible(mask))
            self._by_tensor[mask] = (mask._version, plan)
        return plan.to(device)

    def _find(self, mask: Tensor) -> Plan:
        host = mask.cpu().numpy()
        if host.dtype != bool:
            if (host == 2).any():
                raise Unsupported(
                    "patch: attention_mask must hold 0 and at most -1e30, but it is a bias of other values"
                )
            host = host.astype(bool)
        key = host.shape, hashlib.sha256(np.packbits(host).data).digest()
        plan = self._by_digest.pop(key, None) or plan_of_mask(host)
        self._by_digest[key] = plan
        while len(self._by_digest) > self.KEPT:
            self._by_digest.popitem(last=False)
        return plan


def _kind(mask: Any) -> str:
    return f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)


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


class Tables(Cache):
    """Rope tables ``[.., S, D / 2, 2]`` of the frequencies that a model passes, once for each tensor.

    Inference tensors do not tell whether they were written to, so a table of one is made anew for every call.
    """

    def __init__(self) -> None:
        self._tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @eager
    def of(self, freqs: Tensor, make: Callable[[Tensor], Tensor], key: tuple = ()) -> Tensor:
        """``make(freqs)`` in float32, contiguous, without a gradient; ``key`` holds what else it depends on."""
        if freqs.is_inference():
            return self._make(freqs, make)
        tables = self._tables.setdefault(freqs, {})
        version, table = tables.get(key, (None, None))
        if version != freqs._version:
            table = self._make(freqs, make)
            tables[key] = (freqs._version, table)
        return table

    def _make(self, freqs: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        # whatever mode the call is in, a later one may train on the table
        with torch.inference_mode(False), torch.no_grad():
            return plain(make(freqs.detach()).float().contiguous())


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


def require_complex(system: str, freqs: Tensor) -> None:
    """Rope frequencies are complex numbers.

    Raises:
        Unsupported: they are not.
    """
    if not isinstance(freqs, Tensor) or not freqs.is_complex():
        got = freqs.dtype if isinstance(freqs, Tensor) else type(freqs).__name__
        raise Unsupported(f"patch: {system}'s rope frequencies must be a complex tensor, got {got}")


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
    system: str, q: Tensor, k: Tensor, norm_q: Foreign, norm_k: Foreign, table: Tensor, **options
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
@host_side
def device_ranges(ranges: tuple[tuple[int, int], ...], batch: int, device: torch.device) -> Tensor:
    """int32 ``[batch, 1, R, 2]``; a rollout comes back to the same few lists, so this seldom copies anything."""
    one = torch.tensor(ranges or [(0, 0)], dtype=torch.int32, device=device)
    return one.expand(batch, 1, -1, 2).contiguous()
