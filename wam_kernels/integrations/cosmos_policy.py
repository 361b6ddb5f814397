"""Cosmos Policy: the ``Attention`` of its diffusion transformer, per-head q/k norm and rotate-half rope.

Its attention is dense (``cosmos_policy``): there is nothing to skip, and the model's own flash attention stays.
Replaced is ``compute_qkv`` of every self-attention, where both norms and both rotations, with their casts, become one
launch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._patching import Patch, Tables, Unsupported, norm_rope, require_kernel

SYSTEM = "Cosmos Policy"
_PARTS = ("is_selfattn", "q_proj", "k_proj", "v_proj", "output_proj", "q_norm", "k_norm", "compute_qkv", "attn_op")


def find(model: nn.Module) -> list[nn.Module]:
    """The self-attentions of a model; diffusers has an ``Attention`` too, with other parts."""
    named = (m for m in model.modules() if type(m).__name__ == "Attention")
    return [m for m in named if all(hasattr(m, part) for part in _PARTS) and m.is_selfattn]


def apply(patch: Patch, attentions: list[nn.Module]) -> None:
    tables = Tables()

    def compute_qkv(attn, x: Tensor, context: Tensor | None = None, rope_emb: Tensor | None = None):
        if rope_emb is None or x.ndim != 3:
            raise Unsupported(
                f"patch: {SYSTEM}'s self-attention must get [B, S, C] and rope_emb, got {list(x.shape)} and "
                f"{'None' if rope_emb is None else 'rope_emb'}"
            )
        context = x if context is None else context
        table = tables.of(rope_emb, _rotate_half_table)
        q, k, v = attn.q_proj(x), attn.k_proj(context), attn.v_proj(context)
        options = {"head_dim": attn.head_dim, "per_head": True, "interleaved": False}
        q, k = norm_rope(SYSTEM, q, k, attn.q_norm, attn.k_norm, table, **options)
        return q, k, attn.v_norm(v.unflatten(-1, (attn.n_heads, attn.head_dim)))

    for attn in attentions:
        require_kernel(SYSTEM, attn.q_proj.weight.new_empty(attn.head_dim))
        if getattr(attn.q_norm, "zero_centered_gamma", False):
            raise Unsupported(f"patch: {SYSTEM}'s q_norm must have zero_centered_gamma=False, got True")
        patch.method(attn, "compute_qkv", compute_qkv)


def _rotate_half_table(angles: Tensor) -> Tensor:
    """Angles ``[S, 1, 1, D]``, the second half a copy of the first, to ``[S, D / 2, 2]``."""
    first, second = angles.flatten(1).double().chunk(2, -1)
    if not torch.equal(first, second):
        raise Unsupported(f"patch: {SYSTEM}'s rope_emb must repeat its first half, but its halves differ")
    return torch.stack((first.cos(), first.sin()), -1)
