"""openpi: two Gemmas with one attention, and the model around them.

This module plays ``modeling_gemma``, whose function both call, and ``pi0_pytorch``.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """q ``[B, H, S, D]``, k, v ``[B, 1, T, D]``, additive mask ``[B, 1, S, T]``; out ``[B, S, H, D]`` and weights."""
    key, value = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (key, value))
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class GemmaAttention(nn.Module):
    def __init__(self, width, heads, head_dim):
        super().__init__()
        self.head_dim, self.num_key_value_groups, self.scaling = head_dim, heads, head_dim**-0.5
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, head_dim, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)

    def qkv(self, x):
        return [
            p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        ]


class Layer(nn.Module):
    def __init__(self, width, heads, head_dim):
        super().__init__()
        self.self_attn = GemmaAttention(width, heads, head_dim)


class Gemma(nn.Module):
    def __init__(self, width, heads, head_dim, layers):
        super().__init__()
        self.layers = nn.ModuleList([Layer(width, heads, head_dim) for _ in range(layers)])

    def forward(self, x, attention_mask, past=None):
        """One expert alone, behind the keys and values of ``past``; returns them with its own."""
        cache = []
        for i, layer in enumerate(self.layers):
            attn = layer.self_attn
            q, k, v = attn.qkv(x)
            if past is not None:
                k, v = (torch.cat([p, t], 2) for p, t in zip(past[i], (k, v), strict=True))
            cache.append((k, v))
            out, _ = eager_attention_forward(attn, q, k, v, attention_mask, attn.scaling, dropout=0.0)
            x = x + attn.o_proj(out.flatten(2))
        return x, cache


class _Holder(nn.Module):
    def __init__(self, name, gemma):
        super().__init__()
        setattr(self, name, gemma)


class PaliGemmaWithExpertModel(nn.Module):
    def __init__(self, widths=(20, 12), heads=8, head_dim=32, layers=2):
        super().__init__()
        prefix, suffix = (Gemma(width, heads, head_dim, layers) for width in widths)
        self.paligemma, self.gemma_expert = _Holder("language_model", prefix), _Holder("model", suffix)

    def forward(self, inputs_embeds, attention_mask, past=None):
        prefix, suffix = inputs_embeds
        if suffix is None:
            return self.paligemma.language_model(prefix, attention_mask)
        if prefix is None:
            return self.gemma_expert.model(suffix, attention_mask, past)[0]
        for pair in zip(self.paligemma.language_model.layers, self.gemma_expert.model.layers, strict=True):
            attns = [layer.self_attn for layer in pair]
            q, k, v = (
                torch.cat(t, 2)
                for t in zip(*(a.qkv(x) for a, x in zip(attns, (prefix, suffix), strict=True)), strict=True)
            )
            out, _ = eager_attention_forward(attns[0], q, k, v, attention_mask, attns[0].scaling)
            parts = out.flatten(2).split([prefix.shape[1], suffix.shape[1]], 1)
            prefix, suffix = (x + a.o_proj(p) for x, a, p in zip((prefix, suffix), attns, parts, strict=True))
        return prefix, suffix


def make_att_2d_masks(pad_masks, att_masks):
    """bool ``[B, S, S]`` of padding and blocks ``[B, S]``."""
    at = att_masks.cumsum(1)
    return (at[:, None, :] <= at[:, :, None]) & (pad_masks[:, None, :] * pad_masks[:, :, None])


class PI0Pytorch(nn.Module):
    """Masks are made in every call: for all tokens in training, for the prefix and then for each step in sampling."""

    def __init__(self, states=1, checkpointing=False, **sizes):
        super().__init__()
        self.states, self.checkpointing = states, checkpointing
        self.paligemma_with_expert = PaliGemmaWithExpertModel(**sizes)

    def _prepare_attention_masks_4d(self, att_2d_masks):
        return torch.where(att_2d_masks[:, None, :, :], 0.0, -2.3819763e38)

    def masks(self, pad_masks, att_masks):
        return make_att_2d_masks(pad_masks, att_masks)

    def additive(self, att_2d_masks):
        return self._prepare_attention_masks_4d(att_2d_masks)

    def _suffix(self, x):
        """Its padding and blocks: a block of states, one of actions. Blocks have the dtype of the embeddings."""
        blocks = [1] * self.states + [1] + [0] * (x.shape[1] - self.states - 1)
        blocks = torch.tensor(blocks, dtype=x.dtype, device=x.device)
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), blocks[None].expand(x.shape[0], -1)

    def forward(self, prefix, pads, suffix):
        suffix_pads, suffix_blocks = self._suffix(suffix)
        pad_masks = torch.cat([pads, suffix_pads], dim=1)
        att_masks = torch.cat([torch.zeros_like(pads), suffix_blocks], dim=1)
        mask = self.additive(self.masks(pad_masks, att_masks))
        call = lambda prefix, suffix, mask: self.paligemma_with_expert((prefix, suffix), mask)[1]  # noqa: E731
        if self.checkpointing:
            return checkpoint(call, prefix, suffix, mask, use_reentrant=False)
        return call(prefix, suffix, mask)

    @torch.no_grad()
    def sample_actions(self, prefix, pads, x, steps=2):
        mask = self.additive(self.masks(pads, torch.zeros_like(pads)))
        _, cache = self.paligemma_with_expert((prefix, None), mask)
        for _ in range(steps):
            x = x - self.denoise_step(pads, cache, x) / steps
        return x

    def denoise_step(self, pads, cache, x):
        prefix = pads[:, None, :].expand(-1, x.shape[1], -1)
        mask = torch.cat([prefix, self.masks(*self._suffix(x))], dim=2)
        return self.paligemma_with_expert((None, x), self.additive(mask), past=cache)
