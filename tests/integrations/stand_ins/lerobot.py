"""lerobot's Fast-WAM: ``MoTLayer`` owns the blocks of a layer, experts keep a list of them that is no ``ModuleList``,
and the policy keeps its experts beside ``mot`` unregistered."""

from collections import deque

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def masked_attention(q, k, v, num_heads, mask, fp32_attention):
    """``[B, S, heads * D]`` in and out, in float32 or in the dtype of the values."""
    dtype = torch.float32 if fp32_attention else v.dtype
    q, k, v = (t.to(dtype).unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def dense_rope(x, freqs, num_heads):
    pairs = torch.view_as_complex(x.float().unflatten(-1, (num_heads, -1)).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs).flatten(2).to(x.dtype)


def grid_rope(x, grid_sizes, freqs, num_heads):
    """The sizes of each sample's grid are read on the host; tokens beyond the grid stay; the result is float32."""
    third, out = freqs.shape[1] // 3, []
    axes = freqs.split([freqs.shape[1] - 2 * third, third, third], 1)
    for sample, sizes in zip(x, grid_sizes.tolist(), strict=True):
        shapes = [[-1 if i == axis else 1 for i in range(3)] for axis in range(3)]
        grid = torch.cat(
            [
                f[:n].reshape(*shape, f.shape[1]).expand(*sizes, -1)
                for f, n, shape in zip(axes, sizes, shapes, strict=True)
            ],
            -1,
        ).flatten(0, 2)
        pairs = torch.view_as_complex(sample.double().unflatten(-1, (num_heads, -1)).unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs[: len(grid)] * grid[:, None])
        out.append(torch.cat([turned.flatten(1), sample[len(grid) :].double()]))
    return torch.stack(out).float()


class WanRMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(1 + 0.1 * torch.randn(dim))

    def forward(self, x):
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


class WanLayerNorm(nn.LayerNorm):
    """In float32, its weights too."""

    def forward(self, x):
        weights = [None if p is None else p.float() for p in (self.weight, self.bias)]
        return F.layer_norm(x.float(), self.normalized_shape, *weights, self.eps).type_as(x)


class WanSelfAttention(nn.Module):
    """Projections and norms; nothing calls it."""

    def __init__(self, dim, head_dim, num_heads):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        inner = head_dim * num_heads
        self.q, self.k, self.v = (nn.Linear(dim, inner) for _ in range(3))
        self.o = nn.Linear(inner, dim)
        self.norm_q, self.norm_k = WanRMSNorm(inner), WanRMSNorm(inner)


class FastWAMAttentionBlock(nn.Module):
    def __init__(self, dim, head_dim, num_heads, ffn_dim, fp32_attention):
        super().__init__()
        self.num_heads, self.attn_head_dim, self.fp32_attention = num_heads, head_dim, fp32_attention
        self.self_attn, self.cross_attn = (WanSelfAttention(dim, head_dim, num_heads) for _ in range(2))
        self.norm1, self.norm2 = (WanLayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.norm3 = WanLayerNorm(dim, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def apply_norm1(self, x):
        return self.norm1(x)

    def apply_norm2(self, x):
        return self.norm2(x)

    def apply_norm3(self, x):
        return self.norm3(x)

    def project_self_attention(self, x, freqs):
        attn = self.self_attn
        q, k = attn.norm_q(attn.q(x)), attn.norm_k(attn.k(x))
        if isinstance(freqs, dict):
            q, k = (grid_rope(t, freqs["grid_sizes"], freqs["freqs"], self.num_heads) for t in (q, k))
        else:
            q, k = (dense_rope(t, freqs, self.num_heads) for t in (q, k))
        return q, k, attn.v(x)

    def project_self_attention_output(self, x):
        return self.self_attn.o(x.to(self.self_attn.o.weight.dtype))

    def apply_cross_attention(self, x, context, context_mask):
        attn = self.cross_attn
        q, k = attn.norm_q(attn.q(x)), attn.norm_k(attn.k(context))
        out = masked_attention(q, k, attn.v(context), self.num_heads, context_mask, self.fp32_attention)
        return attn.o(out.to(attn.o.weight.dtype))


class Expert(nn.Module):
    def __init__(self, dim, ffn_dim, num_layers, head_dim, num_heads, fp32_attention=True):
        super().__init__()
        self.num_heads, self.attn_head_dim, self.fp32_attention = num_heads, head_dim, fp32_attention
        self.use_gradient_checkpointing = False
        self.blocks = nn.ModuleList(
            [FastWAMAttentionBlock(dim, head_dim, num_heads, ffn_dim, fp32_attention) for _ in range(num_layers)]
        )


class MoTLayer(nn.Module):
    def __init__(self, blocks, experts, num_heads, attn_head_dim, fp32_attention, mot_checkpoint_mixed_attn):
        super().__init__()
        self.blocks, self.expert_order = nn.ModuleDict(blocks), list(blocks)
        object.__setattr__(self, "_experts", experts)  # the modules, not registered
        self.num_heads, self.attn_head_dim, self.fp32_attention = num_heads, attn_head_dim, fp32_attention
        self.mot_checkpoint_mixed_attn = mot_checkpoint_mixed_attn

    @staticmethod
    def _split_modulation(block, t_mod):
        per_token = t_mod.ndim == 4
        parts = (block.modulation.to(t_mod.dtype) + t_mod).chunk(6, dim=2 if per_token else 1)
        return tuple(p.squeeze(2) for p in parts) if per_token else parts

    def _mixed_attention(self, q_cat, k_cat, v_cat, attention_mask):
        def attend(q, k, v):
            return masked_attention(q, k, v, self.num_heads, attention_mask, self.fp32_attention)

        if self.mot_checkpoint_mixed_attn and self.training:
            return checkpoint(attend, q_cat, k_cat, v_cat, use_reentrant=False)
        return attend(q_cat, k_cat, v_cat)

    def _build_expert_attention_io(self, name, x, freqs, t_mod):
        block = self.blocks[name]
        shift, scale, gate, *mlp = self._split_modulation(block, t_mod)
        q, k, v = block.project_self_attention(block.apply_norm1(x) * (1 + scale) + shift, freqs)
        return q, k, v, x, gate, *mlp, self._experts[name].use_gradient_checkpointing

    @staticmethod
    def _apply_expert_post_block(
        block, residual_x, mixed_attn_out, gate_msa, shift_mlp, scale_mlp, gate_mlp, context_payload
    ):
        x = residual_x + gate_msa * block.project_self_attention_output(mixed_attn_out)
        if context_payload is not None and context_payload.get("context") is not None:
            mask = context_payload.get("mask")
            mask = mask[:, None] if mask is not None and mask.ndim == 3 else mask
            x = x + block.apply_cross_attention(block.apply_norm3(x), context_payload["context"], context_mask=mask)
        return x + gate_mlp * block.ffn(block.apply_norm2(x) * (1 + scale_mlp) + shift_mlp)

    def _post(self, name, mixed, io, payload):
        *rows, checkpointed = io[4:]

        def post(mixed, x, *rows):
            names = dict(zip(("gate_msa", "shift_mlp", "scale_mlp", "gate_mlp"), rows, strict=True))
            return self._apply_expert_post_block(
                block=self.blocks[name], residual_x=x, mixed_attn_out=mixed, **names, context_payload=payload
            )

        if checkpointed and self.training:
            return checkpoint(post, mixed, io[3], *rows, use_reentrant=False)
        return post(mixed, io[3], *rows)

    def forward(self, mode, **kwargs):
        return {"joint": self._joint, "video_prefill": self._prefill, "action_cached": self._cached}[mode](**kwargs)

    def _joint(self, tokens_all, attention_mask, freqs_all, context_all, t_mod_all):
        ios = {
            name: self._build_expert_attention_io(name, tokens_all[name], freqs_all[name], t_mod_all[name])
            for name in self.expert_order
        }
        q, k, v = (torch.cat([io[i] for io in ios.values()], 1) for i in range(3))
        mixed = self._mixed_attention(q_cat=q, k_cat=k, v_cat=v, attention_mask=attention_mask)
        parts = mixed.split([tokens_all[name].shape[1] for name in self.expert_order], 1)
        return {
            name: self._post(name, part, ios[name], context_all[name]) for name, part in zip(ios, parts, strict=True)
        }

    def _prefill(self, x, freqs, t_mod, context_payload, video_attention_mask):
        io = self._build_expert_attention_io("video", x, freqs, t_mod)
        q, k, v = io[:3]
        mixed = self._mixed_attention(q_cat=q, k_cat=k, v_cat=v, attention_mask=video_attention_mask)
        return self._post("video", mixed, io, context_payload), k, v

    def _cached(self, x, freqs, t_mod, context_payload, k_video, v_video, action_attention_mask):
        io = self._build_expert_attention_io("action", x, freqs, t_mod)
        k, v = torch.cat([k_video, io[1]], 1), torch.cat([v_video, io[2]], 1)
        mixed = self._mixed_attention(q_cat=io[0], k_cat=k, v_cat=v, attention_mask=action_attention_mask)
        return self._post("action", mixed, io, context_payload)


class MoT(nn.Module):
    def __init__(self, mixtures, mot_checkpoint_mixed_attn=False):
        super().__init__()
        self.mixtures, first = nn.ModuleDict(mixtures), next(iter(mixtures.values()))
        self.num_layers, self.num_heads, self.attn_head_dim = len(first.blocks), first.num_heads, first.attn_head_dim
        self.fp32_attention = first.fp32_attention
        self.layers = nn.ModuleList(
            MoTLayer(
                {name: expert.blocks[i] for name, expert in mixtures.items()}, dict(mixtures), self.num_heads,
                self.attn_head_dim, self.fp32_attention, mot_checkpoint_mixed_attn,
            )
            for i in range(self.num_layers)
        )  # fmt: skip
        for expert in mixtures.values():  # its blocks have one owner, the layers
            blocks = list(expert.blocks)
            del expert._modules["blocks"]
            object.__setattr__(expert, "blocks", blocks)

    def prefill_video_cache(self, video_tokens, video_freqs, video_t_mod, video_context_payload, video_attention_mask):
        x, cache = video_tokens, []
        for layer in self.layers:
            x, k, v = layer(
                mode="video_prefill", x=x, freqs=video_freqs, t_mod=video_t_mod,
                context_payload=video_context_payload, video_attention_mask=video_attention_mask,
            )  # fmt: skip
            cache.append({"k": k, "v": v})
        return cache

    def forward_action_with_video_cache(
        self, action_tokens, action_freqs, action_t_mod, action_context_payload, video_kv_cache, attention_mask,
        video_seq_len,
    ):  # fmt: skip
        x, mask = action_tokens, attention_mask[video_seq_len:]
        for layer, past in zip(self.layers, video_kv_cache, strict=True):
            x = layer(
                mode="action_cached", x=x, freqs=action_freqs, t_mod=action_t_mod,
                context_payload=action_context_payload, k_video=past["k"], v_video=past["v"],
                action_attention_mask=mask,
            )  # fmt: skip
        return x

    def forward(self, embeds_all, attention_mask, freqs_all, context_all, t_mod_all):
        tokens = dict(embeds_all)
        for layer in self.layers:
            tokens = layer(
                mode="joint", tokens_all=tokens, attention_mask=attention_mask, freqs_all=freqs_all,
                context_all=context_all, t_mod_all=t_mod_all,
            )  # fmt: skip
        return tokens


class FastWAM(nn.Module):
    """``mot`` alone is registered; the experts are its ``mixtures``."""

    def __init__(self, mot):
        super().__init__()
        self.mot = mot
        for name, alias in (
            ("video_expert", mot.mixtures["video"]),
            ("action_expert", mot.mixtures["action"]),
            ("dit", mot),
        ):
            object.__setattr__(self, name, alias)


class FastWAMPolicy(nn.Module):
    """What ``make_policy`` returns. A batch holds what the two experts take, and the mask."""

    def __init__(self, mot, steps=2):
        super().__init__()
        self.model, self.steps, self.queue = FastWAM(mot), steps, deque()

    def forward(self, batch):
        out = self.model.mot(*(batch[name] for name in ("x", "mask", "freqs", "context", "t_mod")))
        loss = sum(t.square().mean() for t in out.values())
        return loss, {"loss": loss.item()}

    @torch.no_grad()
    def select_action(self, batch):
        self.eval()
        if not self.queue:
            one = {name: {key: batch[key][name] for key in ("x", "freqs", "t_mod", "context")} for name in batch["x"]}
            video, length = (
                [one["video"][key] for key in ("x", "freqs", "t_mod", "context")],
                batch["x"]["video"].shape[1],
            )
            cache = self.model.mot.prefill_video_cache(*video, batch["mask"][:length, :length])
            action, x = one["action"], one["action"]["x"]
            for _ in range(self.steps):
                inputs = x, action["freqs"], action["t_mod"], action["context"], cache, batch["mask"], length
                x = x - self.model.mot.forward_action_with_video_cache(*inputs) / self.steps
            self.queue.extend(x.unbind(1))
        return self.queue.popleft()
