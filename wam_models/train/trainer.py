"""The training loop.

Every random number (clips, objectives, chunk sizes, noise) comes from one generator whose state is saved, so a run that
is interrupted and resumed goes on with the losses that it would have had.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoint import Checkpoint, Save
from ..costs import Sizes
from ..data import ClipDataset
from ..data.latents import codec_kind
from ..model.dual_expert import WorldActionModel
from ..rollout import RolloutConfig
from ..rollout.policy import Policy
from ..runtime.checks import instance, whole
from ..runtime.limits import LARGEST_INT64
from ..state_dicts import abridged, check_finite, load_weights
from ..text import FrozenText, Text, WordEmbedding
from ..training_state import TrainingState
from ..weights.parts import choose_parts, frozen_streams, merged
from .config import DECAY_PART, TrainConfig, check_fit
from .ema import update_average
from .initialise import initialise
from .kept import keep_save
from .loader import Pack, PackedDraws, PackLoader
from .log import ERRORS, STREAMS, Meter, losses, recent
from .optimizers import make_optimizers, set_learning_rate
from .packed import packed_step
from .periodic import PeriodicEvaluation
from .ranks import Ranks, whole_tensor
from .resume import best_of, check_resumable, restore, state_tensors
from .run_folder import RunFolder
from .samples import StepConfig
from .step import training_step

TIME_RESERVE = 0.03  # part of a run's time that its planned end leaves, so that a slow moment does not cut it off


@dataclass(frozen=True, eq=False)
class Trained:
    """What :func:`train` returns: the policy with averaged weights, every step's log row, and the last step."""

    policy: Policy
    log: list[dict[str, Any]]
    step: int


class Batch(NamedTuple):
    """A step of clips of one length."""

    config: StepConfig
    clips: dict[str, Tensor]


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
    init: Mapping[str, Tensor] | None = None,
    text: FrozenText | None = None,
    rollout: RolloutConfig | None = None,
    evaluation: PeriodicEvaluation | None = None,
    overwrite: bool = False,
    tensorboard: bool = False,
    files: Mapping[str, str] | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: bool = True,
) -> Trained:
    """Train a model from scratch, or go on from a checkpoint, up to step ``config.steps``.

    Precision is ``config.engine.precision``: unless told otherwise float32 on a CPU, and bf16 over float32 weights on a
    GPU.

    Args:
        config: What to train and how.
        data: Clips; with ``resume`` in the checkpoint's latents and units.
        seed: Of the weights and of everything that is drawn. Ignored with ``resume``.
        device: Where the model runs.
        seconds: Stop after so much time, if that comes before the last step. Where ``config.schedule`` is ``"decay"``,
            the speed of the first half decides, once, at which step the rate reaches 0 and the run ends; that step is
            stored, so a resumed run keeps it.
        out: Folder of ``log.jsonl`` (a row a step) and ``checkpoint/``, written every ``config.save_every`` steps
            and at the end, ``checkpoints/``, the last ``config.keep`` of these, and ``best/``, by ``evaluation``. None
            writes nothing. A folder that holds a run is refused, unless it is the one that is resumed.
        resume: From ``load_checkpoint`` on a folder that this function wrote.
        init: Weights of the model by name, in place of fresh ones, from ``wam_models.weights.start``; what it lacks
            is fresh.
        text: What a frozen encoder has made of the data's instructions; default: vectors of words, which are trained,
            or with ``resume`` the checkpoint's text.
        rollout: Stored with the checkpoint as its default; default: chunks of the largest size trained on.
        evaluation: Measured after every so many steps; neither its random numbers nor its time are the training's, so
            the losses are those of a run without.
        overwrite: Whether a run in ``out`` may be lost.
        tensorboard: Write the rows to ``out/tensorboard`` too.
        files: Written to ``out`` when the run begins: a text by the name of its file.
        stop: Asked after every step; True ends the run as if its time were up.
        progress: Show a progress bar.

    Returns:
        The trained policy, in eval mode, and a log row for each step of this call: ``step`` (from 1), ``loss``,
        ``video_loss``, ``action_loss`` (None where no sample of the step has it), the same of each objective that was
        drawn (``video_loss/joint``), ``rate``, ``gradient`` (its norm before clipping), ``seconds`` since the start of
        the call, without evaluations, what :meth:`Meter.row` says; and ``evaluation`` where there was one.

    Raises:
        ValueError: data that does not fit the model or the checkpoint, a codec that cannot be saved to ``out``, a
            checkpoint without a training state or with a damaged one, an ``out`` that holds another run or cannot be
            written.
        TypeError: a config, data or checkpoint of another class.
        ModuleNotFoundError: ``config.lora`` without the package peft, ``tensorboard`` without that package.
        OSError: no room for a row or a checkpoint; the message names the file.
        FloatingPointError: a loss or a gradient that is not finite.
    """
    for name, value, kind in (("config", config, TrainConfig), ("data", data, ClipDataset)):
        instance(f"train: {name}", value, kind)
    if resume is not None:
        instance("train: resume", resume, Checkpoint)
    device = torch.device(device)
    seed = whole("train: seed", seed, 0, LARGEST_INT64)
    folder = None
    if out is not None:
        folder = RunFolder(out, resume, overwrite=overwrite, tensorboard=tensorboard, files=files)
    check_fit(config, data)
    if out is not None:
        codec_kind(data.codec)  # refuses before the run what could not be saved after it
    trainer = Trainer(
        config, data, seed=seed, device=device, seconds=seconds, resume=resume, init=init, text=text, rollout=rollout,
        evaluation=evaluation,
    )  # fmt: skip
    return trainer.run(folder, stop=stop, progress=progress)


class Trainer:
    """A training run: what it learns, what it draws from, how far it is.

    Args:
        config: What to train and how.
        data: Clips that fit the config.
        seed: Of the weights and of everything that is drawn; a resumed run goes on with the checkpoint's numbers.
        device: Where the model runs.
        seconds: The run's time; None for no limit.
        resume: The checkpoint to go on from.
        init: Weights in place of fresh ones, by name.
        text: What a frozen encoder has made of the instructions.
        rollout: Stored with the checkpoint as its default.
        evaluation: Measured after every so many steps.

    Raises:
        ValueError: a checkpoint that does not fit, or instructions that cannot be embedded.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: ClipDataset,
        *,
        seed: int,
        device: torch.device,
        seconds: float | None = None,
        resume: Checkpoint | None = None,
        init: Mapping[str, Tensor] | None = None,
        text: FrozenText | None = None,
        rollout: RolloutConfig | None = None,
        evaluation: PeriodicEvaluation | None = None,
    ) -> None:
        self.evaluation = evaluation
        self.config, self.data, self.seed, self.device, self.seconds = config, data, seed, device, seconds
        self.rollout = rollout or config.default_rollout()
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # of the initial weights
        self.model = WorldActionModel(config.model)
        if config.initialisation == "by_hand":
            initialise(self.model)
        _start_from(self.model, init, resume)
        self.text = _text_of(config, data, text, resume)
        with torch.no_grad():
            self.text(data.tasks)  # what it refuses could be drawn an hour later
        self.learner = nn.ModuleDict({"model": self.model, "text": self.text})
        choose_parts(
            self.learner, frozen=config.frozen, lora=config.lora, lora_rank=config.lora_rank,
            lora_scale=config.lora_scale,
        )  # fmt: skip
        self.ranks = Ranks(config.engine, device)
        self.parts = [] if config.tokens else self.ranks.samples(config.batch)
        self.bf16 = config.engine.precision == "bf16" or (config.engine.precision == "auto" and device.type == "cuda")
        recompute = config.engine.recompute
        self.model.checkpoint_activations(recompute != "none", selective=recompute == "selective")
        if config.engine.compile:
            for block in self.model.packed_block_stack.packed_blocks:
                block.compile(backend=config.engine.compile)
        self.learner.to(device).train()
        self.ranks.shard(self.learner, self.model, bf16=self.bf16)
        self.optimizers = make_optimizers(self.learner, config)
        self.average = {k: v.detach().clone() for k, v in self.learner.state_dict().items()}
        self.step = 0
        self.planned_end: int | None = None  # the last step, once the clock has decided it
        if resume is not None:
            self.step, self.planned_end = restore(
                resume, self.learner, self.average, self.optimizers, self.generator, self.ranks.group
            )
        self.best = None if resume is None else best_of(resume)  # score of the best evaluation
        self._saving: Future | None = None
        self._writer = ThreadPoolExecutor(1, "save")
        self.kinds = config.draws(frozen_streams(self.learner))
        self.shares = torch.tensor([kind.share for kind in self.kinds])
        self.draws = PackedDraws(config, self.kinds, data, seed) if config.tokens else None
        grid = self.model.token_grid(*data.latent_shape[1:])
        sizes = Sizes(config.model, grid, self.text.tokens)
        self.meter = Meter(sizes, self.ranks.count, device, bf16=self.bf16)
        self.log: list[dict[str, Any]] = []
        self._begin()

    def _begin(self) -> None:
        """From here on the run's seconds count."""
        self.first_step, self.began = self.step, time.perf_counter()
        self._spent = 0.0  # seconds, when the last step was done

    def run(self, folder: RunFolder | None = None, *, stop: Callable[[], bool], progress: bool = True) -> Trained:
        """Steps until the last one is done, time is up or ``stop`` says so; ``folder`` gets the log and checkpoints."""
        self._begin()
        done = self.step >= self.config.steps
        with ExitStack() as stack:
            show = stack.enter_context(self._progress_bar(progress and self.ranks.main))
            if folder is not None:
                self.ranks.of_first(lambda: stack.enter_context(folder.begin(self.step)))
            stack.enter_context(self._saves_finished())
            steps = stack.enter_context(closing(self.steps()))
            while not done:
                row = self.train_step(next(steps))
                if self.evaluation is not None and self.step % self.evaluation.every == 0:
                    row["evaluation"] = self._evaluate(self.evaluation)
                self.log.append(row)
                self._plan_end(row["seconds"])
                done = self._log_and_ask(folder, row, stop)
                show(row)
                best = self._is_best(row.get("evaluation"))
                if folder is not None and (done or best or self.step % self.config.save_every == 0):
                    self.save(folder, best)
        return Trained(self.policy(), self.log, self.step)

    def _log_and_ask(self, folder: RunFolder | None, row: Mapping[str, Any], stop: Callable[[], bool]) -> bool:
        """Adds a row to the log; whether it is the last, because all steps are done, time is up or any process is asked
        to stop.

        Raises:
            OSError: no room for the row; in every process.
        """
        ends = self._at_end() or (self.seconds is not None and row["seconds"] >= self.seconds)
        error = None
        if folder is not None and self.ranks.main:
            try:
                folder.add(row)
            except OSError as found:
                error = found
        # one exchange for both
        asked = self.ranks.largest(2 if error is not None else int(not ends and bool(stop())))
        if asked > 1:
            self.ranks.raise_any(error)
        return ends or asked > 0

    def _is_best(self, found: Mapping[str, Any] | None) -> bool:
        """Whether what an evaluation found is better than all before."""
        if found is None or self.evaluation is None or "error" in found:
            return False
        score = self.evaluation.score(found)
        if score is None or not math.isfinite(score) or (self.best is not None and score <= self.best):
            return False
        self.best = score
        return True

    def steps(self) -> Generator[Batch | list[Pack], None, None]:
        """What each step is made of, from the next one on."""
        if self.draws is not None:
            ranks = {"part": self.ranks.part, "parts": self.ranks.parts}
            yield from PackLoader(self.draws, self.step, accumulation=self.config.engine.accumulation, **ranks)
        while True:
            yield self._draw()

    def train_step(self, step: Batch | list[Pack]) -> dict[str, Any]:
        """Forward, backward, clip, update, average; returns the row for the log."""
        clips = [clip for pack in step for clip in pack.clips] if isinstance(step, list) else [step.clips]
        rate = self.config.rate(self.step, self.planned_end)
        set_learning_rate(self.optimizers, rate)
        means, size = self._gradients(step)
        self._raise_if_diverged("loss", means["loss"], rate, clips)
        norm = nn.utils.clip_grad_norm_(self.learner.parameters(), self.config.clip_norm)
        gradient = whole_tensor(norm).item()
        self._raise_if_diverged("gradient", gradient, rate, clips)  # a step along it would lose the weights
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        update_average(self.average, self.learner.state_dict(), self.step, self.config.ema)
        spent = self.ranks.agreed(time.perf_counter() - self.began)
        row = {"step": self.step, **means, "rate": rate, "gradient": gradient, "seconds": spent}
        row |= self.meter.row(*size, spent - self._spent)
        self._spent = spent
        return row

    def _gradients(self, step: Batch | list[Pack]) -> tuple[dict[str, Any], tuple[int, int, int]]:
        """Those of the step, micro-batch by micro-batch; returns, of all processes, its losses, and its clips, frames
        and visible pairs."""
        self.learner.zero_grad(set_to_none=True)
        drawn, sums = self.generator.get_state(), [0.0] * (4 + ERRORS)
        parts = step if isinstance(step, list) else self.parts
        for part in parts:
            self.ranks.synchronise(self.learner, part is parts[-1])
            self.generator.set_state(drawn)  # each micro-batch is a part of the same draw
            loss, metrics = self.forward(step, part)
            (loss * self.ranks.parts).backward()  # processes take the mean of their gradients
            extent = extent_of(part, self.config.frames)
            if extent[0]:  # else what is computed here is of other processes
                found = [loss.item(), *extent, metrics["visible_pairs"], *metrics["sums"].flatten().tolist()]
                sums = [a + b for a, b in zip(sums, found, strict=True)]
        total, clips, frames, pairs, *errors = self.ranks.sums(sums)
        return {"loss": total} | losses(errors), (int(clips), int(frames), int(pairs))

    def _evaluate(self, evaluation: PeriodicEvaluation) -> dict[str, Any]:
        began = time.perf_counter()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            average = self._gathered(self.device, self.ranks.main)
            found = None
            if self.ranks.main:
                found = evaluation.run(self._policy_of(average, self.device), self.step)
            found = self.ranks.agreed(found)
        self.began += time.perf_counter() - began  # else it would cost a run of limited time its steps
        return found

    def _draw(self) -> Batch:
        """What the samples of the next step are, and clips for them."""
        kind = self.kinds[int(torch.multinomial(self.shares, 1, generator=self.generator))]
        clips = self.data.sample(self.config.batch, self.config.frames, self.generator, kind.splits)
        return Batch(kind.config, clips)

    def forward(self, step: Batch | list[Pack], part: slice | Pack) -> tuple[Tensor, Mapping[str, Any]]:
        """Loss and metrics of a part of a step."""
        # sharded parameters are cast as they are gathered
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16 and not self.ranks.sharded):
            if isinstance(part, Pack):
                return packed_step(self.model, part, self.text(part.tasks), cast(PackedDraws, self.draws))
            step_config, clips = cast(Batch, step)
            words = self.text([self.data.tasks[i] for i in clips["task"].tolist()])
            return training_step(self.model, {**clips, "text": words}, self.generator, step_config, part=part)

    def _raise_if_diverged(self, what: str, value: float, rate: float, clips: Sequence[Mapping[str, Tensor]]) -> None:
        if math.isfinite(value):
            return
        advice = f"lower learning_rate, {rate:g} in this step, or clip_norm, or raise warmup"
        for held in clips:
            for name in STREAMS:
                finite = held[name].isfinite().flatten(held["episode"].ndim).all(-1)
                if not finite.all():
                    episode = held["episode"][~finite].flatten()[0]
                    advice = f"episode {episode} of the data has {name} that is not finite; mend or drop it"
        raise FloatingPointError(f"train: the {what} of step {self.step + 1} is {value}; {advice}")

    def _plan_end(self, spent: float) -> None:
        """Of a "decay" run with limited time: decide, once half of it is spent, at which step the rate reaches 0."""
        if self.planned_end is not None or self.config.schedule != "decay" or self.seconds is None:
            return
        if spent >= (1 - DECAY_PART) * self.seconds:
            remaining = (1 - TIME_RESERVE) * self.seconds - spent
            steps = int(remaining / spent * (self.step - self.first_step))
            self.planned_end = min(self.step + max(steps, 1), self.config.steps)

    def _at_end(self) -> bool:
        return self.step == (self.config.steps if self.planned_end is None else self.planned_end)

    def policy(self, device: torch.device | None = None) -> Policy:
        """The averaged weights as they are now, adapters merged, as a policy of its own; to be called on all ranks.

        ``device`` is where it is, default the run's.
        """
        device = self.device if device is None else device
        return self._policy_of(self._gathered(device, True), device)

    def _gathered(self, device: torch.device, wanted: bool) -> dict[str, Tensor]:
        """The averaged weights, whole, on a device; to be called on all ranks, of which some may not want them."""
        found = {}
        for name, value in self.average.items():
            gathered = whole_tensor(value)
            if wanted:
                found[name] = gathered.to(device)
        return found

    def _policy_of(self, average: Mapping[str, Tensor], device: torch.device) -> Policy:
        sizes = self.config.model
        model = WorldActionModel(sizes).to(device).requires_grad_(False)
        text = self.text.anew().to(device).requires_grad_(False)
        load_weights(nn.ModuleDict({"model": model, "text": text}), merged(average, self.config.lora_scale))
        return Policy.of(model, text, self.data, self.rollout)

    def save(self, folder: RunFolder, best: bool = False) -> None:
        """Begin to write the policy and all that a resume needs, as they are now; on all ranks.

        It goes on beside the steps that follow; the next save, and the end of the run, wait for it.

        Args:
            folder: Of the run.
            best: Whether this is the best so far, and stays.

        Raises:
            OSError: no room, also for the save before; the message names the file. In every process.
        """
        self.finish_saving()
        average = self._gathered(torch.device("cpu"), self.ranks.main)
        training = {
            "config": self.config.to_dict(),
            "step": self.step,
            "seed": self.seed,
            "threads": torch.get_num_threads(),
        }
        if self.evaluation is not None:
            training["evaluation"] = dict(self.evaluation.settings)
            training["best"] = self.best
        tensors = state_tensors(self.learner, self.average, self.optimizers, self.generator)
        state = TrainingState(tensors, {"step": self.step, "planned": self.planned_end}, self.ranks.writers)
        save = self.ranks.of_first(lambda: Save(folder.checkpoint, secrets.token_hex(8), state))
        training_folder = self.ranks.agreed(None if save is None else str(save.training))
        if save is None:
            self._saving = state.write(Path(training_folder))
            return
        policy, step, keep = self._policy_of(average, torch.device("cpu")), self.step, self.config.keep

        def write() -> None:
            policy.save(save, training=training)
            keep_save(folder.out, step, last=keep, best=best)

        self._saving = self._writer.submit(write)

    @contextmanager
    def _saves_finished(self) -> Iterator[None]:
        """At the end no save goes on; one that went wrong is reported, unless something else has ended the run."""
        try:
            yield
            self.finish_saving()
        finally:
            self._writer.shutdown()

    def finish_saving(self) -> None:
        """Wait for the save that goes on, if there is one; on all ranks.

        Raises:
            OSError: it found no room; the message names the file. In every process.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return
        self.ranks.raise_any(cast(Exception | None, saving.exception()))

    @contextmanager
    def _progress_bar(self, shown: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Gives the function that shows a row: in steps, or in seconds where time is what ends the run, as a rule."""
        seconds = self.seconds
        if seconds is None:
            extent = {"total": self.config.steps, "initial": self.step, "unit": "step"}
        else:
            extent = {"total": seconds, "bar_format": "{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}"}
        with tqdm(**extent, desc="train", disable=not shown, dynamic_ncols=True) as bar:

            def show(row: Mapping[str, Any]) -> None:
                bar.update(1 if seconds is None else min(row["seconds"], seconds) - bar.n)
                means = [f"{s} loss {m:.3f}" for s in STREAMS if (m := recent(self.log, s)) is not None]
                bar.set_postfix_str(", ".join([f"step {row['step']}", *means]), refresh=False)

            yield show


def _text_of(config: TrainConfig, data: ClipDataset, given: FrozenText | None, resume: Checkpoint | None) -> Text:
    """Vectors of words, or what a frozen encoder gives, as a checkpoint has it."""
    wanted = config.model.text_dim
    if given is not None and given.text_dim != wanted:
        raise ValueError(f"TrainConfig: model.text_dim must be {given.text_dim} for this text, got {wanted}")
    if resume is None:
        return WordEmbedding.from_instructions(data.tasks, wanted) if given is None else given.anew()
    saved = check_resumable(config, data, resume)
    made_by = saved.made_by if isinstance(saved, FrozenText) else None
    if given is not None and given.made_by != made_by:
        raise ValueError(f"train: text must be of the checkpoint's encoder, {made_by}, got {given.made_by}")
    return (saved if given is None else given).anew()


def _start_from(model: WorldActionModel, init: Mapping[str, Tensor] | None, resume: Checkpoint | None) -> None:
    if init is None:
        return
    if resume is not None:
        raise ValueError("train: init must be left out with resume, whose weights the run goes on with")
    unused = load_weights(model, model.state_dict() | dict(init))
    if unused:
        raise ValueError(f"train: init holds keys that the model does not have: {abridged(unused)}")
    check_finite(init, "train: init: ")


def extent_of(part: slice | Pack, frames: int) -> tuple[int, int]:
    """Clips and latent frames of a part of a step; none of a pack that is there because a process must have one."""
    if isinstance(part, Pack):
        return (len(part.frames), sum(part.frames)) if part.share else (0, 0)
    clips = part.stop - part.start
    return clips, clips * frames
