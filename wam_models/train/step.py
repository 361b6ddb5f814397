"""One training step: draw everything that is random, build the packed sequence, compare flows.

All randomness comes from one ``torch.Generator``, so a run that restores the generator's state continues with the
numbers it would have had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wam_kernels import HISTORIES, compile_plan
from wam_kernels.masks.context import with_context

from ..flow import TimestepDraw, add_noise, target, timesteps
from ..model.blocks import Uncast, at_least_float32
from ..model.dual_expert import WorldActionModel
from ..objectives import (
    GJD,
    GJD_MIXTURE,
    MODEL_PROGRAMS,
    Objective,
    checked_mixture,
    draw_objectives,
    frames_before_chunks,
    geometry_for,
)
from ..runtime.checks import check_field, choice, instance, number, whole_range
from ..runtime.limits import LARGEST_INT32


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What a training step draws from, and how it weighs the losses.

    Args:
        program: ``"generalist_joint_denoising"`` or one of ``wam_kernels.PROGRAMS``.
        history: Which earlier clean tokens a query attends to, one of ``wam_kernels.HISTORIES``.
        chunk_sizes: Smallest and largest chunk, in frames; drawn for every step.
        windows: Smallest and largest window, in order blocks; drawn for every step.
        mixture: Weights of the GJD objectives, drawn for every sample.
        timesteps: How noise levels are drawn.
        noised_history: Probability that the clean video copy of a sample is itself noised.
        video_weight: Factor on the video loss.
        action_weight: Factor on the action loss.
        stop_gradient: Pairs (query stream, key stream): keys and values of that stream get no gradient from those
            queries; as ``compile_plan`` takes them.

    Raises:
        ValueError: an unknown name, a value of the wrong type or outside its range; the message names the field.
    """

    program: str = GJD
    history: str = "full"
    chunk_sizes: tuple[int, int] = (1, 4)
    windows: tuple[int, int] = (4, 64)
    mixture: Mapping[str, float] = field(default_factory=lambda: dict(GJD_MIXTURE))
    timesteps: TimestepDraw = TimestepDraw()
    noised_history: float = 0.5
    video_weight: float = 1.0
    action_weight: float = 1.0
    stop_gradient: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        check_field(self, "program", choice, MODEL_PROGRAMS)
        check_field(self, "history", choice, HISTORIES)
        check_field(self, "chunk_sizes", whole_range, 1, LARGEST_INT32)
        check_field(self, "windows", whole_range, 1, LARGEST_INT32)
        check_field(self, "mixture", checked_mixture)
        check_field(self, "noised_history", number, 0, 1)
        check_field(self, "video_weight", number, 0)
        check_field(self, "action_weight", number, 0)
        check_field(self, "stop_gradient", stream_pairs)
        if not isinstance(self.timesteps, TimestepDraw):
            raise ValueError(f"TrainingConfig: timesteps must be a TimestepDraw, got {self.timesteps!r}")


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


def training_step(
    model: WorldActionModel,
    batch: Mapping[str, Tensor],
    generator: torch.Generator,
    config: TrainingConfig = TrainingConfig(),
    *,
    impl: str | None = None,
) -> tuple[Tensor, dict[str, float | int | Tensor]]:
    """The loss of one batch of clips; the caller does the backward and the optimizer step.

    A sample's loss is the mean squared error of its flows over the tokens that count, the batch's the mean over
    samples, so a sample weighs the same whatever the objectives of the others. Frame 0 is the observed start-up
    frame: a rollout never generates it, so it carries no loss; its clean video is attended to, its action tokens are
    not. On a GPU run it under ``torch.autocast`` in bf16, with a bf16 model, or with FSDP2 and
    ``MixedPrecisionPolicy(param_dtype=torch.bfloat16)``: ``fully_shard`` each of
    ``model.packed_block_stack.packed_blocks``, then the model. Experts and attentions cannot be sharded on their own:
    they are entered by other methods than ``forward``.

    Args:
        model: The model, sharded, compiled or in DistributedDataParallel or not; its parameters' device is where the
            step runs.
        batch: ``video`` ``[B, C, F, y, x]`` clean latents; ``action`` ``[B, F, n, A]`` normalised, those of frame 0 are
            ignored, whatever they hold, and all of a model without actions; ``text`` ``[B, L, text_dim]`` raw
            embeddings, through which the loss differentiates, ignored likewise where an objective has none; and under
            its name each stream of ``model.config.context`` that is made of features ``[B, N, E]``; ``state``
            ``[B, F, S]`` of each frame for a model with ``state_dim``. F at least 2.
        generator: Source of every random number; its device may differ from the model's.
        config: What is drawn and how it is weighed.
        impl: Backend of ``block_attention``.

    Returns:
        The loss, a float32 scalar, and metrics without gradient: ``video_loss``, ``action_loss`` (scalar tensors: means
        over the samples that count; nan when none does), ``chunk_size``, ``window``, and the number of samples of each
        objective as ``samples/<name>``.

    Raises:
        TypeError: a batch entry, generator or config of another class.
        ValueError: a batch entry that is missing or has a shape that does not fit.
    """
    instance("training_step: generator", generator, torch.Generator)
    instance("training_step: config", config, TrainingConfig)
    inside = getattr(model, "module", model)  # of DistributedDataParallel
    video, action, text = _checked(inside, batch)
    has_actions = inside.config.has_actions
    B, _, frames, y, x = video.shape
    device, draws = inside.device, generator.device

    chunk_size, window = (
        int(torch.randint(low, high + 1, (), generator=generator, device=draws))
        for low, high in (config.chunk_sizes, config.windows)
    )
    objectives = draw_objectives(config.program, B, generator, config.mixture)
    if not has_actions and any(o.conditional for o in objectives):
        raise ValueError(
            f"training_step: config.mixture must be {{'joint': 1}} for a model without actions, got {config.mixture}"
        )
    video_sigma, action_sigma = config.timesteps.sigmas(B, frames, generator)
    history_sigma = config.timesteps.history_sigmas(B, frames, config.noised_history, generator)
    video_noise, history_noise, action_noise = (
        torch.randn(t.shape, generator=generator, dtype=torch.float32, device=draws).to(device)
        for t in (video, video, action)
    )

    # 1 where the sample denoises the stream, 0 where the noisy copy holds the clean stream at timestep 0
    denoises_video, denoises_action, keeps_text = (
        torch.tensor([flag(o) for o in objectives], dtype=torch.float32, device=device)[:, None]
        for flag in (lambda o: o.video, lambda o: o.action, lambda o: not o.conditional)
    )
    video_sigma = video_sigma.to(device) * denoises_video
    action_sigma = action_sigma.to(device) * denoises_action
    history_sigma = history_sigma.to(device)

    rows, columns = inside.token_grid(y, x)
    sizes = {"frames": frames, "video_tokens": rows * columns, "action_tokens": action.shape[2]}
    sizes |= {"chunk_size": chunk_size, "window": window}
    geometries = [geometry_for(config.program, o, history=config.history, **sizes) for o in objectives]
    context = {s.name: batch[s.name].to(device) for s in inside.config.context if s.features}
    told = frames_before_chunks(frames, chunk_size)
    state = batch["state"].to(device)[:, told] if inside.config.state_dim else None
    given = sum(s.tokens or context[s.name].shape[1] for s in inside.config.context)
    samples = [with_context(g, given) for g in geometries] if given else geometries
    one = len(set(samples)) == 1
    plan = compile_plan(samples[0] if one else samples, device=device, stop_gradient=config.stop_gradient)
    video_flow, action_flow = model(
        noised_video(video, video_noise, video_sigma),
        noised_video(video, history_noise, history_sigma),
        add_noise(action, action_noise, action_sigma) if has_actions else None,
        action if has_actions else None,
        Uncast(timesteps(video_sigma)),
        Uncast(timesteps(action_sigma)) if has_actions else None,
        torch.where(keeps_text[:, :, None] > 0, text, 0),
        plan,
        clean_video_timesteps=Uncast(timesteps(history_sigma)),
        context=context,
        state=state,
        impl=impl,
    )
    # [B] each, over the frames that a rollout generates
    video_error = (at_least_float32(video_flow) - target(video, video_noise))[:, :, 1:].square().flatten(1).mean(1)
    action_error = torch.zeros_like(video_error)
    if action_flow is not None:
        wrong = at_least_float32(action_flow) - target(action, action_noise)
        action_error = wrong[:, 1:].square().flatten(1).mean(1)
    counts_video, counts_action = denoises_video[:, 0], denoises_action[:, 0] * has_actions
    loss = config.video_weight * video_error * counts_video + config.action_weight * action_error * counts_action
    metrics: dict[str, float | int | Tensor] = {
        "video_loss": (video_error.detach() * counts_video).sum() / counts_video.sum(),
        "action_loss": (action_error.detach() * counts_action).sum() / counts_action.sum(),
        "chunk_size": chunk_size,
        "window": window,
    }
    return loss.mean(), metrics | _counted(objectives)


def noised_video(video_BCFyx: Tensor, noise_BCFyx: Tensor, sigma_BF: Tensor) -> Tensor:
    """``add_noise`` with one level for each frame."""
    return add_noise(video_BCFyx.transpose(1, 2), noise_BCFyx.transpose(1, 2), sigma_BF).transpose(1, 2)


def _counted(objectives: list[Objective]) -> dict[str, int]:
    names = [o.name for o in objectives]
    return {f"samples/{name}": names.count(name) for name in sorted(set(names))}


def _checked(model: WorldActionModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Video, actions (none of each frame for a model without) and text, on the model's device."""
    c = model.config
    names = ["video", *(["action"] if c.has_actions else []), "text", *(s.name for s in c.context if s.features)]
    names += ["state"] if c.state_dim else []
    missing = sorted(set(names) - set(batch))
    if missing:
        raise ValueError(f"training_step: batch lacks {missing}; expected {', '.join(names)}")
    for name in names:
        instance(f"training_step: {name}", batch[name], Tensor)
    video, text = (batch[name].to(model.device) for name in ("video", "text"))
    if video.ndim != 5 or video.shape[1] != c.latent_channels or video.shape[2] < 2 or not video.shape[0]:
        raise ValueError(
            f"training_step: video must be [B >= 1, {c.latent_channels}, F >= 2, y, x], got {list(video.shape)}"
        )
    B, F = video.shape[0], video.shape[2]
    action = batch["action"].to(model.device) if c.has_actions else video.new_zeros(B, F, 0, c.action_dim)
    if tuple(action.shape) != (B, F, c.actions_per_frame * c.has_actions, c.action_dim):
        raise ValueError(
            f"training_step: action must be {[B, F, c.actions_per_frame, c.action_dim]}, got {list(action.shape)}"
        )
    if text.ndim != 3 or text.shape[0] != B or text.shape[2] != c.text_dim:
        raise ValueError(f"training_step: text must be [{B}, L, {c.text_dim}], got {list(text.shape)}")
    if c.state_dim and tuple(batch["state"].shape) != (B, F, c.state_dim):
        raise ValueError(f"training_step: state must be {[B, F, c.state_dim]}, got {list(batch['state'].shape)}")
    # losses and noise levels are float32 whatever the data was stored in; no action leads to frame 0
    action = torch.cat([torch.zeros_like(action[:, :1]), action[:, 1:]], 1)
    return at_least_float32(video), at_least_float32(action), text
