"""LingBot-VA: ``WanTransformer3DModel`` of ``WanAttention`` blocks with a flex training mask and a slot-pool cache.

The flex kernel is PyTorch's fused call under a dense mask here, in the dtype that comes in; everything else keeps the
public interface.
"""

import torch
import torch.nn.functional as F
from torch import nn


def custom_sdpa(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class FlexAttnFunc(nn.Module):
    attention_mask = None
    cross_attention_mask = None

    def __init__(self, is_cross=False):
        super().__init__()
        self.is_cross = is_cross

    def forward(self, query, key, value, dtype=torch.bfloat16):
        mask = FlexAttnFunc.cross_attention_mask if self.is_cross else FlexAttnFunc.attention_mask
        q, k, v = (t[:1].transpose(1, 2) for t in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    @staticmethod
    def init_mask(latent_shape, action_shape, padded_length, chunk_size, window_size, patch_size, device):
        samples = latent_shape[0]
        sample, number, clean = [], [], []
        for is_action, shape, scale in ((0, latent_shape, patch_size), (1, action_shape, (1, 1, 1))):
            frames, each = shape[2], (shape[3] // scale[1]) * (shape[4] // scale[2])
            frame = torch.arange(frames).repeat_interleave(each).repeat(samples)
            for copy in (0, 1):
                sample.append(torch.arange(samples).repeat_interleave(frames * each))
                number.append(frame // chunk_size * 2 + is_action)
                clean.append(torch.full_like(frame, copy))
        sample, number, clean = (F.pad(torch.cat(t), (0, padded_length), value=-1) for t in (sample, number, clean))
        q, k = number[:, None], number[None]
        from_clean, to_clean = clean[:, None] == 1, clean[None] == 1
        from_noisy, to_noisy = clean[:, None] == 0, clean[None] == 0
        mask = (
            (from_clean & to_clean & (k <= q)) | (from_noisy & to_clean & (k < q)) | (from_noisy & to_noisy & (k == q))
        )
        mask = mask & (sample[:, None] == sample) & (sample[:, None] >= 0) & ((q - k).abs() <= window_size)
        text = torch.arange(samples).repeat_interleave(512)
        FlexAttnFunc.attention_mask = mask
        FlexAttnFunc.cross_attention_mask = sample[:, None] == text[None]


class WanAttention(nn.Module):
    def __init__(self, dim, heads, dim_head, eps, cross_attention_dim_head=None, attn_mode="torch"):
        super().__init__()
        is_cross = cross_attention_dim_head is not None
        self.attn_op = FlexAttnFunc(is_cross) if attn_mode == "flex" else custom_sdpa
        self.inner_dim, self.heads = dim_head * heads, heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, self.inner_dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(self.inner_dim, dim), nn.Dropout(0.0)])
        self.norm_q, self.norm_k = (nn.RMSNorm(self.inner_dim, eps=eps) for _ in range(2))
        self.attn_caches = None if is_cross else {}

    def init_kv_cache(self, cache_name, total_tolen, num_head, head_dim, device, dtype, batch_size):
        if self.attn_caches is None:
            return
        shape = (batch_size, total_tolen, num_head, head_dim)
        self.attn_caches[cache_name] = {
            "k": torch.full(shape, float("nan"), dtype=dtype),
            "v": torch.full(shape, float("nan"), dtype=dtype),
            "id": torch.full((total_tolen,), -1),
            "mask": torch.zeros(total_tolen, dtype=torch.bool),
            "is_pred": torch.zeros(total_tolen, dtype=torch.bool),
        }

    def clear_cache(self, cache_name):
        if self.attn_caches is not None:
            self.attn_caches[cache_name] = None

    def clear_pred_cache(self, cache_name):
        if self.attn_caches is not None:
            cache = self.attn_caches[cache_name]
            cache["mask"][cache["is_pred"]] = False

    def allocate_slots(self, cache_name, key_size):
        cache = self.attn_caches[cache_name]
        missing = key_size - int((~cache["mask"]).sum())
        if missing > 0:
            used = cache["mask"].nonzero().squeeze(-1)
            oldest = used[torch.argsort(cache["id"][used])[:missing]]
            cache["mask"][oldest] = False
            cache["id"][oldest] = -1
        return (~cache["mask"]).nonzero().squeeze(-1)[:key_size]

    def update_cache(self, cache_name, key, value, is_pred):
        cache = self.attn_caches[cache_name]
        slots = self.allocate_slots(cache_name, key.shape[1])
        new_id = cache["id"][cache["mask"]].max() + 1 if cache["mask"].any() else 0
        cache["k"][:, slots], cache["v"][:, slots] = key, value
        cache["mask"][slots], cache["id"][slots], cache["is_pred"][slots] = True, new_id, is_pred
        return slots

    def restore_cache(self, cache_name, slots):
        self.attn_caches[cache_name]["mask"][slots] = False

    def forward(self, q, k, v, rotary_emb, update_cache=0, cache_name="pos"):
        query, key, value = (t.unflatten(2, (self.heads, -1)) for t in (
            self.norm_q(self.to_q(q)), self.norm_k(self.to_k(k)), self.to_v(v)
        ))  # fmt: skip
        if rotary_emb is not None:
            query, key = (
                torch.view_as_real(torch.view_as_complex(t.double().unflatten(-1, (-1, 2))) * rotary_emb)
                .flatten(3)
                .to(t.dtype)
                for t in (query, key)
            )
        cache = (self.attn_caches or {}).get(cache_name)
        pooled = cache is not None and cache["k"] is not None
        if pooled:
            slots = self.update_cache(cache_name, key, value, is_pred=(update_cache == 1))
            valid = cache["mask"].nonzero().squeeze(-1)
            key, value = cache["k"][:, valid], cache["v"][:, valid]
        out = self.attn_op(query, key, value)
        if pooled and update_cache == 0:
            self.restore_cache(cache_name, slots)
        return self.to_out[1](self.to_out[0](out.flatten(2, 3).type_as(query)))


class WanTransformerBlock(nn.Module):
    def __init__(self, dim, ffn_dim, heads, eps, attn_mode):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = WanAttention(dim, heads, dim // heads, eps, None, attn_mode)
        self.attn2 = WanAttention(dim, heads, dim // heads, eps, dim // heads, attn_mode)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))
        self.norm3 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb, update_cache=0, cache_name="pos"):
        x, text = hidden_states, encoder_hidden_states
        shift, scale, gate, c_shift, c_scale, c_gate = (self.scale_shift_table[None] + temb).unbind(2)
        h = self.norm1(x) * (1 + scale) + shift
        x = x + gate * self.attn1(h, h, h, rotary_emb, update_cache=update_cache, cache_name=cache_name)
        x = x + self.attn2(self.norm2(x), text, text, None, update_cache=0, cache_name=cache_name)
        return x + c_gate * self.ffn(self.norm3(x) * (1 + c_scale) + c_shift)


class WanTransformer3DModel(nn.Module):
    def __init__(
        self, heads=2, head_dim=24, layers=2, channels=4, action_dim=5, patch_size=(1, 2, 2), attn_mode="torch"
    ):
        super().__init__()
        dim = heads * head_dim
        self.patch_size, self.num_attention_heads, self.attention_head_dim = patch_size, heads, head_dim
        self.patch_embedding_mlp = nn.Linear(channels * patch_size[1] * patch_size[2], dim)
        self.action_embedder = nn.Linear(action_dim, dim)
        self.time = nn.Linear(1, 6 * dim)
        self.text = nn.Linear(6, dim)
        self.blocks = nn.ModuleList([WanTransformerBlock(dim, 2 * dim, heads, 1e-6, attn_mode) for _ in range(layers)])
        self.proj_out, self.action_proj_out = nn.Linear(dim, channels * 4), nn.Linear(dim, action_dim)

    def create_empty_cache(self, cache_name, slots, dtype=torch.float32, batch_size=1):
        for block in self.blocks:
            sizes = (self.num_attention_heads, self.attention_head_dim)
            block.attn1.init_kv_cache(cache_name, slots, *sizes, "cpu", dtype, batch_size)

    def clear_pred_cache(self, cache_name):
        for block in self.blocks:
            block.attn1.clear_pred_cache(cache_name)

    def rope(self, positions):
        """``[B, S]`` to ``[B, S, 1, D / 2]`` complex."""
        half = self.attention_head_dim // 2
        angle = positions[..., None].double() * 100.0 ** (-torch.arange(half) / half)
        return torch.polar(torch.ones_like(angle), angle)[:, :, None]

    def embed(self, latents, action):
        if action:
            return self.action_embedder(latents.flatten(2).mT)
        ph, pw = self.patch_size[1:]
        patches = latents.unfold(3, ph, ph).unfold(4, pw, pw)  # B C F H W ph pw
        return self.patch_embedding_mlp(patches.permute(0, 2, 3, 4, 1, 5, 6).flatten(4).flatten(1, 3))

    def time_embed(self, t):
        return self.time(t[..., None]).unflatten(-1, (6, -1))

    def forward_train(self, input_dict):
        d = input_dict
        latent, action = d["latent_dict"], d["action_dict"]
        streams = (latent, False), (action, True)
        parts = [self.embed(part[name], is_action).flatten(0, 1) for part, is_action in streams
                 for name in ("noisy_latents", "latent")]  # fmt: skip
        x = torch.cat(parts)[None]
        padding = -x.shape[1] % 128
        sizes = [len(p) for p in parts]
        t = torch.cat([torch.full((n,), value) for n, value in zip(sizes, (0.7, 0.0, 0.3, 0.0), strict=True)])[None]
        rotary = F.pad(self.rope(torch.arange(x.shape[1])[None]), (0, 0, 0, 0, 0, padding))
        x, temb = F.pad(x, (0, 0, 0, padding)), F.pad(self.time_embed(t), (0, 0, 0, 0, 0, padding))
        FlexAttnFunc.init_mask(
            latent["noisy_latents"].shape, action["noisy_latents"].shape, padding, d["chunk_size"],
            window_size=d["window_size"], patch_size=self.patch_size, device=x.device,
        )  # fmt: skip
        text = self.text(latent["text_emb"]).flatten(0, 1)[None]
        for block in self.blocks:
            x = block(x, text, temb, rotary, update_cache=False)
        return self.proj_out(x[:, : sizes[0]]), self.action_proj_out(x[:, sum(sizes[:2]) : sum(sizes[:3])])

    def forward(self, d, update_cache=0, cache_name="pos", action_mode=False, train_mode=False):
        if train_mode:
            return self.forward_train(d)
        x = self.embed(d["noisy_latents"], action_mode)
        temb = self.time_embed(torch.full(x.shape[:2], d["timestep"]))
        rotary = self.rope(d["position"] + torch.arange(x.shape[1])[None])
        for block in self.blocks:
            x = block(x, self.text(d["text_emb"]), temb, rotary, update_cache=update_cache, cache_name=cache_name)
        return self.action_proj_out(x) if action_mode else self.proj_out(x)
