"""What the demos that act have in common: train, play, compare, write ``report.json`` and ``demo.html``."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import ClipDataset
from ..draw.charts import curves
from ..rollout.policy import Policy
from ..runtime.files import new_file
from ..simulator.evaluate import EpisodeResult, Rate, Task
from ..simulator.evaluate import evaluate as play
from ..train.config import TrainConfig
from ..train.log import STREAMS, loss_ends
from ..train.run_folder import RunFolder
from ..train.trainer import train

PAGE = "demo.html"
EPISODES = 20  # over all simulators
BATCH = 5  # episodes at once, each with a process of its own
CHUNK, WINDOW = 2, 4


@dataclass(frozen=True, eq=False)
class Demo:
    """A demo's folder, and when it began.

    Args:
        out: Of all files.
        again: Whether an earlier demo is there: then nothing is lost that cannot be made again.
        began: Of ``time.perf_counter``.
    """

    out: Path
    again: bool
    began: float

    @classmethod
    def begin(cls, out: Path) -> Demo:
        """Raises ValueError for a folder that holds a run which is no demo's."""
        began, again = time.perf_counter(), (out / PAGE).exists()
        RunFolder(out, overwrite=again)
        return cls(out, again, began)

    def train_and_play(
        self,
        data: ClipDataset,
        config: TrainConfig,
        simulators: Sequence[str],
        *,
        program: str | None = None,
        seconds: float,
        seed: int,
        episodes: int,
        horizon: int | None,
        progress: bool,
    ) -> tuple[Policy, list[EpisodeResult], dict[str, Any]]:
        """Train a policy and act with it; draws ``loss.png``.

        Args:
            data: What is trained on.
            config: Of the training.
            simulators: What to act in.
            program: Of the rollout; default that of ``config``.
            seconds: Time to train for, at most.
            seed: Of weights, clips and noise.
            episodes: To play in all simulators together, as many in each.
            horizon: Actions of an episode, in place of the simulator's own.
            progress: Show progress bars.

        Returns:
            The policy, the episodes by simulator and number, and what ``report.json`` holds of all that.

        Raises:
            ValueError, SimulatorFailure: what training and evaluation raise.
        """
        print(f"2. train: {config.steps} steps of {config.batch} clips, {seconds:.0f} s at most, on one thread")
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / PAGE).write_text("<!doctype html><p>Not finished.</p>\n", encoding="utf-8")
        default = config.default_rollout()
        rollout = replace(default, program=program or default.program, chunk_size=CHUNK, window=WINDOW)
        trained = train(
            config, data, seed=seed, seconds=seconds, out=self.out, overwrite=self.again, progress=progress,
            rollout=rollout,
        )  # fmt: skip
        policy, took = trained.policy, trained.log[-1]["seconds"]
        losses = {s: {"first": first, "last": last} for s, (first, last) in loss_ends(trained.log)[1].items()}
        parameters = sum(p.numel() for p in policy.model.parameters())
        print(
            f"   {parameters / 1e6:.2f} M parameters, {trained.step} steps in {took:.0f} s; "
            + ", ".join(f"{s} loss {v['first']:.3f} -> {v['last']:.3f}" for s, v in losses.items())
        )
        logged = {stream: [row[f"{stream}_loss"] for row in trained.log] for stream in STREAMS}
        curves(logged, self.out / "loss.png", title="Flow-matching loss of both streams", x_label="training step")

        each = episodes // len(simulators)
        print(f"3. act: {each} episodes of each of {len(simulators)} tasks, from initial states that no one trained on")
        tasks = [Task(name, i, i) for name in simulators for i in range(each)]
        order = {(task.simulator, task.episode): k for k, task in enumerate(tasks)}
        played = play(policy, policy.rollout, tasks, batch=min(BATCH, len(tasks)), horizon=horizon)
        results = sorted(played, key=lambda r: order[r.simulator, r.episode])
        rows = [result.row() for result in results]
        report = {
            "seed": seed, "torch": torch.__version__, "python": platform.python_version(), "parameters": parameters,
            "steps": trained.step, "training_seconds": took, "losses": losses, "config": config.to_dict(),
            "rollout": asdict(policy.rollout), "horizon": horizon,
            "simulators": {n: asdict(Rate.of([r for r in rows if r["simulator"] == n])) for n in simulators},
            "all": asdict(Rate.of(rows)), "episodes": rows,
        }  # fmt: skip
        return policy, results, report

    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.began

    def write(self, report: Mapping[str, Any], page: str) -> None:
        """``report.json`` and the page, each whole or not at all."""
        with new_file(self.out / "report.json") as part:
            part.write_text(json.dumps(report, indent=1) + "\n")
        with new_file(self.out / PAGE) as part:
            part.write_text(page, encoding="utf-8")

    def print_rates(self, report: Mapping[str, Any]) -> None:
        """Success of each task and of all."""
        for name, rate in (*report["simulators"].items(), ("all", report["all"])):
            low, high = (round(100 * rate[end]) for end in ("low", "high"))
            print(f"   {name}: {rate['successes']} of {rate['episodes']} succeed [{low}, {high}] %")

    def print_end(self, report: Mapping[str, Any]) -> None:
        """How long it took, and where the page is."""
        print(f"\n{report['total_seconds']:.0f} s in all. Open {self.out / PAGE} in a browser")


def frames_ahead(
    results: Sequence[EpisodeResult], chunk: int
) -> Iterator[tuple[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]]:
    """For each frame of a chunk, from 1: (imagined, real, last observed) frames of all chunks of all episodes.

    Raises:
        ValueError: no episode reached that frame of a chunk.
    """
    for h in range(chunk):
        found = [
            (imagined[h], result.frames[c * chunk + h + 1], result.frames[c * chunk])
            for result in results
            for c, imagined in enumerate(result.imagined)
            if c * chunk + h + 1 < len(result.frames)
        ]
        if not found:
            raise ValueError(f"demo: no episode reached frame {h + 1} of a chunk; did every simulator go wrong?")
        yield h + 1, found


def shown(results: Sequence[EpisodeResult], simulators: Sequence[str]) -> list[EpisodeResult]:
    """The first episode of each simulator, and the first that failed."""
    begun = [r for r in results if r.frames]
    chosen = [r for name in simulators for r in [r for r in begun if r.simulator == name][:1]]
    return chosen + [r for r in begun if not r.success and r not in chosen][:1]


def with_imagined(result: EpisodeResult) -> tuple[np.ndarray, np.ndarray]:
    """The frames that were observed, and as many that had been imagined, the first of them observed."""
    real = np.stack(result.frames)
    return real, np.concatenate([real[:1], *result.imagined])[: len(real)]


def ending(result: EpisodeResult) -> str:
    """How an episode ended, in words."""
    return "succeeds" if result.success else f"fails: {result.failure}"
