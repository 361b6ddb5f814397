"""Cosmos Policy: ``Attention`` with per-head RMSNorm and rotate-half rope, in a block over latent frames."""

import torch
import torch.nn.functional as F
from torch import nn


def dense_attention(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def apply_rotary_pos_emb(t, freqs):
    """t ``[B, S, H, D]``, freqs ``[S, 1, 1, D]``: angles, the second half a copy of the first."""
    angle = freqs.transpose(0, 1)
    first, second = t.chunk(2, -1)
    return t * angle.cos() + torch.cat((-second, first), -1) * angle.sin()


class Attention(nn.Module):
    def __init__(self, query_dim, context_dim=None, n_heads=2, head_dim=16):
        super().__init__()
        self.is_selfattn = context_dim is None
        self.n_heads, self.head_dim = n_heads, head_dim
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
            q, k = apply_rotary_pos_emb(q, rope_emb), apply_rotary_pos_emb(k, rope_emb)
        return q, k, v

    def forward(self, x, context=None, rope_emb=None):
        return self.output_proj(self.attn_op(*self.compute_qkv(x, context, rope_emb)))


class Block(nn.Module):
    def __init__(self, dim, context_dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.self_attn, self.cross_attn = Attention(dim), Attention(dim, context_dim)

    def forward(self, x, text, rope_emb):
        """x ``[B, T, H, W, D]``."""
        flat = x.flatten(1, 3)
        flat = flat + self.self_attn(self.norm(flat), None, rope_emb=rope_emb)
        return (flat + self.cross_attn(self.norm(flat), text, rope_emb=rope_emb)).view(x.shape)


class MiniTrainDIT(nn.Module):
    def __init__(self, dim=24, context_dim=10, layers=2, head_dim=16):
        super().__init__()
        self.head_dim = head_dim
        self.blocks = nn.ModuleList([Block(dim, context_dim) for _ in range(layers)])

    def pos_embedder(self, x):
        """Angles ``[S, 1, 1, D]`` of a latent video, made anew in every forward."""
        position = torch.arange(x[0, ..., 0].numel(), device=x.device)
        half = torch.outer(position, 20.0 ** (-torch.arange(self.head_dim // 2, device=x.device) / 8))
        return torch.cat((half, half), -1)[:, None, None]

    def forward(self, x, text):
        rope_emb = self.pos_embedder(x)
        for block in self.blocks:
            x = block(x, text, rope_emb)
        return x
