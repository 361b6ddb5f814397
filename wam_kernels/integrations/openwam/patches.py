"""What stands in for OpenWAM's functions. Each takes the original first and hands it what is not ours."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import blocks, modulation
from .unsupported import UnsupportedError
from .visibility import Batch, TextBatch, UnsupportedProfileError, Visibility, read_profile

# ---- attention profiles ----


def build_profile(original, policy, **options):
    """The package's profile without its S x S masks, and with a :class:`Visibility` for a block mask."""
    profile = original(**options | {"build_dense_masks": False, "build_flex_masks": False})
    try:
        visible = read_profile(profile)
    except UnsupportedProfileError as error:
        policy.refuse(str(error))
        return original(**options)
    return replace(profile, self_attention_block_mask=visible)


def move_profile(original, profile, **options):
    """``move_attention_profile``: a profile of ours is at home on every device; the package would build it anew."""
    if isinstance(getattr(profile, "self_attention_block_mask", None), Visibility):
        return profile
    return original(profile, **options)


def select_profile_mask(original, profile, **options):
    """(dense mask, block mask) of a profile: a Visibility is chosen on every device."""
    if isinstance(getattr(profile, "self_attention_block_mask", None), Visibility):
        return None, profile.self_attention_block_mask
    return original(profile, **options)


def batch_attention(original, profiles, stream_lengths, stream_slots, *, device):
    """Joint attention of samples laid out stream by stream, ``[V0 V1 .. | A0 A1 ..]``, with padding between them."""
    visible = [profile.self_attention_block_mask for profile in profiles]
    if not all(isinstance(v, Visibility) for v in visible):
        return original(profiles, stream_lengths, stream_slots, device=device)
    slices = _slices(stream_lengths, stream_slots)
    parts = [(v.geometry or v.ranges, s) for v, s in zip(visible, slices, strict=True)]
    return None, Batch(parts, sum(map(sum, stream_slots))), None


def batch_text(original, query_lengths, query_slots, text_lengths, local_masks, *, device):
    """Cross-attention of one stream of several samples to their own texts."""
    if any(mask is not None for mask in local_masks):
        return original(query_lengths, query_slots, text_lengths, local_masks, device=device)
    return None, TextBatch(_slices([query_lengths], [query_slots]), tuple(text_lengths), sum(query_slots))


def _slices(lengths, slots) -> list[tuple[tuple[int, int], ...]]:
    """Where each sample's tokens are, one slice for each stream."""
    places: list[list[tuple[int, int]]] = [[] for _ in lengths[0]]
    at = 0
    for stream_lengths, stream_slots in zip(lengths, slots, strict=True):
        for place, length, slot in zip(places, stream_lengths, stream_slots, strict=True):
            if length:
                place.append((at, at + length))
            at += slot
    return [tuple(place) for place in places]


# ---- blocks ----


def packed_block(original, policy, self, video_hidden_states, action_hidden_states, *, block_mask=None, **options):
    """``DualExpertPackedBlock.forward``."""
    if not isinstance(block_mask, Visibility | Batch):  # of a batch, its texts are the original's then too
        options = _dense_texts(video_hidden_states.device, options)
        return original(self, video_hidden_states, action_hidden_states, block_mask=block_mask, **options)
    reason = next(filter(None, map(blocks.why_not, (self.video_block, self.action_block))), None)
    if reason is not None:
        policy.refuse(reason)
        options = _dense_options(block_mask, video_hidden_states, action_hidden_states, options)
        return original(self, video_hidden_states, action_hidden_states, **options)
    options = dict.fromkeys(_BLOCK_OPTIONS) | {name: options[name] for name in options if name in _BLOCK_OPTIONS}
    return blocks.packed_block_forward(self, video_hidden_states, action_hidden_states, visible=block_mask, **options)


# what blocks.packed_block_forward takes; the masks and kernel options of the package's attention are not among them
_BLOCK_OPTIONS = (
    "video_timestep_proj",
    "video_rotary_emb",
    "action_temb",
    "action_rotary_emb",
    "video_text_hidden_states",
    "action_text_hidden_states",
    "video_cross_attention_mask",
    "action_cross_attention_mask",
    "video_cross_attention_block_mask",
    "action_cross_attention_block_mask",
    "token_cache",
)


def _dense_options(visible: Visibility | Batch, video: Tensor, action: Tensor | None, options: dict) -> dict:
    """The options of the original block with dense masks for ours."""
    mask = visible.mask(video.device)
    streams = {"video": video} if action is None else {"video": video, "action": action}
    caches = options.get("token_cache")
    options = dict(options)
    at = 0
    for number, (name, x) in enumerate(streams.items()):
        rows = torch.arange(x.shape[1], device=x.device)
        if caches is not None:  # the rows that it computes; it picks them out of all
            rows = caches[number].active_indices if caches[number].ready else caches[number].computed_indices
        all_rows = mask.new_zeros(x.shape[1], mask.shape[1])
        all_rows[rows] = mask[at : at + rows.numel()]
        at += rows.numel()
        options[f"{name}_attention_mask"] = all_rows[None, None]
    return _dense_texts(video.device, options)


def _dense_texts(device: torch.device, options: dict) -> dict:
    """The options of the original block with dense masks for our text batches."""
    options = dict(options)
    for name in ("video", "action"):
        text_batch = options.get(f"{name}_cross_attention_block_mask")
        if isinstance(text_batch, TextBatch):
            options[f"{name}_cross_attention_mask"] = text_batch.mask(device)[None]
            options[f"{name}_cross_attention_block_mask"] = None
    return options


# what SharedTransformerBlock.forward takes and a block of ours has nothing to do with, and its value where it is unused
_PERSISTENT_CACHE = {
    "attention_mask": None,
    "cross_attention_mask": None,
    "self_attention_cache_entry": None,
    "cross_attention_cache_entry": None,
    "cached_prefix_visibility": None,
    "cache_current_token_count": 0,
    "cache_current_token_span": None,
    "self_attention_cache_backend_state": None,
}


def shared_block(original, policy, self, hidden_states, **options):
    """``SharedTransformerBlock.forward``."""
    profile = options.get("attention_profile")
    if profile is None:
        return original(self, hidden_states, **options)
    visible, reason = profile.self_attention_block_mask, blocks.why_not(self)
    if not isinstance(visible, Visibility):
        what = f"attention profile {profile.spec.name!r} of family {profile.spec.family!r}"
        if visible is not None and profile.self_attention_mask is None and hidden_states.device.type != "cuda":
            raise UnsupportedError(
                f"wam_kernels.integrations.openwam: {what} must have a dense mask on {hidden_states.device}, but has "
                "only a block mask, which OpenWAM does not read there: it would attend unmasked"
            )
        policy.refuse(what)
        return original(self, hidden_states, **options)
    for name, unused in _PERSISTENT_CACHE.items():
        value = options.get(name, unused)
        if value is not None and value != unused:
            reason = f"attention profile {profile.spec.name!r} with {name}"
    names = ("encoder_hidden_states", "temb", "rotary_emb")
    if reason is not None:
        policy.refuse(reason)
        text_tokens = options["encoder_hidden_states"].shape[1]
        options["attention_profile"] = replace(
            profile,
            self_attention_mask=visible.mask(hidden_states.device),
            cross_attention_mask=visible.text_mask(text_tokens, hidden_states.device),
            self_attention_block_mask=None,
        )
        return original(self, hidden_states, **options)
    inputs = {name: options[name] for name in names}
    cache = options.get("invariant_cache")
    return (
        blocks.shared_block_forward(self, hidden_states, visible=visible, invariant_cache=cache, **inputs),
        None,
        None,
    )


# ---- modulation ----


def embed_time(original, conditioner, timestep_values: Tensor, *, dtype: torch.dtype):
    """``SharedTransformerTimeEmbedding.forward``."""
    return modulation.embed_time(original, conditioner, timestep_values, dtype=dtype)


def core_time_embed(core, timesteps: Tensor, height: int, width: int, *, dtype: torch.dtype, action_mode: bool = False):
    """``SharedVideoTransformerCore._time_embed`` without the copies, which would lose the rows."""
    _, patch_height, patch_width = (1, 1, 1) if action_mode else core.patch_size
    tokens = (height // patch_height) * (width // patch_width)
    conditioner = core.action_time_conditioner if action_mode else core.time_conditioner
    return conditioner(timesteps.repeat_interleave(tokens, dim=1), dtype=dtype)


def prepare_dual_stream(original, input_dict, *, time_embed, **options):
    """``prepare_exact_dual_stream_train_sequence``: joins the rows of both streams as it joins their modulations."""
    rows: list[modulation.FrameRows] = []

    def watched(*args):
        embedding, expanded = time_embed(*args)
        rows.append(modulation.frame_rows(expanded))
        return embedding, expanded

    prepared = original(input_dict, time_embed=watched, **options)
    modulation.tag_joined(prepared.timestep_proj, rows)
    return prepared
