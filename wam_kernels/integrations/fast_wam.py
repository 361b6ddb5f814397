"""Fast-WAM: ``MoT``, the mixture of a video and an action expert with one attention over both.

Replaced: ``_mixed_attention`` (all of training, prefill and the cached action steps end there) and
``_build_expert_attention_io`` (norm + modulation in one launch, q/k norm and rope in another) and
``_apply_expert_post_block`` (gates, residual sums and the norms behind them). The modulation stays ``[B, S, 6, D]`` or
``[B, 6, D]`` in the model's dtype; the sum with a block's own table is never made. Masks come dense, as the model
builds them for ``fast_wam_uncond``, ``fast_wam_joint``, ``fast_wam_idm`` and their slices.

Forks with this class are served too: VPP 2 (``num_heads`` in the call, fixed video layers, a mask for each sample) and
LoongForge (rope as a pair of tables). The original checkpoints its attention because a dense mask keeps S x S scores;
here nothing of that size exists, so nothing is recomputed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import _glue
from ._kernels import Tables, attend_under_mask, norm_rope, of_heads, require_complex, require_kernel
from ._patching import Foreign, Patch, Unsupported, of_class, require_class, require_norms, require_parts

SYSTEM = "Fast-WAM"


def find(model: nn.Module) -> list[nn.Module]:
    """The ``MoT`` modules of a model; those of lerobot, made of layers, are ``lerobot.find``'s."""
    return [m for m in of_class(model, "MoT") if hasattr(m, "mixtures") and not of_class(m, "MoTLayer")]


def apply(patch: Patch, mots: list[Foreign]) -> None:
    tables = Tables()
    for mot in mots:
        require_class(SYSTEM, mot, "MoT")
        require_parts(SYSTEM, mot, ("num_heads", "_split_modulation"))
        missing = {"video", "action"} - set(mot.mixtures)
        if missing:
            raise Unsupported(
                f"patch: {SYSTEM}'s MoT must have a video and an action expert, but has no {missing.pop()}"
            )
        for expert in mot.mixtures.values():
            require_parts(SYSTEM, expert, ("num_heads",))
            for block in expert.blocks:
                attn = block.self_attn
                require_parts(SYSTEM, attn, ("q", "k", "v", "norm_q", "norm_k", "attn_head_dim"))
                require_kernel(SYSTEM, attn.q.weight.new_empty(attn.attn_head_dim))
                require_norms(SYSTEM, attn.norm_q, attn.norm_k, expert.num_heads * attn.attn_head_dim)
                if hasattr(block, "cross_attn"):
                    patch.leave_alone(block.cross_attn, "attends to all of a short text: nothing to skip")
        patch.method(mot, "_mixed_attention", _mixed_attention)
        fused = _glue.replace(patch, mot, "_apply_expert_post_block", _post_block, partial(_why_no_glue, mot))
        patch.method(mot, "_build_expert_attention_io", _build_io_of_rows if fused else _build_io, tables)


def _why_no_glue(mot: Foreign) -> str | None:
    if not callable(getattr(type(mot), "_apply_expert_post_block", None)):
        return "it has no _apply_expert_post_block"
    for expert in mot.mixtures.values():
        for block in expert.blocks:
            if not of_class(getattr(block, "gate", nn.Identity()), "GateModule"):
                return "its block's gate is no GateModule"
            reason = _glue.why_not_mixture(block)
            if reason is not None:
                return reason
    return None


def _mixed_attention(
    mot: Foreign, q_cat: Tensor, k_cat: Tensor, v_cat: Tensor, attention_mask: Tensor, *, num_heads: int | None = None
) -> Tensor:
    """attention of both experts under one mask."""
    heads = mot.num_heads if num_heads is None else num_heads  # VPP 2 gives those of the expert that attends
    q, k, v = of_heads(q_cat, heads), of_heads(k_cat, heads), of_heads(v_cat, heads)
    return attend_under_mask(SYSTEM, q, k, v, attention_mask).flatten(2)


def _build_io_of_rows(
    tables: Tables, mot: Foreign, expert: Foreign, block: Foreign, x: Tensor, freqs: Tensor | tuple[Tensor, Tensor],
    t_mod: Tensor,
) -> tuple:  # fmt: skip
    """norm + modulation, then q/k norm + rope; the gate and the feed-forward's modulation go on as rows and table."""
    table = _table(tables, freqs, x.device)
    shift, scale, gate, *mlp = _glue.rows_of_mixture(t_mod, block)
    _glue.require_rows(SYSTEM, x, shift)
    h = _glue.modulated(block.norm1, x, shift, scale, torch.promote_types(x.dtype, shift.dtype))
    return *_projected(block.self_attn, h, table), x, gate, *mlp, _is_checkpointed(expert)


def _post_block(
    block: Foreign, residual_x: Tensor, mixed_attn_out: Tensor, gate_msa: Any, shift_mlp: Any, scale_mlp: Any,
    gate_mlp: Any, context_payload: dict | None,
) -> Tensor:  # fmt: skip
    """gate + residual + norm, residual + norm + modulation, gate + residual."""
    y, rows = block.self_attn.o(mixed_attn_out), (gate_msa, shift_mlp, scale_mlp, gate_mlp)
    attend = lambda h, context, mask: block.cross_attn(h, context, ctx_mask=mask)  # noqa: E731
    return _glue.rest_of_mixture(SYSTEM, block, residual_x, y, rows, _glue.over_context(attend, context_payload))


def _build_io(
    tables: Tables, mot: Foreign, expert: Foreign, block: Foreign, x: Tensor, freqs: Tensor | tuple[Tensor, Tensor],
    t_mod: Tensor,
) -> tuple:  # fmt: skip
    """q/k norm + rope."""
    table = _table(tables, freqs, x.device)
    shift, scale, gate, *mlp = mot._split_modulation(block, t_mod)
    h = block.norm1(x) * (1 + scale) + shift
    return *_projected(block.self_attn, h, table), x, gate, *mlp, _is_checkpointed(expert)


def _projected(attn: Foreign, h: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k = norm_rope(SYSTEM, attn.q(h), attn.k(h), attn.norm_q, attn.norm_k, table, head_dim=attn.attn_head_dim)
    return q.flatten(2), k.flatten(2), attn.v(h)


def _is_checkpointed(expert: Foreign) -> bool:
    return bool(getattr(expert, "use_gradient_checkpointing", False))


def _table(tables: Tables, freqs: Tensor | tuple[Tensor, Tensor], device: torch.device) -> Tensor:
    """``[S, D / 2, 2]`` of complex ``[S, 1, D / 2]``, or of LoongForge's cosines and sines ``[S, D / 2]``."""
    if isinstance(freqs, tuple):
        return torch.stack(freqs, -1).float()
    require_complex(SYSTEM, freqs)
    return tables.of(freqs, lambda freqs: _angles(freqs, device), (device,))


def _angles(freqs: Tensor, device: torch.device) -> Tensor:
    table = torch.view_as_real(freqs[:, 0])
    return table if table.device == device else table.to(device)  # VPP 2's are on the CPU
