"""The dual-expert world-action model: a video expert and an action expert that share every attention.

Reads top to bottom: the glue of a block, positions, the modules, the model. Letters of shapes: B samples, S tokens,
F frames, n action slots of a frame, A numbers of an action, C latent channels, D width of an expert, T timesteps of a
stream, H heads, h head width, L text tokens.

A stream's tokens come in runs that share one timestep (the tokens of a frame). Everything that depends on the timestep
stays at ``[B, T, D]``; a ``FrameIndex`` tells the fused ops which row a token reads, so nothing is ever expanded to
one row per token. Attention, norms, modulation, gates, residuals and rope are ``wam_kernels`` ops; matrix products are
PyTorch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wam_kernels import (
    FrameIndex,
    Plan,
    ada_layer_norm,
    block_attention,
    gate_residual_ada_layer_norm,
    qk_norm_rope,
    rope_table,
)
from wam_kernels.runtime.checks import integer

from .._checks import memory
from ..config import ModelConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype of sums and modulations: float32, or float64 where the model is float64."""
    return x if x.dtype == torch.float64 else x.float()


def dtype_of(linear: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """What a linear map takes; ``otherwise`` where its weight does not say: it is quantised, or behind an adapter.

    Parts of a model may differ, because some are kept in float32, or FSDP shards them with another policy.
    """
    weight = getattr(linear, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else otherwise


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dim (all heads together) of the cross-attention's q and k, which have no rope."""
    # PyTorch's fused kernel takes one dtype; under autocast x is narrower than the weight
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


# ---- positions ----


def video_positions(frames: Tensor, rows: int, columns: int) -> Tensor:
    """``(frame, row, column)`` of the tokens of frames ``[..., F]``, float64 ``[..., F * rows * columns, 3]``."""
    places = [torch.arange(n, dtype=torch.float64, device=frames.device) for n in (rows, columns)]
    places = torch.cartesian_prod(*places).expand(*frames.shape, -1, 2)
    return torch.cat([frames.double()[..., None, None].expand(*places.shape[:-1], 1), places], -1).flatten(-3, -2)


def action_positions(frames: Tensor, slots: int) -> Tensor:
    """Positions of action slots, float64 ``[..., F * slots, 3]``: spread between two frames, at row and column -1."""
    inside = torch.arange(1, slots + 1, dtype=torch.float64, device=frames.device) / (slots + 1)
    frame = (frames.double()[..., None] + inside).flatten(-2)[..., None]
    return F.pad(frame, (0, 2), value=-1.0)


@torch.no_grad()
def draw_table(table: Tensor) -> None:
    """A modulation table ``[1, N, D]`` as a new model has it."""
    table.copy_(torch.randn_like(table) / table.shape[-1] ** 0.5)


# ---- modules; attribute names are state-dict keys, see weights.py ----


class Exact:
    """Tensors that keep their dtype where they pass from module to module.

    FSDP's mixed precision casts every float tensor that a module is given, through tuples, dicts and dataclasses, but
    does not look into other objects. In bf16, timesteps near 1000 are 4 apart and a rope table has 3 digits.
    """

    __slots__ = ("tensors",)

    def __init__(self, *tensors: Tensor | None) -> None:
        self.tensors = tensors


class Stream(NamedTuple):
    """What one stream (video or action) brings to the blocks; row t of the modulation serves timestep t's tokens."""

    x: Tensor  # [B, S, D]
    modulation: Exact  # shift1, scale1, gate1, shift2, scale2, gate2 of the blocks: [B, T, D] float32 each
    head: Exact  # shift and scale of the head, likewise
    index: FrameIndex  # the row of every token


class Slots(NamedTuple):
    """Where a block writes its normed and rotated q and k, and its v: ``[B, S, H, h]``, k and v slots of a cache."""

    q: Tensor
    k: Tensor
    v: Tensor


def stream_of(x_BSD: Tensor, t_proj_BT6D: Tensor, head: tuple[Tensor, ...]) -> Stream:
    T = t_proj_BT6D.shape[1]
    index = FrameIndex.from_runs([x_BSD.shape[1] // T] * T, device=x_BSD.device)
    return Stream(x_BSD, Exact(*t_proj_BT6D.unbind(2)), Exact(*head), index)


class Attention(nn.Module):
    """Projections and norms of one attention; who attends to whom is the caller's business."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.head_dim, self.eps = config.head_dim, config.eps
        self.to_q = nn.Linear(width, config.inner)
        self.to_k = nn.Linear(width, config.inner)
        self.to_v = nn.Linear(width, config.inner)
        self.to_out = nn.ModuleList([nn.Linear(config.inner, width)])
        # their weights alone are read: the norm is fused with the rotation, or rms_norm
        self.norm_q = nn.RMSNorm(config.inner)
        self.norm_k = nn.RMSNorm(config.inner)

    def rotated(self, x_BSD: Tensor, rope_Sh2: Tensor, slots: Slots | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v ``[B, S, H, h]``; q and k are normed and rotated. Written to ``slots`` where given."""
        q, k, v = self.to_q(x_BSD), self.to_k(x_BSD), self.to_v(x_BSD)
        weights, options = (self.norm_q.weight, self.norm_k.weight), {"head_dim": self.head_dim, "eps": self.eps}
        if slots is not None:
            return qk_norm_rope(q, k, *weights, rope_Sh2, v=v, out=slots, **options)
        return *qk_norm_rope(q, k, *weights, rope_Sh2, **options), v.unflatten(-1, (-1, self.head_dim))

    def query(self, x_BSD: Tensor) -> Tensor:
        """``[B, S, H, h]``, normed. For the cross-attention, whose q and k have no positions."""
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
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, width))
        self.reset_parameters()
        self.attn1 = Attention(config, width)
        self.attn2 = Attention(config, width)
        self.norm2 = nn.LayerNorm(width, eps=config.eps)
        self.ffn = FeedForward(width, ffn)

    def reset_parameters(self) -> None:
        draw_table(self.scale_shift_table)

    def tables(self) -> tuple[Tensor, ...]:
        """What the block adds to each modulation of a stream: six ``[D]``, float32."""
        return wide(self.scale_shift_table)[0].unbind(0)

    def before(self, stream: Stream, rope: Tensor, slots: Slots | None) -> tuple[Tensor, Tensor, Tensor]:
        (shift, scale, *_), (shift_table, scale_table, *_) = stream.modulation.tensors, self.tables()
        tables = {"shift_table": shift_table, "scale_table": scale_table}
        h = ada_layer_norm(stream.x, shift, scale, stream.index, **tables, eps=self.eps)
        return self.attn1.rotated(h, rope, slots)

    def after(self, stream: Stream, out_BSHh: Tensor, text: TextKV) -> Stream:
        x, index = stream.x, stream.index
        _, _, gate1, shift2, scale2, gate2 = stream.modulation.tensors
        _, _, gate1_table, shift2_table, scale2_table, gate2_table = self.tables()
        norm = self.norm2

        def add(x, update, gate, shift=None, scale=None, **options):
            # under autocast an update comes in a narrower dtype than the residual stream
            return gate_residual_ada_layer_norm(
                x, update.to(x.dtype), gate, shift, scale, index, eps=self.eps, **options
            )

        affine = {"weight": norm.weight, "bias": norm.bias}
        x, h = add(x, self.attn1.output(out_BSHh), gate1, gate_table=gate1_table, **affine)
        tables = {"shift_table": shift2_table, "scale_table": scale2_table}
        x, h = add(x, self.cross_attention(h, text), None, shift2, scale2, **tables)
        x, _ = add(x, self.ffn(h), gate2, gate_table=gate2_table)
        return stream._replace(x=x)

    def cross_attention(self, h_BSD: Tensor, text: TextKV) -> Tensor:
        q = self.attn2.query(h_BSD)
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

    def forward(
        self, streams: Pair, rope: Exact, text: Pair, attend: Callable, slots: Slots | None, wanted: tuple[bool, bool]
    ) -> Pair:
        experts = (self.video_block, self.action_block)
        present = [i for i, stream in enumerate(streams) if stream is not None]
        lengths = [streams[i].x.shape[1] for i in present]
        places = [None] * len(present) if slots is None else zip(*(t.split(lengths, 1) for t in slots), strict=True)
        tables = rope.tensors
        parts = [experts[i].before(streams[i], tables[i], place) for i, place in zip(present, places, strict=True)]
        done: list[Stream | None] = [None, None]
        if not any(wanted[i] for i in present):
            return done[0], done[1]
        q, k, v = (torch.cat(part, 1) for part in zip(*parts, strict=True)) if slots is None else slots
        for i, out in zip(present, attend(q, k, v).split(lengths, 1), strict=True):
            if wanted[i]:
                done[i] = experts[i].after(streams[i], out, text[i])
        return done[0], done[1]


# (video, action); None where a forward has no such tokens.
Pair = tuple


class PackedBlockStack(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.packed_blocks = nn.ModuleList(PackedBlock(config) for _ in range(config.layers))
        self.checkpoint_activations = False

    def forward(
        self,
        streams: Pair,
        rope: Exact,
        text: Sequence[Pair],
        attend: Attend,
        slots: Sequence[Slots] | None = None,
        wanted: Sequence[int] = (0, 1),
    ) -> Pair:
        """The (video, action) streams after the last block; None for a stream that is absent or not wanted.

        Args:
            streams: What goes in; None leaves a stream out.
            rope: Rope table of each stream, (video, action).
            text: ``text[i]`` is the (video, action) text of block i.
            attend: ``attend(i, q, k, v)`` is the attention of block i over ``[video tokens | action tokens]``.
            slots: ``slots[i]`` is where block i writes q, k and v; default new tensors. Inference only.
            wanted: Streams whose result the caller needs: the last block computes nothing else but keys and values.
        """
        last = len(self.packed_blocks) - 1
        # not `i in wanted`: with dynamic=True Dynamo makes the ints symbolic, and finds none of them
        of_last = any(i == 0 for i in wanted), any(i == 1 for i in wanted)
        for i, block in enumerate(self.packed_blocks):

            def attend_here(q, k, v, i=i):
                return attend(i, q, k, v)

            places = None if slots is None else slots[i]
            inputs = streams, rope, text[i], attend_here, places, of_last if i == last else (True, True)
            if self.checkpoint_activations and torch.is_grad_enabled():
                streams = checkpoint(block, *inputs, use_reentrant=False)
            else:
                streams = block(*inputs)
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
    angle = t[..., None] * torch.exp(-math.log(10000.0) * power)
    return torch.cat([angle.cos(), angle.sin()], -1)


class TimeConditioner(nn.Module):
    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = TwoLinears(config.freq_dim, width, F.silu)
        self.time_proj = nn.Linear(width, 6 * width)

    def forward(self, timesteps_BT: Exact, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """temb ``[B, T, D]`` and t_proj ``[B, T, 6, D]``, float32; ``dtype`` as in :func:`dtype_of`."""
        waves = sinusoid(*timesteps_BT.tensors, self.freq_dim)
        temb = self.time_embedder(waves.to(dtype_of(self.time_embedder.linear_1, dtype)))
        t_proj = self.time_proj(F.silu(temb).to(dtype_of(self.time_proj, dtype)))
        return wide(temb), wide(t_proj).unflatten(-1, (6, -1))


class VideoSide(nn.Module):
    """The video expert outside the blocks (``core`` in the state dict)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding_mlp = nn.Linear(config.patch_width, config.hidden)
        self.text_proj = TwoLinears(config.text_dim, config.hidden, gelu_tanh)
        self.time_conditioner = TimeConditioner(config, config.hidden)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, config.hidden))
        self.reset_parameters()
        self.proj_out = nn.Linear(config.hidden, config.patch_width)

    def reset_parameters(self) -> None:
        draw_table(self.scale_shift_table)

    @property
    def dtype(self) -> torch.dtype:
        return self.scale_shift_table.dtype

    def embed(self, video_BCFyx: Tensor, timesteps_BF: Tensor) -> Stream:
        B, C, frames, y, x = video_BCFyx.shape
        _, py, px = self.config.patch
        patches = video_BCFyx.reshape(B, C, frames, y // py, py, x // px, px).permute(0, 2, 3, 5, 1, 4, 6)
        temb, t_proj = self.time_conditioner(Exact(timesteps_BF), self.dtype)
        patches = patches.flatten(4).flatten(1, 3).to(dtype_of(self.patch_embedding_mlp, self.dtype))
        return stream_of(self.patch_embedding_mlp(patches), t_proj, (temb, temb))

    def flow(self, stream: Stream, frames: int, rows: int, columns: int) -> Tensor:
        _, py, px = self.config.patch
        out = head_norm(stream, self.scale_shift_table, self.config.eps)
        out = self.proj_out(out.to(dtype_of(self.proj_out, self.dtype)))
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
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, width))
        self.reset_parameters()
        self.action_proj_out = nn.Linear(width, config.action_dim)

    def reset_parameters(self) -> None:
        draw_table(self.scale_shift_table)

    @property
    def dtype(self) -> torch.dtype:
        return self.scale_shift_table.dtype

    def embed(self, action_BFnA: Tensor, timesteps_BT: Tensor) -> Stream:
        _, t_proj = self.time_conditioner(Exact(timesteps_BT), self.dtype)
        actions = action_BFnA.flatten(1, 2).to(dtype_of(self.action_embedder, self.dtype))
        return stream_of(self.action_embedder(actions), t_proj, (t_proj[:, :, 0], t_proj[:, :, 1]))

    def flow(self, stream: Stream, frames: int) -> Tensor:
        out = head_norm(stream, self.scale_shift_table, self.config.eps)
        out = self.action_proj_out(out.to(dtype_of(self.action_proj_out, self.dtype)))
        return out.unflatten(1, (frames, -1))


def head_norm(stream: Stream, table_12D: Tensor, eps: float) -> Tensor:
    shift_table, scale_table = wide(table_12D)[0].unbind(0)
    tables = {"shift_table": shift_table, "scale_table": scale_table}
    return ada_layer_norm(stream.x, *stream.head.tensors, stream.index, **tables, eps=eps)


class WorldActionModel(nn.Module):
    """Predicts the flow of video latents and of actions, both from the same packed sequence.

    :meth:`forward` is the packed forward of training. A rollout uses the parts it is made of (:meth:`embed_text`,
    :meth:`embed`, :meth:`rope`, ``packed_block_stack``, :meth:`flows`) with an ``attend`` of its own.

    Raises:
        ValueError: a model that the device's memory cannot hold, before anything is allocated.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        device = torch.get_default_device()
        needed, there = config.matrices * torch.get_default_dtype().itemsize, memory(device)
        if needed > there:
            raise ValueError(
                f"WorldActionModel: config has {config.matrices:.3g} numbers in its matrices, which take {needed:.3g} "
                f"bytes, more than the {there:.3g} of {device}; make hidden, heads, ffn or layers smaller"
            )
        self.config = config
        self.core = VideoSide(config)
        self.packed_block_stack = PackedBlockStack(config)
        self.action_expert = ActionSide(config)
        self._draw_linears()

    def reset_parameters(self) -> None:
        """Draw every parameter anew; what a model that was made on the meta device needs after ``to_empty``."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self._draw_linears()

    def _draw_linears(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # A flow of zero is the best guess that knows nothing, and it leaves the first steps to the last layer.
        nn.init.zeros_(self.core.proj_out.weight)
        nn.init.zeros_(self.action_expert.action_proj_out.weight)

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.core.patch_embedding_mlp, self.core.dtype)

    @property
    def device(self) -> torch.device:
        return self.core.scale_shift_table.device

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
        core, expert = self.core, self.action_expert
        video = core.text_proj(text_BLE.to(dtype_of(core.text_proj.linear_1, core.dtype)))
        action = expert.context_proj(text_BLE.to(dtype_of(expert.context_proj, expert.dtype)))
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
            None if video is None else self.core.embed(video, video_t),
            None if action is None else self.action_expert.embed(action, action_t.flatten(1)),
        )

    def rope(self, video_frames: Tensor | None, rows: int, columns: int, action_frames: Tensor | None) -> Pair:
        """Rope tables of the tokens of absolute frames ``[F]``, or ``[B, F]`` where samples differ; None: no stream."""

        def table(positions: Tensor) -> Tensor:
            c, dtype = self.config, torch.promote_types(self.dtype, torch.float32)
            return rope_table(positions, c.head_dim, theta=c.rope_theta, dtype=dtype)

        return (
            None if video_frames is None else table(video_positions(video_frames, rows, columns)),
            None if action_frames is None else table(action_positions(action_frames, self.config.actions_per_frame)),
        )

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
        if latent_y < 1 or latent_x < 1 or latent_y % py or latent_x % px:
            raise ValueError(
                f"video must have positive rows and columns divisible by patch {(py, px)}, got {(latent_y, latent_x)}"
            )
        return latent_y // py, latent_x // px

    def forward(
        self,
        noisy_video: Tensor,
        clean_video: Tensor,
        noisy_action: Tensor,
        clean_action: Tensor,
        video_timesteps: Tensor | Exact,
        action_timesteps: Tensor | Exact,
        text: Tensor,
        plan: Plan | None = None,
        *,
        clean_video_timesteps: Tensor | Exact | None = None,
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
            video_timesteps: ``[B, F]`` of the noisy slot, from 0 (clean) to 1000 (noise); not narrower than float32.
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
            ValueError: shapes or dtypes that do not fit, or not exactly one of ``plan`` and ``attend``.
        """
        video_timesteps, action_timesteps, clean_video_timesteps = (
            t.tensors[0] if isinstance(t, Exact) else t
            for t in (video_timesteps, action_timesteps, clean_video_timesteps)
        )
        if clean_video_timesteps is None:
            clean_video_timesteps = torch.zeros_like(video_timesteps)
        frame_start = integer("WorldActionModel", "frame_start", frame_start)
        frames = self._check(
            noisy_video, clean_video, noisy_action, clean_action, video_timesteps, action_timesteps,
            clean_video_timesteps, text,
        )  # fmt: skip
        rows, columns = self.token_grid(*noisy_video.shape[-2:])
        if (plan is None) == (attend is None):
            raise ValueError(
                "WorldActionModel: give either plan or attend, got " + ("neither" if plan is None else "both")
            )
        if attend is None:

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return block_attention(q, k, v, plan, impl=impl)

        streams = self.embed(
            torch.cat([noisy_video, clean_video], 2),
            torch.cat([video_timesteps, clean_video_timesteps], 1),
            torch.cat([noisy_action, clean_action], 1),
            torch.cat([action_timesteps, torch.zeros_like(action_timesteps)], 1),
        )
        # noisy and clean copies share positions
        positions = torch.arange(frame_start, frame_start + frames, device=self.device).repeat(2)
        rope = self.rope(positions, rows, columns, positions)
        streams = self.packed_block_stack(streams, Exact(*rope), self.embed_text(text), attend)
        return self.flows(tuple(first_half(s) for s in streams), frames, rows, columns)

    def _check(
        self, noisy_video, clean_video, noisy_action, clean_action, video_timesteps, action_timesteps,
        clean_video_timesteps, text,
    ) -> int:  # fmt: skip
        c = self.config
        if noisy_video.ndim != 5 or noisy_video.shape[1] != c.latent_channels or not noisy_video.shape[2]:
            raise ValueError(
                f"noisy_video must be [B, {c.latent_channels}, F >= 1, y, x], got {list(noisy_video.shape)}"
            )
        B, frames = noisy_video.shape[0], noisy_video.shape[2]
        expected = {
            "clean_video": (clean_video, tuple(noisy_video.shape)),
            "noisy_action": (noisy_action, (B, frames, c.actions_per_frame, c.action_dim)),
            "clean_action": (clean_action, (B, frames, c.actions_per_frame, c.action_dim)),
            "video_timesteps": (video_timesteps, (B, frames)),
            "action_timesteps": (action_timesteps, (B, frames, c.actions_per_frame)[: max(action_timesteps.ndim, 2)]),
            "clean_video_timesteps": (clean_video_timesteps, (B, frames)),
            "text": (text, (B, *text.shape[1:2], c.text_dim)),
        }
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
            if "timesteps" in name and tensor.dtype in (torch.bfloat16, torch.float16):
                raise ValueError(
                    f"{name} must be float32 or float64, got {tensor.dtype}, which does not tell neighbours apart; "
                    "where FSDP casts them, use training_step, or MixedPrecisionPolicy(cast_forward_inputs=False) on "
                    "the model"
                )
        return frames


def first_half(stream: Stream) -> Stream:
    """The noisy half of a packed stream, as far as a head needs it."""
    shift, scale = stream.head.tensors
    S, T = stream.x.shape[1] // 2, shift.shape[1] // 2
    index = FrameIndex.from_runs([S // max(T, 1)] * T, device=stream.x.device)
    return Stream(stream.x[:, :S], Exact(), Exact(shift[:, :T], scale[:, :T]), index)
