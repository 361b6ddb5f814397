"""The forward of one chunk over the keys and values of its history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wam_kernels import FrameIndex, StreamingCache, cached_attention
from wam_kernels.masks.visibility import ACTION, CLEAN, NOISY, VIDEO
from wam_kernels.streaming_cache import MAX_RANGES

from ..config import STATE_STREAM
from ..flow import timesteps
from ..model.blocks import BridgeVideo, PerStream, QKVBuffers, StreamInputs, Text, Uncast
from ..model.dual_expert import WorldActionModel
from ..objectives import OBJECTIVES
from .frames import FRAME_DIM, to_device
from .layout import ChunkLayout


@dataclass(eq=False)
class Buffers:
    """What a forward of these streams' noisy or clean tokens reads and writes, at addresses that never change."""

    streams: tuple[int, ...]
    noise: int
    rows: tuple[int, ...]  # tokens of the chunk in each stream
    # of each block: where q, and the keys and values in the cache, are written; candidates' are copied there
    written: list[QKVBuffers] | None
    ranges: Tensor  # int32 [B, streams, MAX_RANGES, 2]: the slots that each stream's queries attend to
    rope: dict[int, Tensor]
    # of each stream's modulation rows; held here, because a captured graph reads their memory
    indices: list[FrameIndex] = field(default_factory=list)


class ChunkForward:
    """Runs the tokens of the chunk at work, noisy or clean, and nothing else.

    Every input stays in place, so that a captured CUDA graph of :meth:`flows` can be replayed for another chunk.

    Args:
        model: Of all forwards.
        layout: Sizes of the chunk and its history.
        cache: Of the history's keys and values.
        latents: The chunk at work, ``[B k, C, chunk, y, x]`` and ``[B k, chunk, n, A]``; what :meth:`flows` denoises.
        candidates: k, chunks at work of each rollout, one after the other in the batch.

    Attributes:
        text: Keys and values of the text in every block; see :meth:`set_text`.
        state: ``[B, S]`` that the chunk's action tokens are told, or None.
        context: Features ``[B, N, E]`` of the given streams, by name; see :meth:`set_context`.
        buffers: Of each (streams, ``NOISY`` or ``CLEAN``) that was run so far.
    """

    def __init__(
        self, model: WorldActionModel, layout: ChunkLayout, cache: StreamingCache | None, latents: dict[int, Tensor],
        candidates: int = 1,
    ) -> None:  # fmt: skip
        self.model, self.layout, self._cache, self.latents = model, layout, cache, latents
        self.candidates, self.samples = candidates, layout.samples * candidates
        self.text: list[PerStream[Text]] = []
        self.context: dict[str, Tensor] = {}
        width = model.config.state_dim
        self.state = latents[VIDEO].new_zeros(layout.batch, width) if width else None
        if self.state is not None and layout.state_tokens:
            self.context[STATE_STREAM] = self.state.new_zeros(layout.batch, 1, width)
        self._clean_sigma = latents[VIDEO].new_zeros(1)
        self._frames = torch.arange(layout.chunk_size, device=model.device)
        self.buffers: dict[tuple[tuple[int, ...], int], Buffers] = {}

    def __getstate__(self) -> dict:
        # buffers are made anew where they are needed
        return vars(self) | {"buffers": {}}

    @property
    def cache(self) -> StreamingCache:
        assert self._cache is not None
        return self._cache

    def of_candidates(self, latents: dict[int, Tensor]) -> ChunkForward:
        """Of ``cache.candidates`` chunks of each rollout, over the same history, text and context."""
        many = ChunkForward(self.model, self.layout, self.cache, latents, self.cache.candidates)
        many.text, many.state, many.context = self.text, self.state, self.context
        return many

    def set_text(self, rollouts: Sequence[int], text: Tensor, bridge: Tensor | BridgeVideo | None = None) -> None:
        """Compute the keys and values of text and bridge of some rollouts; at first of all of them, in order."""
        text = torch.zeros_like(text) if self.layout.objective.conditional else text
        text = torch.cat([text, torch.zeros_like(text)]) if self.layout.guided else text
        device, modes = self.model.device, None
        if self.model.config.mode_token:
            modes = torch.full((len(text),), list(OBJECTIVES).index(self.layout.objective.name), device=device)
        repeat = len(text) // len(rollouts)
        if isinstance(bridge, BridgeVideo):
            levels = Uncast(torch.cat([*bridge.timesteps.tensors] * repeat))
            bridge = bridge._replace(video=torch.cat([bridge.video] * repeat), timesteps=levels)
        elif bridge is not None:
            bridge = torch.cat([to_device(bridge, device)] * repeat)
        fresh = self._embed_text(to_device(text, device), modes, bridge)
        if not self.text:
            self.text = fresh
            return
        for old, new in zip(self.text, fresh, strict=True):
            for old_stream, new_stream in zip(old, new, strict=True):
                for old_tensor, new_tensor in zip(old_stream, new_stream, strict=True):
                    for i, b in enumerate(rollouts):
                        old_tensor[b].copy_(new_tensor[i])
                        if self.layout.guided:
                            old_tensor[self.layout.batch + b].copy_(new_tensor[len(rollouts) + i])

    def _embed_text(
        self, text: Tensor, modes: Tensor | None, bridge: Tensor | BridgeVideo | None
    ) -> list[PerStream[Text]]:
        """Each sample on its own: products of more rows round otherwise, and who begins beside it is no matter of it.

        A bridge that the model makes of its video is always that of all samples.
        """
        if isinstance(bridge, BridgeVideo):
            return self.model.embed_text(text, True, modes=modes, bridge=bridge)
        parts = []
        for i in range(len(text)):
            one, mode, own = (None if t is None else t[i : i + 1] for t in (text, modes, bridge))
            assert one is not None
            parts.append(self.model.embed_text(one, True, modes=mode, bridge=own))
        return [
            tuple(tuple(map(torch.cat, zip(*same, strict=True))) for same in zip(*streams, strict=True))  # type: ignore[misc]
            for streams in zip(*parts, strict=True)
        ]

    def set_context(self, rollouts: Sequence[int], context: Mapping[str, Tensor]) -> None:
        """Compute the keys and values of the given streams, after the text; ``context`` is that of some rollouts."""
        model, layout = self.model, self.layout
        if not layout.context_tokens + layout.state_tokens:
            return
        self._store_context(rollouts, context)
        cache = self.cache
        repeat = layout.samples // layout.batch
        given = model.embed_context({n: torch.cat([t] * repeat) for n, t in self.context.items()}, layout.samples)
        slots, c = cache.context_slots, model.config
        middle = slots.stop - layout.state_tokens  # the context and the state attend to themselves alone
        rows = layout.context_tokens, layout.state_tokens
        ranges = torch.tensor([[[slots.start, middle]], [[middle, slots.stop]]], dtype=torch.int32)
        ranges = to_device(ranges.expand(layout.samples, -1, -1, -1).contiguous(), model.device)
        queries = self._empty(layout.samples, sum(rows))

        def attend(layer: int, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return cached_attention(q, keys, values, ranges, group_rows=rows)

        written = [QKVBuffers(queries, cache.keys(i), cache.values(i), slots.start) for i in range(c.layers)]
        streams, rope = model.embed(None, None, given), model.rope(None, *layout.grid, None, given)
        model.packed_block_stack(streams, Uncast(*rope), self.text, attend, written, ())

    def set_state(self, states: Mapping[int, Tensor], denoises: bool) -> None:
        """Let the next chunk to run be told these states ``[S]``, by rollout; ``denoises``: it is noisy."""
        assert self.state is not None
        for b, state in states.items():
            self.state[b].copy_(state)
        if self.layout.state_tokens and denoises:  # clean tokens do not attend to it
            self.set_context(range(self.layout.batch), {STATE_STREAM: self.state[:, None]})

    def _store_context(self, rollouts: Sequence[int], context: Mapping[str, Tensor]) -> None:
        for name, features in context.items():
            if name not in self.context:
                self.context[name] = features.new_zeros(
                    self.layout.batch, *features.shape[1:], device=self.model.device
                )
            for b, new in zip(rollouts, to_device(features, self.model.device), strict=True):
                self.context[name][b].copy_(new)

    def _empty(self, samples: int, rows: int) -> Tensor:
        """Room for so many queries of each sample."""
        model, c = self.model, self.model.config
        return torch.empty(samples, rows, c.heads, c.head_dim, dtype=model.dtype, device=model.device)

    def set_frames(
        self, streams: Sequence[int], noise: int, firsts: Sequence[int], counts: Sequence[int] | None = None,
        visible_from: Sequence[int] | None = None,
    ) -> Buffers:  # fmt: skip
        """Let the forward of these streams' ``NOISY`` or ``CLEAN`` tokens run the chunks that begin with ``firsts``.

        Args:
            streams: Which run together.
            noise: Their copy.
            firsts: First frame of each rollout's chunk.
            counts: Frames of each that are there; default the whole chunk.
            visible_from: First frame that each attends to; default the window's.
        """
        layout, model = self.layout, self.model
        key = tuple(sorted(streams)), noise
        if key not in self.buffers:
            self.buffers[key] = self._new_buffers(*key)
        buffers, repeat = self.buffers[key], layout.samples // layout.batch
        counts = [layout.chunk_size] * layout.batch if counts is None else counts
        starts = [layout.first_visible(f) for f in firsts] if visible_from is None else visible_from
        history = [first - start for first, start in zip(firsts, starts, strict=True)]
        geometries = [layout.geometry(start, n) for start, n in zip(starts, history, strict=True)]
        ranges = self.cache.ranges(
            geometries * repeat, [*starts] * repeat, history * repeat, [*counts] * repeat, buffers.streams, noise,
            self.candidates,
        )  # fmt: skip
        buffers.ranges.copy_(to_device(ranges, model.device))
        frames = self._chunk_frames(firsts)
        video, action = (frames if s in streams else None for s in (VIDEO, ACTION))
        for stream, table in enumerate(model.rope(video, *layout.grid, action)):
            if table is not None:
                buffers.rope[stream].copy_(table)
        return buffers

    def _chunk_frames(self, firsts: Sequence[int]) -> Tensor:
        """Numbers of the chunk's frames, ``[samples, chunk]``."""
        each = [first for first in firsts for _ in range(self.candidates)]
        first = to_device(torch.tensor(each * (self.samples // len(each)), device="cpu"), self.model.device)
        return first[:, None] + self._frames

    def flows(self, streams: Sequence[int], sigma: Mapping[int, Tensor], wanted: Sequence[int]) -> dict[int, Tensor]:
        """Flow of the noisy chunk, of each ``wanted`` stream, at the noise levels ``[1]`` in ``sigma``.

        Of ``streams``, those without a level are given: they stay at timestep 0.
        """
        buffers = self.buffers[tuple(sorted(streams)), NOISY]
        return self._heads(self._blocks(buffers, self._embed(buffers, sigma), wanted))

    def embedded(self, streams: Sequence[int], sigma: Mapping[int, Tensor]) -> PerStream[StreamInputs | None]:
        """What of the noisy chunk enters the blocks."""
        return self._embed(self.buffers[tuple(sorted(streams)), NOISY], sigma)

    def added(
        self, streams: Sequence[int], tokens: PerStream[StreamInputs | None], wanted: Sequence[int]
    ) -> dict[int, Tensor]:
        """What the blocks add to the tokens of :meth:`embedded`, ``[samples, S, D]`` of each wanted stream."""
        after = self._blocks(self.buffers[tuple(sorted(streams)), NOISY], tokens, wanted)
        pairs = enumerate(zip(tokens, after, strict=True))
        return {s: out.x - x.x for s, (x, out) in pairs if x is not None and out is not None}

    def flows_of(self, tokens: PerStream[StreamInputs | None], added: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """As :meth:`flows`, of what entered the blocks and what they added."""
        pairs = enumerate(tokens)
        return self._heads(
            tuple(t._replace(x=t.x + added[s]) if t is not None and s in added else None for s, t in pairs)
        )

    def _heads(self, after: PerStream[StreamInputs | None]) -> dict[int, Tensor]:
        layout = self.layout
        found = self.model.flows(after, layout.chunk_size, *layout.grid)
        flows = {s: flow for s, flow in enumerate(found) if flow is not None}
        if layout.guided:
            halves = {s: flow.chunk(2) for s, flow in flows.items()}
            strength = {s: layout.config.guidance_of(s) for s in flows}
            flows = {s: without + strength[s] * (text - without) for s, (text, without) in halves.items()}
        return flows

    def run_clean(self, streams: Sequence[int], sigma: Mapping[int, Tensor]) -> None:
        """Keys and values of the clean copy into the slots of the chunk at work, for the frames that were set.

        At the noise levels ``[1]`` in ``sigma`` where the denoising left any, else at 0.
        """
        buffers = self.buffers[tuple(sorted(streams)), CLEAN]
        # candidates' keys are copied by the attention, which the last block leaves out where nothing is wanted
        self._blocks(buffers, self._embed(buffers, sigma), streams if buffers.written is None else ())

    def write_history(
        self, chunk: Mapping[int, Tensor], firsts: Sequence[int], counts: Sequence[int],
        visible_from: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """Keys and values of clean frames, those of :meth:`set_frames`, into the rings."""
        for s, held in self.latents.items():
            held.narrow(FRAME_DIM[s], 0, chunk[s].shape[FRAME_DIM[s]]).copy_(chunk[s])
        self.set_frames(self.layout.history_streams, CLEAN, firsts, counts, visible_from)
        self.run_clean(self.layout.history_streams, {})
        self.cache.store_chunk(self.layout.history_streams, firsts, counts)

    def _embed(self, buffers: Buffers, sigma: Mapping[int, Tensor]) -> PerStream[StreamInputs | None]:
        video, action = (self._inputs(s, sigma) if s in buffers.streams else None for s in (VIDEO, ACTION))
        embedded = self.model.embed(video, action, state=self._state_of_frames())
        buffers.indices = [stream.frame_index for stream in embedded if stream is not None]
        return embedded

    def _inputs(self, stream: int, sigma: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Latents of all samples and timesteps of their frames."""
        latents = torch.cat([self.latents[stream]] * 2) if self.layout.guided else self.latents[stream]
        level = sigma.get(stream, self._clean_sigma)
        return latents, timesteps(level).expand(self.samples, self.layout.chunk_size)

    def _state_of_frames(self) -> Tensor | None:
        """``[samples, chunk, S]`` of a model that is told states."""
        if self.state is None or self.layout.state_tokens:
            return None
        state = torch.cat([self.state] * (self.layout.samples // self.layout.batch))[:, None, None]
        return state.expand(-1, self.candidates, self.layout.chunk_size, -1).flatten(0, 1)

    def _blocks(
        self, buffers: Buffers, embedded: PerStream[StreamInputs | None], wanted: Sequence[int]
    ) -> PerStream[StreamInputs | None]:
        """The ``wanted`` streams after the last block; all keys and values go to the chunk's slots."""

        def attend(layer: int, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            if buffers.written is None:
                self.cache.write_candidates(layer, buffers.streams, buffers.noise, keys, values)
                keys, values = self.cache.keys(layer), self.cache.values(layer)
            return cached_attention(q, keys, values, buffers.ranges, group_rows=buffers.rows)

        rope = Uncast(*(buffers.rope.get(s) for s in range(len(embedded))))
        return self.model.packed_block_stack(embedded, rope, self.text, attend, buffers.written, tuple(wanted))

    def _new_buffers(self, streams: tuple[int, ...], noise: int) -> Buffers:
        cache, model, c = self.cache, self.model, self.model.config
        rows, slots = cache.rows(streams), cache.chunk_slots(streams, noise)
        written = None
        if self.candidates == 1:
            # one for all blocks: each has read its queries when the next writes
            queries = self._empty(self.samples, sum(rows))
            every = range(c.layers)
            written = [QKVBuffers(queries, cache.keys(i), cache.values(i), slots.start) for i in every]
        dtype = torch.promote_types(model.dtype, torch.float32)
        return Buffers(
            streams=streams,
            noise=noise,
            rows=rows,
            written=written,
            ranges=torch.zeros(self.samples, len(streams), MAX_RANGES, 2, dtype=torch.int32, device=model.device),
            rope={
                s: torch.empty(self.samples, n, c.head_dim // 2, 2, dtype=dtype, device=model.device)
                for s, n in zip(streams, rows, strict=True)
            },
        )
