"""VPP 2, a fork of Fast-WAM: its ``MoT`` says in the call how many heads attend.

Its action expert may attend to the keys of one fixed video layer, or to video tokens that it projects itself to its own
number of heads; a mask for each sample hides the video from some.
"""

import torch
from torch import nn

from tests.integrations.stand_ins import fast_wam


def flash_attention(q, k, v, num_heads, ctx_mask=None):
    """Dense boolean mask ``[Sq, Sk]`` or ``[B, Sq, Sk]``."""
    mask = ctx_mask if ctx_mask.ndim == 2 else ctx_mask[:, None]
    return fast_wam.flash_attention(q, k, v, num_heads, mask)


class ActionExpert(fast_wam.Expert):
    """With ``video_dim``, it projects the video's tokens to keys and values of its own."""

    def __init__(self, hidden_dim, ffn_dim, num_layers, attn_head_dim, num_heads, video_dim=None):
        super().__init__(hidden_dim, ffn_dim, num_layers, attn_head_dim, num_heads)
        for block in self.blocks:  # that of the video's blocks has weights
            block.norm3 = nn.LayerNorm(hidden_dim, eps=1e-6, elementwise_affine=False)
        if video_dim is not None:
            inner = num_heads * attn_head_dim
            self.video_k, self.video_v = (
                nn.ModuleList([nn.Linear(video_dim, inner) for _ in range(num_layers)]) for _ in range(2)
            )

    def project_video_tokens(self, layer, tokens, freqs):
        return fast_wam.rope_apply(self.video_k[layer](tokens), freqs, self.num_heads), self.video_v[layer](tokens)


class MoT(fast_wam.MoT):
    def __init__(self, mixtures, mot_checkpoint_mixed_attn=True, use_fixed_video_layers=None, use_video_tokens=False):
        super().__init__(mixtures, mot_checkpoint_mixed_attn)
        self.use_fixed_video_layers, self.use_video_tokens = use_fixed_video_layers, use_video_tokens

    def _mixed_attention(self, q_cat, k_cat, v_cat, attention_mask, num_heads=None):
        heads = self.num_heads if num_heads is None else num_heads

        def attend(q, k, v):
            return flash_attention(q, k, v, heads, attention_mask)

        if self.mot_checkpoint_mixed_attn and self.training:
            return torch.utils.checkpoint.checkpoint(attend, q_cat, k_cat, v_cat, use_reentrant=False)
        return attend(q_cat, k_cat, v_cat)

    def prefill_video_cache(self, video_tokens, video_freqs, video_t_mod, video_context_payload, video_attention_mask):
        expert, x, cache = self.mixtures["video"], video_tokens, []
        for block in expert.blocks:
            io = self._build_expert_attention_io(expert=expert, block=block, x=x, freqs=video_freqs, t_mod=video_t_mod)
            cache.append({"tokens": x, "freqs": video_freqs, "k": io[1], "v": io[2]})
            mixed = self._mixed_attention(*io[:3], attention_mask=video_attention_mask, num_heads=expert.num_heads)
            x = self._post(block, mixed, io, video_context_payload)
        return cache, x

    def _video_of(self, layer, cache):
        entry = cache[layer if self.use_fixed_video_layers is None else self.use_fixed_video_layers]
        if self.use_video_tokens:
            return self.mixtures["action"].project_video_tokens(layer, entry["tokens"], entry["freqs"])
        return entry["k"], entry["v"]

    def forward_action_with_video_cache(
        self, action_tokens, action_freqs, action_t_mod, action_context_payload, video_kv_cache, attention_mask,
        video_seq_len, action_video_conditioning_mask=None,
    ):  # fmt: skip
        expert, x = self.mixtures["action"], action_tokens
        mask = attention_mask[video_seq_len:]
        if action_video_conditioning_mask is not None:
            mask = mask.expand(len(x), -1, -1).clone()
            mask[:, :, :video_seq_len] &= action_video_conditioning_mask[:, None, None]
        for layer, block in enumerate(expert.blocks):
            io = self._build_expert_attention_io(
                expert=expert, block=block, x=x, freqs=action_freqs, t_mod=action_t_mod
            )
            past = self._video_of(layer, video_kv_cache)
            k, v = (torch.cat(pair, 1) for pair in zip(past, io[1:3], strict=True))
            mixed = self._mixed_attention(
                q_cat=io[0], k_cat=k, v_cat=v, attention_mask=mask, num_heads=expert.num_heads
            )
            x = self._post(block, mixed, io, action_context_payload)
        return x

    def forward(
        self, embeds_all, attention_mask, freqs_all, context_all, t_mod_all, action_video_conditioning_mask=None
    ):
        if self.use_fixed_video_layers is None and not self.use_video_tokens:
            return super().forward(embeds_all, attention_mask, freqs_all, context_all, t_mod_all)
        by = lambda name: (x[name] for x in (embeds_all, freqs_all, t_mod_all, context_all))  # noqa: E731
        length = embeds_all["video"].shape[1]
        cache, video = self.prefill_video_cache(*by("video"), attention_mask[:length, :length])
        action = self.forward_action_with_video_cache(
            *by("action"), cache, attention_mask, length, action_video_conditioning_mask
        )
        return {"video": video, "action": action}
