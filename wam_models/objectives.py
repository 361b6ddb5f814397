"""What a sample is trained on: interaction programs, and the three objectives of generalist joint denoising (GJD).

| objective        | noisy copy holds                         | loss on | text   |
| ---------------- | ---------------------------------------- | ------- | ------ |
| joint            | noisy video, noisy action                | both    | kept   |
| forward_dynamics | noisy video, clean action at timestep 0  | video   | zeroed |
| inverse_dynamics | clean video at timestep 0, noisy action  | action  | zeroed |

OpenWAM's GJD also trains on counterfactual samples: recorded dynamics whose actions did not come from a demonstration,
so they say what actions do and not what to do. Such rows of a batch draw a conditional objective.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, cast

import torch

from wam_kernels import PROGRAMS, RULE_PROGRAMS, Geometry, InteractionProgram, RuleGeometry
from wam_kernels.masks.context import with_context

from .runtime.checks import choice, number

GJD = "generalist_joint_denoising"
# All programs of ``wam_kernels.PROGRAMS``, as they are now, and GJD, which is ``joint`` with an objective per sample.
_programs = cast(MutableMapping[str, InteractionProgram], PROGRAMS)  # read alone: a ChainMap writes to its first map
MODEL_PROGRAMS: Mapping[str, InteractionProgram] = MappingProxyType(ChainMap({GJD: PROGRAMS["joint"]}, _programs))


@dataclass(frozen=True)
class Objective:
    """Which streams of the noisy copy are noise (and carry loss), and whether the sample is conditional."""

    name: str
    video: bool  # noisy, and learned; else the copy holds clean video at timestep 0
    action: bool  # the same for actions

    @property
    def conditional(self) -> bool:
        """One stream given, the other denoised: no text, and one boundary frame for history."""
        return not (self.video and self.action)


OBJECTIVES = {
    o.name: o
    for o in (
        Objective("joint", video=True, action=True),
        Objective("forward_dynamics", video=True, action=False),
        Objective("inverse_dynamics", video=False, action=True),
    )
}
GJD_MIXTURE: Mapping[str, float] = {"joint": 0.6, "forward_dynamics": 0.2, "inverse_dynamics": 0.2}

# The same beside counterfactual samples, and of those; as many rows of each as its weights sum to.
GJD_DEMONSTRATIONS: Mapping[str, float] = {"joint": 0.6, "forward_dynamics": 0.1, "inverse_dynamics": 0.1}
GJD_COUNTERFACTUAL: Mapping[str, float] = {"forward_dynamics": 0.1, "inverse_dynamics": 0.1}


def checked_conditional(where: str, mixture: object) -> dict[str, float]:
    """As :func:`checked_mixture`, of counterfactual samples; empty where there are none.

    Raises:
        ValueError: as there, or weight on ``joint``, which would train the policy on their actions.
    """
    if isinstance(mixture, Mapping) and not mixture:
        return {}
    weights = checked_mixture(where, mixture)
    if weights.get("joint", 0.0):
        raise ValueError(f"{where} must have no weight on joint, whose actions the policy would learn, got {mixture!r}")
    return weights


def checked_mixture(where: str, mixture: object) -> dict[str, float]:
    """``mixture`` with float weights.

    Raises:
        ValueError: no mapping, an unknown objective, a weight that is no number of at least 0, or all of them 0.
    """
    if not isinstance(mixture, Mapping) or not set(mixture) <= set(OBJECTIVES):
        raise ValueError(f"{where} must map some of {tuple(OBJECTIVES)} to weights, got {mixture!r}")
    weights = {name: number(f"{where}[{name!r}]", weight, 0) for name, weight in mixture.items()}
    if not 0 < sum(weights.values()) < math.inf:
        raise ValueError(f"{where} must have weights of a finite sum, not all 0, got {mixture!r}")
    return weights


def draw_objectives(
    program: str, batch: int, generator: torch.Generator, mixture: Mapping[str, float] = GJD_MIXTURE
) -> list[Objective]:
    """One objective for each sample: drawn from ``mixture`` for GJD, ``joint`` (denoise both) for a fixed program.

    Raises:
        ValueError: an unknown program or objective, or weights that are negative or all 0.
    """
    if choice("draw_objectives: program", program, MODEL_PROGRAMS) != GJD or not batch:
        return [OBJECTIVES["joint"]] * batch
    mixture = checked_mixture("draw_objectives: mixture", mixture)
    shares = [mixture.get(name, 0.0) for name in OBJECTIVES]
    weights = torch.tensor(shares, dtype=torch.float32, device=generator.device)
    drawn = torch.multinomial(weights, batch, replacement=True, generator=generator)
    return [tuple(OBJECTIVES.values())[i] for i in drawn.tolist()]


def frames_before_chunks(frames: int, chunk_size: int) -> list[int]:
    """Of each frame of an episode's beginning, the last frame before its chunk; of the observed frame 0 itself.

    That is the frame whose state the action tokens of a chunk are told.
    """
    return [max(frame - 1, 0) // chunk_size * chunk_size for frame in range(frames)]


def told_frames(frames: int, chunk_size: int, tokens: bool) -> list[int]:
    """The frames whose states a model is told: of each frame as above, or with ``tokens`` one of each chunk."""
    return list(range(0, frames - 1, chunk_size)) if tokens else frames_before_chunks(frames, chunk_size)


def geometry_for(
    program: str,
    objective: Objective,
    *,
    frames: int,
    video_tokens: int,
    action_tokens: int,
    chunk_size: int,
    window: int,
    history: str = "full",
    start: int = 0,
    chunk_origin: int | None = None,
) -> Geometry:
    """The packed geometry of ``frames`` frames of an episode, of which the first is frame ``start``.

    Frame 0 of an episode is observed before anything is done: a chunk of its own, and no action leads to it.
    ``chunk_origin`` is an episode's frame with which some chunk begins; default 1, the first after the observed one.
    Without ``action_tokens`` there are no actions.
    """
    choice("geometry_for: program", program, MODEL_PROGRAMS)
    action_frames = frames if action_tokens else 0
    return Geometry(
        program=MODEL_PROGRAMS[program].name,
        video_frames=frames,
        video_tokens=video_tokens,
        action_frames=action_frames,
        action_tokens=max(action_tokens, 1),
        chunk_size=chunk_size,
        window=window,
        history=history,
        chunk_origin=(1 if chunk_origin is None else chunk_origin) - start,
        singleton_frame=0 if objective.conditional and start == 0 else None,
        conditional_history="previous_boundary_video_only" if objective.conditional else None,
        startup_action_frames=min(action_frames, 1) if start == 0 else 0,
    )


def sample_for(
    program: str, objective: Objective, *, context: int = 0, full_attention: bool = False, state_tokens: bool = False,
    action_free: bool = False, **sizes: Any,
) -> Geometry | RuleGeometry:  # fmt: skip
    """A clip of an episode's beginning as a packed sample: what a training step compiles.

    Args:
        program: As in :func:`geometry_for`.
        objective: Likewise.
        context: Tokens that are given.
        full_attention: Whether it is ``[video | action | context]``, one copy of each, all of which attend to each
            other: of a model with ``full_attention``, whose clip is the observed frame and one chunk.
        state_tokens: Whether there is a token of the state for each chunk.
        action_free: Whether nothing attends to its actions.
        sizes: The others of :func:`geometry_for`.

    Raises:
        ValueError: as there; or, with ``full_attention``, a clip of several chunks.
    """
    geometry = geometry_for(program, objective, **sizes)
    if action_free:
        geometry = replace(geometry, startup_action_frames=geometry.action_frames)
    if not full_attention:
        return with_context(geometry, context, state_tokens) if context or state_tokens else geometry
    if geometry.chunk_size != geometry.video_frames - 1:
        raise ValueError(
            "sample_for: frames must be 1 + chunk_size for a model with full_attention, whose clip is one chunk behind "
            f"the observed frame, got frames={geometry.video_frames} and chunk_size={geometry.chunk_size}"
        )
    return RULE_PROGRAMS["tri_tower"](
        video=geometry.video_frames * geometry.video_tokens,
        actions=geometry.action_frames * geometry.action_tokens,
        understanding=context + state_tokens,
        startup=geometry.startup_action_frames * geometry.action_tokens,
    )
