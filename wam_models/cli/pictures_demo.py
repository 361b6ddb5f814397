"""``wam demo --pictures``: record demonstrations with a camera, train on its pictures alone, act, and compare what was
imagined with what happened."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..draw.charts import film
from ..rollout.policy import PICTURES
from ..runtime.json_fields import read_json
from ..runtime.threads import restores_threads, set_threads
from ..simulator.evaluate import EpisodeResult
from ..simulator.record import SETTINGS, RecordConfig, record, settings_of
from ..train.config import TrainConfig
from .closed_loop_page import STYLE, picture_of, rates_of, table_of
from .demo_steps import CHUNK, EPISODES, Demo, ending, frames_ahead, shown, with_imagined
from .train import read_data

TASKS = ("button-press-topdown-v3", "drawer-open-v3", "drawer-close-v3", "window-close-v3")
SIMULATORS = tuple(f"metaworld/{task}" for task in TASKS)
CAMERA, SIZE = "behindGripper", 64
RECORD = RecordConfig(episodes=30, picture_every=4)
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
            "batch": 16, "frames": 6, "steps": 500, "warmup": 100, "initialisation": "by_hand",
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
    demo = Demo.begin(out)
    config, (name, size) = config or pictures_training(), camera
    print(f"1. record {recording.episodes} demonstrations of each of {len(simulators)} tasks with camera {name}")
    root = out / "data"
    _record(root, list(simulators), recording, {name: (size, size)}, progress)
    set_threads(1)  # the model is small: a second thread does not make it faster, and may wait for another process
    data = read_data(root, config, camera=PICTURES + name, progress=progress)
    _, results, played = demo.train_and_play(
        data, config, simulators, program="joint", seconds=seconds, seed=seed, episodes=episodes, horizon=horizon,
        progress=progress,
    )  # fmt: skip
    report = {"camera": name, "size": size, "recording": asdict(recording), **played}
    report["imagined"] = errors(results, CHUNK)
    films = [(result, _film(out, n, result)) for n, result in enumerate(shown(results, simulators))]
    report["total_seconds"] = demo.seconds()
    demo.write(report, page(report, films, out / "loss.png"))
    demo.print_rates(report)
    for row in report["imagined"]:
        print(
            f"   pictures imagined {row['frame']} ahead: {row['imagined']:.1f} grey levels off, standing still "
            f"{row['still']:.1f}"
        )
    demo.print_end(report)
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
    for frame, pictures in frames_ahead(results, chunk):
        own = [np.square(imagined - real.astype(np.float32)).mean() for imagined, real, _ in pictures]
        still = [np.square(last - real.astype(np.float32)).mean() for _, real, last in pictures]
        both = {"imagined": float(np.sqrt(np.mean(own))), "still": float(np.sqrt(np.mean(still)))}
        found.append({"frame": frame, "chunks": len(pictures), **both})
    return found


def _film(out: Path, number: int, result: EpisodeResult) -> Path:
    real, imagined = with_imagined(result)
    path = out / f"film{number}.gif"
    film({"real": real[: len(imagined)], "imagined": imagined}, path, milliseconds=FILM_MILLISECONDS)
    return path


def page(report: dict[str, Any], films: Sequence[tuple[EpisodeResult, Path]], loss: Path) -> str:
    """The whole page."""
    rate, size = report["all"], report["size"]
    shown = ""
    for result, path in films:
        title = html.escape(f"{result.simulator.rpartition('/')[2]}, episode {result.episode}: {ending(result)}")
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
