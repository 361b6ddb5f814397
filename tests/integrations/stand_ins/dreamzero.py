"""DreamZero: ``CausalWanSelfAttention`` with its block-by-block training attention and its growing cache."""

import torch
import torch.nn.functional as F
from torch import nn


def rotate(x, freqs):
    """x ``[B, S, H, D]``, freqs complex ``[S, 1, D / 2]``."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs).flatten(3).to(x.dtype)


class WanRMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(1 + 0.1 * torch.randn(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class AttentionModule(nn.Module):
    def forward(self, q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class CausalWanSelfAttention(nn.Module):
    def __init__(
        self,
        dim,
        num_heads,
        frame_seqlen,
        local_attn_size,
        num_frame_per_block,
        num_action_per_block,
        num_state_per_block,
    ):
        super().__init__()
        self.num_heads, self.head_dim, self.frame_seqlen = num_heads, dim // num_heads, frame_seqlen
        self.local_attn_size, self.qk_norm = local_attn_size, True
        self.max_attention_size = (21 if local_attn_size == -1 else local_attn_size) * frame_seqlen
        self.num_frame_per_block = num_frame_per_block
        self.num_action_per_block, self.num_state_per_block = num_action_per_block, num_state_per_block
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = WanRMSNorm(dim), WanRMSNorm(dim)
        self.attn = AttentionModule()

    def _teacher_forced(self, q, k, v, half, blocks):
        """Block by block: the keys of each block laid end to end, then one dense attention over them."""
        frame, size = self.frame_seqlen, self.frame_seqlen * self.num_frame_per_block
        actions, states = 2 * half, 2 * half + blocks * self.num_action_per_block
        out = torch.empty_like(q)

        def block(queries, *keys):
            k_seen, v_seen = (torch.cat([t[:, s] for s in keys], 1) for t in (k, v))
            out[:, queries] = self.attn(q[:, queries], k_seen, v_seen)

        first, first_noisy = slice(0, frame), slice(half, half + frame)
        block(first, first)
        block(first_noisy, first_noisy)
        for i in range(blocks):
            begin, end = frame + i * size, frame + (i + 1) * size
            noisy = slice(half + begin, half + end)
            action = slice(actions + i * self.num_action_per_block, actions + (i + 1) * self.num_action_per_block)
            state = slice(states + i * self.num_state_per_block, states + (i + 1) * self.num_state_per_block)
            block(slice(begin, end), first, slice(max(frame, end - self.local_attn_size * frame), end))
            block(noisy, slice(0, begin), noisy, action, state)
            block(action, slice(0, begin), noisy, action, state)
            block(state, state)
        return out

    def forward(
        self,
        x,
        freqs,
        freqs_action,
        freqs_state,
        action_register_length,
        kv_cache=None,
        current_start_frame=0,
        is_tf=True,
    ):
        registers = action_register_length or 0
        each = self.num_action_per_block + self.num_state_per_block
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        q, k, v = (t.unflatten(2, (self.num_heads, -1)) for t in (q, k, v))
        first = 0 if kv_cache is None else (current_start_frame - 1) // self.num_frame_per_block
        n = registers // each
        own = [f[first * m : (first + n) * m, None] for f, m in
               ((freqs_action, self.num_action_per_block), (freqs_state, self.num_state_per_block))]  # fmt: skip
        positions = torch.cat([freqs] * (2 if kv_cache is None and is_tf else 1) + own * (registers > 0))
        q, k = rotate(q, positions), rotate(k, positions)
        if kv_cache is None:
            if is_tf:
                return self.o(self._teacher_forced(q, k, v, (x.shape[1] - registers) // 2, n).flatten(2)), None
            return self.o(self.attn(q, k, v).flatten(2)), None
        video = x.shape[1] - registers
        new_k, new_v = (
            torch.cat([past, t[:, :video]], 1)[:, -self.max_attention_size :]
            for past, t in zip(kv_cache, (k, v), strict=True)
        )
        seen = (torch.cat([new, t[:, video:]], 1) for new, t in ((new_k, k), (new_v, v)))
        return self.o(self.attn(q, *seen).flatten(2)), torch.stack([new_k, new_v])


class CrossAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.attn = num_heads, AttentionModule()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, context):
        q, k, v = (t.unflatten(2, (self.num_heads, -1)) for t in (self.q(x), self.k(context), self.v(context)))
        return self.o(self.attn(q, k, v).flatten(2))


class CausalWanAttentionBlock(nn.Module):
    def __init__(self, dim, **sizes):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, 1e-6, elementwise_affine=False) for _ in range(2))
        self.norm3 = nn.LayerNorm(dim, 1e-6)
        self.self_attn = CausalWanSelfAttention(dim, **sizes)
        self.cross_attn = CrossAttention(dim, sizes["num_heads"])
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU("tanh"), nn.Linear(2 * dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self, x, e, freqs, freqs_action, freqs_state, action_register_length, context, kv_cache=None,
        crossattn_cache=None, current_start_frame=0, is_tf=True,
    ):  # fmt: skip
        tokens, rows = x.shape[1], (self.modulation.unsqueeze(1) + e).chunk(6, dim=2)
        each = -(-tokens // e.shape[1])  # rows of blocks or frames are repeated, and too many are cut
        rows = [part.squeeze(2).repeat_interleave(each, dim=1)[:, :tokens] for part in rows]
        y, cache = self.self_attn(
            x=self.norm1(x) * (1 + rows[1]) + rows[0], freqs=freqs, freqs_action=freqs_action, freqs_state=freqs_state,
            action_register_length=action_register_length, kv_cache=kv_cache, is_tf=is_tf,
            current_start_frame=current_start_frame,
        )  # fmt: skip
        x = x + y * rows[2]
        x = x + self.cross_attn(self.norm3(x), context)
        return x + self.ffn(self.norm2(x) * (1 + rows[4]) + rows[3]) * rows[5], cache


class CausalWanModel(nn.Module):
    """Blocks alone: tokens in, tokens out, and one cache for each block."""

    def __init__(self, dim=32, num_heads=2, layers=2, local_attn_size=5):
        super().__init__()
        sizes = {"num_heads": num_heads, "frame_seqlen": 6, "local_attn_size": local_attn_size}
        sizes |= {"num_frame_per_block": 2, "num_action_per_block": 4, "num_state_per_block": 1}
        self.blocks = nn.ModuleList([CausalWanAttentionBlock(dim, **sizes) for _ in range(layers)])
        half = dim // num_heads // 2
        angle = torch.arange(400)[:, None].double() * 50.0 ** (-torch.arange(half) / half)
        freqs = torch.polar(torch.ones_like(angle), angle)
        self.context = nn.Parameter(torch.randn(1, 3, dim))
        self.time_projection = nn.Linear(1, 6 * dim)
        self.modulation_rows = None  # as many as there are tokens
        self.freqs, self.freqs_action, self.freqs_state = freqs[:, None], freqs[:300], freqs[:50]

    def _create_freqs(self, first_position, video):
        """Made anew in every forward, frame by frame."""
        frame = self.blocks[0].self_attn.frame_seqlen
        ends = range(first_position, first_position + video, frame)
        return torch.cat([self.freqs[begin : min(begin + frame, first_position + video)] for begin in ends])

    def forward(self, x, first_position, video, caches=None, **arguments):
        """``video`` tokens are at consecutive positions from ``first_position`` on."""
        freqs, new = self._create_freqs(first_position, video), []
        timestep = torch.arange(self.modulation_rows or x.shape[1])[None, :, None].sin().expand(x.shape[0], -1, -1)
        e, context = self.time_projection(timestep.to(x)).unflatten(2, (6, -1)), self.context.expand(x.shape[0], -1, -1)
        for i, block in enumerate(self.blocks):
            x, cache = block(
                x, e=e, context=context, freqs=freqs, freqs_action=self.freqs_action, freqs_state=self.freqs_state,
                kv_cache=None if caches is None else caches[i], **arguments,
            )  # fmt: skip
            new.append(cache)
        return x, new
