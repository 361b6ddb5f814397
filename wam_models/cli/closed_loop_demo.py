"""``wam demo`` without ``--data``: train a small model on Meta-World demonstrations, act in closed loop, and compare
what was imagined with what happened."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data import LeRobotDataset
from ..draw.charts import curves
from ..draw.masks import draw_programs
from ..draw.scene import Scene
from ..draw.style import save_small, small
from ..evaluate import evaluate as evaluate_recorded
from ..objectives import GJD
from ..runtime.files import new_file
from ..runtime.threads import restores_threads, set_threads
from ..simulator.evaluate import EpisodeResult, Rate, Task
from ..simulator.evaluate import evaluate as play
from ..simulator.metaworld import STATE_NAMES
from ..train.config import TrainConfig
from ..train.log import STREAMS, loss_ends
from ..train.run_folder import RunFolder
from ..train.trainer import train
from .closed_loop_page import page
from .train import read_data

DATA = Path("data/metaworld_demo")
TASKS = ("pick-place-v3", "drawer-open-v3", "button-press-topdown-v3", "window-close-v3")
SIMULATORS = tuple(f"metaworld/{task}" for task in TASKS)
EPISODES = 20  # over all simulators
BATCH = 5  # episodes at once, each with a process of its own
CHUNK, WINDOW = 2, 4
RECORDED_FRAMES = 13  # of a held-out episode that is predicted, at least
HAND, OBJECT = slice(0, 3), slice(4, 7)  # in a state of Meta-World, in metres


def demo_training() -> TrainConfig:
    """The demo's run: 300 steps of a model of 1.1 M parameters; what ``examples/metaworld_train.json`` holds."""
    model = {
        "hidden": 96, "heads": 6, "head_dim": 16, "layers": 3, "ffn": 384, "action_hidden": 96, "action_ffn": 384,
        "action_dim": 16, "actions_per_frame": 1, "latent_channels": 17, "text_dim": 64, "patch": [1, 1, 1],
        "rope_theta": 100.0,
    }  # fmt: skip
    return TrainConfig.from_dict(
        {
            "model": model, "actions_per_token": 4, "programs": ["joint"],
            "mixture": {"joint": 0.6, "forward_dynamics": 0.2, "inverse_dynamics": 0.2}, "history": "video_only",
            "chunk_sizes": [1, 4], "windows": [2, 8], "video_shift": 5.0, "action_shift": 5.0, "batch": 64,
            "frames": 6, "steps": 300, "warmup": 30,
        }
    )  # fmt: skip


@restores_threads
def make_closed_loop_demo(
    out: Path,
    root: Path,
    simulators: Sequence[str] = SIMULATORS,
    *,
    seconds: float = 180.0,
    seed: int = 0,
    config: TrainConfig | None = None,
    episodes: int = EPISODES,
    horizon: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train, act, compare, write ``demo.html`` and ``report.json``. Returns what ``report.json`` holds.

    Args:
        out: Folder of all files.
        root: The data set: states, with held-out episodes.
        simulators: What to act in; the states and actions are those of Meta-World.
        seconds: Time to train for, at most.
        seed: Of weights, clips and noise.
        config: Of the training; default :func:`demo_training`.
        episodes: To play in all simulators together, as many in each.
        horizon: Actions of an episode, in place of the simulator's own.
        progress: Show progress bars.

    Raises:
        ValueError: a folder that holds a run which is no demo's, or what training and evaluation raise.
        SimulatorFailure: a simulator that cannot be made.
    """
    began = time.perf_counter()
    page_file = out / "demo.html"
    again = page_file.exists()  # then an earlier demo is there, and nothing is lost that cannot be made again
    RunFolder(out, overwrite=again)
    config = config or demo_training()
    set_threads(1)  # the model is small: a second thread does not make it faster, and may wait for another process
    print(f"1. read {root}")
    data = read_data(root, config, progress=progress)
    print(f"2. train: {config.steps} steps of {config.batch} clips, {seconds:.0f} s at most, on one thread")
    out.mkdir(parents=True, exist_ok=True)
    page_file.write_text("<!doctype html><p>Not finished.</p>\n", encoding="utf-8")
    rollout = replace(config.default_rollout(), chunk_size=CHUNK, window=WINDOW)
    trained = train(
        config, data, seed=seed, seconds=seconds, out=out, overwrite=again, progress=progress, rollout=rollout
    )
    policy, took = trained.policy, trained.log[-1]["seconds"]
    losses = {s: {"first": first, "last": last} for s, (first, last) in loss_ends(trained.log)[1].items()}
    parameters = sum(p.numel() for p in policy.model.parameters())
    print(
        f"   {parameters / 1e6:.2f} M parameters, {trained.step} steps in {took:.0f} s; "
        + ", ".join(f"{s} loss {v['first']:.3f} -> {v['last']:.3f}" for s, v in losses.items())
    )

    each = episodes // len(simulators)
    print(f"3. act: {each} episodes of each of {len(simulators)} tasks, from initial states that no one trained on")
    tasks = [Task(name, i, i) for name in simulators for i in range(each)]
    order = {(task.simulator, task.episode): k for k, task in enumerate(tasks)}
    played = play(policy, policy.rollout, tasks, batch=min(BATCH, len(tasks)), horizon=horizon)
    results = sorted(played, key=lambda r: order[r.simulator, r.episode])
    rows = [result.row() for result in results]

    print("4. predict held-out demonstrations")
    dataset = LeRobotDataset(root)
    long = [i for i in data.held_out if data.length(i) >= RECORDED_FRAMES]
    cases = [("forward_dynamics", GJD), ("inverse_dynamics", GJD)]
    dynamics = evaluate_recorded(
        policy, [policy.clip(dataset, i) for i in long], cases=cases, seed=seed, progress=False
    )

    report = {
        "data": str(root), "seed": seed, "torch": torch.__version__, "python": platform.python_version(),
        "parameters": parameters, "steps": trained.step, "training_seconds": took, "losses": losses,
        "config": config.to_dict(), "rollout": asdict(policy.rollout), "horizon": horizon,
        "simulators": {n: asdict(Rate.of([r for r in rows if r["simulator"] == n])) for n in simulators},
        "all": asdict(Rate.of(rows)), "episodes": rows,
        "imagined": horizons(results, CHUNK),
        "dynamics": dynamics.to_dict(), "recorded_episodes": long,
    }  # fmt: skip
    report["bounds"] = bounds(report)
    report["total_seconds"] = time.perf_counter() - began
    logged = {stream: [row[f"{stream}_loss"] for row in trained.log] for stream in STREAMS}
    curves(logged, out / "loss.png", title="Flow-matching loss of both streams", x_label="training step")
    save_small(draw_programs(), out / "masks.png")
    with new_file(out / "report.json") as part:
        part.write_text(json.dumps(report, indent=1) + "\n")
    with new_file(page_file) as part:
        part.write_text(page(report, films(results, simulators), out), encoding="utf-8")
    print_end(report, page_file)
    return report


def distances(states: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Millimetres from the hand to the hand and from the object to the object: ``[..., S]`` twice to ``[..., 2]``."""
    return 1000 * np.stack([np.linalg.norm(states[..., p] - others[..., p], axis=-1) for p in (HAND, OBJECT)], -1)


def horizons(results: Sequence[EpisodeResult], chunk: int) -> list[dict[str, float]]:
    """For each frame of a chunk, the mean distance in millimetres between imagined and real places, over all chunks of
    all episodes; beside it that of standing still, the last observed frame repeated."""
    found = []
    for h in range(chunk):
        own, still = [], []
        for result in results:
            for c, imagined in enumerate(result.imagined):
                if c * chunk + h + 1 < len(result.frames):
                    real = result.frames[c * chunk + h + 1]
                    own.append(distances(imagined[h], real))
                    still.append(distances(result.frames[c * chunk], real))
        found.append(_compared(h + 1, own, still))
    return found


def _compared(frame: int, own: list[np.ndarray], still: list[np.ndarray]) -> dict[str, float]:
    if not own:
        raise ValueError(f"demo: no episode reached frame {frame} of a chunk; did every simulator go wrong?")
    found: dict[str, float] = {"frame": frame, "chunks": len(own)}
    for name, values in (("imagined", own), ("still", still)):
        hand, thing = np.mean(values, axis=0).tolist()
        found |= {f"hand_{name}": hand, f"object_{name}": thing, f"path_{name}": (hand + thing) / 2}
    return found


def bounds(report: dict[str, Any]) -> dict[str, bool]:
    """What the demo promises, and whether this run keeps it."""
    forward, inverse = report["dynamics"]["rows"]
    return {
        "at least four of five new episodes succeed": report["all"]["successes"] >= 0.8 * report["all"]["episodes"],
        "the imagined path of hand and object beats standing still at every frame of a chunk": all(
            row["path_imagined"] < row["path_still"] for row in report["imagined"]
        ),
        "forward dynamics beats repeating the last frame": forward["frame_rmse"] < forward["repeat_frame_rmse"],
        "inverse dynamics beats repeating the last action": inverse["action_rmse"] < inverse["repeat_action_rmse"],
    }


def films(results: Sequence[EpisodeResult], simulators: Sequence[str]) -> list[dict[str, Any]]:
    """The first episode of each simulator, and the first that failed: ``title``, how it ``end``s, and ``frames``, a PNG
    for each, of what happened beside what had been imagined."""
    failed = [r for r in results if not r.success][:1]
    chosen = [next(r for r in results if r.simulator == name) for name in simulators]
    chosen += [r for r in failed if r not in chosen]
    scene = Scene.of(STATE_NAMES)
    assert scene is not None
    found = []
    for result in chosen:
        real = np.stack(result.frames)
        imagined = np.concatenate([real[:1], *result.imagined])[: len(real)]
        pictures = scene.film({"what happened": real, "what was imagined": imagined})
        found.append(
            {
                "title": f"{result.simulator.rpartition('/')[2]}, episode {result.episode}",
                "end": "succeeds" if result.success else f"fails: {result.failure}",
                "frames": [_png(picture) for picture in pictures],
            }
        )
    return found


def _png(picture: Image.Image) -> bytes:
    file = BytesIO()
    small(picture).save(file, "PNG", optimize=True)
    return file.getvalue()


def print_end(report: dict[str, Any], page_file: Path) -> None:
    """The result in a few lines."""
    for name, rate in (*report["simulators"].items(), ("all", report["all"])):
        low, high = (round(100 * rate[end]) for end in ("low", "high"))
        print(f"   {name}: {rate['successes']} of {rate['episodes']} succeed [{low}, {high}] %")
    for row in report["imagined"]:
        print(
            f"   imagined {row['frame']} ahead: hand and object {row['path_imagined']:.0f} mm off, "
            f"standing still {row['path_still']:.0f} mm"
        )
    forward, inverse = report["dynamics"]["rows"]
    print(f"   forward dynamics {forward['frame_rmse']:.3f}, repeating the frame {forward['repeat_frame_rmse']:.3f}")
    print(f"   inverse dynamics {inverse['action_rmse']:.3f}, repeating the action {inverse['repeat_action_rmse']:.3f}")
    for what, kept in report["bounds"].items():
        print(f"   {'yes' if kept else 'NO'}: {what}")
    print(f"\n{report['total_seconds']:.0f} s in all. Open {page_file} in a browser")
