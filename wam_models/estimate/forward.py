"""What a chunk of a rollout and a training step must compute and move, by the costs of ``wam_models.costs``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from wam_kernels.masks.programs import STREAMS
from wam_kernels.masks.visibility import CLEAN, NOISY, VIDEO
from wam_kernels.roofline import Cost, DeviceModel, cached_attention, linear
from wam_kernels.streaming_cache import key_spans

from ..config import ModelConfig
from ..costs import (
    Sizes,
    block_keys,
    block_matrices,
    block_rest,
    block_text_keys,
    bridge_features,
    ends,
    packed_forward,
    packed_tokens,
    parameters,
    text_products,
)
from ..objectives import OBJECTIVES
from ..rollout import RolloutConfig
from ..rollout.layout import ChunkLayout
from ..rollout.stages import Pace, Stage, stages
from ..train.config import TrainConfig
from ..train.optimizers import ROUNDS
from .share import Share

# bytes that a parameter costs in a step, in float32
CAST_BYTES = 6  # read, and written in bf16
NORM_BYTES = 4  # its gradient read for the norm that gradients are clipped to
ADAMW_BYTES = 28  # gradient, weight and two moments read; weight and two moments written
MUON_BYTES = 20  # gradient, weight and average read; weight and average written
EMA_BYTES = 8  # its average, read and written


@dataclass(frozen=True)
class Part:
    """Forwards of one kind, and how many of them there are."""

    name: str
    times: int
    tokens: int  # of one
    cost: Cost  # of one

    def ms(self, on: DeviceModel) -> float:
        return self.times * self.cost.ms(on)


# ---- rollout ----


def chunk_forward(
    s: Sizes, layout: ChunkLayout, streams: Sequence[int], noise: int, wanted: Sequence[int],
    history: int | None = None, candidates: int = 1, heads: bool = True, there: int | None = None,
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
        there: Frames of the chunk that are attended to; default all.
    """
    history = layout.reach if history is None else history
    c, samples, frames = s.model, layout.samples, layout.chunk_size
    timesteps = samples * candidates * frames
    rows = {stream: timesteps * s.tokens(stream) for stream in streams}
    cost = Cost()
    bridge = (1 + frames) * s.tokens(VIDEO) if c.bridge_layer is not None else 0
    for stream in streams:
        full = c.layers - (stream not in wanted)
        cost += block_keys(s, stream, rows[stream], timesteps) * c.layers
        cost += block_rest(s, stream, rows[stream], timesteps, samples, bridge) * full
        cost += ends(s, stream, rows[stream], timesteps, rows[stream] if heads and stream in wanted else 0)
    geometry = layout.geometry(layout.reach, history)
    end_there = history + (frames if there is None else there)
    spans = [
        [(key, copy, first, min(end, end_there)) for key, copy, first, end in of_stream if first < end_there]
        for of_stream in key_spans(geometry, history, tuple(streams), noise)
    ]
    given = s.context_tokens + s.state_tokens * (noise == NOISY)
    visible = [sum((end - first) * s.tokens(key) for key, _, first, end in of_stream) + given for of_stream in spans]
    pairs = sum(rows[stream] * slots for stream, slots in zip(streams, visible, strict=True))
    read = {(key, copy, f) for spans_of in spans for key, copy, first, end in spans_of for f in range(first, end)}
    slots = samples * (sum(s.tokens(key) * (candidates if f >= history else 1) for key, _, f in read) + given)
    attention = cached_attention(pairs, sum(rows.values()), slots, c.heads, c.head_dim, s.itemsize)
    return cost + attention * (c.layers - (not wanted))


def full_forward(s: Sizes, layout: ChunkLayout, wanted: Sequence[int], candidates: int = 1) -> Cost:
    """One forward of a chunk, as ``FullForward`` runs it: the observed frame and the context in it.

    Args:
        s: Sizes; of the layout too.
        layout: Of the chunk.
        wanted: Streams whose flow is needed; the last block computes nothing else but keys and values.
        candidates: Chunks at work of each rollout.
    """
    c, samples, cost, tokens = s.model, layout.samples * candidates, Cost(), 0
    for stream in (*layout.streams, *s.given):
        frames = layout.chunk_size + (stream == VIDEO)
        timesteps = samples * (1 if stream in s.given else frames)
        rows = samples * (s.given_tokens(stream) if stream in s.given else frames * s.tokens(stream))
        tokens += rows // samples
        cost += block_keys(s, stream, rows, timesteps) * c.layers
        cost += block_rest(s, stream, rows, timesteps, layout.samples) * (c.layers - (stream not in wanted))
        if stream not in s.given:
            of_chunk = samples * layout.chunk_size * s.tokens(stream)
            cost += ends(s, stream, rows, timesteps, of_chunk if stream in wanted else 0)
        elif c.streams[stream].features:
            cost += linear(rows, c.streams[stream].features, s.width(stream), s.itemsize)
    rows = samples * tokens
    return cost + cached_attention(rows * tokens, rows, rows, c.heads, c.head_dim, s.itemsize) * c.layers


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
    if layout.full_attention:
        return parts
    if s.state_tokens:
        parts.insert(0, _of_given(s, layout))
    kept = layout.history_streams
    tokens = _tokens(s, layout, kept)
    if config.cache == "persistent":
        return [*parts, Part("accepted chunk to history", 1, tokens, chunk_forward(s, layout, kept, CLEAN, ()))]
    befores = range(0, layout.reach, layout.chunk_size)  # as if the episode began with the window
    there = min(layout.reach, layout.chunk_size)
    anew = sum((chunk_forward(s, layout, kept, CLEAN, (), before, there=there) for before in befores), Cost())
    return [*parts, Part("window computed anew", 1, tokens * len(befores), anew)]


def layout_of(s: Sizes, config: RolloutConfig, objective: str, batch: int) -> ChunkLayout:
    """That of a chunk of these sizes."""
    actions = s.model.actions_per_frame if s.model.has_actions else 0
    full = s.model.full_attention
    return ChunkLayout(config, OBJECTIVES[objective], batch, s.grid, actions, s.context_tokens, s.state_tokens, full)


def _of_given(s: Sizes, layout: ChunkLayout) -> Part:
    """What is given, computed anew for the state that a chunk is told."""
    c, samples, cost = s.model, layout.samples, Cost()
    for stream in s.given:
        held, rows = c.streams[stream], samples * s.given_tokens(stream)
        cost += block_keys(s, stream, rows, samples) * c.layers + block_rest(s, stream, rows, samples, samples) * (
            c.layers - 1
        )
        cost += linear(rows, held.features, held.width, s.itemsize) if held.features else Cost()
    tokens = s.context_tokens + s.state_tokens
    pairs = samples * (s.context_tokens**2 + s.state_tokens)
    cost += cached_attention(pairs, samples * tokens, samples * tokens, c.heads, c.head_dim, s.itemsize) * (
        c.layers - 1
    )
    return Part("tokens of the state", 1, samples * tokens, cost)


def _of_bridge(s: Sizes, layout: ChunkLayout) -> Part:
    """The bridge of a chunk, and all keys and values of texts anew."""
    samples, frames = layout.samples, 1 + layout.chunk_size
    features = frames * s.tokens(VIDEO)
    cost = bridge_features(s, samples, frames) + text_products(s, samples, features)
    for place, stream in enumerate(s.model.streams):
        cost += block_text_keys(s, place, samples, features) * (s.model.layers * stream.owns_expert)
    return Part("bridge", 1, samples * features, cost)


def _of_stage(s: Sizes, layout: ChunkLayout, stage: Stage) -> Iterator[Part]:
    config, many = layout.config, layout.config.candidates
    counts = {stream: config.trajectory(stream).forwards for stream in layout.streams}
    pace = Pace(counts, config.interleave, config.reuse_keys)
    for (streams, live), times in Counter((f.streams, f.live) for f in stage.forwards(pace)).items():
        names, given = (" and ".join(STREAMS[s] for s in found) for found in (live, sorted({*streams} - {*live})))
        step = (
            full_forward(s, layout, live, many)
            if layout.full_attention
            else chunk_forward(s, layout, streams, NOISY, live, candidates=many)
        )
        name = f"denoising step of {names}" + (f", {given} given" if given else "")
        yield Part(name, times, many * _tokens(s, layout, streams), step)
    if stage.promoted is not None:
        clean = (stage.promoted,)
        # candidates run the last block whole, because its attention is what keeps their keys
        once = chunk_forward(s, layout, clean, CLEAN, clean if many > 1 else (), candidates=many, heads=False)
        yield Part("its clean copy", 1, many * _tokens(s, layout, clean), once)


def _tokens(s: Sizes, layout: ChunkLayout, streams: Sequence[int]) -> int:
    of_frames = layout.chunk_size * sum(s.tokens(stream) for stream in streams)
    beside = s.tokens(VIDEO) + s.context_tokens + s.state_tokens if layout.full_attention else 0
    return layout.samples * (of_frames + beside)


# ---- training ----


def train_step(s: Sizes, config: TrainConfig, gpus: int = 1) -> list[Part]:
    """What one GPU of a training step computes, for the largest chunk and window that may be drawn and the first of the
    programs; packed clips are as many of the longest as there is room for.

    Products in bf16 from float32 weights, the optimizers in float32. The backward is counted as twice the forward (2.5
    times in attention): what the inputs' own gradients would take, which nobody asks for, is in it, and what
    ``engine.recompute`` computes again.

    Raises:
        ValueError: ``gpus`` that the engine or the batch does not divide.
    """
    share, program = Share.of(s, config, gpus), config.programs[0]
    others, attention = packed_forward(
        s, share.clips, config.frames, program, chunk_size=config.chunk_sizes[1], window=config.windows[1],
        history=config.history,
    )  # fmt: skip
    tokens = share.of_samples(packed_tokens(s, share.clips, share.clips * config.frames))
    # 10 H D pairs for 4 H D, 8 tensors for 4
    backward = Cost(attention.flops * 5 // 2, attention.bytes * 2) + others * 2
    if config.engine.recompute == "block":
        backward += others + attention
    forward, backward = (_shared(cost, share.split) for cost in (others + attention, backward))
    cast = Cost(0, CAST_BYTES * parameters(s.model) // share.shards)
    return [
        Part("weights to bf16", share.micro_batches, 0, cast),
        Part(f"forward, {program}", share.micro_batches, tokens, forward),
        Part("backward", share.micro_batches, tokens, backward),
        Part("clipping and optimizers", 1, 0, _shared(optimizers(s.model, config), share.shards)),
    ]


def _shared(cost: Cost, count: int) -> Cost:
    return Cost(cost.flops // count, cost.bytes // count, cost.float32_flops // count)


def optimizers(c: ModelConfig, config: TrainConfig) -> Cost:
    """Clipping, Muon for the matrices of the blocks where it is the optimizer, AdamW for the rest, and the average of
    the weights."""
    total, flops, muon = parameters(c), 0, 0
    for rows, columns, times in block_matrices(c) if config.optimizer == "muon" else ():
        m, n = sorted((rows, columns))
        flops += times * ROUNDS * (4 * m * m * n + 2 * m**3)  # x x^T, its square, and their sum by x
        muon += rows * columns * times
    moved = total * (NORM_BYTES + EMA_BYTES * (config.ema > 0)) + MUON_BYTES * muon + ADAMW_BYTES * (total - muon)
    return Cost(0, moved, flops)
