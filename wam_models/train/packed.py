"""The loss of clips of several lengths in one forward, one after another in one sequence, nothing padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wam_kernels import compile_plan
from wam_kernels.masks.context import with_context

from ..flow import add_noise, target, timesteps
from ..model.blocks import Uncast, at_least_float32
from ..model.dual_expert import WorldActionModel
from ..objectives import OBJECTIVES, frames_before_chunks
from .loader import ClipDraw, Pack, PackedDraws
from .samples import StepConfig, error_sums
from .step import draw_kept_text, draw_marginals, mean_of_numbers, noised_video


class _Noised(NamedTuple):
    """A clip as the forward is given it, ``[1, ...]`` each, and what its loss compares with."""

    video: Tensor
    noisy_video: Tensor
    history: Tensor
    action: Tensor
    noisy_action: Tensor
    video_sigma: Tensor
    action_sigma: Tensor
    history_sigma: Tensor
    video_target: Tensor
    action_target: Tensor
    counts: tuple[bool, bool]  # whether video and actions carry a loss
    keeps_text: bool
    action_mask: Tensor | None


def packed_step(
    model: WorldActionModel, pack: Pack, text: Tensor, draws: PackedDraws, *, impl: str | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """The loss of a pack, to be summed over the packs of a step; the caller does the backward.

    A clip's loss is that of ``training_step``, and what is drawn for it depends on nothing but the clip, so a clip
    contributes the same whatever is beside it. All clips of a pack have one program each, no two the same need be.

    Args:
        model: On the device where the step runs.
        pack: The clips.
        text: Raw embeddings ``[N, L, text_dim]`` of the N clips.
        draws: What the clips were drawn from.
        impl: Backend of ``block_attention``.

    Returns:
        ``pack.share`` times the sum of the clips' losses, float32; and metrics without gradient: ``sums``, as
        :func:`error_sums` gives them, and ``visible_pairs`` of the attention.
    """
    inside = getattr(model, "module", model)
    device = inside.device
    clips = [
        _noised(draw, held, draws.kinds[draw.kind].config, inside)
        for draw, held in zip(pack.draws, pack.clips, strict=True)
    ]
    geometries = [draws.geometry(draw) for draw in pack.draws]
    context = draws.context
    samples = [with_context(g, context) for g in geometries] if context else geometries
    stopped = draws.kinds[0].config.stop_gradient  # of what is frozen, so the same of all kinds
    plan = compile_plan([samples], device=device, stop_gradient=stopped)
    has_actions = inside.config.has_actions

    def joined(name: str, dim: int = 1) -> Tensor:
        return torch.cat([getattr(clip, name) for clip in clips], dim)

    kept = torch.tensor([clip.keeps_text for clip in clips], device=device)[:, None, None]
    video_flow, action_flow, *_ = model(
        joined("noisy_video", 2),
        joined("history", 2),
        joined("noisy_action") if has_actions else None,
        joined("action") if has_actions else None,
        Uncast(timesteps(joined("video_sigma"))),
        Uncast(timesteps(joined("action_sigma"))) if has_actions else None,
        torch.where(kept, text.to(device), 0),
        plan,
        clean_video_timesteps=Uncast(timesteps(joined("history_sigma"))),
        clips=pack.frames,
        impl=impl,
        **_told(inside, pack),
    )
    videos = at_least_float32(video_flow).split(pack.frames, 2)
    actions = [None] * len(clips) if action_flow is None else at_least_float32(action_flow).split(pack.frames, 1)
    total, found = torch.zeros((), device=device), []
    for draw, clip, video, action in zip(pack.draws, clips, videos, actions, strict=True):
        config = draws.kinds[draw.kind].config
        video_error = (video - clip.video_target)[:, :, 1:].square().mean()
        action_error = torch.zeros_like(video_error)
        if action is not None:
            held_mask = None if clip.action_mask is None else clip.action_mask[None]
            action_error = mean_of_numbers((action - clip.action_target)[:, 1:], held_mask)[0]
        weights = config.video_weight * clip.counts[0], config.action_weight * clip.counts[1]
        total = total + weights[0] * video_error + weights[1] * action_error
        found.append(torch.stack([video_error, action_error]))
    counts = torch.tensor([clip.counts for clip in clips], dtype=torch.float32, device=device)
    counts[:, 1] *= has_actions
    sums = error_sums([draw.objective for draw in pack.draws], torch.stack(found, 1).unbind(), counts.T.unbind())
    return pack.share * total, {"sums": sums, "visible_pairs": plan.visible_pairs}


def _noised(draw: ClipDraw, held: Any, config: StepConfig, model: WorldActionModel) -> _Noised:
    """The clip with its noise, from a generator of its own; in the order in which ``training_step`` draws."""
    generator, device = torch.Generator().manual_seed(draw.seed), model.device
    c, objective = model.config, OBJECTIVES[draw.objective]
    video = at_least_float32(held["video"][None].to(device))
    shape = (1, draw.frames, c.actions_per_frame, c.action_dim)
    action = (
        at_least_float32(held["action"][None].to(device))
        if c.has_actions
        else video.new_zeros(*shape[:2], 0, c.action_dim)
    )
    action = torch.cat([torch.zeros_like(action[:, :1]), action[:, 1:]], 1)
    levels = config.timesteps.sigmas(1, draw.frames, generator)
    history_sigma = config.timesteps.history_sigmas(1, draw.frames, config.noised_history, generator).to(device)
    video_noise, history_noise, action_noise = (
        torch.randn(t.shape, generator=generator, dtype=torch.float32).to(device) for t in (video, video, action)
    )
    mask = None if "action_mask" not in held else held["action_mask"].to(device)
    if mask is not None:
        action_noise = action_noise * mask
    (video_alone,), (action_alone,) = draw_marginals(config, generator, [objective], [draw.action_free])
    keeps_text = bool(draw_kept_text(config.text_dropout, 1, generator)) and not objective.conditional
    video_sigma, action_sigma = (
        (torch.ones_like(s) if alone else s).to(device) * denoised
        for s, alone, denoised in zip(
            levels, (video_alone, action_alone), (objective.video, objective.action), strict=True
        )
    )
    return _Noised(
        video=video,
        noisy_video=noised_video(video, video_noise, video_sigma),
        history=noised_video(video, history_noise, history_sigma),
        action=action,
        noisy_action=add_noise(action, action_noise, action_sigma),
        video_sigma=video_sigma,
        action_sigma=action_sigma,
        history_sigma=history_sigma,
        video_target=target(video, video_noise),
        action_target=target(action, action_noise),
        counts=(
            objective.video and not video_alone,
            objective.action and not action_alone and bool(levels[1].any()),
        ),
        keeps_text=keeps_text,
        action_mask=mask,
    )


def _told(model: WorldActionModel, pack: Pack) -> dict[str, Any]:
    """What the forward is given besides video, actions and text."""
    c, told = model.config, {}
    if c.state_dim:
        states: Sequence[Tensor] = [
            held["state"][frames_before_chunks(draw.frames, draw.chunk_size)]
            for draw, held in zip(pack.draws, pack.clips, strict=True)
        ]
        told["state"] = torch.cat(list(states))[None].to(model.device)
    if c.mode_token:
        told["modes"] = torch.tensor([list(OBJECTIVES).index(draw.objective) for draw in pack.draws]).to(model.device)
    return told
