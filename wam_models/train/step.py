"""One training step: draw everything that is random, build the packed sequence, compare flows.

All randomness comes from one ``torch.Generator``, so a run that restores the generator's state continues with the
numbers it would have had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from wam_kernels import Plan, compile_plan

from ..bridge import bridge_video, video_attends_to_actions
from ..flow import add_noise, like, target, timesteps
from ..model.blocks import BridgeVideo, Uncast, at_least_float32
from ..model.dual_expert import WorldActionModel
from ..objectives import (
    GJD,
    OBJECTIVES,
    Objective,
    draw_objectives,
    frames_before_chunks,
    sample_for,
    told_frames,
)
from ..runtime.checks import instance
from .samples import StepConfig, error_sums

DEFAULT = StepConfig()


def training_step(
    model: WorldActionModel,
    batch: Mapping[str, Tensor],
    generator: torch.Generator,
    config: StepConfig = DEFAULT,
    *,
    impl: str | None = None,
    part: slice | None = None,
) -> tuple[Tensor, dict[str, float | int | Tensor]]:
    """The loss of one batch of clips; the caller does the backward and the optimizer step.

    A sample's loss is the mean squared error of its flows over the tokens that count, the batch's the mean over
    samples, so a sample weighs the same whatever the objectives of the others. Frame 0 is the observed start-up
    frame: a rollout never generates it, so it carries no loss; its clean video is attended to, its action tokens are
    not. Of a model with ``full_attention`` it is a frame of the one copy of the video.

    On a GPU run it under ``torch.autocast`` in bf16, with a bf16 model, or with FSDP2 and
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
            ``[B, F, S]`` of each frame for a model with ``state_dim``; ``bridge`` ``[B, N, bridge_dim]`` for one
            that has it and no ``bridge_layer``; ``<stream>_target`` ``[B, N, aligned]`` of each aligned one, the
            embeddings that its tokens are trained towards. F at least 2. Optional, bool ``[B]``:
            ``counterfactual``, the samples whose actions did not come from a demonstration; ``action_free``, those of a
            video without actions: whatever ``action`` holds of them is neither learned nor attended to.
            ``action_mask`` ``[B, A]``, the numbers that a sample's robot has: the others, zeros, get no noise and
            carry no loss.
        generator: Source of every random number; its device may differ from the model's.
        config: What is drawn and how it is weighed.
        impl: Backend of ``block_attention``.
        part: Compute these samples alone. All is drawn as for the whole batch, and the losses of parts add up to its
            loss; metrics are of the part.

    Returns:
        The loss, a float32 scalar, and metrics without gradient: ``video_loss``, ``action_loss`` (scalar tensors: means
        over the samples that count; nan when none does), how many those are as ``video_samples`` and
        ``action_samples``, ``alignment_loss`` of a model with aligned streams, ``chunk_size``, ``window``,
        ``visible_pairs`` of the attention, the number of samples of each objective as ``samples/<name>``, and ``sums``
        as :func:`error_sums` gives them.

    Raises:
        TypeError: a batch entry, generator or config of another class.
        ValueError: a batch entry that is missing or has a shape that does not fit.
    """
    instance("training_step: generator", generator, torch.Generator)
    instance("training_step: config", config, StepConfig)
    inside = getattr(model, "module", model)  # of DistributedDataParallel
    chunk_size, window, d = _draw(inside, batch, generator, config)
    whole = len(d.video)
    if part is not None:
        d, batch = d.part(part), {name: t[part] for name, t in batch.items()}
    frames = d.video.shape[2]
    rows, columns = inside.token_grid(*d.video.shape[-2:])
    sizes = {"frames": frames, "video_tokens": rows * columns, "action_tokens": d.action.shape[2]}
    sizes |= {"chunk_size": chunk_size, "window": window}
    told = _told(inside, batch, d.objectives, chunk_size)
    learned = imagined = 1  # first frame whose actions, whose video is
    if inside.config.bridge_layer is not None:
        learned, told["bridge"] = _own_bridge(inside, config, d.video, d.video_noise, chunk_size)
        if video_attends_to_actions(config.program, config.history):
            imagined = learned  # to the video of earlier chunks, the actions' features are of the future
    given = sum(s.tokens or batch[s.name].shape[1] for s in inside.config.context)
    samples = [
        sample_for(
            config.program, o, history=config.history, context=given, action_free=free,
            full_attention=inside.config.full_attention, state_tokens=inside.config.state_tokens, **sizes,
        )
        for o, free in zip(d.objectives, d.action_free, strict=True)
    ]  # fmt: skip
    one = len(set(samples)) == 1
    plan = compile_plan(samples[0] if one else samples, device=inside.device, stop_gradient=config.stop_gradient)
    if config.imagined_history:
        d = _imagining(model, d, plan, told, impl)
    video_flow, action_flow, *read_out = _flows(model, d, plan, told, impl)
    # [B] each
    video_error = at_least_float32(video_flow) - target(d.video, d.video_noise)
    video_error = video_error[:, :, imagined:].square().flatten(1).mean(1)
    action_error = torch.zeros_like(video_error)
    if action_flow is not None:
        wrong = at_least_float32(action_flow) - target(d.action, d.action_noise)
        action_error = mean_of_numbers(wrong[:, learned:], batch.get("action_mask"))
    loss = config.video_weight * video_error * d.counts_video + config.action_weight * action_error * d.counts_action
    metrics: dict[str, float | int | Tensor] = {
        "video_loss": (video_error.detach() * d.counts_video).sum() / d.counts_video.sum(),
        "action_loss": (action_error.detach() * d.counts_action).sum() / d.counts_action.sum(),
        "video_samples": d.counts_video.sum(),
        "action_samples": d.counts_action.sum(),
        "chunk_size": chunk_size,
        "window": window,
        "visible_pairs": plan.visible_pairs * (len(samples) if one else 1),
        "sums": error_sums(
            [o.name for o in d.objectives], (video_error, action_error), (d.counts_video, d.counts_action)
        ),
    }
    if read_out:
        alignment = _alignment(batch, read_out[0])
        metrics["alignment_loss"] = alignment.detach()
        loss = loss + config.alignment_weight * alignment
    return loss.sum() / whole, metrics | _counted(d.objectives)


def mean_of_numbers(wrong_BFnA: Tensor, mask_BA: Tensor | None) -> Tensor:
    """``[B]``: the mean square over frames, tokens and those numbers of an action that a sample's robot has."""
    squares = wrong_BFnA.square().flatten(1, 2)
    if mask_BA is None:
        return squares.flatten(1).mean(1)
    mask = mask_BA.to(squares)
    return (squares.mean(1) * mask).sum(1) / mask.sum(1)


class Drawn(NamedTuple):
    """A batch and what is drawn for it, on the model's device; each field has an entry for every sample."""

    video: Tensor  # [B, C, F, y, x]
    action: Tensor  # [B, F, n, A]
    text: Tensor  # [B, L, text_dim]
    video_noise: Tensor
    history_noise: Tensor  # of the clean video copy
    action_noise: Tensor
    video_sigma: Tensor  # [B, F], as the next two
    history_sigma: Tensor
    action_sigma: Tensor
    keeps_text: Tensor  # [B, 1]
    counts_video: Tensor  # [B], 1 where the sample carries the loss, else 0
    counts_action: Tensor
    history: Tensor  # as video: what the clean copy is of
    imagines: Tensor  # bool [B], whether that is to be imagined
    imagination_noise: Tensor  # as video_noise; [B] where none imagines
    objectives: list[Objective]
    action_free: list[bool]

    def part(self, samples: slice) -> Drawn:
        return Drawn(*cast(Any, [held[samples] for held in self]))


def _draw(
    model: WorldActionModel, batch: Mapping[str, Tensor], generator: torch.Generator, config: StepConfig
) -> tuple[int, int, Drawn]:
    """Chunk size and window of the step, and what its samples are."""
    video, action, text = _checked(model, batch)
    has_actions = model.config.has_actions
    B, frames = video.shape[0], video.shape[2]
    device, draws = model.device, generator.device
    chunk_size, window = (
        int(torch.randint(low, high + 1, (), generator=generator, device=draws))
        for low, high in (config.chunk_sizes, config.windows)
    )
    counterfactual, action_free = (_marked(batch, name, B) for name in ("counterfactual", "action_free"))
    objectives = draw_sample_objectives(config, generator, counterfactual, action_free)
    if any(o.conditional for o in objectives) and (not has_actions or model.config.bridge_layer is not None):
        raise ValueError(
            "training_step: config.mixture must be {'joint': 1} for a model without actions or with bridge_layer, got "
            f"{config.mixture}"
        )
    video_sigma, action_sigma = config.timesteps.sigmas(B, frames, generator)
    history_sigma = config.timesteps.history_sigmas(B, frames, config.noised_history, generator).to(device)
    video_noise, history_noise, action_noise = (
        torch.randn(t.shape, generator=generator, dtype=torch.float32, device=draws).to(device)
        for t in (video, video, action)
    )
    if "action_mask" in batch:
        action_noise = action_noise * batch["action_mask"].to(action_noise)[:, None, None]
    denoises_video, denoises_action, keeps_text = _flags(objectives, device)
    # True where it is noise alone, and carries no loss
    video_marginal, action_marginal = (
        torch.tensor(marked, device=device)[:, None]
        for marked in draw_marginals(config, generator, objectives, action_free)
    )
    keeps_text = keeps_text * draw_kept_text(config.text_dropout, B, generator).to(device)
    imagines, imagination_noise = torch.zeros(B, dtype=torch.bool), torch.zeros(B)
    if config.imagined_history:  # else nothing is drawn, and every run goes on with the numbers that it had
        if model.config.full_attention:
            raise ValueError(
                "training_step: config.imagined_history must be 0 for a model with full_attention, which has no "
                f"history but the observed frame, got {config.imagined_history}"
            )
        imagines = torch.rand(B, generator=generator, device=draws) < config.imagined_history
        imagination_noise = torch.randn(video.shape, generator=generator, dtype=torch.float32, device=draws)
    video_sigma = video_sigma.to(device).masked_fill(video_marginal, 1.0) * denoises_video
    if model.config.full_attention:
        # the observed frame is one of the chunk, at the level that its clean copy would have
        video_sigma = torch.cat([history_sigma[:, :1], video_sigma[:, 1:]], 1)
    return (
        chunk_size,
        window,
        Drawn(
            video, action, text, video_noise, history_noise, action_noise,
            video_sigma=video_sigma,
            history_sigma=history_sigma,
            action_sigma=action_sigma.to(device).masked_fill(action_marginal, 1.0) * denoises_action,
            keeps_text=keeps_text,
            counts_video=denoises_video[:, 0] * ~video_marginal[:, 0],
            # at level 0 throughout there is nothing to denoise
            counts_action=denoises_action[:, 0]
            * ~action_marginal[:, 0]
            * action_sigma.any(1).to(device)
            * has_actions,
            history=video,
            imagines=imagines.to(device),
            imagination_noise=imagination_noise.to(device),
            objectives=objectives,
            action_free=action_free,
        ),
    )  # fmt: skip


def _flows(model: WorldActionModel, d: Drawn, plan: Plan, told: Mapping[str, Any], impl: str | None) -> Sequence[Any]:
    """What the model answers to what was drawn."""
    has_actions = bool(d.action.shape[2])
    two_copies = not getattr(model, "module", model).config.full_attention
    return model(
        noised_video(d.video, d.video_noise, d.video_sigma),
        noised_video(d.history, d.history_noise, d.history_sigma) if two_copies else None,
        add_noise(d.action, d.action_noise, d.action_sigma) if has_actions else None,
        d.action if has_actions and two_copies else None,
        Uncast(timesteps(d.video_sigma)),
        Uncast(timesteps(d.action_sigma)) if has_actions else None,
        torch.where(d.keeps_text[:, :, None] > 0, d.text, 0),
        plan,
        clean_video_timesteps=Uncast(timesteps(d.history_sigma)) if two_copies else None,
        impl=impl,
        **told,
    )


@torch.no_grad()
def _imagining(model: WorldActionModel, d: Drawn, plan: Plan, told: Mapping[str, Any], impl: str | None) -> Drawn:
    """The same with the history of samples that imagine it: every chunk in one step from noise, after the recorded
    frames before it; as recorded where a sample is given its video, and in frame 0, which is observed."""
    denoises_video, denoises_action, _ = _flags(d.objectives, d.video.device)
    asked = d._replace(
        video_noise=d.imagination_noise,
        video_sigma=denoises_video.expand_as(d.video_sigma),
        action_sigma=denoises_action.expand_as(d.action_sigma),
        history_sigma=torch.zeros_like(d.history_sigma),
    )
    flow = at_least_float32(_flows(model, asked, plan, told, impl)[0])
    torch.clear_autocast_cache()  # of weights that were cast without gradient
    found = torch.where(like(denoises_video > 0, flow), asked.video_noise - flow, d.video)
    found[:, :, 0] = d.video[:, :, 0]
    return d._replace(history=torch.where(like(d.imagines, found), found, d.video))


def _flags(objectives: list[Objective], device: torch.device) -> list[Tensor]:
    """float32 ``[B, 1]``: 1 where the sample denoises the video, the actions, and where it keeps its text.

    Where it does not denoise a stream, the noisy copy holds the clean stream at timestep 0.
    """
    of_samples = zip(*((o.video, o.action, not o.conditional) for o in objectives), strict=True)
    return [torch.tensor(flags, dtype=torch.float32, device=device)[:, None] for flags in of_samples]


def _marked(batch: Mapping[str, Tensor], name: str, samples: int) -> list[bool]:
    """Which samples of the batch are of a kind, none where it does not say."""
    if name not in batch:
        return [False] * samples
    marked = batch[name]
    instance(f"training_step: {name}", marked, Tensor)
    if marked.dtype != torch.bool or list(marked.shape) != [samples]:
        raise ValueError(f"training_step: {name} must be bool [{samples}], got {marked.dtype} {list(marked.shape)}")
    return marked.tolist()


def draw_sample_objectives(
    config: StepConfig, generator: torch.Generator, counterfactual: list[bool], action_free: list[bool]
) -> list[Objective]:
    """Of each sample: of counterfactual ones conditional, of those without actions ``joint``."""
    drawn = draw_objectives(config.program, len(counterfactual), generator, config.mixture)
    if any(counterfactual):
        if config.program != GJD:
            raise ValueError(
                f"training_step: counterfactual samples must come with program {GJD!r}, got {config.program!r}"
            )
        others = draw_objectives(config.program, len(counterfactual), generator, config.counterfactual)
        drawn = [b if marked else a for a, b, marked in zip(drawn, others, counterfactual, strict=True)]
    if any(c and free for c, free in zip(counterfactual, action_free, strict=True)):
        raise ValueError("training_step: a sample must not be both counterfactual and action_free; got one that is")
    return [OBJECTIVES["joint"] if free else o for o, free in zip(drawn, action_free, strict=True)]


def draw_marginals(
    config: StepConfig, generator: torch.Generator, objectives: list[Objective], action_free: list[bool]
) -> tuple[list[bool], list[bool]]:
    """Of each sample whether its video, and whether its actions, are noise alone."""
    video, action = [False] * len(objectives), list(action_free)
    both = config.video_marginal + config.action_marginal
    if both:  # else nothing is drawn, and every run goes on with the numbers that it had
        drawn = torch.rand(len(objectives), generator=generator, device=generator.device).tolist()
        for i, (u, o) in enumerate(zip(drawn, objectives, strict=True)):
            if not o.conditional and not action_free[i]:
                video[i], action[i] = u < config.video_marginal, config.video_marginal <= u < both
    return video, action


def draw_kept_text(dropout: float, samples: int, generator: torch.Generator) -> Tensor:
    """float32 ``[samples, 1]``, 0 where the text is dropped."""
    if not dropout:
        return torch.ones(samples, 1)
    return (torch.rand(samples, 1, generator=generator, device=generator.device) >= dropout).float()


def noised_video(video_BCFyx: Tensor, noise_BCFyx: Tensor, sigma_BF: Tensor) -> Tensor:
    """``add_noise`` with one level for each frame."""
    return add_noise(video_BCFyx.transpose(1, 2), noise_BCFyx.transpose(1, 2), sigma_BF).transpose(1, 2)


def _told(
    model: WorldActionModel, batch: Mapping[str, Tensor], objectives: Sequence[Objective], chunk_size: int
) -> dict[str, Any]:
    """What the forward is given besides video, actions and text."""
    c, device = model.config, model.device
    told: dict[str, Any] = {"context": {s.name: batch[s.name] for s in c.context if s.features}}
    if c.state_dim:
        told["state"] = batch["state"][:, told_frames(batch["state"].shape[1], chunk_size, c.state_tokens)]
    if c.mode_token:
        told["modes"] = torch.tensor([list(OBJECTIVES).index(o.name) for o in objectives])
    if c.bridge_dim and c.bridge_layer is None:
        told["bridge"] = batch["bridge"]
    return tree_map_only(Tensor, lambda t: t.to(device), told)


def _own_bridge(
    model: WorldActionModel, config: StepConfig, video: Tensor, noise: Tensor, chunk_size: int
) -> tuple[int, BridgeVideo]:
    """First frame of the last chunk, whose actions alone know the bridge that a rollout would give them; and that."""
    if model.config.bridge_sigma < 1 and video_attends_to_actions(config.program, config.history):
        raise ValueError(
            "training_step: config must not let the video attend to actions for bridge_sigma="
            f"{model.config.bridge_sigma}, which know what it comes to; got program {config.program!r} with history "
            f"{config.history!r}; give 'video_then_action' with 'video_only'"
        )
    before = frames_before_chunks(video.shape[2], chunk_size)[-1]
    trains = ("action", "video") not in config.stop_gradient
    return before + 1, bridge_video(model.config, video[:, :, before:], noise[:, :, before:], trains)


def _alignment(batch: Mapping[str, Tensor], read_out: Mapping[str, Tensor]) -> Tensor:
    """1 - cosine of what tokens are read out to and their targets, mean over samples, tokens and streams."""
    apart = []
    for name, found in read_out.items():
        wanted = batch[f"{name}_target"].to(found.device)
        if wanted.shape != found.shape:
            raise ValueError(f"training_step: {name}_target must be {list(found.shape)}, got {list(wanted.shape)}")
        apart.append(1 - F.cosine_similarity(at_least_float32(found), at_least_float32(wanted), dim=-1).mean())
    return torch.stack(apart).mean()


def _counted(objectives: list[Objective]) -> dict[str, int]:
    names = [o.name for o in objectives]
    return {f"samples/{name}": names.count(name) for name in sorted(set(names))}


def _checked(model: WorldActionModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Video, actions (none of each frame for a model without) and text, on the model's device."""
    c = model.config
    names = ["video", *(["action"] if c.has_actions else []), "text", *(s.name for s in c.context if s.features)]
    given = ("state", c.state_dim), ("bridge", c.bridge_dim and c.bridge_layer is None)
    names += [name for name, there in given if there]
    names += [f"{s.name}_target" for s in c.context if s.aligned]
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
