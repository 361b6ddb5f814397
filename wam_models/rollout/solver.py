"""The denoising loop of a stage; on a GPU a CUDA graph, captured once and replayed from then on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from wam_kernels.masks.visibility import ACTION, NOISY, VIDEO

from ..flow import sigmas
from .chunk_forward import ChunkForward
from .config import RolloutConfig
from .stages import Stage


class Solver:
    """Euler steps of ``forward.latents`` from noise to data.

    Args:
        forward: Of the chunk.
        config: Number of steps, shifts of the noise levels, whether to capture graphs.

    Attributes:
        step_number: int64 ``[1]``, of the step that comes next; counted on the device, as a captured graph needs.
        steps: One denoising step of each stage that was asked for so far.
    """

    def __init__(self, forward: ChunkForward, config: RolloutConfig) -> None:
        self.forward, self.config = forward, config
        latents = forward.latents[VIDEO]
        shifts = {VIDEO: config.video_shift, ACTION: config.action_shift}
        self._sigmas = {s: F.pad(sigmas(config.steps, shift), (0, 1)).to(latents) for s, shift in shifts.items()}
        self.step_number = torch.zeros(1, dtype=torch.int64, device=latents.device)
        self.steps: dict[Stage, Callable[[], None]] = {}

    def __getstate__(self) -> dict:
        # some are CUDA graphs over this solver's memory; made anew where they are needed
        return vars(self) | {"steps": {}}

    def denoise(self, stage: Stage, firsts: Sequence[int]) -> None:
        """All steps of a stage, for the chunks that begin with these frames of each rollout."""
        self.forward.set_frames(stage.streams, NOISY, firsts)
        self.step_number.zero_()
        step = self.steps.get(stage)
        if step is None:
            step = partial(self._step, stage)
            if self.config.cuda_graphs and self.step_number.device.type == "cuda":
                changed = [self.step_number, *(self.forward.latents[s] for s in stage.denoised)]
                step = _replayed(step, self.step_number.device, changed)
            self.steps[stage] = step
        for _ in range(self.config.steps):
            step()

    def _step(self, stage: Stage) -> None:
        sigma = {s: self._sigmas[s].index_select(0, self.step_number) for s in stage.denoised}
        flows = self.forward.flows(stage.streams, sigma)
        for s, flow in flows.items():
            after = self._sigmas[s].index_select(0, self.step_number + 1)
            self.forward.latents[s] += flow.to(after.dtype) * (after - sigma[s])
        self.step_number += 1


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
