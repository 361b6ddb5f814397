"""What every integration shares: recognising a model, replacing methods so that they can be put back, refusing.

Only instances are changed: a replaced method is an attribute of the module object. Copies and pickles of a patched
model are patched too, on their own weights. Parameters, buffers and state-dict keys are never touched.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

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
        self.refused: dict[str, int] = {}  # reason: calls that ran the original because of it

    def refuse(self, reason: Unsupported) -> None:
        """Raise, or warn once and let the caller go on with the original code, as the user chose."""
        if self.on_unsupported == "error":
            raise reason
        self.refused[str(reason)] = self.refused.get(str(reason), 0) + 1
        if self.refused[str(reason)] == 1:
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
    :meth:`explain` says more.

    Attributes:
        system: Whose model it is.
        model: The model; None where none was found yet.
        replaced: ``(owner, name)`` of every replaced method, in order.
        kept: ``(module, reason)`` of attentions and norms that stay the model's own.
    """

    def __init__(self, system: str, on_unsupported: str) -> None:
        self.system, self.policy = system, Policy(system, on_unsupported)
        self.model: nn.Module | None = None
        self.replaced: list[tuple[nn.Module, str]] = []
        self.kept: list[tuple[nn.Module, str]] = []

    def leave_alone(self, module: nn.Module, reason: str) -> None:
        """Note why a module that one might expect to be replaced is not."""
        self.kept.append((module, reason))

    def method(
        self, owner: nn.Module, name: str, new: Callable, *shared: Any, replacement: type[Replacement] = Replacement
    ) -> None:
        """``owner.name(...)`` becomes ``new(*shared, owner, ...)``; if that raises Unsupported, the original may run.

        Args:
            owner: A module.
            name: A method of its class.
            new: A function of a module, so that copies and pickles of the model find it.
            shared: What several methods of a model share, caches above all.
            replacement: What stands there.

        Raises:
            Unsupported: no such method, one with other parameters, or one that is replaced already.
        """
        what, original = f"{type(owner).__name__}.{name}", getattr(type(owner), name, None)
        if not callable(original):
            raise Unsupported(
                f"patch: {self.system}'s {type(owner).__name__} must have the method {name}, but has none"
            )
        _require_signature(what, original, new, len(shared), 1)
        self._put(owner, name, lambda: replacement(self.policy, owner, name, new, shared))

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

    def explain(self) -> str:
        """What runs where: each replaced method with its calls so far, what stays the model's own and why, and what was
        refused at run time and left to the original.

        A compiled call is counted where it is traced. Modules that are alike in all but a number are one line.
        """
        names = {id(m): name for name, m in self.model.named_modules()} if self.model is not None else {}

        def path(module: nn.Module) -> str:
            return re.sub(r"\b\d+\b", "*", names.get(id(module), "")) or type(module).__name__

        lines: dict[str, dict[str, list[int]]] = {"replaced": {}, "kept": {}}
        for owner, name in self.replaced:
            replacement = vars(owner).get(name)
            calls = replacement.calls if isinstance(replacement, Replacement) else 0
            lines["replaced"].setdefault(f"{path(owner)}.{name}", []).append(calls)
        for module, reason in self.kept:
            lines["kept"].setdefault(f"{path(module)} ({type(module).__name__}): {reason}", []).append(0)
        text = [f"{self.system}: {len(self.replaced)} replaced, {len(self.kept)} kept"]
        for line, each in lines["replaced"].items():
            text.append(f"  replaced {line}, {len(each)}x, {sum(each)} calls so far")
        text += [f"  kept     {line}, {len(each)}x" for line, each in lines["kept"].items()]
        text += [
            f"  refused  {reason}, {count} calls ran the original" for reason, count in self.policy.refused.items()
        ]
        text.append("  kept     every other module: this library has no path for it")
        return "\n".join(text)

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
