"""Cosmos Policy: blocks over latent frames, modulated by AdaLN with LoRA, in front of self-attention (per-head RMSNorm,
rotate-half rope), of cross-attention and of the feed-forward. Rope and timestep embedding come anew in every call.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper


def dense_attention(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def apply_rotary_pos_emb(t, freqs):
    """t ``[B, S, H, D]``, freqs ``[S, 1, 1, D]``: angles, the second half a copy of the first."""
    angle = freqs.transpose(0, 1)
    first, second = t.chunk(2, -1)
    turned = t * angle.cos() + torch.cat((-second, first), -1) * angle.sin()
    return turned.to(t.dtype)


class Attention(nn.Module):
    def __init__(self, query_dim, context_dim=None, n_heads=2, head_dim=16, use_wan_fp32_strategy=False):
        super().__init__()
        self.is_selfattn = context_dim is None
        self.n_heads, self.head_dim, self.qkv_format = n_heads, head_dim, "bshd"
        self.use_wan_fp32_strategy = use_wan_fp32_strategy
        inner, context_dim = n_heads * head_dim, context_dim or query_dim
        self.q_proj = nn.Linear(query_dim, inner, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(context_dim, inner, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = (nn.RMSNorm(head_dim, eps=1e-6) for _ in range(2))
        self.v_norm = nn.Identity()
        self.output_proj = nn.Linear(inner, query_dim, bias=False)
        self.attn_op = dense_attention
        for norm in (self.q_norm, self.k_norm):
            nn.init.normal_(norm.weight, 1, 0.1)

    def compute_qkv(self, x, context=None, rope_emb=None):
        context = x if context is None else context
        parts = (self.q_proj(x), self.k_proj(context), self.v_proj(context))
        q, k, v = (t.unflatten(-1, (self.n_heads, self.head_dim)) for t in parts)
        q, k, v = self.q_norm(q), self.k_norm(k), self.v_norm(v)
        if self.is_selfattn and rope_emb is not None:
            dtype = torch.float32 if self.use_wan_fp32_strategy else q.dtype
            q, k = (apply_rotary_pos_emb(t.to(dtype), rope_emb).to(v.dtype) for t in (q, k))
        return q, k, v

    def forward(self, x, context=None, rope_emb=None, video_size=None, kv_cache_cfg=None):
        q, k, v = self.compute_qkv(x, context, rope_emb=rope_emb)
        return self.output_proj(self.attn_op(q, k, v))


class I2VCrossAttention(Attention):
    """Its context is a pair: of text and of an image."""

    def __init__(self, query_dim, context_dim, image_dim, **heads):
        super().__init__(query_dim, context_dim, **heads)
        inner = self.n_heads * self.head_dim
        self.k_img, self.v_img = (nn.Linear(image_dim, inner, bias=False) for _ in range(2))
        self.k_img_norm = nn.RMSNorm(self.head_dim, eps=1e-6)

    def compute_qkv(self, x, context, rope_emb=None):
        text, image = context
        k_img, v_img = (p(image).unflatten(-1, (self.n_heads, self.head_dim)) for p in (self.k_img, self.v_img))
        return *super().compute_qkv(x, text, rope_emb), self.k_img_norm(k_img), v_img

    def forward(self, x, context=None, rope_emb=None):
        q, k, v, k_img, v_img = self.compute_qkv(x, context, rope_emb)
        return self.output_proj(self.attn_op(q, k, v) + self.attn_op(q, k_img, v_img))


class FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.layer1, self.layer2 = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x):
        return self.layer2(F.gelu(self.layer1(x)))


def modulated(x, norm, scale, shift):
    return norm(x) * (1 + scale) + shift


def adaln(dim, parts, lora_dim):
    """Rows of ``parts`` from an embedding; the released weights begin at 0, where nothing could be told apart."""
    inner = [] if lora_dim is None else [nn.Linear(dim, lora_dim, bias=False)]
    out = nn.Linear(dim if lora_dim is None else lora_dim, parts * dim, bias=False)
    return nn.Sequential(nn.SiLU(), *inner, out)


class Block(nn.Module):
    PARTS = ("self_attn", "cross_attn", "mlp")

    def __init__(self, dim, context_dim, n_heads, lora_dim, image_dim=None, use_wan_fp32_strategy=False):
        super().__init__()
        heads = {"n_heads": n_heads, "head_dim": dim // n_heads}
        self.self_attn = Attention(dim, use_wan_fp32_strategy=use_wan_fp32_strategy, **heads)
        if image_dim is None:
            self.cross_attn = Attention(dim, context_dim, **heads)
        else:
            self.cross_attn = I2VCrossAttention(dim, context_dim, image_dim, **heads)
        self.mlp = FeedForward(dim)
        self.use_adaln_lora, self.use_wan_fp32_strategy = lora_dim is not None, use_wan_fp32_strategy
        self.cp_size = None
        for part in self.PARTS:
            setattr(self, f"layer_norm_{part}", nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6))
            setattr(self, f"adaln_modulation_{part}", adaln(dim, 3, lora_dim))

    def _rows(self, part, emb, lora, dtype):
        """shift, scale, gate ``[B, T, 1, 1, D]``."""
        with torch.autocast("cuda", enabled=self.use_wan_fp32_strategy, dtype=torch.float32):
            rows = getattr(self, f"adaln_modulation_{part}")(emb)
            rows = rows + lora if self.use_adaln_lora else rows
        return [row[:, :, None, None].to(dtype) for row in rows.chunk(3, -1)]

    def forward(
        self, x_B_T_H_W_D, emb_B_T_D, crossattn_emb, rope_emb_L_1_1_D=None, adaln_lora_B_T_3D=None,
        extra_per_block_pos_emb=None, kv_cache_cfg=None,
    ):  # fmt: skip
        x, text, rope = x_B_T_H_W_D, crossattn_emb, {"rope_emb": rope_emb_L_1_1_D}
        if extra_per_block_pos_emb is not None:
            x = x + extra_per_block_pos_emb
        shape, rows = x.shape, [self._rows(p, emb_B_T_D, adaln_lora_B_T_3D, x.dtype) for p in self.PARTS]
        (shift, scale, gate), (c_shift, c_scale, c_gate), (m_shift, m_scale, m_gate) = rows
        size = (shape[1] * (self.cp_size or 1), *shape[2:4])
        h = modulated(x, self.layer_norm_self_attn, scale, shift).flatten(1, 3)
        x = x + gate * self.self_attn(h, None, **rope, video_size=size, kv_cache_cfg=kv_cache_cfg).view(shape)
        h = modulated(x, self.layer_norm_cross_attn, c_scale, c_shift).flatten(1, 3)
        x = self.cross_attn(h, text, **rope).view(shape) * c_gate + x
        return x + m_gate * self.mlp(modulated(x, self.layer_norm_mlp, m_scale, m_shift))


class FinalLayer(nn.Module):
    def __init__(self, dim, lora_dim):
        super().__init__()
        self.layer_norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.adaln_modulation, self.linear = adaln(dim, 2, lora_dim), nn.Linear(dim, dim, bias=False)

    def forward(self, x, emb, lora):
        rows = self.adaln_modulation(emb)
        rows = rows if lora is None else rows + lora[..., : rows.shape[-1]]
        shift, scale = (row[:, :, None, None] for row in rows.chunk(2, -1))
        return self.linear(modulated(x, self.layer_norm, scale, shift))


class MiniTrainDIT(nn.Module):
    def __init__(
        self, dim=32, context_dim=10, layers=2, n_heads=2, lora_dim=8, image_dim=None, extra_pos=False,
        use_wan_fp32_strategy=False, checkpointed=False,
    ):  # fmt: skip
        super().__init__()
        self.head_dim, self.extra_pos = dim // n_heads, extra_pos
        self.t_embedder = nn.Sequential(nn.Linear(1, dim), nn.SiLU())
        self.t_lora = None if lora_dim is None else nn.Linear(dim, 3 * dim, bias=False)
        self.t_embedding_norm = nn.RMSNorm(dim, eps=1e-6)
        options = {"image_dim": image_dim, "use_wan_fp32_strategy": use_wan_fp32_strategy}
        blocks = [Block(dim, context_dim, n_heads, lora_dim, **options) for _ in range(layers)]
        self.blocks = nn.ModuleList([checkpoint_wrapper(block) for block in blocks] if checkpointed else blocks)
        self.final_layer = FinalLayer(dim, lora_dim)

    def pos_embedder(self, x):
        """Angles ``[S, 1, 1, D]`` of a latent video, made anew in every forward."""
        position = torch.arange(x[0, ..., 0].numel(), device=x.device)
        half = torch.outer(position, 20.0 ** (-torch.arange(self.head_dim // 2, device=x.device) / 8))
        return torch.cat((half, half), -1)[:, None, None]

    def forward(self, x, timesteps, text, image=None):
        """x ``[B, T, H, W, D]``; timesteps ``[B]`` or ``[B, T]``."""
        timesteps = timesteps[:, None] if timesteps.ndim == 1 else timesteps
        emb = self.t_embedder(timesteps[..., None])
        lora = None if self.t_lora is None else self.t_lora(emb)
        emb = self.t_embedding_norm(emb)
        extra = torch.linspace(-1, 1, x[0].numel(), device=x.device, dtype=x.dtype).view(x[0].shape)
        for block in self.blocks:
            x = block(
                x, emb, text if image is None else (text, image), rope_emb_L_1_1_D=self.pos_embedder(x),
                adaln_lora_B_T_3D=lora, extra_per_block_pos_emb=extra.expand(x.shape) if self.extra_pos else None,
            )  # fmt: skip
        return self.final_layer(x, emb, lora)
