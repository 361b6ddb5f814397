"""What every integration shares: recognising a model, replacing methods so that they can be put back, refusing.

Only instances are changed: a replaced method is an attribute of the module object. Copies and pickles of a patched
model are patched too, on their own weights. Parameters, buffers and state-dict keys are never touched. OpenWAM's code
passes masks between functions that know no model, so its functions and classes are changed, for all of the process.

A replacement that has nothing for a call raises: :class:`Unsupported` where this library should have a path and has
none (the user's policy decides), :class:`NotOurs` where it never claimed one (the original runs). Nothing has been
computed or written by then.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from types import FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

ON_UNSUPPORTED = ("error", "original")


class _Declined(Exception):
    """A call that the original runs, or a model that is left alone."""

    arguments: tuple[tuple, dict] | None = None

    def with_arguments(self, *args, **kwargs):
        """The original gets these, where those of the call hold what only this library reads."""
        self.arguments = args, kwargs
        return self


class Unsupported(_Declined, ValueError):
    """A model, mask or shape that this library has no path for. Raised before anything is computed."""


class NotOurs(_Declined):
    """A call that this library never claimed to have a path for; it never reaches the caller."""


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


def _parameters(function: Callable, skip: int) -> list[inspect.Parameter]:
    """Those behind the first ``skip``."""
    return list(inspect.signature(function).parameters.values())[skip:]


def _written(parameters: Sequence[inspect.Parameter]) -> str:
    """As in a signature, without defaults and types."""
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return f"({', '.join(stars.get(p.kind, '') + p.name for p in parameters)})"


class Signature:
    """What a replacement takes, and what the method that it stands for takes beside that.

    Args:
        what: The method's name, for messages.
        original: What is replaced. It takes all that ``new`` takes, in that order, and may take more, with defaults, or
            as ``*args`` and ``**kwargs``: calls that give none of this are served.
        new: What stands there, behind its ``shared`` first arguments. What it takes by keyword alone and has a default
            for is what some forks take, and may be missing in the original.
        skip: Arguments of both that may have any name.

    Raises:
        Unsupported: the original takes other parameters.
    """

    def __init__(self, what: str, original: Callable, new: Callable, shared: int, skip: int) -> None:
        own, theirs = _parameters(new, shared + skip), _parameters(original, skip)
        taken = {p.name for p in theirs}
        own = [p for p in own if p.kind is not p.KEYWORD_ONLY or p.default is p.empty or p.name in taken]
        takes_all = any(p.kind is p.VAR_KEYWORD for p in own)
        named = [p for p in own if p.kind is not p.VAR_KEYWORD]
        first = [p.name for p in named if p.kind is not p.KEYWORD_ONLY]
        names = {p.name for p in named}
        more = [p for p in theirs if p.name not in names]
        required = [p for p in more if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        in_order = [p.name for p in theirs[: len(first)]] == first
        if not in_order or not names <= taken or required and not takes_all:
            raise Unsupported(f"patch: {what} must take {_written(own)}, but takes {_written(theirs)}")
        self.what, self.takes_more = what, bool(more) and not takes_all
        self.positional, self.names = skip + len(first), frozenset(names)
        self.defaults = {p.name: p.default for p in more}

    def known(self, args: tuple, kwargs: dict) -> dict:
        """``kwargs`` without what has its default and this library does not take.

        Raises:
            Unsupported: the call gives something else that it does not take.
        """
        unknown = [name for name in kwargs if name not in self.names]
        for name in unknown:
            if self.defaults.get(name, inspect.Parameter.empty) is not kwargs[name]:
                raise Unsupported(f"patch: {self.what} must be called without {name}, which this library does not know")
        if len(args) > self.positional:
            raise Unsupported(
                f"patch: {self.what} must be called with at most {self.positional} arguments, got {len(args)}"
            )
        return {name: value for name, value in kwargs.items() if name in self.names}


# ---- replacing ----


class Policy:
    """What happens with the unsupported, and what has been warned of."""

    def __init__(self, system: str, on_unsupported: str) -> None:
        self.system, self.on_unsupported = system, on_unsupported
        self.refused: dict[str, int] = {}  # reason: calls that ran the original because of it
        self.left: dict[str, int] = {}  # the same, of calls that are not this library's

    def refuse(self, reason: Unsupported) -> None:
        """Raise, or warn once and let the caller go on with the original code, as the user chose."""
        if self.on_unsupported == "error":
            raise reason
        self.refused[str(reason)] = self.refused.get(str(reason), 0) + 1
        if self.refused[str(reason)] == 1:
            warnings.warn(f"{reason}; the original code of {self.system} runs instead", stacklevel=4)

    def leave(self, reason: NotOurs) -> None:
        """Let the caller go on with the original code, and remember why."""
        self.left[str(reason)] = self.left.get(str(reason), 0) + 1


class Replacement:
    """Stands for a method of one module. Raises what ours refuses, or runs the original then."""

    takes_owner = True  # before a call's own arguments

    def __init__(
        self, policy: Policy, owner: Foreign, name: str, new: Callable, shared: tuple, signature: Signature
    ) -> None:
        self.policy, self.owner, self.name, self.new, self.shared = policy, owner, name, new, shared
        self.signature = signature
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

    def __call__(self, *args, **kwargs):
        if self.takes_owner:
            args = (self.owner, *args)
        instead = None
        try:
            known = self.signature.known(args, kwargs) if self.signature.takes_more else kwargs
            out = self.new(*self.shared, *args, **known)
        except Unsupported as reason:
            self.policy.refuse(reason)
            instead = reason.arguments
        except NotOurs as reason:
            self.policy.leave(reason)
            instead = reason.arguments
        else:
            self._count()
            return out
        if instead is not None:
            args, kwargs = instead
        return self.original(*args, **kwargs)

    @property
    def about(self) -> str:
        """What runs there instead, in a line."""
        return (self.new.__doc__ or "").partition("\n")[0].rstrip(".")

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in ("_count", "_calls")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._count_calls()

    def remove(self) -> None:
        """The owner has its own method or function again."""
        delattr(self.owner, self.name)
        self.removed()

    def removed(self) -> None:
        """It stands for nothing any more."""


class StaticReplacement(Replacement):
    """Stands for a static method: the module is no argument of it."""

    takes_owner = False


class FunctionReplacement(Replacement):
    """Stands for a function of a Python module where its first argument is one module.

    The Python module gets a function that looks at its first argument, and its own back when no model is left.
    """

    takes_owner = False
    by_module = True

    def __init__(self, module_name: str, *args) -> None:
        super().__init__(*args)
        self.module_name = module_name
        self._install()

    def _install(self) -> None:
        namespace = sys.modules[self.module_name]
        dispatch = getattr(namespace, self.name)
        if not isinstance(dispatch, _Dispatch):
            dispatch = _Dispatch(self.name, dispatch, self.by_module)
            setattr(namespace, self.name, dispatch)
        dispatch.users[self.owner] = None

    @property
    def original(self) -> Callable:
        function = getattr(sys.modules[self.module_name], self.name)
        return function.original if isinstance(function, _Dispatch) else function

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._install()

    def removed(self) -> None:
        namespace = sys.modules[self.module_name]
        dispatch = getattr(namespace, self.name)
        if isinstance(dispatch, _Dispatch):
            dispatch.users.pop(self.owner, None)
            if not dispatch.users:
                setattr(namespace, self.name, dispatch.original)


class SharedFunctionReplacement(FunctionReplacement):
    """Stands for a function of a Python module whoever calls it, as long as a patched model is left.

    For functions that get no module: what stands there must serve models that are not patched as well. Calls count for
    the model that was patched last. A graph is traced with the original.
    """

    by_module = False


class _Dispatch:
    """A module-level function that is another one for some first arguments, or while somebody uses another."""

    def __init__(self, name: str, original: Callable, by_module: bool) -> None:
        self.name, self.original, self.by_module = name, original, by_module
        self.users: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()  # in order

    def __call__(self, first: Any, *args, **kwargs):
        user = first
        if not self.by_module:
            user = None if torch.compiler.is_compiling() else next(reversed([*self.users]), None)
        return getattr(user, self.name, self.original)(first, *args, **kwargs)


class ProcessReplacement(Replacement):
    """Stands for a function of a Python module, or a method of a class, wherever in the process it is called.

    What stands there is ``function``, which binds as a method does; ``new`` gets the original first.
    """

    takes_owner = False

    def __init__(self, patch: Patch, owner: Foreign, name: str, new: Callable, shared: tuple) -> None:
        self.patch, self.own = patch, vars(owner)[name]
        # of a method, its module may have any name
        signature = Signature(f"{written(owner)}.{name}", self.own, new, len(shared) + 1, int(isinstance(owner, type)))
        super().__init__(patch.policy, owner, name, new, (self.own, *shared), signature)

        @wraps(self.own)
        def function(*args, **kwargs):
            return self(*args, **kwargs)

        function.replacement = self  # type: ignore[attr-defined]
        self.function = function

    @property
    def original(self) -> Callable:
        return self.own

    def remove(self) -> None:
        setattr(self.owner, self.name, self.own)


def written(owner: Foreign) -> str:
    """How texts call what a replacement stands in."""
    if isinstance(owner, type):
        return owner.__qualname__
    return owner.__name__ if isinstance(owner, ModuleType) else type(owner).__name__


class Patch:
    """What was replaced in one model, or for OpenWAM in the process. Made by :func:`wam_kernels.integrations.patch`.

    Its text counts the calls of each replaced method that ran on this library; one with 0 has not run yet.
    :meth:`explain` says more.

    Attributes:
        system: Whose model it is.
        model: The model; None where none was found yet, or none was given (OpenWAM's ``install``).
        replaced: ``(owner, name)`` of every replaced method or function, in order.
        kept: ``(module, reason)`` of attentions and norms that stay the model's own.
    """

    def __init__(self, system: str, on_unsupported: str) -> None:
        self.system, self.policy = system, Policy(system, on_unsupported)
        self.model: nn.Module | None = None
        self.replaced: list[tuple[Foreign, str]] = []
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
            name: A method of its class; a static one gets no owner.
            new: A function of a module, so that copies and pickles of the model find it. ``explain()`` prints the first
                line of its docstring.
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
        static = isinstance(inspect.getattr_static(type(owner), name), staticmethod)
        if static:
            replacement = StaticReplacement
        signature = Signature(what, original, new, len(shared), 0 if static else 1)
        self._put(owner, name, lambda: replacement(self.policy, owner, name, new, shared, signature))

    def function(
        self, module_name: str, name: str, key: nn.Module, new: Callable, *shared: Any,
        replacement: type[FunctionReplacement] = FunctionReplacement,
    ) -> None:  # fmt: skip
        """The function ``name`` of a Python module becomes ``new(*shared, ...)`` where its first argument is ``key``.

        With ``SharedFunctionReplacement`` wherever it is called, as long as ``key`` is there and patched.

        Raises:
            Unsupported: no such function, one with other parameters, or one that is replaced already.
        """
        original = getattr(sys.modules.get(module_name), name, None)
        if not callable(original):
            raise Unsupported(f"patch: {self.system}'s module {module_name} must have {name}, but it has none")
        original = original.original if isinstance(original, _Dispatch) else original
        signature = Signature(f"{module_name}.{name}", original, new, len(shared), 0)
        self._put(key, name, lambda: replacement(module_name, self.policy, key, name, new, shared, signature))

    def process(self, owner: Foreign, name: str, new: Callable, *shared: Any) -> None:
        """The function ``name`` of a Python module, or of a class, becomes ``new(original, *shared, ...)`` for all of
        the process.

        Raises:
            Unsupported: no such function, or one with other parameters.
        """
        if not callable(vars(owner).get(name)):
            raise Unsupported(f"patch: {self.system}'s {written(owner)} must have {name}, but has none")
        setattr(owner, name, ProcessReplacement(self, owner, name, new, shared).function)
        self.replaced.append((owner, name))

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
            what = f"{written(owner)}.{name}"
            calls[what] = calls.get(what, 0) + calls_at(owner, name)
        return calls

    def explain(self) -> str:
        """What runs where: each replaced method with its calls so far, what stays the model's own and why, and what was
        refused at run time and left to the original.

        A compiled call is counted where it is traced. Modules that are alike in all but a number are one line.
        """
        names = {id(m): name for name, m in self.model.named_modules()} if self.model is not None else {}

        def path(owner: Foreign) -> str:
            return re.sub(r"\b\d+\b", "*", names.get(id(owner), "")) or written(owner)

        lines: dict[str, dict[str, list[int]]] = {"replaced": {}, "kept": {}}
        about: dict[str, str] = {}
        for owner, name in self.replaced:
            line, replacement = f"{path(owner)}.{name}", replacement_at(owner, name)
            lines["replaced"].setdefault(line, []).append(calls_at(owner, name))
            about[line] = f": {replacement.about}" if replacement is not None and replacement.about else ""
        for module, reason in self.kept:
            lines["kept"].setdefault(f"{path(module)} ({type(module).__name__}): {reason}", []).append(0)
        text = [f"{self.system}: {len(self.replaced)} replaced, {len(self.kept)} kept"]
        for line, each in lines["replaced"].items():
            text.append(f"  replaced {line}, {len(each)}x, {sum(each)} calls so far{about[line]}")
        text += [f"  kept     {line}, {len(each)}x" for line, each in lines["kept"].items()]
        for verdict, calls in (("refused ", self.policy.refused), ("kept    ", self.policy.left)):
            text += [f"  {verdict} {reason}, {count} calls ran the original" for reason, count in calls.items()]
        text.append("  kept     every other module: this library has no path for it")
        return "\n".join(text)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {count} calls so far" for name, count in sorted(self.calls.items()))
        return f"Patch({self.system}: {counts}; {len(self.replaced)} replaced)"


def replacement_at(owner: Foreign, name: str) -> Replacement | None:
    """What stands in the place of this method of a module or class, or of this function of a Python module."""
    value = vars(owner).get(name)
    if isinstance(value, FunctionType):
        value = vars(value).get("replacement")
    return value if isinstance(value, Replacement) else None


def calls_at(owner: Foreign, name: str) -> int:
    """Calls that ran on this library there; 0 where nothing of it stands any more."""
    replacement = replacement_at(owner, name)
    return 0 if replacement is None else replacement.calls


def replaced_in(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """``(owner, name)`` of everything in a model that stands replaced."""
    return [(m, name) for m in model.modules() for name in vars(m) if replacement_at(m, name) is not None]


def process_patches(model: nn.Module) -> list[Patch]:
    """Those that have replaced methods of a model's classes, for all of the process."""
    classes = dict.fromkeys(cls for m in model.modules() for cls in type(m).__mro__)
    found = (replacement_at(cls, name) for cls in classes for name in vars(cls))
    return list(dict.fromkeys(r.patch for r in found if isinstance(r, ProcessReplacement)))


def put_back(owner: Foreign, name: str) -> None:
    """The own method or function again, if ours still stands there."""
    replacement = replacement_at(owner, name)
    if replacement is not None:
        replacement.remove()


class Cache:
    """A cache that copies and pickles of a model begin anew."""

    def __reduce__(self) -> tuple:
        return type(self), ()
