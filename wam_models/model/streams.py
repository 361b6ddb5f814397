"""The streams outside the blocks: what makes tokens of latents, actions and context, and flows of tokens.

Each stream has a side with ``embed`` and, where it owns an expert, ``text``; denoised ones have ``flow``. Letters of
shapes as in ``dual_expert``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wam_kernels import ada_layer_norm

from ..config import ModelConfig, Stream
from .blocks import StreamInputs, Uncast, at_least_float32, draw_table, dtype_of, stream_inputs

MODES = 3  # objectives: joint, forward dynamics, inverse dynamics


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


class StateEncoder(nn.Module):
    """A state at the width of the video expert; 0 in a new model, so that it begins as one without states."""

    def __init__(self, state_dim: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(state_dim, width)

    def forward(self, state_BFS: Tensor) -> Tensor:
        return self.proj(state_BFS.to(dtype_of(self.proj, state_BFS.dtype)))


class ModeEncoder(nn.Module):
    """A token of raw text for each objective."""

    def __init__(self, modes: int, text_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(modes, text_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, modes_B: Tensor) -> Tensor:
        return self.embedding(modes_B)


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
        if config.adds_state:
            self.proprio_hidden_context_encoder = StateEncoder(config.state_dim, config.hidden)
        if config.mode_token:
            self.generalist_mode_context_encoder = ModeEncoder(MODES, config.text_dim)

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

    def text(self, text_BLE: Tensor) -> Tensor:
        return self.text_proj(text_BLE.to(dtype_of(self.text_proj.linear_1, self.dtype)))

    def flow(self, stream: StreamInputs, frames: int, rows: int, columns: int) -> Tensor:
        _, py, px = self.config.patch
        out = head_norm(stream, self.scale_shift_table, self.config.eps)
        out = self.proj_out(out.to(dtype_of(self.proj_out, self.dtype)))
        out = out.unflatten(-1, (py, px, -1)).unflatten(1, (frames, rows, columns))
        return out.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


class ActionSide(nn.Module):
    """The actions outside the blocks (``action_expert`` in the state dict).

    Without an expert of their own they take the video's text and the table of its head, and like it modulate the head
    by the embedded timestep itself.
    """

    scale_shift_table: Tensor

    def __init__(self, config: ModelConfig, stream: Stream) -> None:
        super().__init__()
        self.config, self.owns_expert = config, stream.owns_expert
        self.action_embedder = nn.Linear(stream.features, stream.width)
        if self.owns_expert:
            self.context_proj = nn.Linear(config.text_dim, stream.width)
        if config.bridge_dim:
            self.bridge_proj = nn.Linear(config.bridge_dim, stream.width)
        self.projects_state = config.adds_state and config.hidden != stream.width
        if self.projects_state:
            self.hidden_context_proj = nn.Linear(config.hidden, stream.width)
        self.time_conditioner = TimeConditioner(config, stream.width)
        if self.owns_expert:
            self.scale_shift_table = nn.Parameter(torch.empty(1, 2, stream.width))
            self.reset_parameters()
        self.action_proj_out = nn.Linear(stream.width, stream.features)

    def reset_parameters(self) -> None:
        if self.owns_expert:
            draw_table(self.scale_shift_table)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype if not self.owns_expert else self.scale_shift_table.dtype

    def text(self, text_BLE: Tensor) -> Tensor:
        return self.context_proj(text_BLE.to(dtype_of(self.context_proj, self.dtype)))

    def embed(self, action_BFnA: Tensor, timesteps_BT: Tensor, state_BFD: Tensor | None = None) -> StreamInputs:
        """``state_BFD``, at the width of the video expert, is added to all tokens of its frame."""
        temb, t_proj = self.time_conditioner(Uncast(timesteps_BT), self.dtype)
        actions = action_BFnA.flatten(1, 2).to(dtype_of(self.action_embedder, self.dtype))
        head = (t_proj[:, :, 0], t_proj[:, :, 1]) if self.owns_expert else (temb, temb)
        x = self.action_embedder(actions)
        if state_BFD is not None:
            state = state_BFD
            if self.projects_state:
                state = self.hidden_context_proj(state.to(dtype_of(self.hidden_context_proj, self.dtype)))
            x = x + state.repeat_interleave(action_BFnA.shape[2], 1).to(x.dtype)
        return stream_inputs(x, t_proj, head)

    def flow(self, stream: StreamInputs, frames: int, video_table: Tensor) -> Tensor:
        """``video_table`` is that of the video's head, for actions that share it."""
        out = head_norm(stream, self.scale_shift_table if self.owns_expert else video_table, self.config.eps)
        out = self.action_proj_out(out.to(dtype_of(self.action_proj_out, self.dtype)))
        return out.unflatten(1, (frames, -1))


class ContextSide(nn.Module):
    """A given stream outside the blocks: its tokens, learned ones or made of features.

    They have no timestep, so the tables of the expert alone modulate them; and no place, so rope does not turn them.
    """

    def __init__(self, config: ModelConfig, stream: Stream) -> None:
        super().__init__()
        self.stream = stream
        if stream.features:
            self.embedder = nn.Linear(stream.features, stream.width)
        else:
            self.tokens = nn.Parameter(torch.empty(1, stream.tokens, stream.width))
            self.reset_parameters()
        if stream.owns_expert:
            self.context_proj = nn.Linear(config.text_dim, stream.width)
        if stream.aligned:
            self.readout = nn.Linear(stream.width, stream.aligned)

    def reset_parameters(self) -> None:
        if self.stream.tokens:
            draw_table(self.tokens)

    def text(self, text_BLE: Tensor) -> Tensor:
        return self.context_proj(text_BLE.to(self.context_proj.weight.dtype))

    def embed(self, features_BNE: Tensor | None, batch: int) -> StreamInputs:
        """Of features, or of the learned tokens where there are none.

        Raises:
            ValueError: features that are missing, of another shape or not asked for.
        """
        name, width = self.stream.name, self.stream.features
        if (features_BNE is None) != (width == 0):
            got = "None" if features_BNE is None else "a tensor"
            raise ValueError(f"context[{name!r}] must be {'a tensor' if width else 'left out'}, got {got}")
        if features_BNE is None:
            x = self.tokens.expand(batch, -1, -1)
        elif features_BNE.ndim != 3 or features_BNE.shape[::2] != (batch, width) or not features_BNE.shape[1]:
            raise ValueError(f"context[{name!r}] must be [{batch}, N >= 1, {width}], got {list(features_BNE.shape)}")
        else:
            x = self.embedder(features_BNE.to(dtype_of(self.embedder, features_BNE.dtype)))
        still = at_least_float32(x.new_zeros(batch, 1, 6, x.shape[2]))
        return stream_inputs(x, still, (still[:, :, 0], still[:, :, 0]))

    def read_out(self, stream: StreamInputs) -> Tensor:
        """``[B, N, aligned]`` of the tokens behind the last block."""
        x = F.layer_norm(at_least_float32(stream.x), stream.x.shape[-1:])
        return self.readout(x.to(dtype_of(self.readout, stream.x.dtype)))


def head_norm(stream: StreamInputs, table_12D: Tensor, eps: float) -> Tensor:
    shift_table, scale_table = at_least_float32(table_12D)[0].unbind(0)
    shift, scale = stream.head.tensors
    return ada_layer_norm(
        stream.x, shift, scale, stream.frame_index, shift_table=shift_table, scale_table=scale_table, eps=eps
    )
