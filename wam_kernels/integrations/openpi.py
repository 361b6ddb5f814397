"""openpi: pi-0 and pi-0.5 in PyTorch, ``PaliGemmaWithExpertModel`` of two Gemmas with one attention.

Both call the module-level ``eager_attention_forward`` of ``modeling_gemma`` with a dense additive mask, which makes the
scores, their float32 softmax and the repeated key head as whole tensors. It is replaced for the attention modules of
this model only: 8 query heads read 1 key head of 256 channels under the program ``prefix_suffix`` (the prefix blind to
the suffix), padding included, in training and over the prefix cache.

The whole model, ``PI0Pytorch``, makes that mask anew for every batch, from two vectors ``[B, S]``: openpi in a method,
lerobot in a function. Where it is what is patched, the mask stays those two vectors up to the attention, so nothing
of S x S is made or kept, and a batch has one plan. Short calls, a traced graph and whatever else reads the mask get it
as it was.

Padding tokens, which nothing attends to, come out as 0, where the original's are a mean of all values. Heads of 256
channels have a GPU kernel in bfloat16 and float16, not in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ._kernels import PaddedBlocks, attend_under_mask, require_kernel
from ._patching import Foreign, Patch, SharedFunctionReplacement, Unsupported, of_class, require_class, require_parts

SYSTEM = "openpi"
_PAIR = "PaliGemmaWithExpertModel"
_WHOLE = "PI0Pytorch", "PI05Pytorch"  # openpi has the first for both; the second is lerobot's
_ATTENTION, _MASKS, _ADDITIVE = "eager_attention_forward", "make_att_2d_masks", "_prepare_attention_masks_4d"


def find(model: nn.Module) -> list[nn.Module]:
    """The pairs of Gemmas in a model."""
    return of_class(model, _PAIR)


def apply(patch: Patch, pairs: list[Foreign]) -> None:
    for pair in pairs:
        require_class(SYSTEM, pair, _PAIR)
        whole = (
            pair.paligemma if hasattr(pair.paligemma, "language_model") else pair.paligemma.model
        )  # newer transformers
        for layers in (whole.language_model.layers, pair.gemma_expert.model.layers):
            for layer in layers:
                attn = layer.self_attn
                require_parts(SYSTEM, attn, ("q_proj", "head_dim"))
                require_kernel(SYSTEM, attn.q_proj.weight.new_empty(attn.head_dim))
                patch.function(_module_of(attn, _ATTENTION), _ATTENTION, attn, _attention)
    wholes = [] if patch.model is None else [m for name in _WHOLE for m in of_class(patch.model, name)]
    for owner in wholes:
        try:
            patch.function(_module_of(owner, _MASKS), _MASKS, owner, _make_masks, replacement=SharedFunctionReplacement)
            if hasattr(owner, _ADDITIVE):
                patch.method(owner, _ADDITIVE, _additive)
            else:
                name = _ADDITIVE.removeprefix("_")
                module = _module_of(owner, name)
                own = getattr(sys.modules[module], name)
                own = getattr(own, "original", own)  # another model's patch stands there
                patch.function(module, name, owner, _additive_of, owner, own, replacement=SharedFunctionReplacement)
        except Unsupported as refused:  # attention is served in either case
            patch.leave_alone(owner, f"masks of S x S: {refused}")


def _module_of(owner: Foreign, function: str) -> str:
    """The Python module with the function that this module calls: that of its class, which FSDP2 may have derived.

    Raises:
        Unsupported: there is none.
    """
    for cls in type(owner).__mro__:
        if hasattr(sys.modules.get(cls.__module__), function):
            return cls.__module__
    raise Unsupported(f"patch: {SYSTEM}'s {type(owner).__name__} must call {function} of its module, but it has none")


def _make_masks(pad_masks: Tensor, att_masks: Tensor) -> Tensor:
    """the mask as the two vectors that it follows from."""

    def spelled() -> Tensor:
        at = torch.cumsum(att_masks, 1)
        return (at[:, None] <= at[:, :, None]) & (pad_masks[:, None] & pad_masks[:, :, None])

    if pad_masks.ndim != 2 or pad_masks.dtype != torch.bool or pad_masks.shape != att_masks.shape:
        raise Unsupported(
            f"patch: {SYSTEM}'s masks must be of bool pads and of blocks [B, S], got {pad_masks.dtype} "
            f"{list(pad_masks.shape)} and {list(att_masks.shape)}"
        )
    return PaddedBlocks(pad_masks, att_masks, spelled, torch.bool)


def _additive(owner: Foreign, att_2d_masks: Tensor) -> Tensor:
    """the additive mask, still as two vectors."""
    return _additive_of(owner, lambda mask, dtype: getattr(type(owner), _ADDITIVE)(owner, mask), att_2d_masks)


def _additive_of(owner: Foreign, own: Callable, att_2d_masks: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """the additive mask, still as two vectors."""
    mask, pair = att_2d_masks, owner.paligemma_with_expert
    # a graph takes no other kind of tensor
    if not isinstance(mask, PaddedBlocks) or pair._compiled_call_impl is not None or hasattr(pair, "_orig_mod"):
        return own(mask, dtype)
    kind = torch.get_default_dtype() if dtype is None else dtype
    return PaddedBlocks(mask.pads, mask.blocks, lambda: own(mask.spelled(), dtype), kind)


def _attention(
    module: Foreign, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float, dropout: float = 0.0, **kwargs,
) -> tuple[Tensor, None]:  # fmt: skip
    if dropout and module.training:
        raise Unsupported(f"patch: {SYSTEM}'s attention must have no dropout, got {dropout}")
    if isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool:  # the original would add it
        got = list(attention_mask.shape)
        raise Unsupported(f"patch: {SYSTEM}'s attention_mask must be additive [B, 1, Sq, Sk], got torch.bool {got}")
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return attend_under_mask(SYSTEM, q, k, v, attention_mask, scale=scaling), None
