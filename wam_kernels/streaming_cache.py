"""Keys and values of a rollout in fixed slots, and which of them a chunk's queries attend to.

A rollout denoises one chunk of frames after the other. The clean tokens of earlier chunks never attend to a noisy
token, so their keys and values are computed once and stay. Every layer has the same slots, allocated once:

    [ video ring | action ring | clean chunk | noisy chunk | context | candidate 0 | candidate 1 | .. ]

Frame f lies in place ``f % frames`` of each ring. The next two hold the chunk at work: its noisy tokens are
overwritten at every denoising step, its clean copies are copied into the rings when the chunk is accepted
(:meth:`store_chunk`), so a chunk that is not accepted leaves no trace. Every query attends to the context, if there is
any, but to its last ``noisy_context_tokens`` noisy ones alone do. Candidates are chunks that continue the same history
side by side, each with a place of its own for its noisy tokens and, where a program needs it, its clean copies. What a
query attends to is a handful of slot ranges (:meth:`ranges`), which change from chunk to chunk but not from step to
step; ``cached_attention`` reads them from device memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .masks.visibility import ACTION, CLEAN, NOISY, SEGMENTS, VIDEO, Geometry, tokens, visible
from .runtime.checks import integer, integers
from .runtime.host import device_of, eager, host_side, plain

# Both rings may wrap around and the chunk adds its clean and its noisy copies of both streams. In a program that has a
# rollout two of these four are not attended to, which leaves room for the context.
MAX_RANGES = 8

# One stream's visible copies: (stream, noise, first frame, end), frames counted from the first of the geometry.
_Span = tuple[int, int, int, int]


@lru_cache(maxsize=1024)
def key_spans(
    geometry: Geometry, history_frames: int, streams: tuple[int, ...], noise: int
) -> tuple[tuple[_Span, ...], ...]:
    """Which frames the queries of each stream of a chunk attend to; it begins ``history_frames`` into ``geometry``.

    Args:
        geometry: History and chunk as one sample; the chunk is its last frames and a chunk of its grid.
        history_frames: Frames of history.
        streams: Streams that query, each of ``VIDEO`` and ``ACTION``.
        noise: ``NOISY`` or ``CLEAN`` queries.
    """
    # every token of a frame attends to the same, so one stands for all
    one = Geometry(**vars(geometry) | {"video_tokens": 1, "action_tokens": 1})
    t, frames = tokens(one), one.video_frames
    spans_of_streams = []
    for stream in streams:
        start = SEGMENTS.index((stream, noise)) * frames
        mask = visible(one, t[start + history_frames : start + frames][:, None], t[None, :])
        assert (mask == mask[:1]).all(), "the frames of a chunk attend to the same"
        spans = []
        for segment, (key_stream, key_noise) in enumerate(SEGMENTS):
            found = np.flatnonzero(mask[0, segment * frames : (segment + 1) * frames])
            if found.size:
                first, end = int(found[0]), int(found[-1]) + 1
                assert end - first == found.size, "a stream's visible frames are one stretch"
                spans.append((key_stream, key_noise, first, end))
        spans_of_streams.append(tuple(spans))
    return tuple(spans_of_streams)


class StreamingCache:
    """Keys and values of all layers in fixed slots, for a batch of rollouts.

    Args:
        layers: Layers of the model.
        batch: Rollouts B, each at a frame of its own.
        heads: Attention heads H.
        head_dim: Width D of a head.
        video_tokens: Tokens of one video frame.
        action_tokens: Action tokens of one frame; 0 where there are no actions.
        chunk_size: Frames of a chunk, at most.
        frames: Frames that each ring holds.
        context_tokens: Tokens that every query attends to.
        noisy_context_tokens: Tokens behind them that noisy queries attend to, such as the state of the chunk at work.
        candidates: Chunks at work side by side; 1: no places but those of the chunk at work.
        clean_candidates: Whether candidates have clean copies too.
        dtype: Of keys and values.
        device: Where they are.

    Attributes:
        buffer: ``[layers, 2, B, N, H, D]``, keys and values; not initialised.
        length: N slots.
        context_slots: Those of the context, which the caller writes.

    Raises:
        ValueError: a size that is no integer or below 1, a dtype that is none of floats, rings that do not hold one
            chunk, or more slots than int32 counts.
    """

    @eager
    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        video_tokens: int,
        action_tokens: int,
        chunk_size: int,
        frames: int,
        context_tokens: int = 0,
        noisy_context_tokens: int = 0,
        candidates: int = 1,
        clean_candidates: bool = False,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        op = "StreamingCache"
        sizes = {"layers": layers, "batch": batch, "heads": heads, "head_dim": head_dim, "video_tokens": video_tokens}
        sizes |= {"action_tokens": action_tokens, "chunk_size": chunk_size, "frames": frames}
        layers, batch, heads, head_dim, video_tokens, action_tokens, chunk_size, frames = (
            integer(op, name, value, int(name != "action_tokens")) for name, value in sizes.items()
        )
        context_tokens = integer(op, "context_tokens", context_tokens)
        self.noisy_context_tokens = integer(op, "noisy_context_tokens", noisy_context_tokens)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"{op}: dtype must be a torch.dtype of floats, got {dtype!r}")
        if frames < chunk_size:
            raise ValueError(f"{op}: frames must be at least chunk_size={chunk_size}, got {frames}")
        self.batch, self.chunk_size, self.frames = batch, chunk_size, frames
        self.per_frame = {VIDEO: video_tokens, ACTION: action_tokens}
        self._ring = {VIDEO: 0, ACTION: frames * video_tokens}
        rings, chunk = frames * (video_tokens + action_tokens), chunk_size * (video_tokens + action_tokens)
        self._chunk = {
            (stream, noise): rings + (chunk if noise == NOISY else 0) + (chunk_size * video_tokens) * (stream == ACTION)
            for stream, noise in SEGMENTS
        }
        end = rings + 2 * chunk + context_tokens + self.noisy_context_tokens
        self.context_slots = slice(rings + 2 * chunk, end)
        self.candidates = integer(op, "candidates", candidates, 1)
        self._candidate = chunk * (1 + clean_candidates) if self.candidates > 1 else 0  # slots of one
        # ranges are int32
        end = self.context_slots.stop + self.candidates * self._candidate
        self.length = integer(op, "its slots (of frames, chunk_size and candidates)", end)
        shape = layers, 2, batch, self.length, heads, head_dim
        # written to as long as it lives, in whatever mode: an inference tensor could not be
        with torch.inference_mode(False):
            self.buffer = torch.empty(shape, dtype=dtype, device=device_of(op, device))

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.buffer = plain(self.buffer)

    def keys(self, layer: int) -> Tensor:
        """``[B, N, H, D]`` of a layer, a view."""
        return self.buffer[layer, 0]

    def values(self, layer: int) -> Tensor:
        """As :meth:`keys`."""
        return self.buffer[layer, 1]

    def rows(self, streams: Sequence[int]) -> tuple[int, ...]:
        """Tokens of a chunk in each stream."""
        return tuple(self.chunk_size * self.per_frame[s] for s in streams)

    def chunk_slots(self, streams: Sequence[int], noise: int) -> slice:
        """Where the chunk at work keeps its noisy tokens or clean copies: one stretch, video before action."""
        start = self._chunk[streams[0], noise]
        return slice(start, start + sum(self.rows(streams)))

    def _of_candidate(self, stream: int, noise: int) -> int:
        """Where a candidate keeps a copy of a stream, counted from its first slot: noisy before clean."""
        place = self._chunk[stream, noise] - self._chunk[VIDEO, noise]
        return place + sum(self.rows((VIDEO, ACTION))) * (noise == CLEAN)

    def write_candidates(self, layer: int, streams: Sequence[int], noise: int, keys: Tensor, values: Tensor) -> None:
        """Keys and values ``[B k, S, H, D]`` of a layer to the places of k candidates of each rollout.

        ``streams`` follow each other there, as in :meth:`chunk_slots`.
        """
        start = self._of_candidate(streams[0], noise)
        for held, new in ((self.keys(layer), keys), (self.values(layer), values)):
            places = held[:, self.context_slots.stop :].unflatten(1, (self.candidates, self._candidate))
            places[:, :, start : start + new.shape[1]] = new.unflatten(0, (self.batch, self.candidates))

    def ring_slots(self, stream: int, first: int, end: int) -> list[tuple[int, int]]:
        """Slot ranges of the frames ``first`` to ``end - 1`` of an episode, in order; at most two."""
        assert 0 <= first <= end <= first + self.frames
        per, ring = self.per_frame[stream], self._ring[stream]
        place, count = first % self.frames, end - first
        parts = [(place, min(place + count, self.frames)), (0, place + count - self.frames)]
        return [(ring + a * per, ring + b * per) for a, b in parts if a < b]

    @host_side
    def ranges(
        self,
        geometries: Sequence[Geometry],
        starts: Sequence[int],
        history_frames: Sequence[int],
        counts: Sequence[int],
        streams: Sequence[int],
        noise: int,
        candidates: int = 1,
    ) -> Tensor:
        """What a chunk's queries attend to, for ``cached_attention`` with a row set for each stream.

        Args:
            geometries: Of each sample: its history and chunk, see :func:`key_spans`.
            starts: Episode frame with which each geometry begins.
            history_frames: Frames of history in each geometry.
            counts: Frames of each sample's chunk that are there; the queries of the others attend to the same and
                may be thrown away. 0: the sample's queries are fully masked.
            streams: Streams that query.
            noise: ``NOISY`` or ``CLEAN`` queries.
            candidates: 1, or as many as the cache has places for: then k of each sample, one after the other.

        Returns:
            int32 ``[B candidates, len(streams), MAX_RANGES, 2]`` on the CPU.
        """
        starts, history_frames, counts = (
            integers("StreamingCache.ranges", name, values)
            for name, values in (("starts", starts), ("history_frames", history_frames), ("counts", counts))
        )
        assert candidates in (1, self.candidates)
        table = np.zeros((self.batch, candidates, len(streams), MAX_RANGES, 2), np.int32)
        for b, (geometry, start, before, count) in enumerate(
            zip(geometries, starts, history_frames, counts, strict=True)
        ):
            for g, spans in enumerate(key_spans(geometry, before, tuple(streams), noise) if count else ()):
                slots: list[tuple[int, int]] = []
                of_own: list[int] = []  # the ranges among them that lie in the chunk at work
                for stream, key_noise, first, end in spans:
                    if key_noise == CLEAN:
                        slots += self.ring_slots(stream, start + min(first, before), start + min(end, before))
                    # of its own chunk, a query attends to the frames that are there
                    own, per = self._chunk[stream, key_noise], self.per_frame[stream]
                    if candidates > 1:
                        own = self.context_slots.stop + self._of_candidate(stream, key_noise)
                    own_first, own_end = max(first - before, 0), min(end - before, count)
                    if own_first < own_end:
                        of_own.append(len(slots))
                        slots.append((own + own_first * per, own + own_end * per))
                end = self.context_slots.stop - self.noisy_context_tokens * (noise == CLEAN)
                if self.context_slots.start < end:
                    slots.append((self.context_slots.start, end))
                for i in range(candidates):
                    table[b, i, g, : len(slots)] = np.reshape(slots, (-1, 2))
                    table[b, i, g, of_own] += i * self._candidate
        return torch.from_numpy(table.reshape(-1, *table.shape[2:]))

    @eager
    def store_chunk(self, streams: Sequence[int], firsts: Sequence[int], counts: Sequence[int]) -> None:
        """Copy the clean chunk's first ``counts[b]`` frames to the places of the frames ``firsts[b]`` and following.

        Fewer rollouts than the batch: it is so many copies of them, as in classifier-free guidance.
        """
        firsts, counts = (
            integers("StreamingCache.store_chunk", name, values)
            for name, values in (("firsts", firsts), ("counts", counts))
        )
        rollouts = len(firsts)
        assert self.batch % rollouts == 0
        alike: dict[tuple[int, int], list[int]] = {}
        for b, key in enumerate(zip(firsts, counts, strict=True)):
            alike.setdefault(key, []).extend(range(b, self.batch, rollouts))
        for (first, count), members in alike.items():
            # no index tensor: it would have to be copied from the host, and wait for it
            whole = len(members) == self.batch
            for chosen in [slice(None)] if whole else [slice(m, m + 1) for m in members]:
                for stream in streams:
                    source = self._chunk[stream, CLEAN]
                    for start, end in self.ring_slots(stream, first, first + count):
                        part = self.buffer[:, :, chosen, source : source + end - start]
                        self.buffer[:, :, chosen, start:end] = part
                        source += end - start
