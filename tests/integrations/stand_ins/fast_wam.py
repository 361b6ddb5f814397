"""Fast-WAM: experts with ``blocks``, and ``MoT`` that mixes them; attention is a module-level function with a mask."""

import torch
import torch.nn.functional as F
from torch import nn


def flash_attention(q, k, v, num_heads, ctx_mask=None):
    """``[B, S, heads * D]`` in and out, dense boolean mask."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=ctx_mask).transpose(1, 2).flatten(2)


def rope_apply(x, freqs, num_heads):
    pairs = torch.view_as_complex(x.unflatten(-1, (num_heads, -1)).double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs).flatten(2).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(1 + 0.1 * torch.randn(dim))

    def forward(self, x):
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class SelfAttention(nn.Module):
    def __init__(self, hidden_dim, attn_head_dim, num_heads):
        super().__init__()
        inner = attn_head_dim * num_heads
        self.num_heads, self.attn_head_dim = num_heads, attn_head_dim
        self.q, self.k, self.v = (nn.Linear(hidden_dim, inner) for _ in range(3))
        self.o = nn.Linear(inner, hidden_dim)
        self.norm_q, self.norm_k = RMSNorm(inner), RMSNorm(inner)


class CrossAttention(SelfAttention):
    def forward(self, x, ctx, ctx_mask=None):
        q, k = self.norm_q(self.q(x)), self.norm_k(self.k(ctx))
        return self.o(flash_attention(q, k, self.v(ctx), self.num_heads, ctx_mask))


class GateModule(nn.Module):
    def forward(self, x, gate, residual):
        return x + gate * residual


class DiTBlock(nn.Module):
    def __init__(self, hidden_dim, attn_head_dim, num_heads, ffn_dim):
        super().__init__()
        self.num_heads = num_heads
        self.self_attn = SelfAttention(hidden_dim, attn_head_dim, num_heads)
        self.cross_attn = CrossAttention(hidden_dim, attn_head_dim, num_heads)
        self.norm1 = nn.LayerNorm(hidden_dim, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(hidden_dim, eps=1e-6, elementwise_affine=False)
        self.norm3 = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(hidden_dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, hidden_dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, hidden_dim) / hidden_dim**0.5)
        self.gate = GateModule()


class Expert(nn.Module):
    def __init__(self, hidden_dim, ffn_dim, num_layers, attn_head_dim, num_heads):
        super().__init__()
        self.num_heads, self.attn_head_dim = num_heads, attn_head_dim
        self.blocks = nn.ModuleList(
            [DiTBlock(hidden_dim, attn_head_dim, num_heads, ffn_dim) for _ in range(num_layers)]
        )

    def forward(self, x, freqs, t_mod, context, mask):
        """The expert alone, as the first stage of idm has it; its own attention, not the mixture's."""
        for block in self.blocks:
            attn = block.self_attn
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = MoT._split_modulation(block, t_mod)
            h = block.norm1(x) * (1 + scale) + shift
            q, k = (rope_apply(t, freqs, self.num_heads) for t in (attn.norm_q(attn.q(h)), attn.norm_k(attn.k(h))))
            x = block.gate(x, gate, attn.o(flash_attention(q, k, attn.v(h), self.num_heads, mask)))
            x = x + block.cross_attn(block.norm3(x), context["context"], context["mask"][:, None])
            x = block.gate(x, gate_mlp, block.ffn(block.norm2(x) * (1 + scale_mlp) + shift_mlp))
        return x


class MoT(nn.Module):
    def __init__(self, mixtures, mot_checkpoint_mixed_attn=True):
        super().__init__()
        self.mixtures = nn.ModuleDict(mixtures)
        self.expert_order = list(mixtures)
        first = self.mixtures[self.expert_order[0]]
        self.num_layers, self.num_heads, self.attn_head_dim = len(first.blocks), first.num_heads, first.attn_head_dim
        self.mot_checkpoint_mixed_attn = mot_checkpoint_mixed_attn

    @staticmethod
    def _split_modulation(block, t_mod):
        per_token = t_mod.ndim == 4
        parts = (block.modulation + t_mod).chunk(6, dim=2 if per_token else 1)
        return tuple(p.squeeze(2) for p in parts) if per_token else parts

    def _mixed_attention(self, q_cat, k_cat, v_cat, attention_mask):
        def attend(q, k, v):
            return flash_attention(q, k, v, self.num_heads, attention_mask)

        if self.mot_checkpoint_mixed_attn and self.training:
            return torch.utils.checkpoint.checkpoint(attend, q_cat, k_cat, v_cat, use_reentrant=False)
        return attend(q_cat, k_cat, v_cat)

    def _build_expert_attention_io(self, expert, block, x, freqs, t_mod):
        shift, scale, gate, *mlp = self._split_modulation(block, t_mod)
        h = block.norm1(x) * (1 + scale) + shift
        q = rope_apply(block.self_attn.norm_q(block.self_attn.q(h)), freqs, block.num_heads)
        k = rope_apply(block.self_attn.norm_k(block.self_attn.k(h)), freqs, block.num_heads)
        checkpointed = getattr(expert, "use_gradient_checkpointing", False)
        return q, k, block.self_attn.v(h), x, gate, *mlp, checkpointed

    @staticmethod
    def _apply_expert_post_block(
        block, residual_x, mixed_attn_out, gate_msa, shift_mlp, scale_mlp, gate_mlp, context_payload
    ):
        x = block.gate(residual_x, gate_msa, block.self_attn.o(mixed_attn_out))
        if context_payload is not None:
            mask = context_payload["mask"]
            mask = mask.unsqueeze(1) if mask is not None and mask.dim() == 3 else mask
            x = x + block.cross_attn(block.norm3(x), context_payload["context"], ctx_mask=mask)
        return block.gate(x, gate_mlp, block.ffn(block.norm2(x) * (1 + scale_mlp) + shift_mlp))

    def _post(self, block, mixed, io, payload):
        names = ("residual_x", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")

        def post(mixed, *parts):
            named = dict(zip(names, parts, strict=True))
            return self._apply_expert_post_block(block=block, mixed_attn_out=mixed, context_payload=payload, **named)

        if io[8] and self.training:
            return torch.utils.checkpoint.checkpoint(post, mixed, *io[3:8], use_reentrant=False)
        return post(mixed, *io[3:8])

    def prefill_video_cache(self, video_tokens, video_freqs, video_t_mod, video_context_payload, video_attention_mask):
        expert, x, cache = self.mixtures["video"], video_tokens, []
        for block in expert.blocks:
            io = self._build_expert_attention_io(expert=expert, block=block, x=x, freqs=video_freqs, t_mod=video_t_mod)
            q, k, v = io[:3]
            mixed = self._mixed_attention(q_cat=q, k_cat=k, v_cat=v, attention_mask=video_attention_mask)
            x = self._post(block, mixed, io, video_context_payload)
            cache.append({"k": k, "v": v})
        return cache

    def forward_action_with_video_cache(
        self, action_tokens, action_freqs, action_t_mod, action_context_payload, video_kv_cache, attention_mask,
        video_seq_len,
    ):  # fmt: skip
        expert, x = self.mixtures["action"], action_tokens
        mask = attention_mask[video_seq_len:]  # a new tensor in each denoising step
        for block, past in zip(expert.blocks, video_kv_cache, strict=True):
            io = self._build_expert_attention_io(
                expert=expert, block=block, x=x, freqs=action_freqs, t_mod=action_t_mod
            )
            k, v = (torch.cat([past[name], t], 1) for name, t in zip("kv", io[1:3], strict=True))
            mixed = self._mixed_attention(q_cat=io[0], k_cat=k, v_cat=v, attention_mask=mask)
            x = self._post(block, mixed, io, action_context_payload)
        return x

    def forward(self, embeds_all, attention_mask, freqs_all, context_all, t_mod_all):
        tokens = dict(embeds_all)
        for layer in range(self.num_layers):
            ios = {}
            for name in self.expert_order:
                expert = self.mixtures[name]
                ios[name] = self._build_expert_attention_io(
                    expert=expert, block=expert.blocks[layer], x=tokens[name], freqs=freqs_all[name],
                    t_mod=t_mod_all[name],
                )  # fmt: skip
            q, k, v = (torch.cat([io[i] for io in ios.values()], 1) for i in range(3))
            mixed = self._mixed_attention(q_cat=q, k_cat=k, v_cat=v, attention_mask=attention_mask)
            parts = mixed.split([tokens[name].shape[1] for name in self.expert_order], 1)
            for name, part in zip(self.expert_order, parts, strict=True):
                block = self.mixtures[name].blocks[layer]
                tokens[name] = self._post(block, part, ios[name], context_all[name])
        return tokens
