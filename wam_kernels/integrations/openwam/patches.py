"""What stands in for OpenWAM's functions. Each takes the original first, and raises NotOurs for what that is to run."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .._patching import NotOurs, Unsupported
from . import blocks, modulation
from .visibility import Batch, TextBatch, Visibility, of_samples, read_profile

# ---- attention profiles ----

_FOREIGN_PROFILE = "an attention profile that OpenWAM's pipeline did not prepare"


def build_profile(original, **options):
    """The package's profile without its S x S masks, and with a :class:`Visibility` for a block mask."""
    profile = original(**options | {"build_dense_masks": False, "build_flex_masks": False})
    return replace(profile, self_attention_block_mask=read_profile(profile))


def move_profile(original, profile, **options):
    """``move_attention_profile``: a profile of ours is at home on every device; the package would build it anew."""
    if not isinstance(getattr(profile, "self_attention_block_mask", None), Visibility):
        raise NotOurs(_FOREIGN_PROFILE)
    return profile


def select_profile_mask(original, profile, **options):
    """(dense mask, block mask) of a profile: a Visibility is chosen on every device."""
    if not isinstance(getattr(profile, "self_attention_block_mask", None), Visibility):
        raise NotOurs(_FOREIGN_PROFILE)
    return None, profile.self_attention_block_mask


def batch_attention(original, profiles, stream_lengths, stream_slots, *, device):
    """Joint attention of samples laid out stream by stream, ``[V0 V1 .. | A0 A1 ..]``, with padding between them."""
    visible = [profile.self_attention_block_mask for profile in profiles]
    if not all(isinstance(v, Visibility) for v in visible):
        raise NotOurs("a batch with profiles that OpenWAM's pipeline did not prepare")
    slices = _slices(stream_lengths, stream_slots)
    parts = [(v.geometry or v.ranges, s) for v, s in zip(visible, slices, strict=True)]
    return None, Batch(parts, sum(map(sum, stream_slots))), None


def batch_text(original, query_lengths, query_slots, text_lengths, local_masks, *, device):
    """Cross-attention of one stream of several samples to their own texts."""
    masks = [None if mask is None else mask.to(device) for mask in local_masks]
    return None, TextBatch(_slices([query_lengths], [query_slots]), text_lengths, sum(query_slots), masks)


def sequence_ids(original, query_ids: Tensor, key_ids: Tensor):
    """(dense mask, block mask) of video-only samples packed one after another: of their tokens, then of their texts.

    A block of ours reads the texts off the tokens' visibility.
    """
    if query_ids is not key_ids:
        return None, None
    return None, of_samples(query_ids.cpu().numpy())


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


def packed_block(original, self, video_hidden_states, action_hidden_states, *, block_mask=None, **options):
    """``DualExpertPackedBlock.forward``."""
    hidden = video_hidden_states, action_hidden_states
    if not isinstance(block_mask, Visibility | Batch):  # of a batch, its texts are the original's then too
        options = _dense_texts(video_hidden_states.device, options)
        raise NotOurs(_FOREIGN_PROFILE).with_arguments(self, *hidden, block_mask=block_mask, **options)
    try:
        blocks.require_sizes(self.video_block, self.action_block)
    except Unsupported as reason:
        raise reason.with_arguments(self, *hidden, **_dense_options(block_mask, *hidden, options)) from None
    options = dict.fromkeys(_BLOCK_OPTIONS) | {name: options[name] for name in options if name in _BLOCK_OPTIONS}
    return blocks.packed_block_forward(self, *hidden, visible=block_mask, **options)


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


def shared_block(original, self, hidden_states, **options):
    """``SharedTransformerBlock.forward``."""
    profile = options.get("attention_profile")
    if profile is None:
        raise NotOurs("a block without an attention profile")
    visible, device = profile.self_attention_block_mask, hidden_states.device
    if not isinstance(visible, Visibility):
        what = f"attention profile {profile.spec.name!r} of family {profile.spec.family!r}"
        if visible is not None and profile.self_attention_mask is None and device.type != "cuda":
            raise ValueError(
                f"patch: OpenWAM's {what} must have a dense mask on {device}, but has only a block mask, which OpenWAM "
                "does not read there: it would attend unmasked"
            )
        raise NotOurs(what)
    given = {name: options.get(name) for name in _PERSISTENT_CACHE}
    used = [name for name, value in given.items() if value is not None and value != _PERSISTENT_CACHE[name]]
    try:
        if used:
            raise NotOurs(f"attention profile {profile.spec.name!r} with {used[0]}")
        blocks.require_sizes(self)
    except (NotOurs, Unsupported) as reason:
        raise reason.with_arguments(
            self, hidden_states, **options | {"attention_profile": _dense_profile(profile, visible, device, options)}
        ) from None
    inputs = {name: options[name] for name in ("encoder_hidden_states", "temb", "rotary_emb")}
    cache = options.get("invariant_cache")
    out = blocks.shared_block_forward(self, hidden_states, visible=visible, invariant_cache=cache, **inputs)
    return out, None, None


def _dense_profile(profile, visible: Visibility, device: torch.device, options: dict):
    """The profile with dense masks for ours."""
    return replace(
        profile,
        self_attention_mask=visible.mask(device),
        cross_attention_mask=visible.text_mask(options["encoder_hidden_states"].shape[1], device),
        self_attention_block_mask=None,
        cross_attention_block_mask=None,
    )


# ---- modulation ----


def embed_time(original, conditioner, timestep_values: Tensor, *, dtype: torch.dtype):
    """``SharedTransformerTimeEmbedding.forward``."""
    return modulation.embed_time(original, conditioner, timestep_values, dtype=dtype)


def core_time_embed(
    original, core, timesteps: Tensor, height: int, width: int, *, dtype: torch.dtype, action_mode: bool = False
):
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
