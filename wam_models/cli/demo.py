"""``wam demo``: train a small model and act with it; with ``--data``, see how well it predicts recorded ones."""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from wam_kernels import PROGRAMS

from ..data import ClipDataset, LeRobotDataset
from ..data.clips import STRIDE
from ..draw.charts import curves, film, film_strip
from ..draw.masks import draw_mask, draw_programs, small_geometry
from ..draw.style import save_small
from ..evaluate import Evaluation, evaluate, imagine, table
from ..rollout.policy import Policy
from ..runtime.files import new_file
from ..runtime.threads import pick_threads, restores_threads
from ..simulator.process import SimulatorFailure
from ..train.config import TrainConfig
from ..train.log import STREAMS, loss_ends
from ..train.run_folder import RunFolder
from ..train.trainer import Trained, train
from .demo_report import how_to_read, loss_line, page, promises, verdicts
from .parser import UserError
from .train import read_data

EPISODES = 6  # held-out episodes that are evaluated, spread over the tasks
IMAGINED_CHUNKS = 4
UNLIMITED = 1_000_000  # steps; the demo's limit is time
SAMPLES = 8  # predictions whose mean is compared
# In three minutes the usual fifth of the samples shows inverse dynamics each pair of frames about once or twice.
MIXTURE = {"joint": 0.25, "forward_dynamics": 0.1, "inverse_dynamics": 0.65}


def demo_training() -> TrainConfig:
    """The demo's run: the defaults, which are tuned for it, more inverse dynamics, and no step limit."""
    return TrainConfig(mixture=MIXTURE, initialisation="by_hand", steps=UNLIMITED, save_every=UNLIMITED)


def run(args: argparse.Namespace) -> int:
    """``wam demo``: without ``--data`` in closed loop, see :mod:`.closed_loop_demo` and :mod:`.pictures_demo`."""
    if args.pictures:
        from .pictures_demo import make_pictures_demo

        if args.data is not None:
            raise UserError("--data must be left out with --pictures, which records its own")
        try:
            make_pictures_demo(args.out or Path("runs/demo_pictures"), seconds=args.seconds, seed=args.seed)
        except SimulatorFailure as failure:
            raise UserError(str(failure)) from failure
        return 0
    out = args.out or Path("runs/demo")
    if args.data is None:
        from .closed_loop_demo import DATA, make_closed_loop_demo

        _check_folder(DATA)
        try:
            make_closed_loop_demo(out, DATA, seconds=args.seconds, seed=args.seed)
        except SimulatorFailure as failure:
            raise UserError(str(failure)) from failure
        return 0
    _check_folder(args.data)
    make_demo(out, args.data, camera=args.camera, seconds=args.seconds, seed=args.seed)
    return 0


def _check_folder(data: Path) -> None:
    if not data.is_dir():
        raise UserError(
            f"--data must be a data set in LeRobot v3 layout, but there is no folder {data}; the demo's own data "
            "is not in the installed package: run wam demo in a clone of the repository, or pass --data DIR"
        )


@restores_threads
def make_demo(
    out: Path,
    root: Path,
    *,
    camera: str | None = None,
    seconds: float = 180.0,
    seed: int = 0,
    config: TrainConfig | None = None,
    chunks: int = 6,
    progress: bool = True,
) -> dict[str, Any]:
    """Train, evaluate, draw, report. Returns what ``report.json`` holds.

    Args:
        out: Folder of all files.
        root: The data set, with held-out episodes.
        camera: The feature to read pictures from, where the data set has several.
        seconds: Time to train for; the rest takes about a minute and a half on two cores.
        seed: Of weights, clips and noise.
        config: Of the training; default :func:`demo_training`.
        chunks: Chunks of each evaluated episode.
        progress: Show progress bars.

    Raises:
        ValueError: a data set without held-out episodes, a folder that holds a run which is no demo's, or what training
            and evaluation raise.
    """
    began = time.perf_counter()
    page_file = out / "report.md"
    again = page_file.exists()  # then what is there is an earlier demo's, and nothing is lost that cannot be made again
    RunFolder(out, overwrite=again)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = config or demo_training()
    print(f"1. read {root}")
    data = read_data(root, config, camera=camera, progress=progress)
    if not data.held_out:
        raise ValueError(f"--data: {root} has no held-out episodes to evaluate on; give meta/info.json such a split")

    precision = _precision(config, data, device)
    print(f"2. train for {seconds:.0f} s on {len(data.train)} episodes ({device}, {precision})")
    out.mkdir(parents=True, exist_ok=True)
    page_file.write_text(f"# Demo on {root}\n\nNot finished.\n", encoding="utf-8")
    trained = train(
        config, data, seed=seed, device=device, seconds=seconds, out=out, overwrite=again, progress=progress
    )
    policy, took = trained.policy, trained.log[-1]["seconds"]
    parameters = sum(p.numel() for p in policy.model.parameters())
    size, losses = f"{parameters / 1e6:.2f} M parameters", loss_line(trained.log)
    print(f"   {size}, {trained.step} steps of {config.batch} clips in {took:.0f} s; {losses}")

    count = min(EPISODES, len(data.held_out))
    chosen = [data.held_out[i * len(data.held_out) // count] for i in range(count)]
    print(f"3. predict {count} held-out episodes with every objective and program")
    dataset = LeRobotDataset(root, camera)
    clips = [policy.clip(dataset, i) for i in chosen]
    evaluation = evaluate(policy, clips, chunks=chunks, samples=SAMPLES, seed=seed, progress=progress)
    print(f"\n{table(evaluation)}\n")

    print("4. draw")
    _draw_losses(out, trained)
    _draw_imagined(out, policy, clips[-1], episode=chosen[-1], fps=data.fps, seed=seed)
    _draw_masks(out)

    total = time.perf_counter() - began
    report = {
        "data": str(root),
        "seed": seed,
        "device": str(device),
        "precision": precision,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "parameters": parameters,
        "steps": trained.step,
        "training_seconds": took,
        "total_seconds": total,
        "losses": {s: {"first": first, "last": last} for s, (first, last) in loss_ends(trained.log)[1].items()},
        "episodes": chosen,
        "config": config.to_dict(),
        "evaluation": evaluation.to_dict(),
        "beaten": promises(evaluation),
        "verdicts": verdicts(evaluation),
    }
    with new_file(out / "report.json") as part:
        part.write_text(json.dumps(report, indent=1) + "\n")
    mixture = ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in config.mixture.items())
    facts = (
        f"Trained for {took:.0f} s ({trained.step} steps of {config.batch} clips of {config.frames} latent frames; "
        f"{size}; {device}, {precision}; seed {seed}; objectives {mixture}; the joint objective's program drawn from "
        f"{len(config.programs)}). {losses[0].upper() + losses[1:]}. The whole demo took {total:.0f} s."
    )
    reading = how_to_read(evaluation, chosen, policy.rollout.chunk_size, SAMPLES)
    with new_file(page_file) as part:
        part.write_text(page(root, facts, reading, evaluation, out / "checkpoint"), encoding="utf-8")
    _print_end(evaluation, total, page_file, out / "checkpoint", root)
    return report


def _precision(config: TrainConfig, data: ClipDataset, device: torch.device) -> str:
    """What is computed in, in words; on a CPU, sets the number of threads that trains fastest."""
    if device.type != "cpu":
        return "bf16 autocast"
    threads = pick_threads(lambda: train(replace(config, steps=2), data, progress=False))
    return f"float32, {threads} thread{'s' if threads > 1 else ''}"


def _draw_losses(out: Path, trained: Trained) -> None:
    losses = {stream: [row[f"{stream}_loss"] for row in trained.log] for stream in STREAMS}
    curves(losses, out / "loss.png", title="Flow-matching loss of both streams", x_label="training step")


def _draw_imagined(out: Path, policy: Policy, clip: dict[str, Any], *, episode: int, fps: float, seed: int) -> None:
    """A held-out episode beside what the policy imagines of it."""
    chunks = min(IMAGINED_CHUNKS, (clip["video"].shape[2] - 1) // policy.rollout.chunk_size)
    joint = imagine(policy, clip, objective="joint", chunks=chunks, seed=seed)
    guided = imagine(policy, clip, objective="forward_dynamics", chunks=chunks, seed=seed)
    videos = {
        "real": clip["frames"][: len(joint)],
        "imagined from the first frame and the instruction": joint,
        "imagined from the first frame and the expert's actions": guided,
    }
    film_strip(videos, out / "imagined.png", title=f'Held-out episode {episode}: "{clip["text"]}"')
    film(videos, out / "imagined.gif", milliseconds=round(1000 * STRIDE / fps))


def _draw_masks(out: Path) -> None:
    for program in PROGRAMS:
        save_small(draw_mask(small_geometry(program)), out / "masks" / f"{program}.png")
    save_small(draw_programs(), out / "masks.png")


def _print_end(evaluation: Evaluation, seconds: float, page_file: Path, checkpoint: Path, root: Path) -> None:
    for sentence in verdicts(evaluation):
        print(f"   {sentence}")
    for what, ok in promises(evaluation).items():
        print(f"   {'yes' if ok else 'NO'}: {what}")
    print(f"\n{seconds:.0f} s in all. Read {page_file}; roll out with")
    print(f"  wam rollout --checkpoint {checkpoint} --data {root}")
