"""OpenWAM (PyPI ``openwam``) on this library: its packed attention, its blocks' glue and its rollout.

    openwam-train --extension wam_kernels.integrations.openwam --cfg ...
    openwam-train --extension wam_kernels.integrations.openwam:register_or_original --cfg ...

or, from Python, before or after the pipeline is built:

    from wam_kernels.integrations import openwam
    openwam.install()        # ... openwam.uninstall() restores every function

Weights, losses, random draws, checkpoints and configs stay the package's. Nothing is patched at import.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib.metadata import PackageNotFoundError, version

from .unsupported import OnUnsupported, UnsupportedError

SUPPORTED_VERSIONS = ("0.2.0",)
ON_UNSUPPORTED = ("error", "original")

_undo: list[tuple[object, str, object]] = []


def install(on_unsupported: str = "error", *, reuse_history: bool = True) -> bool:
    """Switch OpenWAM to this library, for all pipelines of the process.

    Args:
        on_unsupported: What happens with an unsupported version, attention profile or block size: ``"error"`` raises,
            ``"original"`` warns once for each and leaves it to OpenWAM's own code.
        reuse_history: Dual-expert rollouts keep the keys and values of the clean history from one chunk to the next, as
            far as they are still right; False frees them, and computes them anew for every chunk, as the package does.
            With True, a retry from one state and seed may differ in the last bits (5e-7 in float32): how much is
            computed anew depends on what ran before in the process, and matrices of other sizes round in another order.
            With False a retry gives the same bits.

    Returns:
        True if OpenWAM is switched over; False if the version is unsupported and ``on_unsupported="original"``.

    Raises:
        ValueError: another ``on_unsupported``.
        UnsupportedError: OpenWAM is not installed, or in another version than ``SUPPORTED_VERSIONS``.
        RuntimeError: installed already.
    """
    if on_unsupported not in ON_UNSUPPORTED:
        raise ValueError(f"install: on_unsupported must be one of {ON_UNSUPPORTED}, got {on_unsupported!r}")
    if _undo:
        raise RuntimeError("install: OpenWAM runs on wam_kernels already; call uninstall() first")
    policy = OnUnsupported(on_unsupported)
    try:
        found = f"openwam {version('openwam')}"
    except PackageNotFoundError:
        raise UnsupportedError("wam_kernels.integrations.openwam: openwam is not installed") from None
    if found.removeprefix("openwam ") not in SUPPORTED_VERSIONS:
        policy.refuse(f"{found} (supported: {', '.join(SUPPORTED_VERSIONS)})")
        return False
    _patch(policy, reuse_history)
    return True


def uninstall() -> None:
    """Put OpenWAM's own functions back. Does nothing where nothing is installed."""
    while _undo:
        owner, name, original = _undo.pop()
        setattr(owner, name, original)


def register_open_wam() -> None:
    """The hook of ``--extension wam_kernels.integrations.openwam``: unsupported things raise."""
    install("error")


def register_or_original() -> None:
    """The hook of ``--extension wam_kernels.integrations.openwam:register_or_original``: they warn instead."""
    install("original")


# ---- the patches ----


def _replace(owner: object, name: str, wrap: Callable[[Callable], object]) -> None:
    original = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
    _undo.append((owner, name, original))
    setattr(owner, name, wrap(original))


def _patch(policy: OnUnsupported, reuse_history: bool) -> None:
    # OpenWAM and torch load here, not at import
    from open_wam.models.common import denoising_cache, video_action_inference
    from open_wam.models.policy_variants.dual_expert import (
        batch_execution,
        dual_stream_execution,
        packed_block,
        packed_training,
    )
    from open_wam.models.policy_variants.dual_expert import inference as dual_inference
    from open_wam.models.policy_variants.parallel_stream import inference as parallel_inference
    from open_wam.models.visual_tower import (
        replica_core,
        runtime_tensor_transport,
        sequence_adapters,
        shared_transformer_embeddings,
        shared_transformer_support,
    )

    from . import cache, patches, rollout

    # profiles: ours instead of S x S masks, wherever the package prepares one for its own blocks
    for module, name in (
        (packed_training, "build_dual_expert_packed_coupling_attention_profile"),
        (dual_inference, "build_dual_expert_packed_coupling_attention_profile"),
        (parallel_inference, "build_chunked_temporal_exact_attention_profile"),
        (sequence_adapters, "build_chunked_temporal_exact_attention_profile"),
        (sequence_adapters, "build_chunked_conditioned_video_attention_profile"),
    ):
        _replace(module, name, lambda f: _wrapped(patches.build_profile, f, policy))
    for module in (runtime_tensor_transport, replica_core):
        _replace(module, "move_attention_profile", lambda f: _wrapped(patches.move_profile, f))
    _replace(dual_stream_execution, "select_attention_profile_mask", lambda f: _wrapped(patches.select_profile_mask, f))
    _replace(batch_execution, "build_sequence_batch_self_attention", lambda f: _wrapped(patches.batch_attention, f))
    _replace(batch_execution, "build_sequence_batch_cross_attention", lambda f: _wrapped(patches.batch_text, f))
    # blocks
    _replace(packed_block.DualExpertPackedBlock, "forward", lambda f: _wrapped(patches.packed_block, f, policy))
    _replace(
        shared_transformer_support.SharedTransformerBlock,
        "forward",
        lambda f: _wrapped(patches.shared_block, f, policy),
    )
    # modulation
    time_embedding = shared_transformer_embeddings.SharedTransformerTimeEmbedding
    _replace(time_embedding, "forward", lambda f: _wrapped(patches.embed_time, f))
    _replace(replica_core.SharedVideoTransformerCore, "_time_embed", lambda f: wraps(f)(patches.core_time_embed))
    _replace(
        replica_core, "prepare_exact_dual_stream_train_sequence", lambda f: _wrapped(patches.prepare_dual_stream, f)
    )
    # rollout
    for module in (denoising_cache, packed_block):
        _replace(module, "select_block_mask", lambda f: _wrapped(cache.select_mask, f))
    for module in (denoising_cache, video_action_inference):
        _replace(module, "attention_dependency_closure", lambda f: _wrapped(cache.dependency_closure, f))
    history = rollout.History() if reuse_history else None
    name = "forward_dual_expert_packed_coupling_denoise"
    _replace(dual_inference, name, lambda f: _wrapped(rollout.denoise, f, history))
    _replace(denoising_cache.DenoisingCache, "bind", lambda f: _wrapped(cache.bind, f))


def _wrapped(ours: Callable, original: Callable, *more: object) -> Callable:
    """``ours(original, *more, *args, **kwargs)`` as a function, so that it still binds as a method."""

    @wraps(original)
    def call(*args, **kwargs):
        return ours(original, *more, *args, **kwargs)

    return call


__all__ = [
    "ON_UNSUPPORTED",
    "SUPPORTED_VERSIONS",
    "UnsupportedError",
    "install",
    "register_open_wam",
    "register_or_original",
    "uninstall",
]
