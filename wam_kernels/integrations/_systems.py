"""``patch`` and ``unpatch``: which system a model belongs to, and the one line that changes it."""

from __future__ import annotations

from torch import nn

from . import cosmos_policy, dreamzero, fast_wam, lingbot_va, openpi
from ._patching import ON_UNSUPPORTED, Patch, Unsupported

# Each has SYSTEM, its name; find(model), the modules that it recognises by class name and configuration, and
# apply(patch, modules).
_SYSTEMS = (fast_wam, lingbot_va, dreamzero, cosmos_policy, openpi)
_ATTRIBUTE = "_wam_kernels_patch"


def patch(model: nn.Module, on_unsupported: str = "error") -> Patch | None:
    """Run a world-action model's attention, and the norms around it, on this library. One model, in place.

    Recognises, by class and configuration, Fast-WAM (``MoT``), LingBot-VA (``WanTransformer3DModel``), DreamZero
    (``CausalWanSelfAttention``), Cosmos Policy (its ``Attention``) and openpi (``PaliGemmaWithExpertModel``); none of
    these packages is imported. Parameters, buffers and state-dict keys stay as they are.
    What is replaced depends on the system: see the modules of ``wam_kernels.integrations``.

    Args:
        model: The model, or any module that contains it.
        on_unsupported: What happens where this library has no path: a model that is not recognised, a head dim without
            a kernel, a mask that no plan can express. ``"error"`` raises with the reason; ``"original"`` warns once and
            leaves the call, or the model, to its own code.

    Returns:
        The :class:`Patch`, whose text lists what was replaced; None if the model was left alone.

    Raises:
        Unsupported: (a ValueError) see ``on_unsupported``.
        ValueError: an unknown ``on_unsupported``, or a model that is patched already.
    """
    if on_unsupported not in ON_UNSUPPORTED:
        raise ValueError(f"patch: on_unsupported must be one of {ON_UNSUPPORTED}, got {on_unsupported!r}")
    if any(_ATTRIBUTE in vars(m) for m in model.modules()):
        raise ValueError(
            f"patch: model must not be patched already, but this {type(model).__name__} is; unpatch it first"
        )
    for system in _SYSTEMS:
        found = system.find(model)
        if found:
            return _apply(system, model, found, on_unsupported)
    names = ", ".join(system.SYSTEM for system in _SYSTEMS)
    reason = Unsupported(f"patch: model must be one of {names}, got {type(model).__name__}")
    Patch(type(model).__name__, on_unsupported).refuse(reason)
    return None


def _apply(system, model: nn.Module, found: list[nn.Module], on_unsupported: str) -> Patch | None:
    patch = Patch(system.SYSTEM, on_unsupported)
    try:
        system.apply(patch, found)
    except Unsupported as reason:
        patch.undo()  # all of a model or nothing
        patch.refuse(reason)
        return None
    except BaseException:
        patch.undo()
        raise
    object.__setattr__(model, _ATTRIBUTE, patch)
    return patch


def unpatch(model: nn.Module) -> None:
    """Put back everything that :func:`patch` replaced in this model.

    Raises:
        ValueError: the model is not patched; patch and unpatch take the same module.
    """
    patch = vars(model).get(_ATTRIBUTE)
    if patch is None:
        raise ValueError(f"unpatch: model must be one that was given to patch, but this {type(model).__name__} was not")
    patch.undo()
    object.__delattr__(model, _ATTRIBUTE)
