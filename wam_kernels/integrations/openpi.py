"""openpi: pi-0 and pi-0.5 in PyTorch, ``PaliGemmaWithExpertModel`` of two Gemmas with one attention.

Both call the module-level ``eager_attention_forward`` of ``modeling_gemma`` with a dense additive mask, which makes the
scores, their float32 softmax and the repeated key head as whole tensors. It is replaced for the attention modules of
this model only: 8 query heads read 1 key head of 256 channels under the program ``prefix_suffix`` (the prefix blind to
the suffix), padding included, in training and over the prefix cache.

Padding tokens, which nothing attends to, come out as 0, where the original's are a mean of all values. Heads of 256
channels have a GPU kernel in bfloat16 and float16, not in float32.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from ._kernels import attend_under_mask, require_kernel
from ._patching import Foreign, Patch, Unsupported, of_class, require_class, require_parts

SYSTEM = "openpi"
_FUNCTION = "eager_attention_forward"


def find(model: nn.Module) -> list[nn.Module]:
    """The pairs of Gemmas in a model."""
    return of_class(model, "PaliGemmaWithExpertModel")


def apply(patch: Patch, pairs: list[Foreign]) -> None:
    for pair in pairs:
        require_class(SYSTEM, pair, "PaliGemmaWithExpertModel")
        whole = (
            pair.paligemma if hasattr(pair.paligemma, "language_model") else pair.paligemma.model
        )  # newer transformers
        for layers in (whole.language_model.layers, pair.gemma_expert.model.layers):
            for layer in layers:
                attn = layer.self_attn
                require_parts(SYSTEM, attn, ("q_proj", "head_dim"))
                require_kernel(SYSTEM, attn.q_proj.weight.new_empty(attn.head_dim))
                patch.function(_module_of(attn), _FUNCTION, attn, _attention)


def _module_of(attn: Foreign) -> str:
    """The Python module with the function that this attention calls: that of its class, which FSDP2 may have derived.

    Raises:
        Unsupported: there is none.
    """
    for cls in type(attn).__mro__:
        if hasattr(sys.modules.get(cls.__module__), _FUNCTION):
            return cls.__module__
    raise Unsupported(f"patch: {SYSTEM}'s {type(attn).__name__} must call {_FUNCTION} of its module, but it has none")


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
