"""lerobot's port of Fast-WAM: a ``MoT`` whose layers (``MoTLayer``) own the blocks of both experts.

Its LingBot-VA, pi-0 and pi-0.5 have the classes of LingBot-VA and openpi and are found as those.

Replaced, in every layer: ``_mixed_attention`` (training, prefill and the cached action steps end there),
``_build_expert_attention_io`` (norm + modulation in one launch, q/k norm and rope in another) and
``_apply_expert_post_block`` (gates, residual sums and the norms behind them), as in Fast-WAM. The video expert gives
its rope as the sizes of the token grid and the frequencies of one axis, and the original reads the sizes on the host
twice a layer; here its table is computed where they are, once for a step. Attention is float32 where the model's
``fp32_attention``, its default, says so, outside autocast.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import _glue
from ._kernels import Tables, attend_under_mask, norm_rope, of_heads, require_complex, require_kernel
from ._patching import Foreign, Patch, Unsupported, of_class, require_class, require_norms, require_parts

SYSTEM = "lerobot Fast-WAM"


def find(model: nn.Module) -> list[nn.Module]:
    """The ``MoT`` modules of a model that are made of layers."""
    return [m for m in of_class(model, "MoT") if of_class(m, "MoTLayer")]


def apply(patch: Patch, mots: list[Foreign]) -> None:
    tables = Tables()
    layers: list[Foreign] = [layer for mot in mots for layer in of_class(mot, "MoTLayer")]
    for layer in layers:
        _require_layer(layer)
        for block in layer.blocks.values():
            patch.leave_alone(block.cross_attn, "attends to all of a short text: nothing to skip")
        patch.method(layer, "_mixed_attention", _mixed_attention)
        fused = _glue.replace(patch, layer, "_apply_expert_post_block", _post_block, partial(_why_no_glue, layer))
        patch.method(layer, "_build_expert_attention_io", _build_io_of_rows if fused else _build_io, tables)


def _why_no_glue(layer: Foreign) -> str | None:
    if not callable(getattr(type(layer), "_apply_expert_post_block", None)):
        return "it has no _apply_expert_post_block"
    for block in layer.blocks.values():
        require_parts(SYSTEM, block, ("project_self_attention_output", "apply_cross_attention", "ffn"))
        reason = _glue.why_not_mixture(block)
        if reason is not None:
            return reason
    return None


def _require_layer(layer: Foreign) -> None:
    require_class(SYSTEM, layer, "MoTLayer")
    require_parts(SYSTEM, layer, ("num_heads", "attn_head_dim", "fp32_attention", "_experts", "_split_modulation"))
    missing = {"video", "action"} - set(layer.blocks)
    if missing:
        raise Unsupported(
            f"patch: {SYSTEM}'s MoTLayer must have a video and an action block, but has no {min(missing)}"
        )
    for block in layer.blocks.values():
        require_class(SYSTEM, block, "FastWAMAttentionBlock")
        require_parts(SYSTEM, block, ("apply_norm1", "cross_attn"))
        attn = block.self_attn
        require_parts(SYSTEM, attn, ("q", "k", "v", "norm_q", "norm_k"))
        require_kernel(SYSTEM, attn.q.weight.new_empty(layer.attn_head_dim))
        require_norms(SYSTEM, attn.norm_q, attn.norm_k, layer.num_heads * layer.attn_head_dim)


def _mixed_attention(layer: Foreign, q_cat: Tensor, k_cat: Tensor, v_cat: Tensor, attention_mask: Tensor) -> Tensor:
    """attention of both experts under one mask."""
    full = layer.fp32_attention and not torch.is_autocast_enabled(q_cat.device.type)
    dtype = torch.float32 if full else v_cat.dtype
    heads = layer.num_heads
    q, k, v = of_heads(q_cat.to(dtype), heads), of_heads(k_cat.to(dtype), heads), of_heads(v_cat.to(dtype), heads)
    return attend_under_mask(SYSTEM, q, k, v, attention_mask).flatten(2)


def _build_io_of_rows(
    tables: Tables, layer: Foreign, name: str, x: Tensor, freqs: Tensor | dict[str, Tensor], t_mod: Tensor
) -> tuple:
    """norm + modulation, then q/k norm + rope; the gate and the feed-forward's modulation go on as rows and table."""
    block, table = layer.blocks[name], _table(tables, freqs, x.shape[1])
    shift, scale, gate, *mlp = _glue.rows_of_mixture(t_mod, block)
    _glue.require_rows(SYSTEM, x, shift)
    h = _glue.modulated(block.norm1, x, shift, scale, torch.promote_types(x.dtype, shift.dtype))
    return *_projected(layer, block, h, table), x, gate, *mlp, _is_checkpointed(layer, name)


def _post_block(
    block: Foreign, residual_x: Tensor, mixed_attn_out: Tensor, gate_msa: Any, shift_mlp: Any, scale_mlp: Any,
    gate_mlp: Any, context_payload: dict | None,
) -> Tensor:  # fmt: skip
    """gate + residual + norm, residual + norm + modulation, gate + residual."""
    y, rows = block.project_self_attention_output(mixed_attn_out), (gate_msa, shift_mlp, scale_mlp, gate_mlp)
    attend = lambda h, context, mask: block.apply_cross_attention(h, context, context_mask=mask)  # noqa: E731
    return _glue.rest_of_mixture(SYSTEM, block, residual_x, y, rows, _glue.over_context(attend, context_payload))


def _build_io(
    tables: Tables, layer: Foreign, name: str, x: Tensor, freqs: Tensor | dict[str, Tensor], t_mod: Tensor
) -> tuple:
    """q/k norm + rope."""
    block, table = layer.blocks[name], _table(tables, freqs, x.shape[1])
    shift, scale, gate, *mlp = layer._split_modulation(block, t_mod)
    h = block.apply_norm1(x) * (1 + scale) + shift
    return *_projected(layer, block, h, table), x, gate, *mlp, _is_checkpointed(layer, name)


def _projected(layer: Foreign, block: Foreign, h: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attn = block.self_attn
    q, k = norm_rope(SYSTEM, attn.q(h), attn.k(h), attn.norm_q, attn.norm_k, table, head_dim=layer.attn_head_dim)
    return q.flatten(2), k.flatten(2), attn.v(h)


def _is_checkpointed(layer: Foreign, name: str) -> bool:
    return bool(getattr(layer._experts[name], "use_gradient_checkpointing", False))


def _table(tables: Tables, freqs: Tensor | dict[str, Tensor], tokens: int) -> Tensor:
    """``[S, D / 2, 2]`` of the frequencies of every token, or ``[B, S, D / 2, 2]`` of a grid and those of an axis."""
    if not isinstance(freqs, dict):
        require_complex(SYSTEM, freqs)
        return tables.of(freqs, lambda freqs: torch.view_as_real(freqs[:, 0]))
    require_complex(SYSTEM, freqs["freqs"])
    return tables.of(freqs["grid_sizes"], lambda sizes: grid_table(sizes, freqs["freqs"], tokens), (tokens,))


def grid_table(sizes: Tensor, freqs: Tensor, tokens: int) -> Tensor:
    """Cosines and sines ``[B, S, D / 2, 2]`` at each token of grids of frames, rows and columns.

    Args:
        sizes: int ``[B, 3]``; stays on its device.
        freqs: complex ``[positions, D / 2]``: the first channels are for frames, a third each for rows and columns.
        tokens: S; those beyond the grid are not rotated.
    """
    half = freqs.shape[1]
    third, channel = half // 3, torch.arange(half, device=sizes.device)
    axis = (channel >= half - 2 * third).long() + (channel >= half - third)
    at = torch.arange(tokens, device=sizes.device)[:, None]
    # tokens of one row, of one frame, of the grid
    counts = sizes.flip(1).cumprod(1)[:, None]
    strides = torch.cat([counts[..., :2].flip(2), torch.ones_like(counts[..., :1])], 2)
    places = at // strides % sizes[:, None]
    angles = freqs[places[..., axis], channel]
    inside = at < counts[..., 2:]
    return torch.view_as_real(torch.where(inside, angles, torch.ones_like(angles)))
