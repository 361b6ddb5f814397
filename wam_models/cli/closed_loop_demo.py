"""``wam demo`` without ``--data``: train a small model on Meta-World demonstrations, act in closed loop, and compare
what was imagined with what happened."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data import LeRobotDataset
from ..draw.masks import draw_programs
from ..draw.scene import Scene
from ..draw.style import save_small, small
from ..evaluate import evaluate as evaluate_recorded
from ..objectives import GJD
from ..runtime.threads import restores_threads, set_threads
from ..simulator.evaluate import EpisodeResult
from ..simulator.metaworld import STATE_NAMES
from ..train.config import TrainConfig
from .closed_loop_page import page
from .demo_steps import CHUNK, EPISODES, Demo, ending, frames_ahead, shown, with_imagined
from .train import read_data

DATA = Path("data/metaworld_demo")
TASKS = ("pick-place-v3", "drawer-open-v3", "button-press-topdown-v3", "window-close-v3")
SIMULATORS = tuple(f"metaworld/{task}" for task in TASKS)
RECORDED_FRAMES = 13  # of a held-out episode that is predicted, at least
HAND, OBJECT = slice(0, 3), slice(4, 7)  # in a state of Meta-World, in metres


def demo_training() -> TrainConfig:
    """The demo's run: 200 steps of a model of 1.1 M parameters; what ``examples/metaworld_train.json`` holds.

    It acts in one denoising step, from noise alone, so most noise levels are near noise, and in chunks of two frames.
    """
    model = {
        "hidden": 96, "heads": 6, "head_dim": 16, "layers": 3, "ffn": 384, "action_hidden": 96, "action_ffn": 384,
        "action_dim": 16, "actions_per_frame": 1, "latent_channels": 17, "text_dim": 64, "patch": [1, 1, 1],
        "rope_theta": 100.0,
    }  # fmt: skip
    return TrainConfig.from_dict(
        {
            "model": model, "actions_per_token": 4, "programs": ["joint"],
            "mixture": {"joint": 0.6, "forward_dynamics": 0.2, "inverse_dynamics": 0.2}, "history": "video_only",
            "chunk_sizes": [1, CHUNK], "windows": [2, 8], "video_shift": 20.0, "action_shift": 15.0, "batch": 64,
            "frames": 6, "steps": 200, "learning_rate": 6e-3, "warmup": 30, "initialisation": "by_hand",
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
    demo = Demo.begin(out)
    config = config or demo_training()
    set_threads(1)  # the model is small: a second thread does not make it faster, and may wait for another process
    print(f"1. read {root}")
    data = read_data(root, config, progress=progress)
    policy, results, played = demo.train_and_play(
        data, config, simulators, seconds=seconds, seed=seed, episodes=episodes, horizon=horizon, progress=progress
    )
    print("4. predict held-out demonstrations")
    dataset = LeRobotDataset(root)
    long = [i for i in data.held_out if data.length(i) >= RECORDED_FRAMES]
    cases = [("forward_dynamics", GJD), ("inverse_dynamics", GJD)]
    dynamics = evaluate_recorded(
        policy, [policy.clip(dataset, i) for i in long], cases=cases, seed=seed, progress=False
    )
    report = {"data": str(root), **played, "imagined": horizons(results, CHUNK)}
    report |= {"dynamics": dynamics.to_dict(), "recorded_episodes": long}
    report["bounds"] = bounds(report)
    report["total_seconds"] = demo.seconds()
    save_small(draw_programs(), out / "masks.png")
    demo.write(report, page(report, films(results, simulators), out))
    demo.print_rates(report)
    _print_comparison(report)
    demo.print_end(report)
    return report


def distances(states: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Millimetres from the hand to the hand and from the object to the object: ``[..., S]`` twice to ``[..., 2]``."""
    return 1000 * np.stack([np.linalg.norm(states[..., p] - others[..., p], axis=-1) for p in (HAND, OBJECT)], -1)


def horizons(results: Sequence[EpisodeResult], chunk: int) -> list[dict[str, float]]:
    """For each frame of a chunk, the mean distance in millimetres between imagined and real places, over all chunks of
    all episodes; beside it that of standing still, the last observed frame repeated."""
    found = []
    for frame, places in frames_ahead(results, chunk):
        row: dict[str, float] = {"frame": frame, "chunks": len(places)}
        own = [distances(imagined, real) for imagined, real, _ in places]
        still = [distances(last, real) for _, real, last in places]
        for name, values in (("imagined", own), ("still", still)):
            hand, thing = np.mean(values, axis=0).tolist()
            row |= {f"hand_{name}": hand, f"object_{name}": thing, f"path_{name}": (hand + thing) / 2}
        found.append(row)
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
    scene = Scene.of(STATE_NAMES)
    assert scene is not None
    found = []
    for result in shown(results, simulators):
        real, imagined = with_imagined(result)
        pictures = scene.film({"what happened": real, "what was imagined": imagined})
        found.append(
            {
                "title": f"{result.simulator.rpartition('/')[2]}, episode {result.episode}",
                "end": ending(result),
                "frames": [_png(picture) for picture in pictures],
            }
        )
    return found


def _png(picture: Image.Image) -> bytes:
    file = BytesIO()
    small(picture).save(file, "PNG", optimize=True)
    return file.getvalue()


def _print_comparison(report: dict[str, Any]) -> None:
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
