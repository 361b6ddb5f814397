"""Cosmos Policy: ``Block`` and ``Attention`` of its diffusion transformer.

Its attention is dense (``cosmos_policy``): there is nothing to skip, and the model's own flash attention stays.
Replaced are ``compute_qkv`` of every self-attention, where both norms and both rotations, with their casts, become one
launch, and ``forward`` of every block, where each of the three norms and its modulation are one launch with the gate
and the residual sum before it. The modulation (AdaLN with or without LoRA) stays ``[B, T, D]``, a row for each latent
frame; the original spreads it over the frame's tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _glue
from ._kernels import Tables, norm_rope, require_kernel
from ._patching import Foreign, Patch, Unsupported, of_class, require_class, require_norms, require_parts

SYSTEM = "Cosmos Policy"
_PARTS = ("is_selfattn", "q_proj", "k_proj", "v_proj", "output_proj", "q_norm", "k_norm", "compute_qkv", "attn_op")
_OF_BLOCK = (
    "layer_norm_self_attn", "layer_norm_cross_attn", "layer_norm_mlp", "cross_attn", "mlp", "use_adaln_lora", "cp_size",
    "adaln_modulation_self_attn", "adaln_modulation_cross_attn", "adaln_modulation_mlp", "use_wan_fp32_strategy",
)  # fmt: skip


def find(model: nn.Module) -> list[nn.Module]:
    """The self-attentions of a model; diffusers has an ``Attention`` too, with other parts."""
    return [m for m in of_class(model, "Attention") if all(hasattr(m, part) for part in _PARTS) and m.is_selfattn]


def apply(patch: Patch, attentions: list[Foreign]) -> None:
    tables = _RotateHalf()
    for attn in attentions:
        require_class(SYSTEM, attn, "Attention")
        require_parts(SYSTEM, attn, ("head_dim", "n_heads", "v_norm"))
        require_kernel(SYSTEM, attn.q_proj.weight.new_empty(attn.head_dim))
        require_norms(SYSTEM, attn.q_norm, attn.k_norm, attn.head_dim)
        layout = getattr(attn, "qkv_format", "bshd")
        if layout != "bshd":
            raise Unsupported(f"patch: {SYSTEM}'s attention must have qkv_format='bshd', got {layout!r}")
        patch.method(attn, "compute_qkv", _compute_qkv, tables)
        if isinstance(attn.attn_op, nn.Module):
            patch.leave_alone(attn.attn_op, "attends to the whole sequence: nothing to skip")
    known = {id(attn) for attn in attentions}
    for block in of_class(patch.model, "Block") if patch.model is not None else ():
        if id(getattr(block, "self_attn", None)) in known:
            _glue.replace(patch, block, "forward", _block_forward, partial(_why_no_glue, block))


def _why_no_glue(block: Foreign) -> str | None:
    require_class(SYSTEM, block, "Block")
    require_parts(SYSTEM, block, _OF_BLOCK)
    norms = block.layer_norm_self_attn, block.layer_norm_cross_attn, block.layer_norm_mlp
    return _glue.why_not(block.self_attn.q_proj.in_features, norms)


class VideoSize(NamedTuple):
    """Of all ranks, for attentions that want it."""

    T: int
    H: int
    W: int


def _block_forward(
    block: Foreign, x_B_T_H_W_D: Tensor, emb_B_T_D: Tensor, crossattn_emb: Any, rope_emb_L_1_1_D: Tensor | None = None,
    adaln_lora_B_T_3D: Tensor | None = None, extra_per_block_pos_emb: Tensor | None = None, kv_cache_cfg: Any = None,
) -> Tensor:  # fmt: skip
    """norm + modulation, gate + residual + norm + modulation twice, gate + residual."""
    x = x_B_T_H_W_D
    if x.ndim != 5 or emb_B_T_D.ndim != 3 or emb_B_T_D.shape[1] not in (1, x.shape[1]):
        raise Unsupported(
            f"patch: {SYSTEM}'s block must get tokens [B, T, H, W, D] and an embedding [B, T, D], got {list(x.shape)} "
            f"and {list(emb_B_T_D.shape)}"
        )
    if extra_per_block_pos_emb is not None:
        x = x + extra_per_block_pos_emb
    T, H, W = x.shape[1:4]
    size, x = VideoSize(T * (block.cp_size or 1), H, W), x.flatten(1, 3)
    # as the original: the modulation has an autocast of its own, and is rounded to the dtype of the tokens
    with torch.autocast("cuda", enabled=block.use_wan_fp32_strategy, dtype=torch.float32):
        modulation = [
            adaln(emb_B_T_D) + adaln_lora_B_T_3D if block.use_adaln_lora else adaln(emb_B_T_D)
            for adaln in (
                block.adaln_modulation_self_attn, block.adaln_modulation_cross_attn, block.adaln_modulation_mlp
            )
        ]  # fmt: skip
    (shift, scale, gate), (c_shift, c_scale, c_gate), (m_shift, m_scale, m_gate) = (
        _glue.split_rows(m.type_as(x).unflatten(-1, (3, -1)), None, x.dtype) for m in modulation
    )
    _glue.require_rows(SYSTEM, x, shift)
    h = _glue.modulated(block.layer_norm_self_attn, x, shift, scale)
    y = block.self_attn(h, None, rope_emb=rope_emb_L_1_1_D, video_size=size, kv_cache_cfg=kv_cache_cfg)
    dtype = _glue.promoted(x, y)
    x, h = _glue.added_and_modulated(x, y, gate, block.layer_norm_cross_attn, c_shift, c_scale, dtype)
    y = block.cross_attn(h, crossattn_emb, rope_emb=rope_emb_L_1_1_D)
    dtype = _glue.promoted(x, y)
    x, h = _glue.added_and_modulated(x, y, c_gate, block.layer_norm_mlp, m_shift, m_scale, dtype)
    y = block.mlp(h.unflatten(1, (T, H, W))).flatten(1, 3)
    return _glue.added(x, y, m_gate, _glue.promoted(x, y)).unflatten(1, (T, H, W))


def _compute_qkv(
    tables: _RotateHalf, attn: Foreign, x: Tensor, context: Tensor | None = None, rope_emb: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q/k norm + rope."""
    if rope_emb is None or x.ndim != 3:
        raise Unsupported(
            f"patch: {SYSTEM}'s self-attention must get [B, S, C] and rope_emb, got {list(x.shape)} and "
            f"{'None' if rope_emb is None else 'rope_emb'}"
        )
    context = x if context is None else context
    table = tables.of(rope_emb, tables.table)
    q, k, v = attn.q_proj(x), attn.k_proj(context), attn.v_proj(context)
    options = {"head_dim": attn.head_dim, "per_head": True, "interleaved": False}
    q, k = norm_rope(SYSTEM, q, k, attn.q_norm, attn.k_norm, table, **options)
    return q, k, attn.v_norm(v.unflatten(-1, (attn.n_heads, attn.head_dim)))


class _RotateHalf(Tables):
    """Tables of rotate-half angles. The model builds its angles anew in every forward, always by the same code.

    So whether the second half of the channels repeats the first is looked at once for each shape on a device, where
    looking stops it; on the CPU it costs nothing and is looked at always. A compiled graph asserts it on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._checked: set[tuple] = set()

    def table(self, angles: Tensor) -> Tensor:
        """Angles ``[S, 1, 1, D]`` to ``[S, D / 2, 2]``."""
        first, second = angles.flatten(1).double().chunk(2, -1)
        if torch.compiler.is_compiling():
            torch._assert_async((first == second).all(), f"patch: {SYSTEM}'s rope_emb must repeat its first half")
            return torch.stack((first.cos(), first.sin()), -1)
        shape = angles.shape, angles.device
        if shape not in self._checked:
            if not torch.equal(first, second):
                raise Unsupported(f"patch: {SYSTEM}'s rope_emb must repeat its first half, but its halves differ")
            if waits_for_device(angles):
                self._checked.add(shape)
        return torch.stack((first.cos(), first.sin()), -1)


def waits_for_device(tensor: Tensor) -> bool:
    """Reading a value of it makes the host wait."""
    return tensor.device.type != "cpu"
