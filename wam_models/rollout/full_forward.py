"""The forward of a chunk of a model with ``full_attention``: the observed frame and the context run with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wam_kernels import cached_attention
from wam_kernels.masks.visibility import ACTION, NOISY, VIDEO

from ..model.blocks import PerStream, StreamInputs, Uncast
from ..model.dual_expert import WorldActionModel, of_timesteps
from .chunk_forward import Buffers, ChunkForward
from .frames import FRAME_DIM, to_device
from .layout import ChunkLayout


class FullForward(ChunkForward):
    """Runs ``[frame before the chunk | chunk's video | its actions | context]``, all of which attend to each other.

    As :class:`ChunkForward`, without a cache: every forward computes all keys and values.

    Attributes:
        observed: ``[B, C, 1, y, x]``, the frame before the chunk, at timestep 0.
    """

    def __init__(
        self, model: WorldActionModel, layout: ChunkLayout, latents: dict[int, Tensor], candidates: int = 1
    ) -> None:
        super().__init__(model, layout, None, latents, candidates)
        video = latents[VIDEO].narrow(FRAME_DIM[VIDEO], 0, 1)
        self.observed = video.new_zeros(layout.batch, *video.shape[1:])

    def of_candidates(self, latents: dict[int, Tensor]) -> FullForward:
        many = FullForward(self.model, self.layout, latents, self.layout.config.candidates)
        many.text, many.state, many.context, many.observed = self.text, self.state, self.context, self.observed
        return many

    def set_context(self, rollouts: Sequence[int], context: Mapping[str, Tensor]) -> None:
        """Features of the given streams of some rollouts, for the forwards from now on."""
        self._store_context(rollouts, context)

    def set_frames(
        self, streams: Sequence[int], noise: int, firsts: Sequence[int], counts: Sequence[int] | None = None,
        visible_from: Sequence[int] | None = None,
    ) -> Buffers:  # fmt: skip
        """Let the forward run the chunks that begin with ``firsts``; they are whole, and have no clean copies."""
        assert noise == NOISY and counts is None and visible_from is None
        key = tuple(sorted(streams)), noise
        assert key[0] == self.layout.streams, "all of them attend to each other"
        if key not in self.buffers:
            self.buffers[key] = self._new_buffers(*key)
        buffers = self.buffers[key]
        frames = self._chunk_frames(firsts)
        video = torch.cat([frames[:, :1] - 1, frames], 1)
        tables = self.model.rope(video, *self.layout.grid, frames if ACTION in streams else None)
        for stream, table in enumerate(tables):
            if table is not None:
                buffers.rope[stream].copy_(table)
        return buffers

    def _given(self) -> PerStream[StreamInputs | None]:
        """The context of all samples."""
        copies = self.layout.samples // self.layout.batch
        features = {n: torch.cat([t] * copies).repeat_interleave(self.candidates, 0) for n, t in self.context.items()}
        return self.model.embed_context(features, self.samples)

    def _embed(self, buffers: Buffers, sigma: Mapping[int, Tensor]) -> PerStream[StreamInputs | None]:
        video, levels = self._inputs(VIDEO, sigma)
        copies = self.layout.samples // self.layout.batch
        observed = torch.cat([self.observed] * copies).repeat_interleave(self.candidates, 0)
        video, levels = torch.cat([observed, video], 2), torch.cat([torch.zeros_like(levels[:, :1]), levels], 1)
        action = self._inputs(ACTION, sigma) if ACTION in buffers.streams else None
        embedded = self.model.embed((video, levels), action, self._given(), self._state_of_frames())
        buffers.indices = [stream.frame_index for stream in embedded if stream is not None]
        return embedded

    def _blocks(
        self, buffers: Buffers, embedded: PerStream[StreamInputs | None], wanted: Sequence[int]
    ) -> PerStream[StreamInputs | None]:
        rows = buffers.rows

        def attend(layer: int, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return cached_attention(q, keys, values, buffers.ranges, group_rows=rows)

        rope = Uncast(*(buffers.rope.get(s) for s in range(len(embedded))))
        return self.model.packed_block_stack(embedded, rope, self.text, attend, None, tuple(wanted))

    def _heads(self, after: PerStream[StreamInputs | None]) -> dict[int, Tensor]:
        """Of the chunk alone: the observed frame has no flow."""
        video = after[VIDEO]
        chunk = None if video is None else of_timesteps(video, 1, 1 + self.layout.chunk_size)
        return super()._heads((chunk, *after[1:]))

    def _new_buffers(self, streams: tuple[int, ...], noise: int) -> Buffers:
        layout, model = self.layout, self.model
        tables = model.rope(
            self._frames.new_zeros(self.samples, 1 + layout.chunk_size), *layout.grid,
            self._frames.new_zeros(self.samples, layout.chunk_size) if ACTION in streams else None, self._given(),
        )  # fmt: skip
        rope = {s: table for s, table in enumerate(tables) if table is not None}
        rows = sum(table.shape[-3] for table in rope.values())
        ranges = torch.tensor([0, rows], dtype=torch.int32).expand(self.samples, 1, 1, 2)
        return Buffers(
            streams=streams, noise=noise, rows=(rows,), written=None,
            ranges=to_device(ranges.contiguous(), model.device), rope=rope,
        )  # fmt: skip
