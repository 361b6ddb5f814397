"""OpenWAM's transformer blocks on the fused ops. Parameters and modules stay the package's; only the forwards change.

A block is: adaLN, projections, q/k norm and rope, attention; gate + residual + norm; cross-attention; residual + adaLN;
feed-forward; gate + residual. ``DualExpertPackedBlock`` runs that for two streams with joint attention,
``SharedTransformerBlock`` for one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from open_wam.models.visual_tower.runtime_parameter_ops import (
    linear_with_materialized_params,
    materialize_runtime_parameter,
    rms_norm_with_materialized_weight,
)
from torch import Tensor, nn

from ... import FrameIndex, ada_layer_norm, gate_residual_ada_layer_norm, qk_norm_rope
from .._patching import Foreign, Unsupported
from .cache import Direct, TokenCache
from .modulation import frame_rows
from .visibility import Batch, TextBatch, Visibility, attend_all

Linear = Callable[[nn.Linear, Tensor], Tensor]


@dataclass
class Stream:
    """One expert's tokens on their way through one block."""

    block: Foreign
    x: Tensor  # [B, S, D]
    rows: Tensor  # [B, F, 6, D], float32: shift, scale, gate of attention, then of the feed-forward
    table: Tensor  # [6, D], float32
    index: FrameIndex
    rope: Tensor  # complex [B, S, 1, head_dim / 2]
    linear: Linear  # how the package calls the projections of this block
    norm: Callable[[nn.RMSNorm, Tensor], Tensor]
    text: Tensor  # [B, T, D]
    text_mask: Tensor | None = None  # bool [B, S, T] or [B, H, S, T]
    text_batch: TextBatch | None = None  # several samples in one sequence
    cache: TokenCache | Direct | None = None
    number: int = 0

    def modulation(self, first: int) -> dict[str, Any]:
        """shift and scale number ``first``, and their rows of the table."""
        shift, scale = self.rows[:, :, first], self.rows[:, :, first + 1]
        return {
            "shift": shift, "scale": scale,
            "shift_table": self.table[first], "scale_table": self.table[first + 1],
        }  # fmt: skip

    def gate(self, number: int) -> dict[str, Any]:
        return {"gate": self.rows[:, :, number], "gate_table": self.table[number]}

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key, value of self-attention, ``[B, S, H, D]``."""
        attn = self.block.attn1
        h = ada_layer_norm(self.x, index=self.index, eps=self.block.norm1.eps, **self.modulation(0))
        q, k, v = (self.linear(layer, h) for layer in (attn.to_q, attn.to_k, attn.to_v))
        head_dim = q.shape[-1] // attn.heads
        weight_q, weight_k = _weight(attn.norm_q, q), _weight(attn.norm_k, q)
        angles = torch.view_as_real(self.rope[:, :, 0]).contiguous()
        q, k = qk_norm_rope(q, k, weight_q, weight_k, angles, head_dim=head_dim, eps=attn.norm_q.eps)
        return q, k, v.unflatten(-1, (attn.heads, head_dim))

    def finish(self, attention: Tensor) -> Tensor:
        """The rest of the block behind attention ``[B, S, H, D]``; hidden states ``[B, S, D]``."""
        block = self.block
        y = self._out(block.attn1, attention)
        affine: dict[str, Any] = {}
        if isinstance(block.norm2, nn.LayerNorm):
            weight, bias = (p.float() for p in (_dense(block.norm2.weight, y), _dense(block.norm2.bias, y)))
            affine = {"weight": weight, "bias": bias, "eps": block.norm2.eps}
        x, h = gate_residual_ada_layer_norm(
            self.x, y.type_as(self.x), shift=None, scale=None, index=self.index, **self.gate(2), **affine
        )
        y = self._out(block.attn2, self._attend_text(x if h is None else h))
        x, h = gate_residual_ada_layer_norm(
            x, y.type_as(x), gate=None, index=self.index, eps=block.norm3.eps, **self.modulation(3)
        )
        y = block.ffn(h)
        x, _ = gate_residual_ada_layer_norm(x, y.type_as(x), shift=None, scale=None, index=self.index, **self.gate(5))
        return x if self.cache is None else self.cache.output(x)

    def _out(self, attn: Foreign, heads: Tensor) -> Tensor:
        return attn.to_out[1](self.linear(attn.to_out[0], heads.flatten(2)))

    def _attend_text(self, h: Tensor) -> Tensor:
        attn = self.block.attn2
        q = self.norm(attn.norm_q, self.linear(attn.to_q, h)).unflatten(-1, (attn.heads, -1))
        known = None if self.cache is None else self.cache.layer.text.get(self.number)
        if known is None:
            k = self.norm(attn.norm_k, self.linear(attn.to_k, self.text)).unflatten(-1, (attn.heads, -1))
            known = k, self.linear(attn.to_v, self.text).unflatten(-1, (attn.heads, -1))
            if self.cache is not None:  # one conditioning for all steps of a stage, so one set of text keys
                self.cache.layer.text[self.number] = known
        if self.text_batch is not None:
            return self.text_batch.attend(q, *known)
        mask = self.text_mask
        return attend_all(q, *known, mask[:, None] if mask is not None and mask.ndim == 3 else mask)


def _dense(parameter: Tensor, like: Tensor) -> Tensor:
    return materialize_runtime_parameter(parameter, device=like.device, dtype=parameter.dtype)


def _weight(norm: nn.RMSNorm, like: Tensor) -> Tensor:
    """An RMSNorm weight in a dtype that the op takes; under autocast it stays float32."""
    weight = _dense(norm.weight, like)
    return weight if weight.dtype == torch.float32 else weight.to(like.dtype)


def _call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def why_not(block: Foreign) -> str | None:
    """Why the fused ops cannot run a block, or None."""
    heads, inner = block.attn1.heads, block.attn1.inner_dim
    width, head_dim = block.scale_shift_table.shape[-1], inner // heads
    if width % 8 or width > 8192:
        return f"hidden size {width} (the fused ops take multiples of 8 up to 8192)"
    if head_dim % 8 or head_dim > 256 or inner > 8192:
        return f"{heads} heads of {head_dim} (attention takes head sizes that are multiples of 8 up to 256)"
    return None


def require_sizes(*blocks: Foreign) -> None:
    """The fused ops take these blocks.

    Raises:
        Unsupported: a hidden size or a head size that they do not take.
    """
    reason = next(filter(None, map(why_not, blocks)), None)
    if reason is not None:
        raise Unsupported(f"patch: OpenWAM has {reason}")


def _attend(visible: Visibility | Batch, streams: list[Stream]) -> list[Tensor]:
    """Joint attention of all streams; its output, split by stream."""
    qkv = zip(*(s.qkv() for s in streams), strict=True)
    q, k, v = (torch.cat(parts, 1) if len(streams) > 1 else parts[0] for parts in qkv)
    lengths = [s.x.shape[1] for s in streams]
    layer = None if streams[0].cache is None else streams[0].cache.layer
    if layer is None:
        out = visible.attend(q, k, v)
    else:
        layer.write(k, v)
        assert isinstance(visible, Visibility) and layer.key is not None and layer.value is not None
        out = visible.attend_cache(q, layer.key, layer.value)
    return list(out.split(lengths, 1))


# ---- dual expert ----


def packed_block_forward(
    self,
    video_hidden_states: Tensor | None,
    action_hidden_states: Tensor | None,
    *,
    visible: Visibility | Batch,
    video_timestep_proj: Tensor | None,
    video_rotary_emb: Tensor | None,
    action_temb: Tensor | None,
    action_rotary_emb: Tensor | None,
    video_text_hidden_states: Tensor | None,
    action_text_hidden_states: Tensor | None,
    video_cross_attention_mask: Tensor | None,
    action_cross_attention_mask: Tensor | None,
    video_cross_attention_block_mask: TextBatch | None,
    action_cross_attention_block_mask: TextBatch | None,
    token_cache: Sequence[TokenCache | Direct] | None,
) -> tuple[Tensor | None, Tensor | None]:
    """``DualExpertPackedBlock.forward`` for a ``block_mask`` of ours; the arguments are the package's."""
    # of a stream that has hidden states all that it needs is there
    inputs: tuple[tuple[Any, ...], ...] = (
        (self.video_block, video_hidden_states, video_timestep_proj, video_rotary_emb, video_text_hidden_states,
         video_cross_attention_mask, video_cross_attention_block_mask),
        (self.action_block, action_hidden_states, action_temb, action_rotary_emb, action_text_hidden_states,
         action_cross_attention_mask, action_cross_attention_block_mask),
    )  # fmt: skip
    streams = []
    for number, (block, x, temb, rope, text, mask, text_batch) in enumerate(inputs):
        if x is None:
            continue
        cache = None if token_cache is None else token_cache[number]
        if cache is not None:
            x, temb, rope = (cache.select(t) for t in (x, temb, rope))
            mask = cache.select(mask, dim=-2)
        rows, index = frame_rows(temb)
        table = _dense(block.scale_shift_table, x)[0].to(temb.dtype).float()
        streams.append(
            Stream(
                block, x, rows.float().expand(x.shape[0], -1, -1, -1), table, index, rope, _call, _call, text, mask,
                text_batch, cache, number,
            )
        )  # fmt: skip
    results: list[Tensor | None] = [None, None]
    for stream, attention in zip(streams, _attend(visible, streams), strict=True):
        results[stream.number] = stream.finish(attention)
    return results[0], results[1]


# ---- parallel stream ----


def shared_block_forward(
    self,
    hidden_states: Tensor,
    *,
    visible: Visibility,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Tensor,
    invariant_cache: TokenCache | None,
) -> Tensor:
    """``SharedTransformerBlock.forward`` for a profile of ours and no cache that outlives the call."""
    x, cache = hidden_states, invariant_cache
    if cache is not None:
        select: Callable[[Tensor], Any] = cache.select  # None of None alone
        x, temb, rotary_emb = (select(t) for t in (x, temb, rotary_emb))
    rows, index = frame_rows(temb)
    table = _dense(self.scale_shift_table, x)[0].float()
    text_tokens = encoder_hidden_states.shape[1]
    text_mask = None if visible.proprio is None else visible.text_mask(text_tokens, x.device)[None]
    stream = Stream(
        self, x, rows.float().expand(x.shape[0], -1, -1, -1), table, index, rotary_emb,
        linear_with_materialized_params, rms_norm_with_materialized_weight, encoder_hidden_states, text_mask,
        None if visible.proprio is not None else visible.text(text_tokens), cache,
    )  # fmt: skip
    (attention,) = _attend(visible, [stream])
    return stream.finish(attention)
