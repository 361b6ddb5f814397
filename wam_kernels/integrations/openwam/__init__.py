"""OpenWAM (PyPI ``openwam``) on this library: its packed attention, its blocks' glue and its rollout.

    openwam-train --extension wam_kernels.integrations.openwam --cfg ...
    openwam-train --extension wam_kernels.integrations.openwam:register_or_original --cfg ...

or, from Python, before or after the pipeline is built:

    from wam_kernels.integrations import openwam
    done = openwam.install()        # ... openwam.uninstall() restores every function

or ``patch(pipeline)`` and ``unpatch(pipeline)``, which do the same. Its functions hand profiles to each other that know
no model, so what is replaced is replaced for all pipelines of the process.

Weights, losses, random draws, checkpoints and configs stay the package's. Nothing is patched at import.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from torch import nn

from .._patching import ON_UNSUPPORTED, Foreign, Patch, Unsupported, of_class

SYSTEM = "OpenWAM"
SUPPORTED_VERSIONS = ("0.2.0",)
_BLOCKS = ("DualExpertPackedBlock", "SharedTransformerBlock")

_installed: Patch | None = None


def find(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model."""
    return [m for name in _BLOCKS for m in of_class(model, name) if _is_of_package(m)]


def _is_of_package(module: nn.Module) -> bool:
    return any(cls.__module__.startswith("open_wam.") for cls in type(module).__mro__)


def apply(patch: Patch, found: list[Foreign]) -> None:
    """As :func:`install`, once no block is of a size that the fused ops refuse."""
    _require_version()
    from . import blocks

    for block in found:
        if not hasattr(block, "video_block"):  # of the two streams of a dual block, each is found by itself
            blocks.require_sizes(block)
    _switch_over(patch, reuse_history=True)


def install(on_unsupported: str = "error", *, reuse_history: bool = True) -> Patch | None:
    """Switch OpenWAM to this library, for all pipelines of the process.

    Args:
        on_unsupported: What happens with an unsupported version or block size: ``"error"`` raises, ``"original"`` warns
            once for each and leaves it to OpenWAM's own code. What this library never claims, such as an application's
            own attention profile, runs OpenWAM's own code either way; :meth:`Patch.explain` says how often.
        reuse_history: Dual-expert rollouts keep the keys and values of the clean history from one chunk to the next, as
            far as they are still right; False frees them, and computes them anew for every chunk, as the package does.
            With True, a retry from one state and seed may differ in the last bits (5e-7 in float32): how much is
            computed anew depends on what ran before in the process, and matrices of other sizes round in another order.
            With False a retry gives the same bits.

    Returns:
        The :class:`Patch`, whose ``explain()`` says what was replaced and how often it ran; None if the version is
        unsupported and ``on_unsupported="original"``.

    Raises:
        ValueError: another ``on_unsupported``.
        Unsupported: (a ValueError) OpenWAM is not installed, or in another version than ``SUPPORTED_VERSIONS``.
        RuntimeError: installed already.
    """
    if on_unsupported not in ON_UNSUPPORTED:
        raise ValueError(f"install: on_unsupported must be one of {ON_UNSUPPORTED}, got {on_unsupported!r}")
    if _installed is not None and _installed.replaced:
        raise RuntimeError("install: OpenWAM runs on wam_kernels already; call uninstall() first")
    patch = Patch(SYSTEM, on_unsupported)
    try:
        _require_version()
    except Unsupported as reason:
        patch.policy.refuse(reason)
        return None
    try:
        _switch_over(patch, reuse_history)
    except BaseException:
        patch.undo()
        raise
    return patch


def uninstall() -> None:
    """Put OpenWAM's own functions back. Does nothing where nothing is installed."""
    if _installed is not None:
        _installed.undo()


def register_open_wam() -> None:
    """The hook of ``--extension wam_kernels.integrations.openwam``: unsupported things raise."""
    install("error")


def register_or_original() -> None:
    """The hook of ``--extension wam_kernels.integrations.openwam:register_or_original``: they warn instead."""
    install("original")


def _require_version() -> None:
    supported = ", ".join(SUPPORTED_VERSIONS)
    try:
        found = version("openwam")
    except PackageNotFoundError:
        raise Unsupported(f"patch: {SYSTEM} must be installed in version {supported}, but is not installed") from None
    if found not in SUPPORTED_VERSIONS:
        raise Unsupported(f"patch: {SYSTEM} must be in version {supported}, got openwam {found}")


# ---- what is replaced ----


def _switch_over(patch: Patch, reuse_history: bool) -> None:
    # OpenWAM loads here, not at import
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
        sequence_batch,
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
        patch.process(module, name, patches.build_profile)
    for module in (runtime_tensor_transport, replica_core):
        patch.process(module, "move_attention_profile", patches.move_profile)
    patch.process(dual_stream_execution, "select_attention_profile_mask", patches.select_profile_mask)
    patch.process(batch_execution, "build_sequence_batch_self_attention", patches.batch_attention)
    patch.process(batch_execution, "build_sequence_batch_cross_attention", patches.batch_text)
    patch.process(sequence_batch, "build_sequence_id_attention", patches.sequence_ids)
    # blocks
    patch.process(packed_block.DualExpertPackedBlock, "forward", patches.packed_block)
    patch.process(shared_transformer_support.SharedTransformerBlock, "forward", patches.shared_block)
    # modulation
    time_embedding = shared_transformer_embeddings.SharedTransformerTimeEmbedding
    patch.process(time_embedding, "forward", patches.embed_time)
    patch.process(replica_core.SharedVideoTransformerCore, "_time_embed", patches.core_time_embed)
    patch.process(replica_core, "prepare_exact_dual_stream_train_sequence", patches.prepare_dual_stream)
    # rollout
    for module in (denoising_cache, packed_block):
        patch.process(module, "select_block_mask", cache.select_mask)
    for module in (denoising_cache, video_action_inference):
        patch.process(module, "attention_dependency_closure", cache.dependency_closure)
    history = rollout.History() if reuse_history else None
    patch.process(dual_inference, "forward_dual_expert_packed_coupling_denoise", rollout.denoise, history)
    patch.process(denoising_cache.DenoisingCache, "bind", cache.bind)
    global _installed
    _installed = patch


__all__ = [
    "SUPPORTED_VERSIONS",
    "install",
    "register_open_wam",
    "register_or_original",
    "uninstall",
]
