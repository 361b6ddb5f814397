"""``wam train --eval-every``: success in simulators and errors on held-out episodes, while training goes on."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..data import ClipDataset
from ..data.latents import pictures_of
from ..draw.charts import curves, film_strip
from ..evaluate import RECORDED_CHUNKS, fewest_frames, join, joint_errors, stream
from ..model.dual_expert import WorldActionModel
from ..rollout import RolloutEngine
from ..rollout.policy import Policy
from ..runtime.checks import instance, whole
from ..runtime.files import new_file
from ..simulator.evaluate import Rate, Task, describe, evaluate, summary
from ..simulator.process import SimulatorFailure, SimulatorProcess
from ..text import WordEmbedding
from ..train.config import TrainConfig
from ..train.periodic import PeriodicEvaluation
from .parser import UserError

EPISODES = 10  # of each simulator, unless told otherwise
BATCH = 8  # episodes at once, each with a process of its own
RECORDED = 4  # held-out episodes at most


@dataclass(frozen=True)
class Settings:
    """What is measured; a checkpoint stores it."""

    every: int
    simulators: tuple[str, ...]
    episodes: int
    chunk: int

    def __post_init__(self) -> None:
        for name in ("every", "episodes", "chunk"):
            whole(f"evaluation.{name}", getattr(self, name), 1)
        for name in self.simulators:
            instance("evaluation.simulators", name, str)


def make_evaluation(
    args: argparse.Namespace, config: TrainConfig, data: ClipDataset, stored: Mapping[str, Any] | None
) -> PeriodicEvaluation | None:
    """What the flags, or else the checkpoint's settings, ask for.

    Raises:
        ValueError: flags that do not go together, nothing to measure, or a simulator that does not fit the data.
        UserError: a simulator that cannot be made.
    """
    settings = _settings(args, config, stored)
    if settings is None:
        return None
    begin = fewest_frames(settings.chunk)
    held_out = data.sources("held_out")[0][1] if data.robots else data.held_out  # of several robots the first acts
    recorded = [i for i in held_out if data.length(i) >= begin][:RECORDED]
    if not settings.simulators and not recorded:
        raise ValueError(
            f"--eval-every: nothing to measure: no --simulator, and no held-out episode of {begin} latent frames or "
            "more in --data"
        )
    if settings.simulators:
        _check(config, data, settings.simulators)
    clips = [_clip(data, i) for i in recorded]
    tasks = [Task(name, i, i) for name in settings.simulators for i in range(settings.episodes)]

    def measure(policy: Policy, step: int) -> dict[str, Any]:
        policy = policy.of_robot()
        policy = replace(policy, rollout=replace(policy.rollout, chunk_size=settings.chunk))
        try:
            found: dict[str, Any] = {}
            if clips:
                found["recorded"] = joint_errors(policy, clips, chunks=RECORDED_CHUNKS)
            found |= _played(policy, tasks) if tasks else {}
            if clips:
                found["picture"] = f"evaluation/step-{step:06d}.png"
                imagined_beside_real(policy, clips[0], args.out / found["picture"], f"step {step}: {clips[0]['text']}")
        except Exception as error:  # PeriodicEvaluation stores it, and the training goes on
            tqdm.write(f"step {step}: the evaluation failed: {type(error).__name__}: {error}")
            raise
        tqdm.write(f"step {step}: {_line(found)}")
        return found

    kept = {**vars(settings), "simulators": list(settings.simulators)}
    return PeriodicEvaluation(settings.every, measure, score_of, kept)


def score_of(found: Mapping[str, Any]) -> float | None:
    """The rate of success where it acted, else how small the error of actions, or of frames, is; None without any."""
    if "all" in found:
        return found["all"]["successes"] / found["all"]["episodes"]
    errors = found.get("recorded", {})
    wrong = [errors[name] for name in ("action_rmse", "frame_rmse") if errors.get(name) is not None]
    return -wrong[0] if wrong else None


def _settings(args: argparse.Namespace, config: TrainConfig, stored: Mapping[str, Any] | None) -> Settings | None:
    flags = {"--simulator": args.simulator, "--eval-episodes": args.eval_episodes, "--eval-chunk": args.eval_chunk}
    if args.eval_every is not None:
        names = tuple(dict.fromkeys(args.simulator or ()))
        chunk = args.eval_chunk or config.chunk_sizes[1]
        return Settings(args.eval_every, names, args.eval_episodes or EPISODES, chunk)
    for flag, value in flags.items():
        if value is not None:
            raise ValueError(f"{flag} needs --eval-every N, the steps between evaluations")
    if stored is None:
        return None
    try:
        return Settings(**{**stored, "simulators": tuple(stored["simulators"])})
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"--resume: metadata.training.evaluation of the checkpoint must be what wam train wrote, got {stored!r} "
            f"({error}); name --eval-every anew"
        ) from error


def _check(config: TrainConfig, data: ClipDataset, names: Sequence[str]) -> None:
    """Refuses now what would fail at every evaluation."""
    with torch.device("meta"):
        model = WorldActionModel(config.model)
    text = WordEmbedding.from_instructions(data.tasks, config.model.text_dim)
    policy = Policy.of(model, text, data, config.default_rollout()).of_robot()
    try:
        with SimulatorProcess(policy.cameras) as process:
            describe(policy, names, process)
    except SimulatorFailure as failure:
        raise UserError(str(failure)) from failure


def _clip(data: ClipDataset, index: int) -> dict[str, Any]:
    """An episode as :meth:`Policy.clip` gives it, its pictures those of its latents."""
    held = data.episode(index)
    frames = pictures_of(data.codec, held["video"][0])
    text = data.tasks[int(held["task"][0])]
    action, state = held["action"], held.get("state")
    if data.robots:
        first = next(iter(data.robots.values()))
        action = action[..., held["action_mask"][0]]
        state = None if state is None else state[..., : first.own_widths[1]]
    return {"video": held["video"], "action": action, "frames": frames, "text": text, "state": state}


def imagined_beside_real(policy: Policy, clip: Mapping[str, Any], path: Path, title: str) -> None:
    """A PNG of a held-out episode's frames, real and imagined chunk by chunk from the real history; of states the curve
    of the one that varies most.

    Args:
        policy: What imagines.
        clip: As :meth:`Policy.clip` gives it.
        path: The file.
        title: One line.
    """
    with torch.no_grad():
        text = policy.text([clip["text"]])
    chunks = stream(
        RolloutEngine(policy.model, policy.rollout), clip["video"], clip["action"], text, objective="joint",
        generator=torch.Generator().manual_seed(0), state=clip["state"],
    )  # fmt: skip
    some = list(islice(chunks, RECORDED_CHUNKS))
    latents = join((clip["video"][:, :, :1], *(c.video for c in some)), 2)[0]
    if not policy.frames_are_states:
        imagined = pictures_of(policy.codec, latents)
        rows = {"real": clip["frames"][: len(imagined)], "imagined": imagined}
        film_strip(rows, path, title=title, columns=min(8, len(imagined)))
        return
    both = torch.stack([clip["video"][0, :, : latents.shape[1]], latents])[..., 0, 0]  # [2, S, F], in units of the std
    number = int(both[0].std(1).argmax())
    heights = both[:, number] - both[:, number].min()
    with new_file(path) as part:
        curves(
            dict(zip(("real", "imagined"), heights.tolist(), strict=True)), part, smooth=1, x_label="latent frame",
            title=f"{title}: number {number} of the state, in its std",
        )  # fmt: skip


def _played(policy: Policy, tasks: Sequence[Task]) -> dict[str, Any]:
    """In simulators: success, the imagined frames beside standing still, and which simulators went wrong."""
    rows = [result.row() for result in evaluate(policy, policy.rollout, tasks, batch=BATCH)]
    rows.sort(key=lambda row: (row["simulator"], row["episode"]))
    broken = [{k: row[k] for k in ("simulator", "episode", "failure")} for row in rows if row["broken"]]
    return summary(rows) | {"broken": broken}


def _line(found: Mapping[str, Any]) -> str:
    parts = []
    if "all" in found:
        rate = Rate(**found["all"])
        broken = f", {rate.broken} broken" if rate.broken else ""
        parts.append(
            f"{rate.successes} of {rate.episodes} succeed [{100 * rate.low:.0f}, {100 * rate.high:.0f}] %{broken}"
        )
        pairs = zip(found["imagined_mse"], found["still_mse"], strict=True)
        errors = ", ".join(f"{own:.3g} ({still:.3g})" for own, still in pairs if own is not None)
        if errors:
            parts.append(f"imagined frames' square error (standing still) {errors}")
    if "recorded" in found:
        row = found["recorded"]
        parts.append(
            f"held-out episodes: action {row['action_rmse']:.3f} (repeating {row['repeat_action_rmse']:.3f}), frame "
            f"{row['frame_rmse']:.3f} (repeating {row['repeat_frame_rmse']:.3f})"
        )
    return "; ".join(parts)
