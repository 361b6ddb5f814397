"""How one stream is denoised: the noise levels of its forwards, and what each makes of its flow.

Every solver here is linear: a forward gives a flow, and the latents and a few tensors kept beside them become sums of
that flow and of what they were, with weights that follow from the noise levels alone. So all of it is known before the
first forward, and the loop has no branch that a value on the device decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import expm1, log

import numpy as np
import torch
from torch import Tensor

from ..flow import TRAIN_TIMESTEPS, noise_levels
from ..runtime.checks import check_field, choice, number, whole

# Of UniPC: log of the signal at pure noise. As diffusers does, so that its logarithm is finite.
LEAST_SIGNAL = 1e-6


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How one stream is denoised.

    Args:
        steps: Steps of the solver, at most 1000; default ``RolloutConfig.steps``. In a stage of both streams each takes
            its steps in the first forwards, unless ``RolloutConfig.interleave`` spreads them; the one that is done
            stays as it is while the other goes on. 0, of video alone: it is not denoised, and actions attend to its
            features at the level ``start``.
        solver: ``"euler"``; ``"heun"``, two forwards a step; or ``"unipc"`` (order 2, B2), one forward a step.
        start: Noise level of the first forward, up to 1. Below 1 a chunk begins as the last accepted frame, repeated
            and noised to that level, in place of noise.
        stop: Noise level at which denoising ends, below ``start``; of video alone. What is left noisy serves the
            actions and cannot be accepted as history.
        guidance: Strength of its classifier-free guidance; default ``RolloutConfig.guidance``.

    Raises:
        ValueError: a value of the wrong type or outside its range; the message names the field.
    """

    steps: int | None = None
    solver: str = "euler"
    start: float = 1.0
    stop: float = 0.0
    guidance: float | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_field(self, "steps", whole, 0, TRAIN_TIMESTEPS)
        check_field(self, "solver", choice, tuple(SOLVERS))
        check_field(self, "start", number, 1e-3, 1)
        check_field(self, "stop", number, 0, 1)
        if self.guidance is not None:
            check_field(self, "guidance", number, 0)
        if self.stop >= self.start:
            raise ValueError(f"Schedule: stop must be below start={self.start}, got {self.stop}")
        if self.steps == 0 and self.stop:
            raise ValueError(f"Schedule: stop must be 0 where no step is taken, got {self.stop}")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A schedule as the loop runs it.

    Attributes:
        levels: float32 ``[forwards + 1]``: what the model is told at each forward, and the level at the end.
        updates: Of each forward ``[K, 1 + K]``: the latents and K - 1 kept tensors after it, as sums of the flow, the
            latents and the kept tensors.
    """

    levels: Tensor
    updates: np.ndarray

    @property
    def forwards(self) -> int:
        return len(self.updates)

    @property
    def end(self) -> float:
        """Noise level at which the stream is left."""
        return self.levels[-1].item()

    @property
    def kept(self) -> int:
        """Tensors beside the latents."""
        return self.updates.shape[1] - 1


def trajectory(schedule: Schedule, steps: int, shift: float) -> Trajectory:
    """Of a schedule, with ``steps`` where it names none and the ``shift`` of its noise levels."""
    steps = steps if schedule.steps is None else schedule.steps
    if steps == 0:
        return Trajectory(torch.tensor([schedule.start], device="cpu"), np.zeros((0, 1, 2)))
    levels = noise_levels(steps, shift, schedule.start, schedule.stop)
    told, updates = SOLVERS[schedule.solver](levels.double().tolist())
    return Trajectory(torch.cat([levels[told], levels[-1:]]), np.array(updates))


# ---- solvers: of levels, the index of each forward's level, and its update ----

_Plan = tuple[list[int], list[np.ndarray]]


def euler(levels: Sequence[float]) -> _Plan:
    """x + flow ds."""
    steps = range(len(levels) - 1)
    return list(steps), [np.array([[levels[i + 1] - levels[i], 1.0]]) for i in steps]


def heun(levels: Sequence[float]) -> _Plan:
    """A step of Euler, then its end moved by half the difference of the flows at both ends; the flow is what is kept.

    To noise level 0, where a model has nothing to say, the step is Euler's.
    """
    told, updates = [], []
    for i in range(len(levels) - 1):
        ds = levels[i + 1] - levels[i]
        told.append(i)
        updates.append(np.array([[ds, 1.0, 0.0], [1.0, 0.0, 0.0]]))
        if levels[i + 1] > 0:
            told.append(i + 1)
            updates.append(np.array([[ds / 2, 1.0, -ds / 2], [0.0, 0.0, 0.0]]))
    return told, updates


def unipc(levels: Sequence[float]) -> _Plan:
    """UniPC of order 2 with B2(h) = e^h - 1 on data predictions (Zhao et al. 2023), corrected at every forward.

    Kept: the corrected latents of the forward before, and the data predicted there and one before.
    """
    signal = [max(1 - s, LEAST_SIGNAL) for s in levels]
    noise = [1 - a for a in signal[:1]] + list(levels[1:])
    half_snr = [log(a) - log(s) if s > 0 else float("inf") for a, s in zip(signal, noise, strict=True)]
    flow, x, last, data1, data2 = np.eye(5)
    updates, order = [], 1
    for i in range(len(levels) - 1):
        data = x - noise[i] * flow
        now = x
        if i > 0:
            h = half_snr[i] - half_snr[i - 1]
            by, grown = noise[i] / noise[i - 1], expm1(-h)
            change = data - data1
            if order == 1:
                moved = change / 2
            else:
                ratio = (half_snr[i - 2] - half_snr[i - 1]) / h
                first = grown / -h - 1
                b = np.array([first / grown, (first / -h - 0.5) * 2 / grown])
                rho = np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], b)
                moved = rho[0] * (data2 - data1) / ratio + rho[1] * change
            now = by * last - signal[i] * grown * (data1 + moved)
        order = min(2, i + 1) if levels[i + 1] > 0 else 1
        h = half_snr[i + 1] - half_snr[i]
        after = noise[i + 1] / noise[i] * now - signal[i + 1] * expm1(-h) * data
        if order == 2:
            ratio = (half_snr[i - 1] - half_snr[i]) / h
            after = after - signal[i + 1] * expm1(-h) * (data1 - data) / ratio / 2
        updates.append(np.stack([after, now, data, data1]))
    return list(range(len(levels) - 1)), updates


SOLVERS: dict[str, Callable[[Sequence[float]], _Plan]] = {"euler": euler, "heun": heun, "unipc": unipc}
