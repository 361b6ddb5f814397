"""What the forwards of a model compute and move, from sizes alone: nothing is loaded or run.

Forwards are sums of the costs of ``wam_kernels.roofline``: matrix products, attention over visible pairs, norms, GELU.
The products' FLOPs are exactly those that PyTorch's ``FlopCounterMode`` finds in the real forward.
"""

from __future__ import annotations

from dataclasses import dataclass

from wam_kernels import compile_plan
from wam_kernels.masks.visibility import ACTION, VIDEO
from wam_kernels.roofline import (
    Cost,
    ada_layer_norm,
    block_attention,
    cached_attention,
    gate_residual_ada_layer_norm,
    linear,
    qk_norm_rope,
)

from .config import ModelConfig
from .objectives import OBJECTIVES, frames_before_chunks, sample_for, told_frames

BF16 = 2  # bytes of a number


@dataclass(frozen=True)
class Sizes:
    """Of a model and of what it is given.

    Args:
        model: The model.
        grid: Rows and columns of a frame's video tokens.
        text_tokens: Of an instruction.
        itemsize: Bytes of a number in weights, activations and caches.
        block_itemsize: Bytes of a weight in the blocks' linear maps, where they are quantised; default ``itemsize``.
    """

    model: ModelConfig
    grid: tuple[int, int]
    text_tokens: int
    itemsize: int = BF16
    block_itemsize: int | None = None

    def __post_init__(self) -> None:
        m = self.model
        names = [stream.name for stream in m.context if stream.features]
        if names or (m.bridge_dim and m.bridge_layer is None):
            raise ValueError(
                "--estimate must be of a model that is given no features of another network, whose number it does not "
                f"tell, got context {names} and bridge_dim={m.bridge_dim} without bridge_layer"
            )

    @property
    def denoised(self) -> tuple[int, ...]:
        """Streams that are: video, and actions where there are any."""
        return (VIDEO, ACTION) if self.model.has_actions else (VIDEO,)

    @property
    def given(self) -> tuple[int, ...]:
        """Streams that are not: of learned tokens, and of the state."""
        return tuple(range(len(self.denoised), len(self.model.streams)))

    @property
    def context_tokens(self) -> int:
        return sum(stream.tokens for stream in self.model.context)

    @property
    def state_tokens(self) -> int:
        """Of each chunk."""
        return int(self.model.state_tokens)

    def given_tokens(self, stream: int, chunks: int = 1) -> int:
        """Of one that is not denoised, in a clip of so many chunks."""
        return self.model.streams[stream].tokens or chunks

    @property
    def copies(self) -> int:
        """Of each denoised stream in a training forward: noisy and clean, or one."""
        return 1 if self.model.full_attention else 2

    @property
    def texts(self) -> int:
        """Tokens of an instruction with that of the objective."""
        return self.text_tokens + self.model.mode_token

    def tokens(self, stream: int) -> int:
        """Of one frame."""
        return self.grid[0] * self.grid[1] if stream == VIDEO else self.model.actions_per_frame

    def width(self, stream: int) -> int:
        return self.model.streams[stream].width


def parameters(c: ModelConfig) -> int:
    """Numbers of a model's weights, biases and tables."""
    inner, total = c.inner, linear_numbers(c.hidden, c.hidden)  # the second map of the video's text
    for place, stream in enumerate(c.streams):
        width, ffn, data = stream.width, stream.ffn, stream.features
        if stream.owns_expert:
            attention = 3 * linear_numbers(width, inner) + linear_numbers(inner, width) + 2 * inner
            block = 6 * width + 2 * attention + 2 * width + linear_numbers(width, ffn) + linear_numbers(ffn, width)
            total += c.layers * block + linear_numbers(c.text_dim, width)
        if place < 1 + c.has_actions:
            time = linear_numbers(c.freq_dim, width) + linear_numbers(width, width) + linear_numbers(width, 6 * width)
            total += time + 2 * width * stream.owns_expert + linear_numbers(width, data)
        total += linear_numbers(data, width) if data else stream.tokens * width
        total += linear_numbers(width, stream.aligned) if stream.aligned else 0
    if c.adds_state:
        total += linear_numbers(c.state_dim, c.hidden)
        total += linear_numbers(c.hidden, c.action_hidden) if c.hidden != c.action_hidden else 0
    total += len(OBJECTIVES) * c.text_dim if c.mode_token else 0
    return total + (linear_numbers(c.bridge_dim, c.action_hidden) if c.bridge_dim else 0)


def linear_numbers(width_in: int, width_out: int) -> int:
    """Of a linear map and its bias."""
    return width_in * width_out + width_out


def block_matrices(c: ModelConfig) -> list[tuple[int, int, int]]:
    """(rows, columns, how many): the matrices of the blocks, which Muon learns."""
    experts = [(stream.width, stream.ffn) for stream in c.streams if stream.owns_expert]
    return [m for width, ffn in experts for m in ((c.inner, width, 8 * c.layers), (ffn, width, 2 * c.layers))]


def block_keys(s: Sizes, stream: int, rows: int, timesteps: int) -> Cost:
    """Of one block, up to the attention: norm, q, k and v, their norm and rotation."""
    c, e, w, width = s.model, s.itemsize, s.block_itemsize, s.width(stream)
    cost = ada_layer_norm(rows, timesteps, width, e) + linear(rows, width, c.inner, e, w) * 3
    return cost + qk_norm_rope(rows, c.heads, c.head_dim, e)


def block_rest(s: Sizes, stream: int, rows: int, timesteps: int, samples: int, bridge: int = 0) -> Cost:
    """Of one block, after the attention; the text's keys and values, and those of a bridge, are there."""
    c, e, w, width, ffn = s.model, s.itemsize, s.block_itemsize, s.width(stream), s.model.streams[stream].ffn
    texts = s.texts + bridge * (stream == ACTION and c.has_actions)
    cost = linear(rows, c.inner, width, e, w) * 2 + linear(rows, width, c.inner, e, w)
    cost += cached_attention(rows * texts, rows, samples * texts, c.heads, c.head_dim, e)
    cost += Cost(0, 4 * rows * c.inner * e)  # RMSNorm of the cross-attention's q, and its residual's norm below
    cost += linear(rows, width, ffn, e, w) + linear(rows, ffn, width, e, w) + Cost(0, 2 * rows * ffn * e)
    return cost + gate_residual_ada_layer_norm(rows, timesteps, width, e) * 3


def ends(s: Sizes, stream: int, rows: int, timesteps: int, head_rows: int) -> Cost:
    """Embeddings of data and timesteps, and the head over ``head_rows`` tokens, 0 where it is not asked for."""
    c, e, width = s.model, s.itemsize, s.width(stream)
    data = c.patch_width if stream == VIDEO else c.action_dim
    cost = linear(rows, data, width, e)
    for width_in, width_out in ((c.freq_dim, width), (width, width), (width, 6 * width)):
        cost += linear(timesteps, width_in, width_out, e)
    if stream == ACTION and c.adds_state:
        cost += linear(timesteps, c.state_dim, c.hidden, e)
        cost += linear(timesteps, c.hidden, width, e) if c.hidden != width else Cost()
    if head_rows:
        cost += linear(head_rows, width, data, e) + ada_layer_norm(head_rows, timesteps, width, e)
    return cost


def text_products(s: Sizes, samples: int, bridge: int = 0) -> Cost:
    """Projections of the text, and of so many features of a bridge."""
    c, e = s.model, s.itemsize
    cost = linear(samples * s.texts, c.hidden, c.hidden, e)
    for stream in c.streams:
        cost += linear(samples * s.texts, c.text_dim, stream.width, e) if stream.owns_expert else Cost()
    return cost + (linear(samples * bridge, c.bridge_dim, c.action_hidden, e) if bridge else Cost())


def block_text_keys(s: Sizes, stream: int, samples: int, bridge: int = 0) -> Cost:
    """Of one block: keys and values of the text, and of a bridge."""
    texts = s.texts + bridge * (stream == ACTION and s.model.has_actions)
    return linear(samples * texts, s.width(stream), s.model.inner, s.itemsize, s.block_itemsize) * 2


def bridge_features(s: Sizes, samples: int, frames: int) -> Cost:
    """The features of the model's own video, of the frame before a chunk and the chunk."""
    c, rows = s.model, samples * frames * s.tokens(VIDEO)
    block = block_keys(s, VIDEO, rows, samples * frames) + block_rest(s, VIDEO, rows, samples * frames, samples)
    block += block_text_keys(s, VIDEO, samples)
    block += cached_attention(rows * frames * s.tokens(VIDEO), rows, rows, c.heads, c.head_dim, s.itemsize)
    return (
        text_products(s, samples, 1) + ends(s, VIDEO, rows, samples * frames, 0) + block * (1 + (c.bridge_layer or 0))
    )


def packed_products(s: Sizes, samples: int, frames: int, bridged: int = 0, chunks: int = 1) -> Cost:
    """All of a training forward but the attention.

    Args:
        s: Sizes.
        samples: Clips.
        frames: Of all clips together.
        bridged: Frames of each clip that a bridge of the model's own is made of.
        chunks: Of each clip, for each of which there is a token of the state.
    """
    c, e, timesteps, features = s.model, s.itemsize, s.copies * frames, bridged * s.tokens(VIDEO)
    cost = text_products(s, samples, features) + (bridge_features(s, samples, bridged) if bridged else Cost())
    for stream in s.denoised:
        rows = timesteps * s.tokens(stream)
        block = block_keys(s, stream, rows, timesteps) + block_rest(s, stream, rows, timesteps, samples, features)
        block += block_text_keys(s, stream, samples, features)
        cost += block * c.layers + ends(s, stream, rows, timesteps, rows // s.copies)
    for stream in s.given:
        held = c.streams[stream]
        rows = samples * s.given_tokens(stream, chunks)
        cost += linear(rows, held.features, held.width, e) if held.features else Cost()
        rest = block_rest(s, stream, rows, samples, samples) + block_text_keys(s, stream, samples)
        cost += block_keys(s, stream, rows, samples) * c.layers + rest * (c.layers - (not held.aligned))
        cost += linear(rows, held.width, held.aligned, e) if held.aligned else Cost()
    return cost


def packed_tokens(s: Sizes, samples: int, frames: int, chunks: int = 1) -> int:
    """Of a training forward of ``samples`` clips, ``frames`` together: all copies of the streams, what is given."""
    return s.copies * frames * sum(map(s.tokens, s.denoised)) + samples * (s.context_tokens + chunks * s.state_tokens)


def packed_forward(
    s: Sizes, samples: int, frames: int, program: str, *, chunk_size: int, window: int, history: str
) -> tuple[Cost, Cost]:
    """The forward of a training step under the joint objective: (all but the attention, the attention)."""
    c = s.model
    bridged = frames - frames_before_chunks(frames, chunk_size)[-1] if c.bridge_layer is not None else 0
    sample = sample_for(
        program, OBJECTIVES["joint"], frames=frames, video_tokens=s.tokens(VIDEO),
        action_tokens=s.tokens(ACTION) if c.has_actions else 0, chunk_size=chunk_size, window=window, history=history,
        context=s.context_tokens, full_attention=c.full_attention, state_tokens=c.state_tokens,
    )  # fmt: skip
    plan = compile_plan(sample)
    chunks = len(told_frames(frames, chunk_size, True))
    pairs, tokens = samples * plan.visible_pairs, packed_tokens(s, samples, samples * frames, chunks)
    attention = block_attention(pairs, tokens, c.heads, c.head_dim, s.itemsize) * c.layers
    return packed_products(s, samples, samples * frames, bridged, chunks), attention
