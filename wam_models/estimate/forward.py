"""What a chunk of a rollout and a training step must compute and move, from sizes alone: nothing is loaded or run.

Forwards are sums of the costs of ``wam_kernels.roofline``: matrix products, attention over visible pairs, norms, GELU.
The products' FLOPs are exactly those that PyTorch's ``FlopCounterMode`` finds in the real forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from wam_kernels import compile_plan
from wam_kernels.masks.context import with_context
from wam_kernels.masks.programs import STREAMS
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
from ..objectives import OBJECTIVES, frames_before_chunks, geometry_for
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
        """Streams of learned tokens."""
        return tuple(range(len(self.denoised), len(self.model.streams)))

    @property
    def context_tokens(self) -> int:
        return sum(self.model.streams[stream].tokens for stream in self.given)

    @property
    def texts(self) -> int:
        """Tokens of an instruction with that of the objective."""
        return self.text_tokens + self.model.mode_token

    def tokens(self, stream: int) -> int:
        """Of one frame."""
        return self.grid[0] * self.grid[1] if stream == VIDEO else self.model.actions_per_frame

    def width(self, stream: int) -> int:
        return self.model.streams[stream].width


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
    if c.state_dim:
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


def _keys(s: Sizes, stream: int, rows: int, timesteps: int) -> Cost:
    """Of one block, up to the attention: norm, q, k and v, their norm and rotation."""
    c, e, width = s.model, s.itemsize, s.width(stream)
    cost = ada_layer_norm(rows, timesteps, width, e) + linear(rows, width, c.inner, e) * 3
    return cost + qk_norm_rope(rows, c.heads, c.head_dim, e)


def _rest(s: Sizes, stream: int, rows: int, timesteps: int, samples: int, bridge: int = 0) -> Cost:
    """Of one block, after the attention; the text's keys and values, and those of a bridge, are there."""
    c, e, width, ffn = s.model, s.itemsize, s.width(stream), s.model.streams[stream].ffn
    texts = s.texts + bridge * (stream == ACTION and c.has_actions)
    cost = linear(rows, c.inner, width, e) * 2 + linear(rows, width, c.inner, e)
    cost += cached_attention(rows * texts, rows, samples * texts, c.heads, c.head_dim, e)
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
    if stream == ACTION and c.state_dim:
        cost += linear(timesteps, c.state_dim, c.hidden, e)
        cost += linear(timesteps, c.hidden, width, e) if c.hidden != width else Cost()
    if head_rows:
        cost += linear(head_rows, width, data, e) + ada_layer_norm(head_rows, timesteps, width, e)
    return cost


def _text(s: Sizes, samples: int, bridge: int = 0) -> Cost:
    """Projections of the text, and of so many features of a bridge."""
    c, e = s.model, s.itemsize
    cost = linear(samples * s.texts, c.hidden, c.hidden, e)
    for stream in c.streams:
        cost += linear(samples * s.texts, c.text_dim, stream.width, e) if stream.owns_expert else Cost()
    return cost + (linear(samples * bridge, c.bridge_dim, c.action_hidden, e) if bridge else Cost())


def _text_keys(s: Sizes, stream: int, samples: int, bridge: int = 0) -> Cost:
    """Of one block: keys and values of the text, and of a bridge."""
    texts = s.texts + bridge * (stream == ACTION and s.model.has_actions)
    return linear(samples * texts, s.width(stream), s.model.inner, s.itemsize) * 2


def _bridge(s: Sizes, samples: int, frames: int) -> Cost:
    """The features of the model's own video, of the frame before a chunk and the chunk."""
    c, rows = s.model, samples * frames * s.tokens(VIDEO)
    block = _keys(s, VIDEO, rows, samples * frames) + _rest(s, VIDEO, rows, samples * frames, samples)
    block += _text_keys(s, VIDEO, samples)
    block += cached_attention(rows * frames * s.tokens(VIDEO), rows, rows, c.heads, c.head_dim, s.itemsize)
    return _text(s, samples, 1) + _ends(s, VIDEO, rows, samples * frames, 0) + block * (1 + (c.bridge_layer or 0))


# ---- rollout ----


def chunk_forward(
    s: Sizes, layout: ChunkLayout, streams: Sequence[int], noise: int, wanted: Sequence[int],
    history: int | None = None, candidates: int = 1, heads: bool = True,
) -> Cost:  # fmt: skip
    """One forward of a chunk, as ``ChunkForward`` runs it.

    Args:
        s: Sizes; of the layout too.
        layout: Of the chunk.
        streams: Whose tokens run.
        noise: Their copy, ``NOISY`` or ``CLEAN``.
        wanted: Streams whose flow is needed; the last block computes nothing else but keys and values.
        history: Frames before the chunk; default a full window.
        candidates: Chunks at work of each rollout, which read the history once.
        heads: Whether wanted streams run through their heads too.
    """
    history = layout.reach if history is None else history
    c, samples, frames = s.model, layout.samples, layout.chunk_size
    timesteps = samples * candidates * frames
    rows = {stream: timesteps * s.tokens(stream) for stream in streams}
    cost = Cost()
    bridge = (1 + frames) * s.tokens(VIDEO) if c.bridge_layer is not None else 0
    for stream in streams:
        full = c.layers - (stream not in wanted)
        cost += _keys(s, stream, rows[stream], timesteps) * c.layers
        cost += _rest(s, stream, rows[stream], timesteps, samples, bridge) * full
        cost += _ends(s, stream, rows[stream], timesteps, rows[stream] if heads and stream in wanted else 0)
    geometry = layout.geometry(layout.reach, history)
    spans = key_spans(geometry, history, tuple(streams), noise)
    given = s.context_tokens
    visible = [sum((end - first) * s.tokens(key) for key, _, first, end in of_stream) + given for of_stream in spans]
    pairs = sum(rows[stream] * slots for stream, slots in zip(streams, visible, strict=True))
    read = {(key, copy, f) for spans_of in spans for key, copy, first, end in spans_of for f in range(first, end)}
    slots = samples * (sum(s.tokens(key) * (candidates if f >= history else 1) for key, _, f in read) + given)
    attention = cached_attention(pairs, sum(rows.values()), slots, c.heads, c.head_dim, s.itemsize)
    return cost + attention * (c.layers - (not wanted))


def rollout_chunk(
    s: Sizes, config: RolloutConfig, *, objective: str = "joint", want: str = "both", batch: int = 1
) -> list[Part]:
    """The forwards of one chunk in the middle of an episode: those of its denoising and those that keep it as history.

    Guidance doubles the batch, ``cache="recomputed"`` runs the window's chunks anew, each stream has its own schedule,
    and of several candidates one becomes history. Forwards that ``reuse_flow`` and ``reuse_chunk`` would leave out
    depend on the data and are counted.

    Raises:
        ValueError: an unknown objective or want.
    """
    denoised = OBJECTIVES[objective]
    layout = layout_of(s, config, objective, batch)
    loops = stages(config.program, denoised, want, layout.streams)
    parts = [part for stage in loops for part in _of_stage(s, layout, stage)]
    if s.model.bridge_layer is not None:
        parts.insert(0, _of_bridge(s, layout))
    kept = layout.history_streams
    tokens = _tokens(s, layout, kept)
    if config.cache == "persistent":
        return [*parts, Part("accepted chunk to history", 1, tokens, chunk_forward(s, layout, kept, CLEAN, ()))]
    befores = range(0, layout.reach, layout.chunk_size)  # as if the episode began with the window
    anew = sum((chunk_forward(s, layout, kept, CLEAN, (), before) for before in befores), Cost())
    return [*parts, Part("window computed anew", 1, tokens * len(befores), anew)]


def layout_of(s: Sizes, config: RolloutConfig, objective: str, batch: int) -> ChunkLayout:
    """That of a chunk of these sizes."""
    actions = s.model.actions_per_frame if s.model.has_actions else 0
    return ChunkLayout(config, OBJECTIVES[objective], batch, s.grid, actions, s.context_tokens)


def _of_bridge(s: Sizes, layout: ChunkLayout) -> Part:
    """The bridge of a chunk, and all keys and values of texts anew."""
    samples, frames = layout.samples, 1 + layout.chunk_size
    features = frames * s.tokens(VIDEO)
    cost = _bridge(s, samples, frames) + _text(s, samples, features)
    for place, stream in enumerate(s.model.streams):
        cost += _text_keys(s, place, samples, features) * (s.model.layers * stream.owns_expert)
    return Part("bridge", 1, samples * features, cost)


def _of_stage(s: Sizes, layout: ChunkLayout, stage: Stage) -> Iterator[Part]:
    config, many = layout.config, layout.config.candidates
    counts = {stream: config.trajectory(stream).forwards for stream in layout.streams}
    for (streams, live), times in Counter(stage.forwards(counts)).items():
        names, given = (" and ".join(STREAMS[s] for s in found) for found in (live, sorted({*streams} - {*live})))
        step = chunk_forward(s, layout, streams, NOISY, live, candidates=many)
        name = f"denoising step of {names}" + (f", {given} given" if given else "")
        yield Part(name, times, many * _tokens(s, layout, streams), step)
    if stage.promoted is not None:
        clean = (stage.promoted,)
        # candidates run the last block whole, because its attention is what keeps their keys
        once = chunk_forward(s, layout, clean, CLEAN, clean if many > 1 else (), candidates=many, heads=False)
        yield Part("its clean copy", 1, many * _tokens(s, layout, clean), once)


def _tokens(s: Sizes, layout: ChunkLayout, streams: Sequence[int]) -> int:
    return layout.samples * layout.chunk_size * sum(s.tokens(stream) for stream in streams)


# ---- training ----


def packed_forward(
    s: Sizes, samples: int, frames: int, program: str, *, chunk_size: int, window: int, history: str
) -> tuple[Cost, Cost]:
    """The forward of a training step under the joint objective: (all but the attention, the attention)."""
    c, e, timesteps = s.model, s.itemsize, samples * 2 * frames
    bridged = frames - frames_before_chunks(frames, chunk_size)[-1] if c.bridge_layer is not None else 0
    features = bridged * s.tokens(VIDEO)
    cost = _text(s, samples, features) + (_bridge(s, samples, bridged) if bridged else Cost())
    for stream in s.denoised:
        rows = timesteps * s.tokens(stream)
        block = _keys(s, stream, rows, timesteps) + _rest(s, stream, rows, timesteps, samples, features)
        block += _text_keys(s, stream, samples, features)
        cost += block * c.layers + _ends(s, stream, rows, timesteps, rows // 2)
    for stream in s.given:
        held = c.streams[stream]
        rest = _rest(s, stream, samples * held.tokens, samples, samples) + _text_keys(s, stream, samples)
        cost += _keys(s, stream, samples * held.tokens, samples) * c.layers + rest * (c.layers - (not held.aligned))
        cost += linear(samples * held.tokens, held.width, held.aligned, e) if held.aligned else Cost()
    geometry = geometry_for(
        program, OBJECTIVES["joint"], frames=frames, video_tokens=s.tokens(VIDEO),
        action_tokens=s.tokens(ACTION) if c.has_actions else 0, chunk_size=chunk_size, window=window, history=history,
    )  # fmt: skip
    tokens = timesteps * sum(map(s.tokens, s.denoised)) + samples * s.context_tokens
    plan = compile_plan(with_context(geometry, s.context_tokens) if s.context_tokens else geometry)
    pairs = samples * plan.visible_pairs
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
    tokens = config.batch * 2 * config.frames * sum(map(s.tokens, s.denoised)) + config.batch * s.context_tokens
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
