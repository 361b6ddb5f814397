"""The dual-expert world-action model: a video expert and an action expert that share every attention.

The blocks are in ``blocks``; here is what is around them: what makes tokens of latents and actions, what makes flows
of tokens, and the model. Letters of shapes: B samples, S tokens, F frames, n action tokens of a frame, A numbers of an
action, C latent channels, D width of an expert, T timesteps of a stream, H heads, h head width, L text tokens. Names of
attributes are keys of the state dict, see ``weights``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wam_kernels import FrameIndex, Plan, ada_layer_norm, block_attention, rope_table
from wam_kernels.runtime.checks import integer

from ..config import ModelConfig
from ..runtime.checks import memory
from .blocks import (
    Attend,
    PackedBlock,
    PackedBlockStack,
    Pair,
    StreamInputs,
    Text,
    Uncast,
    at_least_float32,
    draw_table,
    dtype_of,
    stream_inputs,
)
from .positions import action_positions, video_positions


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
    t = at_least_float32(timesteps_BT)
    power = torch.arange(half, dtype=t.dtype, device=t.device) / half
    angle = t[..., None] * torch.exp(-math.log(10000.0) * power)
    return torch.cat([angle.cos(), angle.sin()], -1)


class TimeConditioner(nn.Module):
    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = TwoLinears(config.freq_dim, width, F.silu)
        self.time_proj = nn.Linear(width, 6 * width)

    def forward(self, timesteps_BT: Uncast[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """temb ``[B, T, D]`` and t_proj ``[B, T, 6, D]``, float32; ``dtype`` as in :func:`dtype_of`."""
        waves = sinusoid(timesteps_BT.tensors[0], self.freq_dim)
        temb = self.time_embedder(waves.to(dtype_of(self.time_embedder.linear_1, dtype)))
        t_proj = self.time_proj(F.silu(temb).to(dtype_of(self.time_proj, dtype)))
        return at_least_float32(temb), at_least_float32(t_proj).unflatten(-1, (6, -1))


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

    def embed(self, video_BCFyx: Tensor, timesteps_BF: Tensor) -> StreamInputs:
        B, C, frames, y, x = video_BCFyx.shape
        _, py, px = self.config.patch
        patches = video_BCFyx.reshape(B, C, frames, y // py, py, x // px, px).permute(0, 2, 3, 5, 1, 4, 6)
        temb, t_proj = self.time_conditioner(Uncast(timesteps_BF), self.dtype)
        patches = patches.flatten(4).flatten(1, 3).to(dtype_of(self.patch_embedding_mlp, self.dtype))
        return stream_inputs(self.patch_embedding_mlp(patches), t_proj, (temb, temb))

    def flow(self, stream: StreamInputs, frames: int, rows: int, columns: int) -> Tensor:
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

    def embed(self, action_BFnA: Tensor, timesteps_BT: Tensor) -> StreamInputs:
        _, t_proj = self.time_conditioner(Uncast(timesteps_BT), self.dtype)
        actions = action_BFnA.flatten(1, 2).to(dtype_of(self.action_embedder, self.dtype))
        return stream_inputs(self.action_embedder(actions), t_proj, (t_proj[:, :, 0], t_proj[:, :, 1]))

    def flow(self, stream: StreamInputs, frames: int) -> Tensor:
        out = head_norm(stream, self.scale_shift_table, self.config.eps)
        out = self.action_proj_out(out.to(dtype_of(self.action_proj_out, self.dtype)))
        return out.unflatten(1, (frames, -1))


def head_norm(stream: StreamInputs, table_12D: Tensor, eps: float) -> Tensor:
    shift_table, scale_table = at_least_float32(table_12D)[0].unbind(0)
    shift, scale = stream.head.tensors
    return ada_layer_norm(
        stream.x, shift, scale, stream.frame_index, shift_table=shift_table, scale_table=scale_table, eps=eps
    )


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
        needed, available = config.matrices * torch.get_default_dtype().itemsize, memory(device)
        if needed > available:
            raise ValueError(
                f"WorldActionModel: config has {config.matrices:.3g} numbers in its matrices, which take {needed:.3g} "
                f"bytes, more than the {available:.3g} of {device}; make hidden, heads, ffn or layers smaller"
            )
        self.config = config
        self.core = VideoSide(config)
        self.packed_block_stack = PackedBlockStack(config)
        self.action_expert = ActionSide(config)
        self._draw_linears()

    def reset_parameters(self) -> None:
        """Draw every parameter anew; what a model that was made on the meta device needs after ``to_empty``."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()
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

    def embed_text(self, text_BLE: Tensor, keys_values: bool = False) -> list[Pair[Text]]:
        """The (video, action) text of every block, from raw embeddings ``[B, L, text_dim]``.

        With ``keys_values`` the cross-attention keys and values are computed here, once, for the many forwards of a
        rollout; without, each block computes its own, which keeps them out of a training step's memory.
        """
        if text_BLE.ndim != 3 or text_BLE.shape[-1] != self.config.text_dim:
            raise ValueError(f"text must be [B, L, text_dim={self.config.text_dim}], got {list(text_BLE.shape)}")
        core, expert = self.core, self.action_expert
        video = core.text_proj(text_BLE.to(dtype_of(core.text_proj.linear_1, core.dtype)))
        action = expert.context_proj(text_BLE.to(dtype_of(expert.context_proj, expert.dtype)))
        blocks = cast(Iterable[PackedBlock], self.packed_block_stack.packed_blocks)
        if not keys_values:
            return [(video, action) for _ in blocks]
        return [(b.video_block.attn2.key_value(video), b.action_block.attn2.key_value(action)) for b in blocks]

    def embed(self, video: Pair[Tensor] | None, action: Pair[Tensor] | None) -> Pair[StreamInputs | None]:
        """What the streams bring to the blocks, each made of its data and timesteps; None leaves a stream out.

        Video latents are ``[B, C, F, y, x]``, actions ``[B, F, n, A]``. Timesteps run from 0 (clean) to 1000:
        ``[B, F]``, for actions also ``[B, F, n]``.
        """
        return (
            None if video is None else self.core.embed(*video),
            None if action is None else self.action_expert.embed(action[0], action[1].flatten(1)),
        )

    def rope(
        self, video_frames: Tensor | None, rows: int, columns: int, action_frames: Tensor | None
    ) -> Pair[Tensor | None]:
        """Rope tables of the tokens of absolute frames ``[F]``, or ``[B, F]`` where samples differ; None: no stream."""

        def table(positions: Tensor) -> Tensor:
            c, dtype = self.config, torch.promote_types(self.dtype, torch.float32)
            return rope_table(positions, c.head_dim, theta=c.rope_theta, dtype=dtype)

        return (
            None if video_frames is None else table(video_positions(video_frames, rows, columns)),
            None if action_frames is None else table(action_positions(action_frames, self.config.actions_per_frame)),
        )

    def flows(self, streams: Pair[StreamInputs | None], frames: int, rows: int, columns: int) -> Pair[Tensor | None]:
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
        video_timesteps: Tensor | Uncast[Tensor],
        action_timesteps: Tensor | Uncast[Tensor],
        text: Tensor,
        plan: Plan | None = None,
        *,
        clean_video_timesteps: Tensor | Uncast[Tensor] | None = None,
        frame_start: int = 0,
        attend: Attend | None = None,
        impl: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One packed forward over ``[V_noisy | V_clean | A_noisy | A_clean]``.

        Args:
            noisy_video: ``[B, C, F, y, x]`` latents of the noisy copy.
            clean_video: As ``noisy_video``: the clean copy that later chunks attend to.
            noisy_action: ``[B, F, n, A]``; the actions of frame f lead from frame f - 1 to frame f.
            clean_action: As ``noisy_action``.
            video_timesteps: ``[B, F]`` of the noisy copy, from 0 (clean) to 1000 (noise); not narrower than float32.
            action_timesteps: ``[B, F]``, or ``[B, F, n]`` where those of a frame differ.
            text: ``[B, L, text_dim]`` raw text embeddings.
            plan: From ``wam_kernels.compile_plan`` for the packed sequence, on the model's device.
            clean_video_timesteps: ``[B, F]`` where the clean copy is noised; default all 0.
            frame_start: Absolute frame of the first frame: moves the rope positions, nothing else.
            attend: Instead of a plan: the attention, ``attend(layer, q, k, v)`` with ``[B, S, H, h]`` tensors.
            impl: Backend of ``block_attention``.

        Returns:
            The predicted flows of the noisy copies: ``[B, C, F, y, x]`` and ``[B, F, n, A]``, dtype of the model.

        Raises:
            ValueError: shapes or dtypes that do not fit, or not exactly one of ``plan`` and ``attend``.
        """
        video_t, action_t = plain_tensor(video_timesteps), plain_tensor(action_timesteps)
        clean_video_t = torch.zeros_like(video_t)
        if clean_video_timesteps is not None:
            clean_video_t = plain_tensor(clean_video_timesteps)
        frame_start = integer("WorldActionModel", "frame_start", frame_start)
        frames = self._check(
            noisy_video, clean_video, noisy_action, clean_action, video_t, action_t, clean_video_t, text
        )
        rows, columns = self.token_grid(*noisy_video.shape[-2:])
        if (plan is None) == (attend is None):
            raise ValueError(
                "WorldActionModel: give either plan or attend, got " + ("neither" if plan is None else "both")
            )
        if attend is None:

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return block_attention(q, k, v, cast(Plan, plan), impl=impl)

        streams = self.embed(
            (torch.cat([noisy_video, clean_video], 2), torch.cat([video_t, clean_video_t], 1)),
            (torch.cat([noisy_action, clean_action], 1), torch.cat([action_t, torch.zeros_like(action_t)], 1)),
        )
        # noisy and clean copies share positions
        positions = torch.arange(frame_start, frame_start + frames, device=self.device).repeat(2)
        rope = self.rope(positions, rows, columns, positions)
        video, action = self.packed_block_stack(streams, Uncast(*rope), self.embed_text(text), attend)
        return (
            self.core.flow(noisy_half(video), frames, rows, columns),
            self.action_expert.flow(noisy_half(action), frames),
        )

    def _check(
        self, noisy_video: Tensor, clean_video: Tensor, noisy_action: Tensor, clean_action: Tensor,
        video_timesteps: Tensor, action_timesteps: Tensor, clean_video_timesteps: Tensor, text: Tensor,
    ) -> int:  # fmt: skip
        """Shapes and dtypes; returns the number of frames."""
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


def plain_tensor(t: Tensor | Uncast[Tensor]) -> Tensor:
    return t.tensors[0] if isinstance(t, Uncast) else t


def noisy_half(stream: StreamInputs) -> StreamInputs:
    """The noisy half of a packed stream, as far as a head needs it."""
    shift, scale = stream.head.tensors
    S, T = stream.x.shape[1] // 2, shift.shape[1] // 2
    index = FrameIndex.from_runs([S // max(T, 1)] * T, device=stream.x.device)
    return StreamInputs(stream.x[:, :S], Uncast(), Uncast(shift[:, :T], scale[:, :T]), index)
