"""What every layer gives, in our model and in the package that the weights are from, for the same random inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..model.blocks import StreamInputs, Uncast
from ..model.dual_expert import WorldActionModel

FRAMES, CELLS = 3, 4  # of the inputs: latent frames, and video tokens in either direction of a frame
TEXT_TOKENS = 5

Layers = dict[str, Tensor]  # in the order in which they are computed


@dataclass(frozen=True)
class Inputs:
    """One sample in which all tokens attend to all: shapes as ``WorldActionModel.embed`` takes them."""

    video: Tensor  # [1, C, F, y, x]
    video_timesteps: Tensor  # [1, F]
    action: Tensor  # [1, F, n, A]
    action_timesteps: Tensor  # [1, F]
    text: Tensor  # [1, L, text_dim]
    state: Tensor | None  # [1, F, S], of a model that is told one

    @classmethod
    def drawn(cls, config: ModelConfig, seed: int, device: torch.device) -> Inputs:
        """float32, from a seed; noise levels differ between frames and streams."""
        generator = torch.Generator().manual_seed(seed)
        _, rows, columns = (CELLS * size for size in config.patch)
        video = torch.randn(1, config.latent_channels, FRAMES, rows, columns, generator=generator)
        action = torch.randn(1, FRAMES, config.actions_per_frame, config.action_dim, generator=generator)
        text = torch.randn(1, TEXT_TOKENS, config.text_dim, generator=generator)
        times = torch.rand(2, 1, FRAMES, generator=generator) * 1000
        state = torch.randn(1, FRAMES, config.state_dim, generator=generator).to(device) if config.state_dim else None
        video, action, text, times = (t.to(device) for t in (video, action, text, times))
        return cls(video, times[0], action, times[1], text, state)


def attend_to_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``[B, S, H, h]`` in and out."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def our_model(config: ModelConfig, state: Mapping[str, Tensor]) -> WorldActionModel:
    """A model that holds these very tensors, in float32; what they lack stays on the meta device."""
    with torch.device("meta"):
        model = WorldActionModel(config)
    model.load_state_dict({name: value.float() for name, value in state.items()}, strict=False, assign=True)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def our_layers(model: WorldActionModel, inputs: Inputs, *, actions: bool) -> Layers:
    """Text, timesteps, tokens, each block and the flows; without ``actions`` those of the video alone."""
    streams = model.embed(
        (inputs.video, inputs.video_timesteps),
        (inputs.action, inputs.action_timesteps) if actions else None,
        state=inputs.state if actions else None,
    )
    frames = torch.arange(FRAMES, device=inputs.video.device)
    rope = model.rope(frames, CELLS, CELLS, frames if actions else None)
    config = model.config
    names = ("video", "action") if actions else ("video",)
    own = {s.name: model.side(s.name).text(inputs.text) for s in config.streams if s.name in names and s.owns_expert}
    text = [own.get(s.expert, own["video"]) for s in config.streams]  # of streams that are left out too, unread
    found: Layers = {}
    for name, stream in zip(names, streams, strict=False):
        found |= {f"{name} text": own[name]} if name in own else {}
        found |= _stream_layers(name, stream)

    def add_block(i: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, out: tuple[StreamInputs | None, ...]) -> None:
            found.update({f"block {i}, {n}": s.x for n, s in zip(names, out, strict=False) if s is not None})

        return hook

    blocks = model.packed_block_stack.packed_blocks
    handles = [block.register_forward_hook(add_block(i)) for i, block in enumerate(blocks)]
    try:
        out = model.packed_block_stack(
            streams, Uncast(*rope), [tuple(text)] * len(blocks), lambda _, q, k, v: attend_to_all(q, k, v)
        )
    finally:
        for handle in handles:
            handle.remove()
    flows = model.flows(out, FRAMES, CELLS, CELLS)
    return found | {f"{n} flow": flow for n, flow in zip(names, flows, strict=False) if flow is not None}


def _stream_layers(name: str, stream: StreamInputs | None) -> Layers:
    if stream is None:
        return {}
    return {f"{name} timesteps": torch.stack(stream.modulation.tensors, 2), f"{name} tokens": stream.x}


# ---- the packages that weights are from ----


@torch.no_grad()
def diffusers_layers(config: ModelConfig, state: Mapping[str, Tensor], inputs: Inputs) -> Layers:
    """The same of ``diffusers.WanTransformer3DModel`` with these weights, the video alone.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
    """
    from diffusers import WanTransformer3DModel

    sizes: dict[str, Any] = {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "num_layers": config.layers,
    }
    sizes |= {"in_channels": config.latent_channels, "out_channels": config.latent_channels, "ffn_dim": config.ffn}
    sizes |= {"text_dim": config.text_dim, "freq_dim": config.freq_dim}
    model: Any
    with torch.device("meta"):
        model = WanTransformer3DModel(**sizes, patch_size=config.patch, eps=config.eps)
    model.rope = type(model.rope)(config.head_dim, config.patch, 1024).to(inputs.video.device)
    model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    found: Layers = {}

    def embedded(_: nn.Module, __: Any, out: tuple[Tensor, ...]) -> None:
        found["video text"] = out[2]
        found["video timesteps"] = _of_frames(out[1]).unflatten(-1, (6, -1))

    model.condition_embedder.register_forward_hook(embedded)
    model.patch_embedding.register_forward_hook(
        lambda _, __, out: found.__setitem__("video tokens", out.flatten(2).transpose(1, 2))
    )
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: found.__setitem__(f"block {i}, video", out))
    times = inputs.video_timesteps.repeat_interleave(CELLS * CELLS, 1)
    found["video flow"] = model.eval()(inputs.video, times, inputs.text, return_dict=False)[0]
    return found


@torch.no_grad()
def openwam_layers(config: ModelConfig, state: Mapping[str, Tensor], inputs: Inputs) -> Layers:
    """The same of OpenWAM's dual expert with these weights.

    Raises:
        ModuleNotFoundError: openwam is not installed.
    """
    from open_wam.models.policy_variants.dual_expert.dual_stream_execution import finish_packed_video
    from open_wam.models.visual_tower.grid_ids import build_action_grid_ids, build_mesh_id

    core, expert, stack = _openwam_modules(config, state, inputs.video.device)
    device, per_frame = inputs.video.device, config.actions_per_frame
    found: Layers = {}
    video = core.prepare_exact_single_stream_inputs(
        {
            "noisy_latents": inputs.video,
            "text_emb": inputs.text,
            "grid_id": build_mesh_id(FRAMES, CELLS, CELLS, 0.0, device=device)[None],
            "timesteps": inputs.video_timesteps,
        },
        action_mode=False,
    )
    told = None
    if inputs.state is not None:  # the state of a frame, for all its actions
        told = core.proprio_hidden_context_encoder(inputs.state[0])[None].repeat_interleave(per_frame, 1)
    action = expert.pre_dit(
        action_tokens=inputs.action.flatten(1, 2),
        timestep=inputs.action_timesteps.repeat_interleave(per_frame, 1),
        context=inputs.text,
        hidden_context=told,
        action_grid_ids=build_action_grid_ids(num_frames=FRAMES, action_per_frame=per_frame, device=device)[None],
    )
    found |= {"video text": video["text_hidden_states"], "video timesteps": _of_frames(video["timestep_proj"])}
    found |= {"video tokens": video["hidden_states"], "action text": action.context}
    found |= {"action timesteps": _of_frames(action.t_mod), "action tokens": action.tokens}
    for i, block in enumerate(stack.packed_blocks):
        block.register_forward_hook(
            lambda _, __, out, i=i: found.update({f"block {i}, video": out[0], f"block {i}, action": out[1]})
        )
    everything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    length = video["hidden_states"].shape[1], action.tokens.shape[1]
    out = stack(
        video["hidden_states"],
        action.tokens,
        video_timestep_proj=video["timestep_proj"],
        video_rotary_emb=video["rotary_emb"],
        action_temb=action.t_mod,
        action_rotary_emb=action.freqs[:, :, None],
        video_attention_mask=everything.expand(1, 1, length[0], sum(length)),
        action_attention_mask=everything.expand(1, 1, length[1], sum(length)),
        video_text_hidden_states=video["text_hidden_states"],
        action_text_hidden_states=action.context,
    )
    # it takes a sequence for a noisy and a clean copy, and gives the flow of the noisy one
    tokens, temb = (torch.cat([t, t], 1) for t in (out[0], video["temb"]))
    found["video flow"] = finish_packed_video(SimpleNamespace(core=core), tokens, temb, tuple(inputs.video.shape))
    found["action flow"] = expert.post_dit(out[1], action).unflatten(1, (FRAMES, -1))
    return found


@torch.no_grad()
def openwam_parallel_layers(config: ModelConfig, state: Mapping[str, Tensor], inputs: Inputs) -> Layers:
    """The same of OpenWAM's parallel stream, one transformer for both, with these weights.

    Raises:
        ModuleNotFoundError: openwam is not installed.
    """
    from open_wam.models.visual_tower.grid_ids import build_action_grid_ids, build_mesh_id

    core, device, per_frame = _openwam_core(config, inputs.video.device), inputs.video.device, config.actions_per_frame
    nn.ModuleDict({"visual_tower": nn.ModuleDict({"core": core})}).load_state_dict(
        {name: value.float() for name, value in state.items()}, strict=False, assign=True
    )
    given = {
        "video": (inputs.video, build_mesh_id(FRAMES, CELLS, CELLS, 0.0, device=device), inputs.video_timesteps),
        "action": (
            inputs.action.permute(0, 3, 1, 2)[..., None],
            build_action_grid_ids(num_frames=FRAMES, action_per_frame=per_frame, device=device),
            inputs.action_timesteps,
        ),
    }
    found: Layers = {}
    streams = []
    for name, (latents, grid, times) in given.items():
        step = {"noisy_latents": latents, "text_emb": inputs.text, "grid_id": grid[None], "timesteps": times}
        streams.append(made := core.prepare_exact_single_stream_inputs(step, action_mode=name == "action"))
        if name == "action" and inputs.state is not None:  # the state of a frame, for all its actions
            told = core.proprio_hidden_context_encoder(inputs.state[0])[None].repeat_interleave(per_frame, 1)
            made["hidden_states"] = made["hidden_states"] + told
        found |= {"video text": made["text_hidden_states"]} if name == "video" else {}
        found |= {f"{name} timesteps": _of_frames(made["timestep_proj"]), f"{name} tokens": made["hidden_states"]}
    lengths = [made["hidden_states"].shape[1] for made in streams]
    x, rope, temb, times = (
        torch.cat([made[name] for made in streams], 1)
        for name in ("hidden_states", "rotary_emb", "temb", "timestep_proj")
    )
    for i, block in enumerate(core.blocks):
        x = block(x, encoder_hidden_states=found["video text"], temb=times, rotary_emb=rope)[0]
        found |= {f"block {i}, {name}": part for name, part in zip(given, x.split(lengths, 1), strict=True)}
    shift, scale = (core.scale_shift_table[None] + temb[:, :, None]).unbind(2)
    video, action = (core.norm_out(x) * (1 + scale) + shift).split(lengths, 1)
    of_pixels = core.proj_out(video).unflatten(-1, (*config.patch[1:], -1)).unflatten(1, (FRAMES, CELLS, CELLS))
    found["video flow"] = of_pixels.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
    found["action flow"] = core.action_proj_out(action).unflatten(1, (FRAMES, -1))
    return found


def _openwam_core(config: ModelConfig, device: torch.device) -> Any:
    """Its visual core on the meta device, but for its rope."""
    from open_wam.configs.backbone import SharedVideoTransformerConfig
    from open_wam.models.visual_tower.replica_core import SharedVideoTransformerCore

    _, patch_h, patch_w = config.patch
    backbone = SharedVideoTransformerConfig(
        hidden_size=config.hidden, ffn_dim=config.ffn, latent_channels=config.latent_channels, patch_size_h=patch_h,
        patch_size_w=patch_w, latent_norm_eps=config.eps, **_openwam_sizes(config),
    )  # fmt: skip
    with torch.device("meta"):
        core = SharedVideoTransformerCore(backbone, action_dim=config.action_dim, state_dim=config.state_dim)
        if config.state_dim:
            core.configure_proprio_hidden_context_encoder(enabled=True)
    core.rope = type(core.rope)(config.head_dim).to(device)
    return core


def _openwam_sizes(config: ModelConfig) -> dict[str, Any]:
    sizes: dict[str, Any] = {"num_layers": config.layers, "num_heads": config.heads, "text_dim": config.text_dim}
    return sizes | {"freq_dim": config.freq_dim, "attention_head_dim": config.head_dim}


def _openwam_modules(config: ModelConfig, state: Mapping[str, Tensor], device: torch.device) -> tuple[Any, Any, Any]:
    """Its visual core, action expert and packed blocks, which hold these very tensors, in float32."""
    from open_wam.models.policy_variants.dual_expert.modules import DualExpertActionExpert
    from open_wam.models.policy_variants.dual_expert.packed_block import DualExpertPackedBlockStack

    core = _openwam_core(config, device)
    with torch.device("meta"):
        expert = DualExpertActionExpert(
            hidden_size=config.action_hidden, action_dim=config.action_dim, ffn_dim=config.action_ffn,
            hidden_context_dim=config.hidden, eps=config.eps, **_openwam_sizes(config),
        )  # fmt: skip
        stack = DualExpertPackedBlockStack(core.blocks, expert.blocks)
    core.blocks, expert.blocks = nn.ModuleList(), nn.ModuleList()
    expert.rope = type(expert.rope)(config.head_dim).to(device)
    policy = nn.ModuleDict({"action_expert": expert, "packed_block_stack": stack})
    whole = nn.ModuleDict({"visual_tower": nn.ModuleDict({"core": core}), "policy_variant": policy})
    whole.load_state_dict({name: value.float() for name, value in state.items()}, strict=False, assign=True)
    return core, expert, stack


def _of_frames(per_token_BSD: Tensor) -> Tensor:
    """``[B, F, D]`` of what is the same for all tokens of a frame."""
    return per_token_BSD.unflatten(1, (FRAMES, -1))[:, :, 0]
