"""The denoising of a chunk; on a GPU one CUDA graph, captured once and replayed from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from wam_kernels.masks.visibility import ACTION, CLEAN, NOISY

from .chunk_forward import ChunkForward
from .config import RolloutConfig
from .skipping import Skipping
from .stages import Forward, Pace, Stage


class Solver:
    """The steps of ``forward.latents`` from noise to data.

    Args:
        forward: Of the chunk.
        config: Schedules of the streams, whether to capture graphs.

    Attributes:
        trajectories: Of each stream, what its schedule comes to.
        chunks: The denoising of a chunk, for each list of stages that was asked for so far, with and without actions
            that are held, and keys that are used again.
        skipping: Which forwards are left out; None: none.
    """

    def __init__(self, forward: ChunkForward, config: RolloutConfig) -> None:
        self.forward, self.config = forward, config
        self.trajectories = {s: config.trajectory(s) for s in forward.latents}
        self._levels = {s: self.trajectories[s].levels.to(t) for s, t in forward.latents.items()}
        self._kept = {s: t.new_zeros(self.trajectories[s].kept, *t.shape) for s, t in forward.latents.items()}
        self.chunks: dict[tuple[tuple[Stage, ...], bool, bool], Callable[[], None]] = {}
        # of actions that are held: what they are, the noise that they begin as, and which; bool
        self._held: tuple[Tensor, Tensor, Tensor] | None = None
        self.skipping = Skipping(forward, config) if config.skips else None

    def __getstate__(self) -> dict:
        # some are CUDA graphs over this solver's memory; made anew where they are needed
        return vars(self) | {"chunks": {}}

    def level_left(self, stage: Stage, stream: int) -> float | None:
        """Noise level of a stream after its stage; None where the request left it before its last step."""
        if stream not in stage.denoised:
            return 0.0
        runs = sum(stream in forward.live for forward in self._forwards(stage))
        path = self.trajectories[stream]
        return path.end if 0 < runs == path.forwards else None

    def hold(self, actions: Tensor, noise: Tensor, which: Tensor) -> None:
        """Let these actions come out as they are: at every forward they lie between themselves and their noise.

        Args:
            actions: As the chunk's, ``[B k, chunk, n, A]``.
            noise: Of the same shape.
            which: bool, of the same shape.
        """
        latents = self.forward.latents[ACTION]
        if self._held is None:  # at addresses that never change, as a captured graph reads them
            self._held = torch.zeros_like(latents), torch.zeros_like(latents), torch.zeros_like(latents).bool()
        for held, new in zip(self._held, (actions, noise, which), strict=True):
            held.copy_(new)

    def _keep_held(self, number: int) -> None:
        """Put what is held to its place at this forward's noise level."""
        assert self._held is not None
        known, noise, which = self._held
        latents, level = self.forward.latents[ACTION], self._levels[ACTION][number]
        latents.copy_(torch.where(which, known + (noise - known) * level, latents))

    def denoise(
        self, stages: tuple[Stage, ...], firsts: Sequence[int], full: bool = False, held: bool = False
    ) -> list[int]:
        """All stages, in order, for the chunks that begin with these frames of each rollout.

        Args:
            stages: What the request needs.
            firsts: First frame of each rollout's chunk.
            full: Leave no forward out, and use no keys and values again that have changed.
            held: Whether there are actions of :meth:`hold`.

        Returns:
            The forwards that ran for each chunk.
        """
        reuse_keys = self.config.reuse_keys and not full
        for stage in stages:
            for streams in {forward.streams for forward in self._forwards(stage, reuse_keys)}:
                self.forward.set_frames(streams, NOISY, firsts)
            if stage.promoted is not None:
                self.forward.set_frames((stage.promoted,), CLEAN, firsts)
        if self.skipping is not None and not full:
            self.skipping.begin()
            self._chunk(stages, self.skipping, held, reuse_keys)
            return self.skipping.ran.tolist()
        chunk = self.chunks.get((stages, held, reuse_keys))
        if chunk is None:
            chunk, device = lambda: self._chunk(stages, None, held, reuse_keys), self.forward.model.device
            if self.config.cuda_graphs and device.type == "cuda":
                changed = [self.forward.latents[s] for stage in stages for s in stage.denoised]
                chunk = _replayed(chunk, device, changed)
            self.chunks[stages, held, reuse_keys] = chunk
        chunk()
        return [sum(len(self._forwards(stage, reuse_keys)) for stage in stages)] * len(firsts) * self.forward.candidates

    def promote(self, stage: Stage, firsts: Sequence[int]) -> None:
        """Compute the keys and values again of the stream that a stage has left clean, for these chunks."""
        if stage.promoted is not None:
            self.forward.set_frames((stage.promoted,), CLEAN, firsts)
            self.forward.run_clean((stage.promoted,), self._at_end(stage))

    def _forwards(self, stage: Stage, reuse_keys: bool = False) -> list[Forward]:
        counts = {s: t.forwards for s, t in self.trajectories.items()}
        return stage.forwards(Pace(counts, self.config.interleave, reuse_keys))

    def _chunk(self, stages: tuple[Stage, ...], skipping: Skipping | None, held: bool, reuse_keys: bool) -> None:
        for stage in stages:
            self._denoise_stage(stage, skipping, held and ACTION in stage.denoised, reuse_keys)
            if stage.promoted is not None:
                self.forward.run_clean((stage.promoted,), self._at_end(stage))

    def _denoise_stage(self, stage: Stage, skipping: Skipping | None, held: bool, reuse_keys: bool) -> None:
        if held:
            self._keep_held(0)
        taken, waiting = dict.fromkeys(stage.denoised, 0), dict[int, Tensor]()

        def step(streams: Iterable[int]) -> None:
            for s in streams:
                self._update(s, self.trajectories[s].updates[taken[s]].tolist(), waiting.pop(s))
                taken[s] += 1
                if held and s == ACTION:
                    self._keep_held(taken[s])

        for number, forward in enumerate(self._forwards(stage, reuse_keys)):
            # between its steps an interleaved stream stays where its last one began: a step ends where the next begins
            step([s for s in waiting if not self.config.interleave or s in forward.live])
            sigma = {s: self._levels[s][n : n + 1] for s, n in taken.items()}
            if skipping is None:
                flows = self.forward.flows(forward.streams, sigma, forward.live)
            else:
                flows = skipping.flows((stage, number), forward, sigma)
            waiting |= flows
        step([*waiting])

    def _at_end(self, stage: Stage) -> dict[int, Tensor]:
        """Noise levels ``[1]`` at which the denoised streams of a stage are left."""
        return {s: self._levels[s][-1:] for s in stage.denoised}

    def _update(self, stream: int, weights: Sequence[Sequence[float]], flow: Tensor) -> None:
        latents, kept = self.forward.latents[stream], self._kept[stream]
        before = (flow.to(latents.dtype), latents, *kept)
        after = [_weighted(row, before) for row in weights]
        for held, new in zip((latents, *kept), after, strict=True):
            if new is not None:
                held.copy_(new)


def _weighted(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor | None:
    """Their sum; None where all weights are 0. What has weight 0 is not read: it may never have been written."""
    found: Tensor | None = None
    for weight, tensor in zip(weights, tensors, strict=True):
        if weight:
            found = tensor * weight if found is None else found.add(tensor, alpha=weight)
    return found


def _replayed(step: Callable[[], None], device: torch.device, changed: Sequence[Tensor]) -> Callable[[], None]:
    """``step`` as a CUDA graph that is captured at the first call.

    Args:
        step: Reads and writes tensors that stay where they are, and never waits for the device.
        device: Where they are.
        changed: The tensors whose values it changes.
    """
    graph: torch.cuda.CUDAGraph | None = None

    def replay() -> None:
        nonlocal graph
        if graph is None:
            # kernels compile and libraries set up in a run that does not count
            before = [t.clone() for t in changed]
            captured, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream(device).wait_stream(side)
            for t, value in zip(changed, before, strict=True):
                t.copy_(value)
            # on a stream of this device: the default one of torch.cuda.graph belongs to whichever captured first
            with torch.cuda.graph(captured, stream=side):
                step()
            graph = captured
        graph.replay()

    return replay
