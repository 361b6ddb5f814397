"""What a chunk of a rollout and a training step must compute and move, from sizes alone: nothing is loaded or run.

Forwards are sums of the costs of ``wam_kernels.roofline``: matrix products, attention over visible pairs, norms, GELU.
The products' FLOPs are exactly those that PyTorch's ``FlopCounterMode`` finds in the real forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from wam_kernels import compile_plan
from wam_kernels.masks.visibility import ACTION, CLEAN, NOISY, VIDEO
from wam_kernels.roofline import (
    Cost,
    DeviceModel,
    ada_layer_norm,
    block_attention,
    cached_attention,
    gate_residual_ada_layer_norm,
    linear,
    qk_norm_rope,
)
from wam_kernels.streaming_cache import key_spans

from ..config import ModelConfig
from ..objectives import OBJECTIVES, geometry_for
from ..rollout import RolloutConfig
from ..rollout.layout import ChunkLayout
from ..rollout.stages import Stage, stages
from ..train.config import TrainConfig
from ..train.optimizers import ROUNDS

BF16 = 2  # bytes of a number
# bytes that a parameter costs in a step, in float32
CAST_BYTES = 6  # read, and written in bf16
NORM_BYTES = 4  # its gradient read for the norm that gradients are clipped to
ADAMW_BYTES = 28  # gradient, weight and two moments read; weight and two moments written
MUON_BYTES = 20  # gradient, weight and average read; weight and average written
EMA_BYTES = 8  # its average, read and written


@dataclass(frozen=True)
class Sizes:
    """Of a model and of what it is given.

    Args:
        model: The model.
        grid: Rows and columns of a frame's video tokens.
        text_tokens: Of an instruction.
        itemsize: Bytes of a number in weights, activations and caches.
    """

    model: ModelConfig
    grid: tuple[int, int]
    text_tokens: int
    itemsize: int = BF16

    def __post_init__(self) -> None:
        m = self.model
        if m.topology != "dual_expert" or m.context or m.state_dim or m.mode_token or m.bridge_dim:
            names = [stream.name for stream in m.context]
            raise ValueError(
                "--estimate must be of a dual-expert model that is given pictures and text alone, got "
                f"topology={m.topology!r}, context {names}, state_dim={m.state_dim}, mode_token={m.mode_token} and "
                f"bridge_dim={m.bridge_dim}"
            )

    def tokens(self, stream: int) -> int:
        """Of one frame."""
        return self.grid[0] * self.grid[1] if stream == VIDEO else self.model.actions_per_frame

    def width(self, stream: int) -> int:
        return self.model.hidden if stream == VIDEO else self.model.action_hidden


@dataclass(frozen=True)
class Part:
    """Forwards of one kind, and how many of them there are."""

    name: str
    times: int
    tokens: int  # of one
    cost: Cost  # of one

    def ms(self, on: DeviceModel) -> float:
        return self.times * self.cost.ms(on)


def parameters(c: ModelConfig) -> int:
    """Numbers of a model's weights, biases and tables."""
    inner, total = c.inner, 0
    for width, ffn, data in ((c.hidden, c.ffn, c.patch_width), (c.action_hidden, c.action_ffn, c.action_dim)):
        attention = 4 * width * inner + 3 * inner + width + 2 * inner
        block = 6 * width + 2 * attention + 2 * width + 2 * width * ffn + ffn + width
        time = c.freq_dim * width + width + width * width + width + 6 * width * width + 6 * width
        total += c.layers * block + time + 2 * width + data * width + width + width * data + data
    text = (c.text_dim * c.hidden + c.hidden) + (c.hidden * c.hidden + c.hidden)
    return total + text + c.text_dim * c.action_hidden + c.action_hidden


def block_matrices(c: ModelConfig) -> list[tuple[int, int, int]]:
    """(rows, columns, how many): the matrices of the blocks, which Muon learns."""
    experts = (c.hidden, c.ffn), (c.action_hidden, c.action_ffn)
    return [m for width, ffn in experts for m in ((c.inner, width, 8 * c.layers), (ffn, width, 2 * c.layers))]


def _keys(s: Sizes, stream: int, rows: int, timesteps: int) -> Cost:
    """Of one block, up to the attention: norm, q, k and v, their norm and rotation."""
    c, e, width = s.model, s.itemsize, s.width(stream)
    cost = ada_layer_norm(rows, timesteps, width, e) + linear(rows, width, c.inner, e) * 3
    return cost + qk_norm_rope(rows, c.heads, c.head_dim, e)


def _rest(s: Sizes, stream: int, rows: int, timesteps: int, samples: int) -> Cost:
    """Of one block, after the attention; the text's keys and values are there."""
    c, e, width = s.model, s.itemsize, s.width(stream)
    ffn = c.ffn if stream == VIDEO else c.action_ffn
    text = samples * s.text_tokens
    cost = linear(rows, c.inner, width, e) * 2 + linear(rows, width, c.inner, e)
    cost += cached_attention(rows * s.text_tokens, rows, text, c.heads, c.head_dim, e)
    cost += Cost(0, 4 * rows * c.inner * e)  # RMSNorm of the cross-attention's q, and its residual's norm below
    cost += linear(rows, width, ffn, e) + linear(rows, ffn, width, e) + Cost(0, 2 * rows * ffn * e)
    return cost + gate_residual_ada_layer_norm(rows, timesteps, width, e) * 3


def _ends(s: Sizes, stream: int, rows: int, timesteps: int, head_rows: int) -> Cost:
    """Embeddings of data and timesteps, and the head over ``head_rows`` tokens, 0 where it is not asked for."""
    c, e, width = s.model, s.itemsize, s.width(stream)
    data = c.patch_width if stream == VIDEO else c.action_dim
    cost = linear(rows, data, width, e)
    for width_in, width_out in ((c.freq_dim, width), (width, width), (width, 6 * width)):
        cost += linear(timesteps, width_in, width_out, e)
    if head_rows:
        cost += linear(head_rows, width, data, e) + ada_layer_norm(head_rows, timesteps, width, e)
    return cost


# ---- rollout ----


def chunk_forward(
    s: Sizes, layout: ChunkLayout, streams: Sequence[int], noise: int, wanted: Sequence[int], history: int | None = None
) -> Cost:
    """One forward of a chunk, as ``ChunkForward`` runs it.

    Args:
        s: Sizes; of the layout too.
        layout: Of the chunk.
        streams: Whose tokens run.
        noise: Their copy, ``NOISY`` or ``CLEAN``.
        wanted: Streams whose flow is needed; the last block computes nothing else but keys and values.
        history: Frames before the chunk; default a full window.
    """
    history = layout.reach if history is None else history
    c, samples, frames = s.model, layout.samples, layout.chunk_size
    timesteps = samples * frames
    rows = {stream: timesteps * s.tokens(stream) for stream in streams}
    cost = Cost()
    for stream in streams:
        full = c.layers - (stream not in wanted)
        cost += _keys(s, stream, rows[stream], timesteps) * c.layers
        cost += _rest(s, stream, rows[stream], timesteps, samples) * full
        cost += _ends(s, stream, rows[stream], timesteps, rows[stream] if stream in wanted else 0)
    geometry = layout.geometry(layout.reach, history)
    spans = key_spans(geometry, history, tuple(streams), noise)
    visible = [sum((end - first) * s.tokens(key) for key, _, first, end in of_stream) for of_stream in spans]
    pairs = sum(rows[stream] * slots for stream, slots in zip(streams, visible, strict=True))
    read = {(key, copy, f) for spans_of in spans for key, copy, first, end in spans_of for f in range(first, end)}
    slots = samples * sum(s.tokens(key) for key, _, _ in read)
    attention = cached_attention(pairs, sum(rows.values()), slots, c.heads, c.head_dim, s.itemsize)
    return cost + attention * (c.layers - (not wanted))


def rollout_chunk(
    s: Sizes, config: RolloutConfig, *, objective: str = "joint", want: str = "both", batch: int = 1
) -> list[Part]:
    """The forwards of one chunk in the middle of an episode: its denoising steps and those that keep it as history.

    Guidance doubles the batch, ``cache="recomputed"`` runs the window's chunks anew, and each stage has its own steps.

    Raises:
        ValueError: an unknown objective or want.
    """
    denoised = OBJECTIVES[objective]
    layout = ChunkLayout(config, denoised, batch, s.grid, s.model.actions_per_frame)
    parts = [part for stage in stages(config.program, denoised, want) for part in _of_stage(s, layout, stage)]
    kept = layout.history_streams
    tokens = _tokens(s, layout, kept)
    if config.cache == "persistent":
        return [*parts, Part("accepted chunk to history", 1, tokens, chunk_forward(s, layout, kept, CLEAN, ()))]
    befores = range(0, layout.reach, layout.chunk_size)  # as if the episode began with the window
    anew = sum((chunk_forward(s, layout, kept, CLEAN, (), before) for before in befores), Cost())
    return [*parts, Part("window computed anew", 1, tokens * len(befores), anew)]


def _of_stage(s: Sizes, layout: ChunkLayout, stage: Stage) -> Iterator[Part]:
    names = " and ".join(("video", "action")[stream] for stream in stage.denoised)
    step = chunk_forward(s, layout, stage.streams, NOISY, stage.denoised)
    yield Part(f"denoising step of {names}", layout.config.steps, _tokens(s, layout, stage.streams), step)
    if stage.promoted is not None:
        once = chunk_forward(s, layout, (stage.promoted,), CLEAN, ())
        yield Part("its clean copy", 1, _tokens(s, layout, (stage.promoted,)), once)


def _tokens(s: Sizes, layout: ChunkLayout, streams: Sequence[int]) -> int:
    return layout.samples * layout.chunk_size * sum(s.tokens(stream) for stream in streams)


# ---- training ----


def packed_forward(
    s: Sizes, samples: int, frames: int, program: str, *, chunk_size: int, window: int, history: str
) -> tuple[Cost, Cost]:
    """The forward of a training step under the joint objective: (all but the attention, the attention)."""
    c, e, timesteps = s.model, s.itemsize, samples * 2 * frames
    cost = linear(samples * s.text_tokens, c.text_dim, c.hidden, e)
    cost += linear(samples * s.text_tokens, c.hidden, c.hidden, e)
    cost += linear(samples * s.text_tokens, c.text_dim, c.action_hidden, e)
    for stream in (VIDEO, ACTION):
        rows = timesteps * s.tokens(stream)
        text = linear(samples * s.text_tokens, s.width(stream), c.inner, e) * 2
        block = _keys(s, stream, rows, timesteps) + _rest(s, stream, rows, timesteps, samples) + text
        cost += block * c.layers + _ends(s, stream, rows, timesteps, rows // 2)
    geometry = geometry_for(
        program, OBJECTIVES["joint"], frames=frames, video_tokens=s.tokens(VIDEO), action_tokens=s.tokens(ACTION),
        chunk_size=chunk_size, window=window, history=history,
    )  # fmt: skip
    tokens = timesteps * (s.tokens(VIDEO) + s.tokens(ACTION))
    pairs = samples * compile_plan(geometry).visible_pairs
    return cost, block_attention(pairs, tokens, c.heads, c.head_dim, e) * c.layers


def train_step(s: Sizes, config: TrainConfig) -> list[Part]:
    """One training step on a GPU, for the largest chunk and window that may be drawn and the first of the programs.

    Products in bf16 from float32 weights, the optimizers in float32. The backward is counted as twice the forward (2.5
    times in attention): what the inputs' own gradients would take, which nobody asks for, is in it.
    """
    program = config.programs[0]
    others, attention = packed_forward(
        s, config.batch, config.frames, program, chunk_size=config.chunk_sizes[1], window=config.windows[1],
        history=config.history,
    )  # fmt: skip
    tokens = config.batch * 2 * config.frames * (s.tokens(VIDEO) + s.tokens(ACTION))
    # 10 H D pairs for 4 H D, 8 tensors for 4
    backward = Cost(attention.flops * 5 // 2, attention.bytes * 2) + others * 2
    return [
        Part("weights to bf16", 1, 0, Cost(0, CAST_BYTES * parameters(s.model))),
        Part(f"forward, {program}", 1, tokens, others + attention),
        Part("backward", 1, tokens, backward),
        Part("clipping and optimizers", 1, 0, optimizers(s.model, averaged=config.ema > 0)),
    ]


def optimizers(c: ModelConfig, *, averaged: bool) -> Cost:
    """Clipping, Muon for the matrices of the blocks, AdamW for the rest, and the average of the weights."""
    total, flops = parameters(c), 0
    for rows, columns, times in block_matrices(c):
        m, n = sorted((rows, columns))
        flops += times * ROUNDS * (4 * m * m * n + 2 * m**3)  # x x^T, its square, and their sum by x
    muon = sum(rows * columns * times for rows, columns, times in block_matrices(c))
    moved = total * (NORM_BYTES + EMA_BYTES * averaged) + MUON_BYTES * muon + ADAMW_BYTES * (total - muon)
    return Cost(0, moved, flops)
