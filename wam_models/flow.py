"""Flow matching: ``x_t = (1 - s) x + s n`` with sigma s from 1 (noise n) to 0 (data x), and flow ``n - x``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .runtime.checks import check_field, choice, number, whole

TRAIN_TIMESTEPS = 1000
VIDEO_SHIFT, ACTION_SHIFT = 5.0, 1.0
# of a shift: far outside, float32 noise levels no longer fall from 1 to 0, and the last steps do nothing
SHIFTS = (1e-3, 1e3)
LEVELS_PER = ("frame", "clip")
COUPLINGS = ("independent", "shared_index", "shared_video_schedule", "matched_sigma", "asynchronous")


def sigmas(steps: int, shift: float) -> Tensor:
    """Noise levels of ``steps`` steps, falling from 1, float32 ``[steps]``; the 0 after the last is left out.

    ``shift`` above 1 spends more of the steps near noise: s becomes ``shift * s / (1 + (shift - 1) * s)``.

    Raises:
        ValueError: ``steps`` that is no whole number from 1 to 1000, or ``shift`` that is none from 0.001 to 1000.
    """
    steps, shift = whole("sigmas: steps", steps, 1, TRAIN_TIMESTEPS), number("sigmas: shift", shift, *SHIFTS)
    return noise_levels(steps, shift)[:-1]


def noise_levels(steps: int, shift: float, start: float = 1.0, stop: float = 0.0) -> Tensor:
    """As :func:`sigmas`, from ``start`` to ``stop`` and with both, float32 ``[steps + 1]``."""
    first, last = (level / (shift - (shift - 1) * level) for level in (start, stop))  # before the shift
    s = torch.linspace(first, last, steps + 1, dtype=torch.float32, device="cpu")
    return shift * s / (1 + (shift - 1) * s)


def timesteps(sigma: Tensor) -> Tensor:
    """What the model is told: ``1000 * sigma``."""
    return TRAIN_TIMESTEPS * sigma


def like(sigma: Tensor, x: Tensor) -> Tensor:
    """``sigma`` with trailing dims of size 1, to broadcast over ``x`` from the left."""
    return sigma.reshape(*sigma.shape, *[1] * (x.ndim - sigma.ndim))


def add_noise(x: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """``(1 - s) x + s n``; ``sigma`` covers the leading dims of ``x``, e.g. ``[B, F]`` for ``[B, F, ...]``."""
    s = like(sigma, x)
    return (1 - s) * x + s * noise


def target(x: Tensor, noise: Tensor) -> Tensor:
    """The flow that a model learns: ``n - x``."""
    return noise - x


@dataclass(frozen=True, kw_only=True)
class TimestepDraw:
    """How training draws noise levels: one for each frame, or clip, and stream.

    Args:
        per: ``"frame"``, a level for each; or ``"clip"``, one for all frames of a clip, as in a rollout of clips that
            are one chunk.
        coupling: Relation of the two streams' draws of a frame. ``"independent"``; ``"shared_index"``: the same index
            of each stream's own grid; ``"shared_video_schedule"``: actions use the video's noise level itself;
            ``"matched_sigma"``: actions use the level of their own grid that is nearest to the video's.
            ``"asynchronous"``, as X-WAM (arXiv 2604.26694) draws where the actions are denoised in fewer steps than the
            video: half of the samples have clean actions, at level 0, and of the others the video is the noisier one.
        video_shift: Shift of the video grid, from 0.001 to 1000.
        action_shift: Shift of the action grid, likewise.

    Raises:
        ValueError: an unknown coupling, or a shift outside its range; the message names the field.
    """

    per: str = "frame"
    coupling: str = "independent"
    video_shift: float = VIDEO_SHIFT
    action_shift: float = ACTION_SHIFT

    def __post_init__(self) -> None:
        check_field(self, "per", choice, LEVELS_PER)
        check_field(self, "coupling", choice, COUPLINGS)
        for name in ("video_shift", "action_shift"):
            check_field(self, name, number, *SHIFTS)

    def sigmas(self, batch: int, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Video and action noise levels, float32 ``[batch, frames]`` each, on the generator's device."""
        video_grid = sigmas(TRAIN_TIMESTEPS, self.video_shift).to(generator.device)
        action_grid = sigmas(TRAIN_TIMESTEPS, self.action_shift).to(generator.device)
        # both are always drawn, so that the coupling does not move what the generator gives next
        video_index, action_index = (
            torch.randint(TRAIN_TIMESTEPS, (batch, frames), generator=generator, device=generator.device)
            for _ in range(2)
        )
        clean = torch.zeros(batch, 1, dtype=torch.bool, device=generator.device)
        if self.coupling == "asynchronous":
            clean = torch.rand(batch, 1, generator=generator, device=generator.device) < 0.5
            # before its shift a level is 1 - index / 1000, and Beta(1.5, 1) is a uniform number's power of 1 / 1.5
            noisier = torch.rand(batch, frames, generator=generator, device=generator.device) ** (1 / 1.5)
            video_index = torch.where(clean, video_index, (action_index * (1 - noisier)).long())
        if self.per == "clip":
            video_index, action_index = (index[:, :1].expand(-1, frames) for index in (video_index, action_index))
        video = video_grid[video_index]
        if self.coupling == "shared_index":
            action_index = video_index
        if self.coupling == "shared_video_schedule":
            return video, video.clone()
        if self.coupling == "matched_sigma":
            action_index = (action_grid - video[..., None]).abs().argmin(-1)
        return video, action_grid[action_index].masked_fill(clean, 0.0)

    def history_sigmas(self, batch: int, frames: int, probability: float, generator: torch.Generator) -> Tensor:
        """Noise levels of the clean video copy, ``[batch, frames]``: 0 but for samples whose history is noised.

        A noised sample draws each frame from the lower-noise half of the video grid.
        """
        device, half = generator.device, TRAIN_TIMESTEPS // 2
        grid = sigmas(TRAIN_TIMESTEPS, self.video_shift).to(device)
        noised = torch.rand(batch, 1, generator=generator, dtype=torch.float32, device=device) < probability
        index = torch.randint(half, TRAIN_TIMESTEPS, (batch, frames), generator=generator, device=device)
        return torch.where(noised, grid[index], 0.0)
