"""The training loop, its config file, its checkpoints.

Every random number (clips, objectives, chunk sizes, noise) comes from one generator whose state is saved, so a run that
is interrupted and resumed goes on with the losses that it would have had.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from wam_kernels import HISTORIES, PROGRAMS

from .._checks import check_field, choice, instance, number, whole, whole_range, writable_folder
from .._json import from_fields, read_json
from ..config import LARGEST, ModelConfig
from ..data import ClipDataset
from ..data.latents import codec_kind
from ..flow import SHIFTS, TimestepDraw
from ..model.checkpoint import CONFIG, TRAINING, Checkpoint, alone, remove_checkpoint, saved_as
from ..model.dual_expert import WorldActionModel
from ..model.weights import check_finite, few, load_weights
from ..objectives import GJD, GJD_MIXTURE, OBJECTIVES, checked_mixture
from ..rollout.episode import CONDITIONAL_CHUNK, RolloutConfig
from ..rollout.policy import Policy
from ..text import WordEmbedding
from .optim import Muon
from .step import MOST, TrainingConfig, training_step

SCHEDULES = ("constant", "cosine", "decay")
DECAY = 0.5  # part of a "decay" run, its end, over which the learning rate falls
TINIEST = 1e-12  # of a learning rate or a gradient's length, which must be positive
LARGEST_SEED = 2**63 - 1
MOMENTA = {Muon: {"average"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}  # what they hold of each parameter
SPARE = 0.03  # part of a run's time that its planned end leaves, so that a slow moment does not cut the decay off


def small_model() -> ModelConfig:
    """The demo's model: see :class:`TrainConfig` for what was tried."""
    return ModelConfig(
        hidden=192,
        heads=12,
        head_dim=16,
        layers=2,
        ffn=512,
        action_hidden=128,
        action_ffn=384,
        action_dim=7,
        actions_per_frame=4,
        text_dim=64,
        rope_theta=10.0,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that a training run depends on, beside the data and the seed. JSON in and out.

    The defaults are the demo's, for three minutes on two CPU cores. Tried on one core, at equal CPU time (70 to 100 s):

    - batch 2 instead of 4, for more steps: video loss 1.22 instead of 1.36, action loss 0.76 instead of 1.05;
    - 2 layers instead of 3: a step costs 0.31 instead of 0.46 s;
    - pairs of action heads that look at two frames, instead of at all frames alike: action loss 0.58 instead of 0.65;
    - 1 denoising step instead of 5: from noise it gives the mean of what may follow; action error 0.73 instead of 0.88;
    - half of the samples inverse dynamics instead of a fifth: its error is 0.515 instead of 0.555;
    - 12 heads of 16 instead of 6 of 32, which look at twice as many places: 0.454 instead of 0.494.

    Then 400 steps each with the demo's mixture and seed 0: inverse dynamics error on all 11 held-out episodes (0.432
    for repeating the last action) and PSNR of forward dynamics on the demo's six. Each line adds to the kept lines
    before it:

    - conditional objectives in chunks of one frame, as they are rolled out: 0.478, 16.5 dB;
    - rope base 10 instead of 10,000, whose second pair of dimensions tells near places apart too, and a rate that falls
      to 0: 0.459, 17.7 dB;
    - attention that starts out sharper, 5 (video) and 3 (actions) instead of 2: 0.452, 19.5 dB;
    - video shift 20 instead of 5, and action shift 40 instead of 15: 0.469, 20.3 dB (the video's alone is kept), with
      learning rate 3e-3 instead of 1.5e-3: 0.472, 20.1 dB;
    - noise of up to 0.6 on both frames of inverse dynamics: 0.463, 20.1 dB; not kept;
    - 18 heads and a feed-forward width of 384: 0.466, 20.5 dB, and a step costs a quarter more; not kept;
    - blocks that start out adding nothing: 0.459, 20.6 dB;
    - Muon instead of AdamW inside the blocks (without the line before): 0.435, 19.9 dB; a step costs a third more;
    - both together for 560 steps: 0.399, 21.2 dB; as it is now, ``"decay"`` for cosine, seeds 1 and 2: 0.385 and 0.384,
      21.3 and 21.4 dB.

    What is short is the fit, not the data: on training episodes these models are at 0.39, where a ridge regression from
    the latents of the two frames is at 0.13, and at 0.353 on the held-out ones (0.383 from 20 of the 40 training
    episodes, 0.343 from frames at all four offsets).

    Args:
        model: Sizes of the model.
        programs: Interaction programs of the ``joint`` objective's samples, equally often. Default: all of
            ``wam_kernels.PROGRAMS``, so that one checkpoint serves every rollout program.
        mixture: Share of each objective among the samples.
        history: Which earlier clean tokens a query sees, one of ``wam_kernels.HISTORIES``.
        chunk_sizes: Smallest and largest chunk, in frames; drawn for every step.
        windows: Smallest and largest window, in order blocks; drawn for every step.
        noised_history: Probability that the clean video copy of a sample is itself noised.
        video_shift: Shift of the video's noise levels.
        action_shift: Shift of the actions' noise levels.
        video_weight: Factor on the video loss.
        action_weight: Factor on the action loss.
        batch: Clips of a step.
        frames: Latent frames of a clip.
        steps: Steps of the run, and the end of the schedule unless time ends the run before.
        learning_rate: After the warm-up.
        warmup: Steps of linear warm-up.
        schedule: ``"constant"``; ``"cosine"``, down to 0 at ``steps``; or ``"decay"``, constant for the first half and
            then linearly down to 0. Of a run whose time is limited, :func:`train` finds the end of ``"decay"``.
        beta2: Of AdamW; its beta1 is 0.9.
        weight_decay: Of AdamW, on matrices alone.
        clip_norm: Longest gradient.
        ema: Sharpness of the average of the weights, which is what a checkpoint's model holds; 0 for none. The
            average always spans the last 1 / (ema + 1) or so of the run, so training may stop at any time, without
            a learning rate that has to know when.
        save_every: Steps between checkpoints.

    Raises:
        ValueError: a value of the wrong type or outside its range; the message names the field.
    """

    model: ModelConfig = field(default_factory=small_model)
    programs: tuple[str, ...] = field(default_factory=lambda: tuple(PROGRAMS))
    mixture: Mapping[str, float] = field(default_factory=lambda: dict(GJD_MIXTURE))
    history: str = "full"
    chunk_sizes: tuple[int, int] = (1, 4)
    windows: tuple[int, int] = (4, 16)
    noised_history: float = 0.0
    video_shift: float = 20.0
    action_shift: float = 15.0
    video_weight: float = 1.0
    action_weight: float = 1.0
    batch: int = 2
    frames: int = 9
    steps: int = 2000
    learning_rate: float = 1.5e-3
    warmup: int = 20
    schedule: str = "decay"
    beta2: float = 0.99
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema: float = 7.0
    save_every: int = 500

    def __post_init__(self) -> None:
        if not isinstance(self.model, ModelConfig):
            raise ValueError(f"TrainConfig: model must be a ModelConfig, got {self.model!r}")
        check_field(self, "programs", _programs)
        check_field(self, "mixture", checked_mixture)
        check_field(self, "history", choice, HISTORIES)
        for name in ("chunk_sizes", "windows"):
            check_field(self, name, whole_range, 1, MOST)
        check_field(self, "noised_history", number, 0, 1)
        for name in ("video_shift", "action_shift"):
            check_field(self, name, number, *SHIFTS)
        check_field(self, "batch", whole, 1, LARGEST)
        for name, low in (("frames", 2), ("steps", 1), ("warmup", 0), ("save_every", 1)):
            check_field(self, name, whole, low)
        check_field(self, "learning_rate", number, TINIEST, 100)
        check_field(self, "clip_norm", number, TINIEST)
        for name in ("weight_decay", "ema", "video_weight", "action_weight"):
            check_field(self, name, number, 0)
        check_field(self, "schedule", choice, SCHEDULES)
        check_field(self, "beta2", number, 0, 0.999999)

    def to_dict(self) -> dict:
        """A dict that ``json.dumps`` takes."""
        return asdict(self) | {"model": self.model.to_dict(), "mixture": dict(self.mixture)}

    @classmethod
    def from_dict(cls, values: dict, source: str = "TrainConfig") -> TrainConfig:
        """From a dict as JSON gives it; fields that are left out keep their defaults, in ``model`` too.

        Raises:
            ValueError: an unknown field, or a value that is refused; the message names it and ``source``.
        """
        if isinstance(values, dict) and "model" in values:
            model = values["model"]
            if isinstance(model, dict):
                model = small_model().to_dict() | model
            values = values | {"model": ModelConfig.from_dict(model, f"{source}: model")}
        return from_fields(cls, values, source, defaults=True)

    @classmethod
    def from_json(cls, path: str | Path) -> TrainConfig:
        """From a file. Raises ValueError, naming file and field, or OSError where it cannot be read."""
        return cls.from_dict(read_json(Path(path)), str(path))

    def rate(self, step: int, end: int | None = None) -> float:
        """Learning rate of a step, counted from 0, of a run that ends at step ``end`` (default ``steps``)."""
        end = self.steps if end is None else end
        left = 1 - min(1.0, step / end)
        decay = {
            "constant": 1.0,
            "cosine": 0.5 * (1 - math.cos(math.pi * left)),
            "decay": min(1.0, left / DECAY),
        }[self.schedule]
        return self.learning_rate * min(1.0, (step + 1) / (self.warmup + 1)) * decay

    def draws(self) -> list[tuple[float, TrainingConfig]]:
        """What a step may be trained on, with probabilities, such that the samples keep the mixture.

        A step has one program for all its samples. The conditional objectives share steps of their own, in which each
        sample draws its objective; their chunks are of one frame, as in a rollout.
        """
        total = sum(self.mixture.values())
        share = {name: self.mixture.get(name, 0.0) / total for name in OBJECTIVES}
        common = TrainingConfig(
            history=self.history,
            chunk_sizes=self.chunk_sizes,
            windows=self.windows,
            timesteps=TimestepDraw(video_shift=self.video_shift, action_shift=self.action_shift),
            noised_history=self.noised_history,
            video_weight=self.video_weight,
            action_weight=self.action_weight,
        )
        joint = share.pop("joint")
        kinds = [(joint / len(self.programs), replace(common, program=p)) for p in self.programs]
        conditional = sum(share.values())
        if conditional > 0:
            one = (CONDITIONAL_CHUNK, CONDITIONAL_CHUNK)
            kinds.append((conditional, replace(common, program=GJD, mixture=share, chunk_sizes=one)))
        return kinds


def _programs(where: str, value: object) -> tuple[str, ...]:
    listed = isinstance(value, list | tuple | Mapping) and value
    if not listed or not all(p in PROGRAMS for p in value) or len(set(value)) < len(value):
        raise ValueError(f"{where} must be some of {tuple(PROGRAMS)}, each once, got {value!r}")
    return tuple(value)


@dataclass(frozen=True, eq=False)
class Trained:
    """What :func:`train` returns: the policy with averaged weights, every step's log row, and the last step."""

    policy: Policy
    log: list[dict]
    step: int


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    config: TrainConfig,
    data: ClipDataset,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    seconds: float | None = None,
    out: str | Path | None = None,
    resume: Checkpoint | None = None,
    rollout: RolloutConfig | None = None,
    overwrite: bool = False,
    stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
) -> Trained:
    """Train a model from scratch, or go on from a checkpoint, up to step ``config.steps``.

    float32 on a CPU; on a GPU bf16 autocast over float32 weights.

    Args:
        config: What to train and how.
        data: Clips; with ``resume`` in the checkpoint's latents and units.
        seed: Of the weights and of everything that is drawn. Ignored with ``resume``.
        device: Where the model runs.
        seconds: Stop after so much time, if that comes before the last step. Where ``config.schedule`` is ``"decay"``,
            the speed of the first half decides, once, at which step the rate reaches 0 and the run ends; that step is
            stored, so a resumed run keeps it.
        out: Folder of ``log.jsonl`` (a row a step) and ``checkpoint/``, written every ``config.save_every`` steps
            and at the end. None writes nothing. A folder that holds a run is refused, unless it is the one that is
            resumed.
        resume: From ``load_checkpoint`` on a folder that this function wrote.
        rollout: Stored with the checkpoint as its default; default: chunks of the largest size trained on.
        overwrite: Whether a run in ``out`` may be lost.
        stop: Asked after every step; True ends the run as if its time were up.
        progress: Show a progress bar.

    Returns:
        The trained policy, in eval mode, and a log row for each step of this call: ``step`` (from 1), ``loss``,
        ``video_loss``, ``action_loss`` (None where no sample of the step has it), ``rate``, ``gradient`` (its norm
        before clipping), ``seconds`` since the start of the call.

    Raises:
        ValueError: data that does not fit the model or the checkpoint, a codec that cannot be saved to ``out``, a
            checkpoint without a training state or with a damaged one, an ``out`` that holds another run or cannot be
            written.
        TypeError: a config, data or checkpoint of another class.
        OSError: no room for a row or a checkpoint; the message names the file.
        FloatingPointError: a loss or a gradient that is not finite.
    """
    for name, value, kind in (("config", config, TrainConfig), ("data", data, ClipDataset)):
        instance(f"train: {name}", value, kind)
    if resume is not None:
        instance("train: resume", resume, Checkpoint)
    device = torch.device(device)
    seed = whole("train: seed", seed, 0, LARGEST_SEED)
    folder = None if out is None else RunFolder(out, resume, overwrite=overwrite)
    _check_fit(config, data)
    if out is not None:
        codec_kind(data.codec)  # refuses before the run what could not be saved after it
    torch.manual_seed(seed)  # of the initial weights
    generator = torch.Generator().manual_seed(seed)
    model = WorldActionModel(config.model)
    prepare(model)
    text = WordEmbedding.from_instructions(data.tasks, config.model.text_dim)
    if resume is not None:
        _check_resumable(config, data, resume)
        text = WordEmbedding(resume.text.vocabulary, config.model.text_dim, tokens=resume.text.tokens)
    with torch.no_grad():
        text(data.tasks)  # what it refuses could be drawn an hour later
    learner = nn.ModuleDict({"model": model, "text": text}).to(device).train()
    optimizers = _optimizers(learner, config)
    average = {k: v.detach().clone() for k, v in learner.state_dict().items()}
    step = 0
    planned: int | None = None  # the last step, once the clock has decided it
    if resume is not None:
        average = {f"model.{k}": v for k, v in resume.model.state_dict().items()}
        average |= {f"text.{k}": v for k, v in resume.text.state_dict().items()}
        average = {k: v.detach().to(device, copy=True) for k, v in average.items()}
        step, planned = _restore(resume, learner, optimizers, generator)

    weights, kinds = zip(*config.draws(), strict=True)
    weights = torch.tensor(weights)
    # one step from noise gives the mean of what may follow: the best guess that an error can ask for
    rollout = rollout or RolloutConfig(
        chunk_size=config.chunk_sizes[1],
        window=4,
        history=config.history,
        steps=1,
        video_shift=config.video_shift,
        action_shift=config.action_shift,
    )
    log: list[dict] = []
    first = step
    began = time.perf_counter()

    def policy() -> Policy:
        averaged = WorldActionModel(config.model).to(device).requires_grad_(False)
        words = (
            WordEmbedding(text.vocabulary, config.model.text_dim, tokens=text.tokens).to(device).requires_grad_(False)
        )
        load_weights(nn.ModuleDict({"model": averaged, "text": words}), average)
        return Policy.of(averaged, words, data, rollout)

    def save(checkpoint: Path) -> None:
        policy().save(
            checkpoint,
            training={"config": config.to_dict(), "step": step, "seed": seed, "threads": torch.get_num_threads()},
            training_state={
                "weights": learner.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "generator": generator.get_state(),
                "step": step,
                "planned": planned,
            },
        )

    if seconds is None:
        extent = {"total": config.steps, "initial": step, "unit": "step"}
    else:  # time is what ends the run, as a rule
        extent = {"total": seconds, "bar_format": "{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}"}
    bar = tqdm(**extent, desc="train", disable=not progress, dynamic_ncols=True)
    with bar, nullcontext() if folder is None else folder.begin(step):
        while step < config.steps:
            kind = kinds[int(torch.multinomial(weights, 1, generator=generator))]
            clips = data.sample(config.batch, config.frames, generator)
            words = text([data.tasks[i] for i in clips["task"].tolist()])
            rate = config.rate(step, planned)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, metrics = training_step(model, {**clips, "text": words}, generator, kind)
            if not torch.isfinite(loss):
                raise _diverged("loss", loss, step + 1, rate, clips)
            learner.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(learner.parameters(), config.clip_norm)
            if not torch.isfinite(norm):  # a step along it would lose the weights
                raise _diverged("gradient", norm, step + 1, rate, clips)
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            _follow(average, learner.state_dict(), step, config.ema)
            row = {
                "step": step,
                "loss": loss.item(),
                **{k: _finite(metrics[k].item()) for k in ("video_loss", "action_loss")},
                "rate": rate,
                "gradient": norm.item(),
                "seconds": time.perf_counter() - began,
            }
            log.append(row)
            if folder is not None:
                folder.add(row)
            bar.update(1 if seconds is None else min(row["seconds"], seconds) - bar.n)
            means = [f"{s} loss {m:.3f}" for s in STREAMS if (m := recent(log, s)) is not None]
            bar.set_postfix_str(", ".join([f"step {step}", *means]), refresh=False)
            if planned is None and config.schedule == "decay" and seconds is not None:
                spent = row["seconds"]
                if spent >= (1 - DECAY) * seconds:
                    left = int(((1 - SPARE) * seconds - spent) / spent * (step - first))
                    planned = min(step + max(left, 1), config.steps)
            over = step == (config.steps if planned is None else planned)
            done = over or stop() or (seconds is not None and row["seconds"] >= seconds)
            if folder is not None and (done or step % config.save_every == 0):
                save(folder.checkpoint)
            if done:
                break
    return Trained(policy(), log, step)


def prepare(
    model: WorldActionModel,
    *,
    gate: float = 0.1,
    content: float = 0.3,
    video_sharp: float = 5.0,
    action_sharp: float = 3.0,
    copy: float = 1.0,
    opening: float = 0.5,
) -> None:
    """Start a fresh model near what any trained one does, which saves the first few hundred steps.

    - Both heads undo the embedding of their stream: near noise the flow is the noise itself, so passing the input
      through is the best first guess.
    - The first block passes on minus what it reads from other tokens, unchanged: the flow is noise minus picture.
    - Attention starts out looking at places rather than contents, through constant parts of q and k that rope turns
      apart with the distance: video tokens look at their own place in all frames, the heads of the action expert at
      places spread over the picture.
    - Everything else that a block adds starts at 0, behind gates that are open: it disturbs nothing and learns at once.

    Args:
        gate: Factor on the modulation that depends on the timestep.
        content: Factor on the parts of q and k that depend on contents.
        video_sharp: Factor on the scores of the video expert's queries; the larger, the less of a place's neighbours.
        action_sharp: The same of the action expert's queries.
        copy: How much the first block passes on.
        opening: Gates of the blocks.
    """
    config, core = model.config, model.core
    patch, proj = core.patch_embedding_mlp.weight, core.proj_out.weight
    nn.init.orthogonal_(patch)
    per_patch = config.patch_width // config.latent_channels
    blocks = model.packed_block_stack.packed_blocks
    with torch.no_grad():
        # the head's patches are ordered (place, channel), those of the embedding (channel, place)
        undo = patch.T.unflatten(0, (config.latent_channels, per_patch)).transpose(0, 1).flatten(0, 1)
        # LayerNorm scales the embedded patch, of width patch_width, to one number's size in each of hidden places
        proj.copy_(undo * min(1.0, config.patch_width / config.hidden) ** 0.5)
        _pass_actions_through(model.action_expert)
        for side in (core, model.action_expert):
            side.time_conditioner.time_proj.weight.mul_(gate)
            side.time_conditioner.time_embedder.linear_2.weight.mul_(gate)
        for i, block in enumerate(blocks):
            for expert, sharp in ((block.video_block, video_sharp), (block.action_block, action_sharp)):
                attention = expert.attn1
                for layer in (attention.to_q, attention.to_k):
                    layer.weight.mul_(content)
                    layer.bias.copy_(_looking(config, [(None if layer is attention.to_q else 0, 0, 0)] * config.heads))
                attention.norm_q.weight.fill_(sharp)
                for layer in (attention.to_out[0], expert.attn2.to_out[0], expert.ffn.net[2]):
                    layer.weight.zero_()
                expert.scale_shift_table[0, (2, 5), :] = opening
            places = [_place(i * config.heads + h, len(blocks) * config.heads) for h in range(config.heads)]
            block.action_block.attn1.to_q.bias.copy_(_looking(config, places))
        first = blocks[0].video_block
        nn.init.orthogonal_(first.attn1.to_v.weight)
        first.attn1.to_out[0].weight.copy_(-first.attn1.to_v.weight.T)
        first.scale_shift_table[0, 2] = copy


def _pass_actions_through(expert: nn.Module) -> None:
    """An action is far narrower than its token: a constant part keeps LayerNorm from taking its size away."""
    embedder = expert.action_embedder
    width, numbers = embedder.weight.shape
    # orthonormal columns without mean; the last is the constant part, of one number's size in each place
    columns = torch.linalg.qr(torch.cat([torch.ones(width, 1), torch.randn(width, numbers + 1)], 1))[0][:, 1:]
    embedder.weight.copy_(columns[:, :numbers])
    embedder.bias.copy_(columns[:, numbers] * width**0.5)
    expert.action_proj_out.weight.copy_(columns[:, :numbers].T)


ROWS, COLUMNS = 4, 8  # the token grid over which the action expert's heads are spread


def _place(i: int, count: int) -> tuple[float, int, int]:
    """Where head i of ``count`` looks, in frames, rows and columns from an action token.

    The token sits about half a frame behind the frame that it leads to, at row and column -1. Heads come in pairs: one
    looks at that frame, the other at the one before, because motion is what tells actions.
    """
    at = i // 2 * 2 * ROWS * COLUMNS // count
    return -0.5 - i % 2, 1 + at // COLUMNS, 1 + at % COLUMNS


def _looking(config: ModelConfig, places: list[tuple[float | None, int, int]]) -> torch.Tensor:
    """A q bias ``[inner]`` whose heads score the keys at these offsets best; with offset 0 also the k bias.

    None is no preference.
    """
    bias = torch.zeros(config.heads, config.head_dim)
    frame, row, column = config.rope_split
    for h, place in enumerate(places):
        starts = (0, frame, frame + row)
        for offset, start, width, weight in zip(place, starts, config.rope_split, (1.5, 1, 1), strict=True):
            if offset is None:
                continue
            for pair in range(min(2, width // 2)):  # the first turns by a radian a place, the rest ever slower
                angle = offset * config.rope_theta ** -(2 * pair / width)
                bias[h, start + 2 * pair] = weight * math.cos(angle)
                bias[h, start + 2 * pair + 1] = weight * math.sin(angle)
    return bias.flatten()


def _diverged(what: str, value: torch.Tensor, step: int, rate: float, clips: dict) -> FloatingPointError:
    advice = f"lower learning_rate, {rate:g} in this step, or clip_norm, or raise warmup"
    for name in ("video", "action"):
        finite = clips[name].isfinite().flatten(1).all(1)
        if not finite.all():
            advice = (
                f"episode {clips['episode'][~finite][0]} of the data has {name} that is not finite; mend or drop it"
            )
    return FloatingPointError(f"train: the {what} of step {step} is {value.item()}; {advice}")


STREAMS = ("video", "action")


def recent(log: list[dict], stream: str, steps: int = 30, first: bool = False) -> float | None:
    """Mean loss of a stream over the last (or first) ``steps`` rows that have one; None where none has."""
    values = [row[f"{stream}_loss"] for row in (log[:steps] if first else log[-steps:])]
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def loss_ends(log: list[dict], most: int = 30) -> tuple[int, dict[str, tuple[float | None, float | None]]]:
    """How many steps are compared, none of them twice, and each stream's mean loss over the first and the last."""
    steps = min(most, max(1, len(log) // 2))
    return steps, {s: (recent(log, s, steps, first=True), recent(log, s, steps)) for s in STREAMS}


class RunFolder:
    """The files of a run: log rows as they come, the latest checkpoint.

    Args:
        out: The folder.
        resume: The checkpoint that the run goes on from.
        overwrite: Whether another run in the folder may be lost.

    Raises:
        ValueError: a folder that cannot be written, or that holds another run.
    """

    def __init__(self, out: str | Path, resume: Checkpoint | None = None, *, overwrite: bool = False) -> None:
        self.out, self.resume, self.overwrite = Path(out), resume, overwrite
        self.log, self.checkpoint = self.out / "log.jsonl", self.out / "checkpoint"
        for folder in (self.out, self.checkpoint):
            writable_folder("--out", folder)
        self._look()

    def _look(self) -> None:
        """What the folder holds, and whether that is in the way."""
        saved = None
        with suppress(ValueError) if self.overwrite else nullcontext():
            saved = saved_as(self.checkpoint)
        resume = self.resume
        self.goes_on = saved is not None and resume is not None and saved == (resume.save_id, resume.metadata)
        held = saved is not None or (self.log.exists() and self.log.stat().st_size > 0)
        if held and not self.goes_on and not self.overwrite:
            resumed = "" if saved is None else f"go on from {self.checkpoint} with --resume, "
            raise ValueError(
                f"--out: {self.out} holds {'a' if resume is None else 'another'} run; {resumed}lose it with "
                "--overwrite (overwrite=True), or name another folder"
            )

    @contextmanager
    def begin(self, step: int) -> Iterator[None]:
        """Keeps the log's rows up to this step, or nothing of another run, and is open for more.

        Raises:
            ValueError: another process trains into the folder, or did so since it was looked at.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(alone(self.out, wait=False))
            except BlockingIOError as error:
                raise ValueError(
                    f"--out: another process trains into {self.out} right now; wait for its end, or name another folder"
                ) from error
            self._look()
            self._tidy(step)
            self._file = stack.enter_context(self.log.open("ab", buffering=0))
            yield

    def _tidy(self, step: int) -> None:
        held = self.log.read_bytes() if self.log.exists() else b""
        if not self.goes_on:
            remove_checkpoint(self.checkpoint)
        # rows behind the checkpoint belong to steps that are run again, and a kill can leave half a row
        rows = [line + b"\n" for line in held.splitlines() if self.goes_on and _step(line) <= step]
        if (kept := b"".join(rows)) != held:
            part = self.log.with_name("log.jsonl.part")
            part.write_bytes(kept)
            part.replace(self.log)

    def add(self, row: dict) -> None:
        """Appends a row; whoever reads the log finds it at once."""
        left = json.dumps(row).encode() + b"\n"
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OSError(f"train: cannot write {self.log}: {error.strerror}") from error


def _step(line: bytes) -> float:
    """Of a row of the log; infinity where that cannot be read."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def _optimizers(learner: nn.Module, config: TrainConfig) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices of the blocks; AdamW for the rest, of which only matrices decay."""
    named = list(learner.named_parameters())
    inner = [p for n, p in named if p.ndim == 2 and ".packed_blocks." in n]
    ids = {id(p) for p in inner}
    outer = [(n, p) for n, p in named if id(p) not in ids]
    decayed = [p.ndim == 2 and not n.startswith("text.") and "table" not in n for n, p in outer]
    groups = [
        {"params": [p for (_, p), d in zip(outer, decayed, strict=True) if d], "weight_decay": config.weight_decay},
        {"params": [p for (_, p), d in zip(outer, decayed, strict=True) if not d], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)
    return Muon(inner, config.learning_rate, weight_decay=config.weight_decay), adamw


def _check_resumable(config: TrainConfig, data: ClipDataset, resume: Checkpoint) -> None:
    training = resume.metadata.get("training")
    if resume.training_state is None or resume.text is None or not isinstance(training, dict):
        raise ValueError("train: the checkpoint to resume has no training state; name one that wam train wrote")
    ours, theirs = config.model.to_dict(), resume.model.config.to_dict()
    other = [f"{name} {theirs[name]}, not {ours[name]}" for name in ours if ours[name] != theirs[name]]
    if other:
        raise ValueError(f"train: config.model must be that of the checkpoint to resume, which has {', '.join(other)}")
    units = {"action_mean": data.action_mean, "action_std": data.action_std, "varying": ~data.constant_actions}
    for name, value in (units | {f"codec.{k}": v for k, v in data.codec.state_dict().items()}).items():
        kept = resume.extra.get(name)
        # on another machine the same data gives a mean with other last digits
        if kept is None or kept.shape != value.shape or not torch.allclose(kept.double().cpu(), value.double().cpu()):
            raise ValueError(
                f"train: {name} of data must be the checkpoint's; make data with ClipDataset(root, policy.codec, "
                "units=policy.units), of the policy that Policy.load gives with the checkpoint"
            )


def _restore(
    resume: Checkpoint, learner: nn.Module, optimizers: Sequence[torch.optim.Optimizer], generator: torch.Generator
) -> tuple[int, int | None]:
    """Puts a training state in its places; returns the steps done and the last one, if that is decided.

    Raises:
        ValueError: a damaged state; the message names the file and the entry.
    """
    file = (resume.folder or Path()) / TRAINING

    def take(name: str, use: Callable[[Any], Any]) -> Any:
        if name not in resume.training_state:
            raise ValueError(f"{file}: {name} is missing; resume from another checkpoint")
        try:
            return use(resume.training_state[name])
        except Exception as error:  # what is damaged can raise anything
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"{file}: {name}: {kind}{error}; resume from another checkpoint") from error

    def load_optimizers(states: Sequence[dict]) -> None:
        for optimizer, state in zip(optimizers, states, strict=True):
            own = optimizer.state_dict()["param_groups"]
            if [g["params"] for g in state["param_groups"]] != [g["params"] for g in own]:
                raise ValueError("param_groups must be of the parameters of this model, got others")
            params = [p for g in optimizer.param_groups for p in g["params"]]
            if not state["state"] or not set(state["state"]) <= set(range(len(params))):
                raise ValueError(f"state must be of parameters 0 to {len(params) - 1}, got {few(list(state['state']))}")
            for i, held in state["state"].items():
                _check_momenta(held, params[i], MOMENTA[type(optimizer)], step)
            # the settings are those of the config
            optimizer.load_state_dict({"state": state["state"], "param_groups": own})

    def load_all_weights(weights: Mapping[str, Tensor]) -> None:
        unused = load_weights(learner, weights)
        if unused:
            raise ValueError(f"keys that the model does not have: {few(unused)}")
        check_finite(learner.state_dict())

    names = {"step", "planned", "generator", "weights", "optimizers"}
    if not set(resume.training_state) <= names:
        unknown = sorted(map(str, set(resume.training_state) - names))
        raise ValueError(f"{file}: unknown entries {unknown}; resume with the version that wrote it")
    step = take("step", lambda value: whole("it", value, 1))
    planned = take("planned", lambda value: None if value is None else whole("it", value, 1))
    saved = resume.metadata["training"].get("step")
    if saved != step:
        raise ValueError(f"{file}: it is of step {step}, {CONFIG} of step {saved}; take both from one save")
    take("generator", generator.set_state)
    take("weights", load_all_weights)
    take("optimizers", load_optimizers)
    # else that run is over, and this one goes beyond
    return step, planned if planned is not None and step < planned else None


def _check_momenta(held: Mapping[str, Tensor], p: Tensor, names: set[str], step: int) -> None:
    """Whether this is what an optimizer holds of a parameter after so many steps."""
    if set(held) != names:
        raise ValueError(f"must hold {sorted(names)} of a parameter, got {sorted(held)}")
    for name, value in held.items():
        shape = [] if name == "step" else list(p.shape)
        if not value.is_floating_point() or list(value.shape) != shape:
            raise ValueError(f"{name} must be floats {shape} as its parameter, got {value.dtype} {list(value.shape)}")
    check_finite(held)
    if "exp_avg_sq" in held and held["exp_avg_sq"].min() < 0:
        raise ValueError(f"exp_avg_sq must be mean squares, got {held['exp_avg_sq'].min():g}")
    if "step" in held and not 1 <= held["step"] <= step:
        raise ValueError(f"step of a parameter must be from 1 to {step}, got {held['step']:g}")


@torch.no_grad()
def _follow(average: dict, current: dict, step: int, sharpness: float) -> None:
    """Moves the average of the weights towards the current ones, such that step s has weight ~ s ** sharpness."""
    keep = (1 - 1 / step) ** (sharpness + 1) if sharpness else 0.0
    names = list(average)
    torch._foreach_lerp_([average[n] for n in names], [current[n] for n in names], 1 - keep)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _check_fit(config: TrainConfig, data: ClipDataset) -> None:
    channels, rows, columns = data.latent_shape
    model = config.model
    for name, wants, has in (
        ("latent_channels", model.latent_channels, channels),
        ("action_dim", model.action_dim, data.action_mean.numel()),
        ("actions_per_frame", model.actions_per_frame, 4),
    ):
        if wants != has:
            raise ValueError(f"TrainConfig: model.{name} must be {has} for this data set, got {wants}")
    if model.action_hidden < model.action_dim + 2:  # prepare passes actions through, beside a mean and a constant
        raise ValueError(
            f"TrainConfig: model.action_hidden must be at least {model.action_dim + 2}, two more than action_dim, got "
            f"{model.action_hidden}"
        )
    if rows % model.patch[1] or columns % model.patch[2]:
        raise ValueError(
            f"TrainConfig: model.patch must divide the latent rows and columns {(rows, columns)}, got {model.patch}"
        )
    longest = max(data.length(i) for i in data.train)
    if config.frames > longest:
        raise ValueError(f"TrainConfig: frames must be at most {longest}, the longest episode, got {config.frames}")
