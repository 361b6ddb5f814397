"""What the samples of a training step are, and how their losses are weighed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wam_kernels import HISTORIES

from ..flow import TimestepDraw
from ..objectives import (
    GJD,
    GJD_COUNTERFACTUAL,
    GJD_MIXTURE,
    MODEL_PROGRAMS,
    OBJECTIVES,
    checked_conditional,
    checked_mixture,
)
from ..runtime.checks import check_field, choice, number, whole_range
from ..runtime.limits import LARGEST_INT32


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What the config of a step and that of a run have in common.

    Args:
        history: Which earlier clean tokens a query attends to, one of ``wam_kernels.HISTORIES``.
        chunk_sizes: Smallest and largest chunk, in frames; drawn for every step.
        windows: Smallest and largest window, in order blocks; drawn for every step.
        mixture: Weights of the objectives of demonstrations.
        counterfactual: The same of counterfactual samples, without ``joint``.
        video_marginal: Probability that the video of a ``joint`` sample is noise at t = 1000 in all frames, without
            loss: the actions are then learned without the video, as a policy (UWM).
        action_marginal: The same of its actions: the video is learned without them.
        text_dropout: Probability that a sample's text is zeroed, for classifier-free guidance.
        noised_history: Probability that the clean video copy of a sample is itself noised.
        imagined_history: Probability that the clean video copy of a sample is what the model imagines of it at that
            step, each chunk in one denoising step from noise after the recorded frames before it: what actions act
            beside and go on from in a rollout. Costs a forward without gradient in every step.
        video_weight: Factor on the video loss.
        action_weight: Factor on the action loss.
        alignment_weight: Factor on the alignment loss of a model with aligned streams: 1 - the cosine of the angle
            between what a token is read out to and its target, mean over tokens and streams.

    Raises:
        ValueError: an unknown name, a value of the wrong type or outside its range; the message names the field.
    """

    history: str = "full"
    chunk_sizes: tuple[int, int] = (1, 4)
    windows: tuple[int, int] = (4, 64)
    mixture: Mapping[str, float] = field(default_factory=lambda: dict(GJD_MIXTURE))
    counterfactual: Mapping[str, float] = field(default_factory=lambda: dict(GJD_COUNTERFACTUAL))
    video_marginal: float = 0.0
    action_marginal: float = 0.0
    text_dropout: float = 0.0
    noised_history: float = 0.5
    imagined_history: float = 0.0
    video_weight: float = 1.0
    action_weight: float = 1.0
    alignment_weight: float = 1.0

    def __post_init__(self) -> None:
        check_field(self, "history", choice, HISTORIES)
        for name in ("chunk_sizes", "windows"):
            check_field(self, name, whole_range, 1, LARGEST_INT32)
        check_field(self, "mixture", checked_mixture)
        check_field(self, "counterfactual", checked_conditional)
        for name in ("video_marginal", "action_marginal", "text_dropout", "noised_history", "imagined_history"):
            check_field(self, name, number, 0, 1)
        if self.video_marginal + self.action_marginal > 1:
            raise ValueError(
                f"{type(self).__name__}: video_marginal and action_marginal must sum to at most 1, got "
                f"{self.video_marginal} and {self.action_marginal}"
            )
        for name in ("video_weight", "action_weight", "alignment_weight"):
            check_field(self, name, number, 0)


@dataclass(frozen=True, kw_only=True)
class StepConfig(SampleConfig):
    """What a training step draws from, and how it weighs the losses.

    Args:
        program: ``"generalist_joint_denoising"`` or one of ``wam_kernels.PROGRAMS``. The objectives of ``mixture`` and
            ``counterfactual`` are those of the former.
        timesteps: How noise levels are drawn.
        stop_gradient: Pairs (query stream, key stream): keys and values of that stream get no gradient from those
            queries; as ``compile_plan`` takes them. ``("action", "video")`` holds for a bridge too.

    Raises:
        ValueError: an unknown name, a value of the wrong type or outside its range; the message names the field.
    """

    program: str = GJD
    timesteps: TimestepDraw = TimestepDraw()
    stop_gradient: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "program", choice, MODEL_PROGRAMS)
        check_field(self, "stop_gradient", stream_pairs)
        if not isinstance(self.timesteps, TimestepDraw):
            raise ValueError(f"StepConfig: timesteps must be a TimestepDraw, got {self.timesteps!r}")


def error_sums(objectives: Sequence[str], errors: Sequence[Tensor], counts: Sequence[Tensor]) -> Tensor:
    """float32 ``[streams, 2, 3]``: of each stream and each of ``OBJECTIVES`` the sum of its samples' errors, and how
    many count.

    Args:
        objectives: Of each of B samples.
        errors: ``[B]`` of each stream.
        counts: ``[B]`` of each stream, 1 where the sample carries its loss, else 0.
    """
    names = list(OBJECTIVES)
    chosen = torch.zeros(len(objectives), len(names))
    chosen[range(len(objectives)), [names.index(name) for name in objectives]] = 1
    pairs = [torch.stack([error.detach() * count, count]) for error, count in zip(errors, counts, strict=True)]
    return (torch.stack(pairs).float()[..., None] * chosen.to(pairs[0].device)).sum(2)


def stream_pairs(where: str, value: Any) -> tuple[tuple[str, str], ...]:
    """``value`` as pairs (query stream, key stream), of ``video`` and ``action``.

    Raises:
        ValueError: it is not that.
    """
    listed = value if isinstance(value, list | tuple) else (value,)
    pairs = [tuple(pair) if isinstance(pair, list | tuple) else () for pair in listed]
    if not all(len(pair) == 2 and set(pair) <= {"video", "action"} for pair in pairs):
        raise ValueError(
            f"{where} must be pairs (query stream, key stream) of 'video' and 'action', such as ('action', 'video'), "
            f"got {value!r}"
        )
    return tuple((query, key) for query, key in pairs)
