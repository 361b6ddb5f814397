"""The dual-expert world-action model: a video expert and an action expert that share every attention.

Reads top to bottom: the glue of a block, positions, the modules, the model. Letters of shapes: B samples, S tokens,
F frames, n action slots of a frame, A numbers of an action, C latent channels, D width of an expert, T timesteps of a
stream, H heads, h head width, L text tokens.

A stream's tokens come in runs that share one timestep (the tokens of a frame). Everything that depends on the timestep
stays at ``[B, T, ...]`` and meets the tokens as ``[B, T, run, D]``, so nothing is ever expanded to one row per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wam_kernels import Plan, block_attention

from .config import ModelConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


# ---- the glue of a block: sums and modulations in float32, results in the dtype that came in ----


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype of sums: float32, or float64 where the model is float64."""
    return x if x.dtype == torch.float64 else x.float()


def by_timestep(x_BSD: Tensor, timesteps: int) -> Tensor:
    """Tokens grouped by the timestep they share: ``[B, S, D]`` to ``[B, T, S / T, D]``, no copy."""
    return x_BSD.unflatten(1, (timesteps, -1))


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """LayerNorm without affine over the last dim, in float32 (and left there)."""
    return F.layer_norm(wide(x), x.shape[-1:], eps=eps)


def ada_layer_norm(x_BSD: Tensor, shift_BTD: Tensor, scale_BTD: Tensor, eps: float) -> Tensor:
    """``LN(x) * (1 + scale) + shift`` with one scale and shift for each run of tokens."""
    x_BTRD = by_timestep(layer_norm(x_BSD, eps), scale_BTD.shape[1])
    return (x_BTRD * (1 + scale_BTD[:, :, None]) + shift_BTD[:, :, None]).flatten(1, 2).to(x_BSD.dtype)


def gated_residual(x_BSD: Tensor, update_BSD: Tensor, gate_BTD: Tensor) -> Tensor:
    """``x + gate * update`` with one gate for each run of tokens."""
    update_BTRD = by_timestep(update_BSD, gate_BTD.shape[1]) * gate_BTD[:, :, None]
    return (wide(x_BSD) + update_BTRD.flatten(1, 2)).to(x_BSD.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dim: for q and k that is all heads together."""
    return (F.rms_norm(wide(x), weight.shape, eps=eps) * wide(weight)).to(x.dtype)


def rotate(x_BSHh: Tensor, rope: Rope) -> Tensor:
    """Rotary position embedding of the pairs ``(x[2i], x[2i+1])``."""
    even, odd = wide(x_BSHh).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = even * rope.cos - odd * rope.sin, even * rope.sin + odd * rope.cos
    return torch.stack(rotated, -1).flatten(-2).to(x_BSHh.dtype)


# ---- positions ----


class Rope(NamedTuple):
    """Cosines and sines ``[S, 1, h / 2]`` of the tokens' rotation angles, float32 (float64 in a float64 model)."""

    cos: Tensor
    sin: Tensor


def video_positions(frames_F: Tensor, rows: int, columns: int) -> Tensor:
    """``(frame, row, column)`` of the tokens of the given frames, float64 ``[F * rows * columns, 3]``."""
    y, x = (torch.arange(n, dtype=torch.float64, device=frames_F.device) for n in (rows, columns))
    return torch.cartesian_prod(frames_F.double(), y, x).reshape(-1, 3)


def action_positions(frames_F: Tensor, slots: int) -> Tensor:
    """Positions of action slots, float64 ``[F * slots, 3]``: spread between two frames, at row and column -1."""
    inside = torch.arange(1, slots + 1, dtype=torch.float64, device=frames_F.device) / (slots + 1)
    frame = (frames_F.double()[:, None] + inside).reshape(-1, 1)
    return F.pad(frame, (0, 2), value=-1.0)


def rope_of(positions_S3: Tensor, config: ModelConfig, dtype: torch.dtype) -> Rope:
    """Rotation of each token; angles in float64, because bf16 or float32 frame numbers drift over a long episode."""
    angles = []
    for axis, width in enumerate(config.rope_split):
        power = torch.arange(0, width, 2, dtype=torch.float64, device=positions_S3.device) / max(width, 1)
        angles.append(positions_S3[:, axis : axis + 1] * config.rope_theta**-power)
    angle = torch.cat(angles, -1)[:, None]
    dtype = torch.promote_types(dtype, torch.float32)
    return Rope(angle.cos().to(dtype), angle.sin().to(dtype))


# ---- modules; attribute names are state-dict keys, see wam_models.checkpoint ----


class Stream(NamedTuple):
    """What one stream (video or action) brings to the blocks; one row of the timestep tensors serves S / T tokens."""

    x: Tensor  # [B, S, D]
    t_proj: Tensor  # [B, T, 6, D] float32, modulation of the blocks
    head: Tensor  # [B, T, 2, D] or [B, T, 1, D] float32, modulation of the head


class Attention(nn.Module):
    """Projections and norms of one attention; who attends to whom is the caller's business."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.head_dim, self.eps = config.head_dim, config.eps
        self.to_q = nn.Linear(width, config.inner)
        self.to_k = nn.Linear(width, config.inner)
        self.to_v = nn.Linear(width, config.inner)
        self.to_out = nn.ModuleList([nn.Linear(config.inner, width)])
        self.norm_q = nn.Module()
        self.norm_k = nn.Module()
        for norm in (self.norm_q, self.norm_k):
            norm.weight = nn.Parameter(torch.ones(config.inner))

    def query(self, x_BSD: Tensor) -> Tensor:
        """``[B, S, H, h]``, normed."""
        return rms_norm(self.to_q(x_BSD), self.norm_q.weight, self.eps).unflatten(-1, (-1, self.head_dim))

    def key_value(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Two ``[B, S, H, h]``; the keys are normed."""
        k = rms_norm(self.to_k(x_BSD), self.norm_k.weight, self.eps).unflatten(-1, (-1, self.head_dim))
        return k, self.to_v(x_BSD).unflatten(-1, (-1, self.head_dim))

    def output(self, out_BSHh: Tensor) -> Tensor:
        return self.to_out[0](out_BSHh.flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(width, inner)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(inner, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))


class ExpertBlock(nn.Module):
    """One expert's half of a block: what comes before the shared attention, and what comes after."""

    def __init__(self, config: ModelConfig, width: int, ffn: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)
        self.attn1 = Attention(config, width)
        self.attn2 = Attention(config, width)
        self.norm2 = nn.LayerNorm(width, eps=config.eps)
        self.ffn = FeedForward(width, ffn)

    def modulation(self, stream: Stream) -> tuple[Tensor, ...]:
        """shift1, scale1, gate1, shift2, scale2, gate2: ``[B, T, D]`` each, float32."""
        return (wide(self.scale_shift_table) + stream.t_proj).unbind(2)

    def before(self, stream: Stream, modulation: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        shift, scale = modulation[:2]
        h = ada_layer_norm(stream.x, shift, scale, self.eps)
        return self.attn1.query(h), *self.attn1.key_value(h)

    def after(self, stream: Stream, out_BSHh: Tensor, text: TextKV, modulation: tuple[Tensor, ...]) -> Stream:
        _, _, gate1, shift2, scale2, gate2 = modulation
        x = gated_residual(stream.x, self.attn1.output(out_BSHh), gate1)
        x = x + self.cross_attention(x, text)
        h = ada_layer_norm(x, shift2, scale2, self.eps)
        return stream._replace(x=gated_residual(x, self.ffn(h), gate2))

    def cross_attention(self, x_BSD: Tensor, text: TextKV) -> Tensor:
        norm = self.norm2
        x = F.layer_norm(wide(x_BSD), norm.normalized_shape, wide(norm.weight), wide(norm.bias), norm.eps)
        q = self.attn2.query(x.to(x_BSD.dtype))
        k, v = text if isinstance(text, tuple) else self.attn2.key_value(text)
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return self.attn2.output(out.transpose(1, 2))


# Text as one block's cross-attention takes it: projected embeddings [B, L, D], or their keys and values.
TextKV = Tensor | tuple[Tensor, Tensor]


class PackedBlock(nn.Module):
    """Both experts' halves around one attention over ``[video tokens | action tokens]``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.video_block = ExpertBlock(config, config.hidden, config.ffn)
        self.action_block = ExpertBlock(config, config.action_hidden, config.action_ffn)

    def forward(self, streams: Pair, rope: Rope, text: Pair, attend: Callable) -> Pair:
        experts = (self.video_block, self.action_block)
        present = [i for i, stream in enumerate(streams) if stream is not None]
        modulations = {i: experts[i].modulation(streams[i]) for i in present}
        parts = [experts[i].before(streams[i], modulations[i]) for i in present]
        q, k, v = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        out = attend(rotate(q, rope), rotate(k, rope), v)
        outs = out.split([streams[i].x.shape[1] for i in present], 1)
        done: list[Stream | None] = [None, None]
        for i, part in zip(present, outs, strict=True):
            done[i] = experts[i].after(streams[i], part, text[i], modulations[i])
        return done[0], done[1]


# (video, action); None where a forward has no such tokens.
Pair = tuple


class PackedBlockStack(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.packed_blocks = nn.ModuleList(PackedBlock(config) for _ in range(config.layers))
        self.checkpoint_activations = False

    def forward(self, streams: Pair, rope: Rope, text: Sequence[Pair], attend: Attend) -> Pair:
        """``text[i]`` is the (video, action) text of block i; ``attend(i, q, k, v)`` is its attention."""
        for i, block in enumerate(self.packed_blocks):

            def attend_here(q, k, v, i=i):
                return attend(i, q, k, v)

            if self.checkpoint_activations and torch.is_grad_enabled():
                streams = checkpoint(block, streams, rope, text[i], attend_here, use_reentrant=False)
            else:
                streams = block(streams, rope, text[i], attend_here)
        return streams


class TwoLinears(nn.Module):
    def __init__(self, width_in: int, width: int, activation: Callable) -> None:
        super().__init__()
        self.activation = activation
        self.linear_1 = nn.Linear(width_in, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def sinusoid(timesteps_BT: Tensor, width: int) -> Tensor:
    """``[B, T, width]``: cosines, then sines, of ``t * 10000^(-i / (width / 2))``; float32 at least."""
    half = width // 2
    t = wide(timesteps_BT)
    power = torch.arange(half, dtype=t.dtype, device=t.device) / half
    angle = t[..., None] * torch.exp(-torch.log(torch.tensor(10000.0, dtype=t.dtype, device=t.device)) * power)
    return torch.cat([angle.cos(), angle.sin()], -1)


class TimeConditioner(nn.Module):
    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = TwoLinears(config.freq_dim, width, F.silu)
        self.time_proj = nn.Linear(width, 6 * width)

    def forward(self, timesteps_BT: Tensor) -> tuple[Tensor, Tensor]:
        """temb ``[B, T, D]`` and t_proj ``[B, T, 6, D]``, float32."""
        dtype = self.time_proj.weight.dtype
        temb = self.time_embedder(sinusoid(timesteps_BT, self.freq_dim).to(dtype))
        return wide(temb), wide(self.time_proj(F.silu(temb))).unflatten(-1, (6, -1))


class VideoSide(nn.Module):
    """The video expert outside the blocks (``core`` in the state dict)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding_mlp = nn.Linear(config.patch_width, config.hidden)
        self.text_proj = TwoLinears(config.text_dim, config.hidden, gelu_tanh)
        self.time_conditioner = TimeConditioner(config, config.hidden)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, config.hidden) / config.hidden**0.5)
        self.proj_out = nn.Linear(config.hidden, config.patch_width)

    def embed(self, video_BCFyx: Tensor, timesteps_BF: Tensor) -> Stream:
        B, C, frames, y, x = video_BCFyx.shape
        _, py, px = self.config.patch
        patches = video_BCFyx.reshape(B, C, frames, y // py, py, x // px, px).permute(0, 2, 3, 5, 1, 4, 6)
        temb, t_proj = self.time_conditioner(timesteps_BF)
        return Stream(self.patch_embedding_mlp(patches.flatten(4).flatten(1, 3)), t_proj, temb[:, :, None])

    def flow(self, stream: Stream, frames: int, rows: int, columns: int) -> Tensor:
        _, py, px = self.config.patch
        out = self.proj_out(head_norm(stream, self.scale_shift_table, self.config.eps))
        out = out.unflatten(-1, (py, px, -1)).unflatten(1, (frames, rows, columns))
        return out.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


class ActionSide(nn.Module):
    """The action expert outside the blocks (``action_expert`` in the state dict)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.action_hidden
        self.action_embedder = nn.Linear(config.action_dim, width)
        self.context_proj = nn.Linear(config.text_dim, width)
        self.time_conditioner = TimeConditioner(config, width)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.action_proj_out = nn.Linear(width, config.action_dim)

    def embed(self, action_BFnA: Tensor, timesteps_BT: Tensor) -> Stream:
        _, t_proj = self.time_conditioner(timesteps_BT)
        return Stream(self.action_embedder(action_BFnA.flatten(1, 2)), t_proj, t_proj[:, :, :2])

    def flow(self, stream: Stream, frames: int) -> Tensor:
        out = self.action_proj_out(head_norm(stream, self.scale_shift_table, self.config.eps))
        return out.unflatten(1, (frames, -1))


def head_norm(stream: Stream, table_12D: Tensor, eps: float) -> Tensor:
    shift, scale = (wide(table_12D) + stream.head).unbind(2)
    return ada_layer_norm(stream.x, shift, scale, eps)


class WorldActionModel(nn.Module):
    """Predicts the flow of video latents and of actions, both from the same packed sequence.

    :meth:`forward` is the packed forward of training. A rollout uses the parts it is made of (:meth:`embed_text`,
    :meth:`embed`, :meth:`rope`, :meth:`blocks`, :meth:`flows`) with an ``attend`` of its own.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.core = VideoSide(config)
        self.packed_block_stack = PackedBlockStack(config)
        self.action_expert = ActionSide(config)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # A flow of zero is the best guess that knows nothing, and it leaves the first steps to the last layer.
        nn.init.zeros_(self.core.proj_out.weight)
        nn.init.zeros_(self.action_expert.action_proj_out.weight)

    @property
    def dtype(self) -> torch.dtype:
        return self.core.proj_out.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.core.proj_out.weight.device

    def checkpoint_activations(self, on: bool = True) -> None:
        """Recompute each block in the backward instead of keeping its activations."""
        self.packed_block_stack.checkpoint_activations = on

    def embed_text(self, text_BLE: Tensor, keys_values: bool = False) -> list[Pair]:
        """The (video, action) text of every block, from raw embeddings ``[B, L, text_dim]``.

        With ``keys_values`` the cross-attention keys and values are computed here, once, for the many forwards of a
        rollout; without, each block computes its own, which keeps them out of a training step's memory.
        """
        if text_BLE.ndim != 3 or text_BLE.shape[-1] != self.config.text_dim:
            raise ValueError(f"text must be [B, L, text_dim={self.config.text_dim}], got {list(text_BLE.shape)}")
        text_BLE = text_BLE.to(self.dtype)
        video, action = self.core.text_proj(text_BLE), self.action_expert.context_proj(text_BLE)
        blocks = self.packed_block_stack.packed_blocks
        if not keys_values:
            return [(video, action)] * len(blocks)
        return [(b.video_block.attn2.key_value(video), b.action_block.attn2.key_value(action)) for b in blocks]

    def embed(
        self, video: Tensor | None, video_t: Tensor | None, action: Tensor | None, action_t: Tensor | None
    ) -> Pair:
        """Streams of video latents ``[B, C, F, y, x]`` and actions ``[B, F, n, A]``; None leaves a stream out.

        Timesteps run from 0 (clean) to 1000: ``[B, F]``, for actions also ``[B, F, n]``.
        """
        return (
            None if video is None else self.core.embed(video.to(self.dtype), video_t),
            None if action is None else self.action_expert.embed(action.to(self.dtype), action_t.flatten(1)),
        )

    def rope(self, video_frames: Tensor | None, rows: int, columns: int, action_frames: Tensor | None) -> Rope:
        """Rotation of the tokens of the given absolute frames (1-D tensors; None leaves a stream out)."""
        parts = []
        if video_frames is not None:
            parts.append(video_positions(video_frames, rows, columns))
        if action_frames is not None:
            parts.append(action_positions(action_frames, self.config.actions_per_frame))
        return rope_of(torch.cat(parts), self.config, self.dtype)

    def blocks(self, streams: Pair, rope: Rope, text: Sequence[Pair], attend: Attend) -> Pair:
        return self.packed_block_stack(streams, rope, text, attend)

    def flows(self, streams: Pair, frames: int, rows: int, columns: int) -> tuple[Tensor | None, Tensor | None]:
        """Flow of video ``[B, C, F, y, x]`` and of actions ``[B, F, n, A]``; None where the stream is None."""
        video, action = streams
        return (
            None if video is None else self.core.flow(video, frames, rows, columns),
            None if action is None else self.action_expert.flow(action, frames),
        )

    def token_grid(self, latent_y: int, latent_x: int) -> tuple[int, int]:
        """Rows and columns of video tokens of a latent frame."""
        _, py, px = self.config.patch
        if latent_y % py or latent_x % px:
            raise ValueError(
                f"video must have rows and columns divisible by patch {(py, px)}, got {(latent_y, latent_x)}"
            )
        return latent_y // py, latent_x // px

    def forward(
        self,
        noisy_video: Tensor,
        clean_video: Tensor,
        noisy_action: Tensor,
        clean_action: Tensor,
        video_timesteps: Tensor,
        action_timesteps: Tensor,
        text: Tensor,
        plan: Plan | None = None,
        *,
        clean_video_timesteps: Tensor | None = None,
        frame_start: int = 0,
        attend: Attend | None = None,
        impl: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One packed forward over ``[V_noisy | V_clean | A_noisy | A_clean]``.

        Args:
            noisy_video: ``[B, C, F, y, x]`` latents of the noisy slot.
            clean_video: As ``noisy_video``: the clean copy that later chunks read.
            noisy_action: ``[B, F, n, A]``; the actions of frame f lead from frame f - 1 to frame f.
            clean_action: As ``noisy_action``.
            video_timesteps: ``[B, F]`` of the noisy slot, from 0 (clean) to 1000 (noise).
            action_timesteps: ``[B, F]``, or ``[B, F, n]`` where slots of a frame differ.
            text: ``[B, L, text_dim]`` raw text embeddings.
            plan: From ``wam_kernels.compile_plan`` for the packed sequence, on the model's device.
            clean_video_timesteps: ``[B, F]`` where the clean copy is noised; default all 0.
            frame_start: Absolute frame of the first frame: moves the rope positions, nothing else.
            attend: Instead of a plan: the attention, ``attend(layer, q, k, v)`` with ``[B, S, H, h]`` tensors.
            impl: Backend of ``block_attention``.

        Returns:
            The predicted flows of the noisy slots: ``[B, C, F, y, x]`` and ``[B, F, n, A]``, dtype of the model.

        Raises:
            ValueError: shapes that do not fit, or not exactly one of ``plan`` and ``attend``.
        """
        frames = self._check(noisy_video, clean_video, noisy_action, clean_action, video_timesteps, action_timesteps)
        rows, columns = self.token_grid(*noisy_video.shape[-2:])
        if (plan is None) == (attend is None):
            raise ValueError(
                "WorldActionModel: give either plan or attend, got " + ("neither" if plan is None else "both")
            )
        if attend is None:

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return block_attention(q, k, v, plan, impl=impl)

        if clean_video_timesteps is None:
            clean_video_timesteps = torch.zeros_like(video_timesteps)
        streams = self.embed(
            torch.cat([noisy_video, clean_video], 2),
            torch.cat([video_timesteps, clean_video_timesteps], 1),
            torch.cat([noisy_action, clean_action], 1),
            torch.cat([action_timesteps, torch.zeros_like(action_timesteps)], 1),
        )
        # noisy and clean copies share positions
        positions = torch.arange(frame_start, frame_start + frames, device=self.device).repeat(2)
        rope = self.rope(positions, rows, columns, positions)
        streams = self.blocks(streams, rope, self.embed_text(text), attend)
        return self.flows(tuple(first_half(s) for s in streams), frames, rows, columns)

    def _check(self, noisy_video, clean_video, noisy_action, clean_action, video_timesteps, action_timesteps) -> int:
        c = self.config
        B, frames = noisy_video.shape[0], noisy_video.shape[2]
        expected = {
            "clean_video": (clean_video, tuple(noisy_video.shape)),
            "noisy_action": (noisy_action, (B, frames, c.actions_per_frame, c.action_dim)),
            "clean_action": (clean_action, (B, frames, c.actions_per_frame, c.action_dim)),
            "video_timesteps": (video_timesteps, (B, frames)),
            "action_timesteps": (action_timesteps, (B, frames, c.actions_per_frame)[: action_timesteps.ndim]),
        }
        if noisy_video.ndim != 5 or noisy_video.shape[1] != c.latent_channels:
            raise ValueError(f"noisy_video must be [B, {c.latent_channels}, F, y, x], got {list(noisy_video.shape)}")
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
        return frames


def first_half(stream: Stream) -> Stream:
    """The noisy half of a packed stream."""
    S, T = stream.x.shape[1] // 2, stream.head.shape[1] // 2
    return Stream(stream.x[:, :S], stream.t_proj[:, :T], stream.head[:, :T])
