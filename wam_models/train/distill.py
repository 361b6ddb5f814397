"""Step distillation: a policy learns to give in one step of each stream what it gave in several.

Consistency distillation (Song et al. 2023) on the levels of a rollout's own schedule. Each stream has a parametrisation
of its own, ``f(x, s) = x - s * flow(x, s)`` over its own levels ``s[0] = 1 > ... > s[N] = 0``, which the stream's shift
gives; at level 0 it is x itself. With x at level ``s[i]``, the teacher takes one Euler step to ``s[i + 1]``, and the
student's f at x is drawn to the f of its own moving average there. Streams that a program denoises together are at the
same place i of their schedules, as in a rollout; others each at a place of their own.

Drawn to that alone the student is at best its teacher, and what it misses of it comes on top of the teacher's own
errors. So each target holds a share of the recorded clip; over the N levels it adds up to ``1 - (1 - share) ** N`` of
what the student is drawn to from noise.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from wam_kernels import Plan, compile_plan
from wam_kernels.masks.visibility import ACTION, VIDEO

from ..data import ClipDataset
from ..flow import TRAIN_TIMESTEPS, add_noise, like, noise_levels, timesteps
from ..model.blocks import Uncast
from ..model.dual_expert import WorldActionModel
from ..objectives import MODEL_PROGRAMS, OBJECTIVES, sample_for, told_frames
from ..rollout import RolloutConfig, Schedule
from ..rollout.frames import FRAME_DIM
from ..rollout.policy import Policy
from ..runtime.checks import check_field, instance, number, whole
from ..runtime.limits import LARGEST_SIZE

WARM_UP = 0.1  # of the steps: a student begins at the teacher, which a first step of full length would lose


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How a policy is distilled.

    Args:
        teacher_steps: N, Euler steps of each stream that become one.
        steps: Of the training.
        batch: Clips of a step.
        chunks: Of a clip, behind its first frame; as many as the episodes have room for. Where the window holds more
            than the others, the last chunk has less history than in a rollout. One of a model with ``full_attention``.
        learning_rate: Of AdamW; rises over the first tenth of the steps and falls linearly to 0.
        recorded: Share of the recorded clip in each target, from 0 to 1; 0: the teacher's steps alone.
        average: Of the moving average, which gives the targets and is what is kept: how much of it stays at a step.
        clip_norm: Longest gradient.

    Raises:
        ValueError: a value of the wrong type or outside its range; the message names the field.
    """

    teacher_steps: int = 5
    steps: int = 200
    batch: int = 8
    chunks: int = 3
    learning_rate: float = 2e-4
    recorded: float = 0.1
    average: float = 0.95
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        check_field(self, "teacher_steps", whole, 1, TRAIN_TIMESTEPS)
        for name in ("steps", "batch", "chunks"):
            check_field(self, name, whole, 1, LARGEST_SIZE)
        for name in ("learning_rate", "clip_norm"):
            check_field(self, name, number, 1e-12, 100)
        for name in ("recorded", "average"):
            check_field(self, name, number, 0, 1)


def distill(
    policy: Policy, data: ClipDataset, config: DistillConfig | None = None, *, seed: int = 0, progress: bool = True
) -> tuple[Policy, list[float]]:
    """A policy that takes one step where the given one takes ``config.teacher_steps``, and the losses.

    Of the program, chunk, window and history of ``policy.rollout``, and the ``joint`` objective alone: what the model
    says elsewhere is no longer trained.

    Args:
        policy: The teacher, on its device. It stays as it is.
        data: Clips in its latents and units, on whose training split it is distilled.
        config: How; default :class:`DistillConfig`.
        seed: Of all that is drawn.
        progress: Show a progress bar.

    Returns:
        The student, whose ``rollout`` has one step of each stream, and the loss of each step.

    Raises:
        ValueError: a policy with guidance, a bridge or ``cache="recomputed"``, or data without a clip of a whole chunk.
        FloatingPointError: a loss that is not finite.
    """
    config = DistillConfig() if config is None else config
    instance("distill: policy", policy, Policy)
    instance("distill: data", data, ClipDataset)
    rollout, c = policy.rollout, policy.model.config
    for name, value, only in (("guidance", rollout.guidance, 1.0), ("bridge_dim", c.bridge_dim, 0)):
        if value != only:
            raise ValueError(f"distill: policy must have {name}={only}, got {value}")
    size = rollout.chunk_size
    longest = max(data.length(i) for i in data.train)
    chunks = min(1 if c.full_attention else config.chunks, (longest - 1) // size)
    if not chunks:
        raise ValueError(f"distill: data must have an episode of {1 + size} latent frames, the longest has {longest}")
    generator = torch.Generator().manual_seed(whole("distill: seed", seed, 0))
    pair = _Pair(policy, rollout, 1 + chunks * size, data.latent_shape[1:], config)
    student = copy.deepcopy(policy.model).requires_grad_(True).train()
    average = copy.deepcopy(policy.model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    losses: list[float] = []
    for step in tqdm(range(config.steps), desc="distill", unit="step", disable=not progress, dynamic_ncols=True):
        clips = data.sample(config.batch, pair.frames, generator)
        with torch.no_grad():
            text = policy.text([data.tasks[i] for i in clips["task"].tolist()])
        loss = pair.loss(student, average, clips, text, generator)
        if not loss.isfinite():
            raise FloatingPointError(f"distill: the loss of step {step + 1} is {loss.item()}; lower learning_rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), config.clip_norm)
        warmed = min(1.0, (step + 1) / (WARM_UP * config.steps))
        optimizer.param_groups[0]["lr"] = config.learning_rate * warmed * (1 - step / config.steps)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - config.average)
        losses.append(loss.item())
    once = replace(rollout, steps=1, video=Schedule(), action=Schedule())
    return replace(policy, model=average, rollout=once), losses


class _Pair:
    """Teacher and student at neighbouring levels of a rollout's schedule, in packed forwards."""

    def __init__(
        self, policy: Policy, rollout: RolloutConfig, frames: int, latent: tuple[int, int], config: DistillConfig
    ) -> None:
        self.teacher, self.frames, self.size = policy.model, frames, rollout.chunk_size
        self.recorded = config.recorded
        c, device = policy.model.config, policy.model.device
        rows, columns = policy.model.token_grid(*latent)
        self.full_attention = c.full_attention
        sample = sample_for(
            rollout.program, OBJECTIVES["joint"], frames=frames, video_tokens=rows * columns,
            action_tokens=c.actions_per_frame if c.has_actions else 0, chunk_size=self.size, window=rollout.window,
            history=rollout.history, context=sum(stream.tokens for stream in c.context),
            full_attention=self.full_attention, state_tokens=c.state_tokens,
        )  # fmt: skip
        self.plan: Plan = compile_plan(sample, device=device)
        shifts = {VIDEO: rollout.video_shift} | ({ACTION: rollout.action_shift} if c.has_actions else {})
        self.levels = {s: noise_levels(config.teacher_steps, shift).to(device) for s, shift in shifts.items()}
        self.together = any(len(resolved) > 1 for resolved in MODEL_PROGRAMS[rollout.program].stages)

    def loss(
        self,
        student: WorldActionModel,
        average: WorldActionModel,
        clips: Mapping[str, Tensor],
        text: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Mean squared distance of the student's f to the average's one step on and the clip, the streams' summed."""
        device = self.teacher.device
        clean = {s: clips[name].to(device) for s, name in ((VIDEO, "video"), (ACTION, "action")) if s in self.levels}
        told: dict[str, Any] = {}
        if self.teacher.config.state_dim:
            tokens = self.teacher.config.state_tokens
            told["state"] = clips["state"].to(device)[:, told_frames(self.frames, self.size, tokens)]
        if self.teacher.config.mode_token:
            told["modes"] = torch.zeros(len(text), dtype=torch.int64, device=device)

        def flows(model: WorldActionModel, x: dict[int, Tensor], levels: dict[int, Tensor]) -> dict[int, Tensor]:
            of = {s: Uncast(timesteps(level)) for s, level in levels.items()}
            copies = {} if self.full_attention else clean
            found = model(
                x[VIDEO], copies.get(VIDEO), x.get(ACTION), copies.get(ACTION), of[VIDEO], of.get(ACTION), text,
                self.plan, **told,
            )  # fmt: skip
            return {s: found[s] for s in x}

        places = self._places(len(text), generator)
        now, then = ({s: self.levels[s][places[s].to(device) + k] for s in self.levels} for k in (0, 1))
        if self.full_attention:  # the observed frame is one of the chunk, and given
            for levels in (now, then):
                levels[VIDEO] = torch.cat([torch.zeros_like(levels[VIDEO][:, :1]), levels[VIDEO][:, 1:]], 1)
        x = {}
        for s, data in clean.items():
            noise = torch.randn(data.shape, generator=generator).to(device)
            x[s] = add_noise(data, noise, _leading(now[s], s))

        def over(level: Tensor, s: int) -> Tensor:
            return like(_leading(level, s), x[s])

        with torch.no_grad():
            flow = flows(self.teacher, x, now)
            after = {s: x[s] + over(then[s] - now[s], s) * flow[s] for s in x}
            flow = flows(average, after, then)
            wanted = {s: after[s] - over(then[s], s) * flow[s] for s in x}
        flow = flows(student, x, now)
        total = torch.zeros((), device=device)
        for s in x:
            wanted[s] = torch.lerp(wanted[s], clean[s], self.recorded)
            wrong = x[s] - over(now[s], s) * flow[s] - wanted[s]
            total = total + wrong.narrow(FRAME_DIM[s], 1, self.frames - 1).square().mean()
        return total

    def _places(self, samples: int, generator: torch.Generator) -> dict[int, Tensor]:
        """int64 ``[samples, frames]`` of each stream: its place in its levels, the same in all frames of a chunk."""
        steps, chunks = len(self.levels[VIDEO]) - 1, (self.frames - 1) // self.size
        drawn = {s: torch.randint(steps, (samples, chunks), generator=generator) for s in self.levels}
        if self.together:
            drawn = dict.fromkeys(drawn, drawn[VIDEO])
        first = torch.zeros(samples, 1, dtype=torch.int64)
        return {s: torch.cat([first, of.repeat_interleave(self.size, 1)], 1) for s, of in drawn.items()}


def _leading(level_BF: Tensor, stream: int) -> Tensor:
    """Levels of frames as the leading dims of a stream's latents."""
    return level_BF if stream == ACTION else level_BF[:, None]
