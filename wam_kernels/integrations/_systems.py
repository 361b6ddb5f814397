"""``patch`` and ``unpatch``: which system a model belongs to, and the one line that changes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn

from . import cosmos_policy, dreamzero, fast_wam, lerobot, lingbot_va, openpi, openwam
from ._patching import (
    ON_UNSUPPORTED,
    Patch,
    Policy,
    Unsupported,
    process_patches,
    put_back,
    replaced_in,
    replacement_at,
)

# Each has SYSTEM, its name; find(model), the modules that it recognises by class name and configuration, and
# apply(patch, modules).
SYSTEMS = (fast_wam, lerobot, lingbot_va, dreamzero, cosmos_policy, openpi, openwam)
_ATTRIBUTE = "_wam_kernels_patch"


def patch(model: nn.Module, on_unsupported: str = "error") -> Patch | None:
    """Run a world-action model's attention, and the norms around it, on this library. One model, in place.

    Recognises, by class (or one derived from it, as FSDP2 does) and configuration, Fast-WAM (``MoT``, in lerobot one of
    ``MoTLayer``), LingBot-VA (``WanTransformer3DModel``), DreamZero (``CausalWanSelfAttention``), Cosmos Policy (its
    ``Attention``), openpi (``PaliGemmaWithExpertModel``) and OpenWAM (its blocks); none of these packages is imported.
    Parameters, buffers and state-dict keys stay. What is replaced depends on the system: see the modules of
    ``wam_kernels.integrations``. OpenWAM's code passes masks between functions that know no model: its patch holds for
    all of its models in the process, until one of them is unpatched.

    Args:
        model: The model, or any module that contains it.
        on_unsupported: What happens where this library has no path: a model that is not recognised, a head dim without
            a kernel, a mask that no plan can express. ``"error"`` raises with the reason; ``"original"`` warns once and
            leaves the call, or the model, to its own code.

    Returns:
        The :class:`Patch`, whose ``explain()`` lists what was replaced and what not; None if the model was left alone.

    Raises:
        Unsupported: (a ValueError), see ``on_unsupported``.
        ValueError: an unknown ``on_unsupported``, or a model that is patched already.
        TypeError: no ``nn.Module``.
    """
    _require_module("patch", model)
    if on_unsupported not in ON_UNSUPPORTED:
        raise ValueError(f"patch: on_unsupported must be one of {ON_UNSUPPORTED}, got {on_unsupported!r}")
    if replaced_in(model) or process_patches(model) or any(_ATTRIBUTE in vars(m) for m in model.modules()):
        raise ValueError(
            f"patch: model must not be patched already, but this {type(model).__name__} is; unpatch it first"
        )
    if any(isinstance(m, nn.DataParallel) for m in model.modules()):
        reason = Unsupported(
            "patch: model must not be in nn.DataParallel, whose replicas would run on the weights of the first device; "
            "use DistributedDataParallel"
        )
        Policy(type(model).__name__, on_unsupported).refuse(reason)
        return None
    for system in SYSTEMS:
        done = Patch(system.SYSTEM, on_unsupported)
        try:
            found = _expected(system, system.find, model)
            if found:
                done.model = model
                _expected(system, system.apply, done, found)
                if not done.replaced:
                    raise Unsupported(f"patch: {system.SYSTEM}'s model must have attentions to replace, but has none")
        except Unsupported as error:
            done.undo()  # all of a model or nothing
            done.policy.refuse(error)
            return None
        except BaseException:
            done.undo()
            raise
        if found:
            if not process_patches(model):  # such a patch is known by the classes that it changed
                object.__setattr__(model, _ATTRIBUTE, done)
            _trace_anew()
            return done
    names = ", ".join(system.SYSTEM for system in SYSTEMS)
    reason = Unsupported(f"patch: model must be one of {names}, got {type(model).__name__}")
    Policy(type(model).__name__, on_unsupported).refuse(reason)
    return None


# deep enough for a script's object that holds a policy that holds a model
_SEARCH_DEPTH = 4
# a longer list or dict is data, such as the index of a trainer's data set
_LONGEST = 1000


def accelerate(holder: object, on_unsupported: str = "error") -> Patch | None:
    """:func:`patch` on the model that something holds: a trainer, a policy, a server, a pipeline, or the model itself.

    Looks through attributes, and through what lists, tuples and dicts of at most 1000 items hold, for an ``nn.Module``
    that :func:`patch` recognises. A model and its wrapper count once.

    Args:
        holder: The object of a system's own script: Fast-WAM's trainer, LingBot-VA's server, DreamZero's
            ``GrootSimPolicy``, what Cosmos Policy's ``get_model``, openpi's ``load_pytorch`` or lerobot's
            ``make_policy`` returns.
        on_unsupported: As for :func:`patch`.

    Returns:
        As :func:`patch`; its ``model`` is what :func:`unpatch` takes.

    Raises:
        Unsupported: no such model, with what was searched, or two models that are not parts of each other.
    """
    if isinstance(holder, nn.Module):
        return patch(holder, on_unsupported)
    if isinstance(holder, type) or holder is None or isinstance(holder, str | int | float):
        raise TypeError(f"accelerate: holder must be an object that holds a model, got {holder!r}; pass the object")
    modules = dict(_modules_in(holder))
    recognised: dict[str, set[int]] = {}
    for path, module in modules.items():
        parts = {id(m) for system in SYSTEMS for m in _expected(system, system.find, module)}
        if parts and not any(parts <= others for others in recognised.values()):
            recognised = {p: others for p, others in recognised.items() if not others <= parts} | {path: parts}
    if len(recognised) == 1:
        return patch(modules[next(iter(recognised))], on_unsupported)
    kind = type(holder).__name__
    if recognised:
        reason = Unsupported(f"accelerate: {kind} must hold one model, got {', '.join(recognised)}; give one to patch")
    else:
        searched = ", ".join(f"{path} ({type(m).__name__})" for path, m in modules.items()) or "nothing"
        systems = ", ".join(system.SYSTEM for system in SYSTEMS)
        reason = Unsupported(
            f"accelerate: {kind} must hold a model of {systems}; searched {searched}, and no list or dict of more than "
            f"{_LONGEST} items; give the model itself to patch"
        )
    Policy(kind, on_unsupported).refuse(reason)
    return None


def _modules_in(holder: object) -> Iterator[tuple[str, nn.Module]]:
    """``(path, module)`` of the outermost modules that an object holds, nearest first."""
    visited, level = {id(holder)}, [("", holder)]
    for _ in range(_SEARCH_DEPTH):
        below: list[tuple[str, object]] = []
        for path, value in level:
            for name, part in _parts(value):
                if id(part) in visited:
                    continue
                visited.add(id(part))
                if isinstance(part, nn.Module):
                    yield path + name, part
                elif not isinstance(part, type | ModuleType | Tensor | str | bytes | int | float | None):
                    below.append((path + name, part))
        level = below


def _parts(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict | list | tuple) and len(value) > _LONGEST:
        return
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        yield from ((f"[{i}]", part) for i, part in enumerate(value))
    elif hasattr(value, "__dict__"):
        yield from ((f".{name}", part) for name, part in vars(value).items())


def _require_module(op: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"{op}: model must be an nn.Module, got {got}; pass the module that holds the weights")


def _expected(system, function, *args):
    """``function(*args)``; a model that it stumbles over is one that is not laid out as this library knows it."""
    try:
        return function(*args)
    except Unsupported:
        raise
    except (AttributeError, TypeError, LookupError, ValueError) as error:
        raise Unsupported(f"patch: {system.SYSTEM}'s model is not laid out as expected: {error}") from error


def unpatch(model: nn.Module) -> None:
    """Put back everything that :func:`patch` replaced in this model, or in what it holds; for OpenWAM in the process.

    Raises:
        ValueError: nothing in it is patched, or something was replaced once more after :func:`patch`.
        TypeError: no ``nn.Module``.
    """
    _require_module("unpatch", model)
    holders = [m for m in model.modules() if _ATTRIBUTE in vars(m)]
    replaced, shared = replaced_in(model), process_patches(model)
    if not holders and not replaced and not shared:
        raise ValueError(
            f"unpatch: model must be one that was given to patch, or hold it, but this {type(model).__name__} was not"
        )
    for owner, name in (pair for m in holders for pair in vars(m)[_ATTRIBUTE].replaced):
        if name in vars(owner) and replacement_at(owner, name) is None:
            raise ValueError(
                f"unpatch: {type(owner).__name__}.{name} must be as patch left it, but it was replaced once more; undo "
                "that first"
            )
    for owner, name in replaced:
        put_back(owner, name)
    for m in holders:
        object.__delattr__(m, _ATTRIBUTE)
    for done in shared:
        done.undo()
    _trace_anew()


def _trace_anew() -> None:
    """A model that was compiled and run before goes through its methods as they are now.

    PyTorch 2.7 does not look whether a module has another method than its class, 2.11 does: without this, what was
    compiled before ``patch`` would go on as it was.
    """
    if "torch._dynamo" in sys.modules and torch.__version__ < "2.11":
        torch._dynamo.reset()
