"""``wam demo --pictures``: record demonstrations with a camera, train on its pictures alone, act, and compare what was
imagined with what happened."""

from __future__ import annotations

import base64
import html
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..draw.charts import curves, film
from ..rollout.policy import PICTURES
from ..runtime.files import new_file
from ..runtime.json_fields import read_json
from ..runtime.threads import restores_threads, set_threads
from ..simulator.evaluate import EpisodeResult, Rate, Task
from ..simulator.evaluate import evaluate as play
from ..simulator.record import SETTINGS, RecordConfig, record, settings_of
from ..train.config import TrainConfig
from ..train.log import STREAMS, loss_ends
from ..train.run_folder import RunFolder
from ..train.trainer import train
from .closed_loop_page import STYLE, picture_of, rates_of, table_of
from .train import read_data

TASKS = ("button-press-topdown-v3", "drawer-open-v3", "drawer-close-v3", "window-close-v3")
SIMULATORS = tuple(f"metaworld/{task}" for task in TASKS)
CAMERA, SIZE = "behindGripper", 64
RECORD = RecordConfig(episodes=30, picture_every=4)
EPISODES = 20  # over all simulators
BATCH = 5  # episodes at once, each with a process of its own
CHUNK, WINDOW = 2, 4
FILM_MILLISECONDS = 100  # a frame, half as fast as it happened


def pictures_training() -> TrainConfig:
    """A model of 1.8 M parameters, tokens of 16 x 16 pixels; what ``examples/metaworld_pixels_train.json`` holds."""
    model = {
        "hidden": 128, "heads": 8, "head_dim": 16, "layers": 3, "ffn": 384, "action_hidden": 128, "action_ffn": 384,
        "action_dim": 16, "actions_per_frame": 1, "latent_channels": 48, "text_dim": 64, "patch": [1, 2, 2],
        "rope_theta": 10.0,
    }  # fmt: skip
    return TrainConfig.from_dict(
        {
            "model": model, "actions_per_token": 4, "cell": 8, "programs": ["joint"], "mixture": {"joint": 1.0},
            "history": "video_only", "chunk_sizes": [1, 4], "windows": [2, 8], "video_shift": 5.0, "action_shift": 5.0,
            "batch": 16, "frames": 6, "steps": 500, "warmup": 100,
        }
    )  # fmt: skip


@restores_threads
def make_pictures_demo(
    out: Path,
    simulators: Sequence[str] = SIMULATORS,
    *,
    seconds: float = 180.0,
    seed: int = 0,
    config: TrainConfig | None = None,
    recording: RecordConfig = RECORD,
    camera: tuple[str, int] = (CAMERA, SIZE),
    episodes: int = EPISODES,
    horizon: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Record, train, act, write ``demo.html`` and ``report.json``. Returns what ``report.json`` holds.

    Args:
        out: Folder of all files; demonstrations of an earlier demo are kept.
        simulators: What to record and act in, with scripted experts.
        seconds: Time to train for, at most.
        seed: Of weights, clips and noise.
        config: Of the training; default :func:`pictures_training`.
        recording: Of the demonstrations.
        camera: Its name, and height and width of its pictures.
        episodes: To play in all simulators together, as many in each.
        horizon: Actions of an episode, in place of the simulator's own.
        progress: Show progress bars.

    Raises:
        ValueError: a folder that holds a run which is no demo's, or what recording, training and evaluation raise.
        SimulatorFailure: a simulator that cannot be made, as where nothing renders.
    """
    began = time.perf_counter()
    page_file = out / "demo.html"
    again = page_file.exists()  # then an earlier demo is there, and nothing is lost that cannot be made again
    RunFolder(out, overwrite=again)
    config, (name, size) = config or pictures_training(), camera
    print(f"1. record {recording.episodes} demonstrations of each of {len(simulators)} tasks with camera {name}")
    root = out / "data"
    _record(root, list(simulators), recording, {name: (size, size)}, progress)
    set_threads(1)  # the model is small: a second thread does not make it faster, and may wait for another process
    data = read_data(root, config, camera=PICTURES + name, progress=progress)
    print(f"2. train: {config.steps} steps of {config.batch} clips, {seconds:.0f} s at most, on one thread")
    page_file.write_text("<!doctype html><p>Not finished.</p>\n", encoding="utf-8")
    rollout = replace(config.default_rollout(), program="joint", chunk_size=CHUNK, window=WINDOW)
    trained = train(
        config, data, seed=seed, seconds=seconds, out=out, overwrite=again, progress=progress, rollout=rollout
    )
    policy, took = trained.policy, trained.log[-1]["seconds"]
    losses = {s: {"first": first, "last": last} for s, (first, last) in loss_ends(trained.log)[1].items()}
    each = episodes // len(simulators)
    print(f"3. act: {each} episodes of each task, from initial states that no one trained on")
    tasks = [Task(simulator, i, i) for simulator in simulators for i in range(each)]
    order = {(task.simulator, task.episode): k for k, task in enumerate(tasks)}
    played = play(policy, policy.rollout, tasks, batch=min(BATCH, len(tasks)), horizon=horizon)
    results = sorted(played, key=lambda r: order[r.simulator, r.episode])
    rows = [result.row() for result in results]
    report: dict[str, Any] = {
        "seed": seed, "torch": torch.__version__, "python": platform.python_version(), "camera": name, "size": size,
        "recording": asdict(recording), "parameters": sum(p.numel() for p in policy.model.parameters()),
        "steps": trained.step, "training_seconds": took, "losses": losses, "config": config.to_dict(),
        "rollout": asdict(policy.rollout), "horizon": horizon,
        "simulators": {n: asdict(Rate.of([r for r in rows if r["simulator"] == n])) for n in simulators},
        "all": asdict(Rate.of(rows)), "episodes": rows, "imagined": errors(results, CHUNK),
    }  # fmt: skip
    logged = {stream: [row[f"{stream}_loss"] for row in trained.log] for stream in STREAMS}
    curves(logged, out / "loss.png", title="Flow-matching loss of both streams", x_label="training step")
    films = [(result, _film(out, n, result)) for n, result in enumerate(_shown(results, simulators))]
    report["total_seconds"] = time.perf_counter() - began
    with new_file(out / "report.json") as part:
        part.write_text(json.dumps(report, indent=1) + "\n")
    with new_file(page_file) as part:
        part.write_text(page(report, films, out / "loss.png"), encoding="utf-8")
    _print_end(report, page_file)
    return report


def _record(
    root: Path, simulators: list[str], config: RecordConfig, cameras: dict[str, tuple[int, int]], progress: bool
) -> None:
    """The demonstrations, unless an earlier demo has recorded the same."""
    settings = root / SETTINGS
    if settings.exists() and read_json(settings) == settings_of(simulators, config, cameras):
        print(f"   {root} is kept")
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    record(
        root, simulators, config, cameras=cameras, overwrite=root.exists(),
        progress=lambda e: tqdm(e, desc="record", unit="demonstration", dynamic_ncols=True, disable=not progress),
    )  # fmt: skip


def errors(results: Sequence[EpisodeResult], chunk: int) -> list[dict[str, float]]:
    """For each frame of a chunk, the root mean square error of imagined pictures in grey levels, over all chunks of all
    episodes; beside it that of the last observed picture, repeated."""
    found = []
    for h in range(chunk):
        own, still = [], []
        for result in results:
            for c, imagined in enumerate(result.imagined):
                if c * chunk + h + 1 < len(result.frames):
                    real = result.frames[c * chunk + h + 1].astype(np.float32)
                    own.append(np.square(imagined[h] - real).mean())
                    still.append(np.square(result.frames[c * chunk] - real).mean())
        if not own:
            raise ValueError(f"demo: no episode reached frame {h + 1} of a chunk; did every simulator go wrong?")
        both = {"imagined": float(np.sqrt(np.mean(own))), "still": float(np.sqrt(np.mean(still)))}
        found.append({"frame": h + 1, "chunks": len(own), **both})
    return found


def _shown(results: Sequence[EpisodeResult], simulators: Sequence[str]) -> list[EpisodeResult]:
    """The first episode of each simulator, and the first that failed."""
    begun = [r for r in results if r.frames]
    chosen = [r for name in simulators for r in [r for r in begun if r.simulator == name][:1]]
    return chosen + [r for r in begun if not r.success and r not in chosen][:1]


def _film(out: Path, number: int, result: EpisodeResult) -> Path:
    real = np.stack(result.frames)
    imagined = np.concatenate([real[:1], *result.imagined])[: len(real)]
    path = out / f"film{number}.gif"
    film({"real": real[: len(imagined)], "imagined": imagined}, path, milliseconds=FILM_MILLISECONDS)
    return path


def page(report: dict[str, Any], films: Sequence[tuple[EpisodeResult, Path]], loss: Path) -> str:
    """The whole page."""
    rate, size = report["all"], report["size"]
    shown = ""
    for result, path in films:
        end = "succeeds" if result.success else f"fails: {result.failure}"
        title = html.escape(f"{result.simulator.rpartition('/')[2]}, episode {result.episode}: {end}")
        data = base64.b64encode(path.read_bytes()).decode()
        shown += f'<h3>{title}</h3><img alt="{title}" src="data:image/gif;base64,{data}">'
    rows = [(str(r["frame"]), f"{r['imagined']:.1f}", f"{r['still']:.1f}") for r in report["imagined"]]
    weak = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in weaknesses(report))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>wam demo --pictures</title><style>{STYLE}</style>
<h1>Acting from pictures alone: {rate["successes"]} of {rate["episodes"]} new episodes succeed</h1>
<p>A joint-denoising model of {report["parameters"] / 1e6:.2f} M parameters, trained for
{report["training_seconds"]:.0f} s ({report["steps"]} steps, seed {report["seed"]}) on {report["recording"]["episodes"]}
scripted demonstrations of each task. It gets the {size} x {size} pictures of one camera
({html.escape(report["camera"])}) and the name of the task, and no state. A chunk is {CHUNK} frames and their actions,
denoised together in one step, executed, and replaced by what was observed. The whole demo took
{report["total_seconds"]:.0f} s.</p>
<h2>What happened, and what was imagined before</h2>
{shown}
<h2>How good</h2>
{rates_of(report)}
<p>Root mean square error of imagined pictures, in grey levels of 255; standing still repeats the last observed one.</p>
{table_of(("frames ahead", "imagined", "standing still"), rows)}
<h2>What is not good</h2>
<ul>{weak}</ul>
<h2>Training</h2>
{picture_of(loss, "Loss curves")}
</html>
"""


def weaknesses(report: dict[str, Any]) -> list[str]:
    """What this run does badly, and what no run of the demo shows."""
    failed = [row for row in report["episodes"] if not row["success"]]
    found = [f"{row['simulator']}, episode {row['episode']} fails: {row['failure']}." for row in failed]
    found += [
        f"Pictures {row['frame']} ahead are imagined worse ({row['imagined']:.1f}) than standing still "
        f"({row['still']:.1f})."
        for row in report["imagined"]
        if row["imagined"] >= row["still"]
    ]
    if report["steps"] < report["config"]["steps"]:
        found.append(
            f"Time ended the training after {report['steps']} of {report['config']['steps']} steps; --seconds allows "
            "more."
        )
    return [
        *found,
        "The tasks are those whose objects are large in the picture; where a target is a few pixels, as of reach and "
        "push, such a policy learns little.",
        "Whether imagining helps the actions is not shown: wam ablate --track pixels compares that.",
        f"One training seed and {report['all']['episodes']} episodes: another seed moves the rate by more than its "
        "interval says.",
    ]


def _print_end(report: dict[str, Any], page_file: Path) -> None:
    for name, rate in (*report["simulators"].items(), ("all", report["all"])):
        low, high = (round(100 * rate[end]) for end in ("low", "high"))
        print(f"   {name}: {rate['successes']} of {rate['episodes']} succeed [{low}, {high}] %")
    for row in report["imagined"]:
        print(
            f"   pictures imagined {row['frame']} ahead: {row['imagined']:.1f} grey levels off, standing still "
            f"{row['still']:.1f}"
        )
    print(f"\n{report['total_seconds']:.0f} s in all. Open {page_file} in a browser")
