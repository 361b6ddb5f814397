"""``wam demo``: train a small model on real demonstrations, see how well it predicts, and leave pictures behind."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import replace
from pathlib import Path

import torch

from wam_kernels import PROGRAMS

from .._files import new_file
from ..data import LeRobotDataset
from ..data.clips import STRIDE
from ..draw.charts import curves, film, film_strip
from ..draw.masks import draw_mask, draw_programs, small_geometry
from ..draw.style import save_small
from ..evaluate import Evaluation, Row, evaluate, imagine, table
from ..objectives import GJD
from ..rollout.config import CONDITIONAL_CHUNK
from ..threads import pick_threads, restores_threads
from ..train.config import TrainConfig
from ..train.log import STREAMS, loss_ends
from ..train.run_folder import RunFolder
from ..train.trainer import Trained, train
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
    return TrainConfig(mixture=MIXTURE, steps=UNLIMITED, save_every=UNLIMITED)


def verdicts(evaluation: Evaluation) -> list[str]:
    """What the rows say, in words: each objective against each baseline, with the programs of ``joint`` together."""
    said = []
    for objective in dict.fromkeys(r.objective for r in evaluation.rows):
        rows = [r for r in evaluation.rows if r.objective == objective]
        name = objective.replace("_", " ")
        if rows[0].action_rmse is not None:
            for baseline, label in (
                ("mean_action_rmse", "the mean action"),
                ("repeat_action_rmse", f"repeating the last action for {rows[0].chunk_actions} steps"),
            ):
                said.append(_compared(name, rows, "action_rmse", baseline, label))
        if rows[0].psnr is not None:
            label = f"repeating the last frame for {rows[0].chunk_frames}"
            said.append(_compared(name, rows, "psnr", "repeat_frame_psnr", label))
    return said


def _compared(name: str, rows: list[Row], mine: str, baseline: str, label: str) -> str:
    """One sentence: the range of the rows' values, and which of them are better than the baseline."""
    higher_is_better = mine == "psnr"
    what, unit, digits = ("imagined frames", " dB", 2) if higher_is_better else ("action error", "", 3)
    values, bar = {r.program: getattr(r, mine) for r in rows}, getattr(rows[0], baseline)
    low, high = (f"{f(values.values()):.{digits}f}" for f in (min, max))
    spread = f"{low}{unit}" if len(rows) == 1 else f"{low} to {high}{unit}"
    better = [p for p, v in values.items() if (v > bar if higher_is_better else v < bar)]
    if len(better) == len(rows):
        verdict = "beats" if len(rows) == 1 else "every program beats"
    elif not better:
        verdict = "does NOT beat" if len(rows) == 1 else "NO program beats"
    else:
        verdict = f"{', '.join(better)} beat{'s' if len(better) == 1 else ''}, the others do NOT beat,"
    return f"{name}, {what} {spread}: {verdict} {label} ({bar:.{digits}f}{unit})."


def beaten(evaluation: Evaluation) -> dict[str, bool]:
    """What the demo promises: every action prediction beats the mean action, inverse dynamics the last action too."""
    rows = [r for r in evaluation.rows if r.action_rmse is not None]
    inverse = evaluation.row("inverse_dynamics", GJD)
    return {
        "every action prediction beats the mean action": all(r.action_rmse < r.mean_action_rmse for r in rows),
        "inverse dynamics beats repeating the last action": inverse.action_rmse < inverse.repeat_action_rmse,
    }


def loss_line(trained: Trained) -> str:
    """First and last losses of both streams, each a mean over up to 30 steps."""
    parts = []
    steps, losses = loss_ends(trained.log)
    for stream, (first, last) in losses.items():
        if first is not None and last is not None:
            parts.append(f"{stream} {first:.3f} -> {last:.3f}")
    return f"loss (means of the first and the last {steps} steps): " + ", ".join(parts)


def run(args) -> int:
    """``wam demo``."""
    if not args.data.is_dir():
        raise UserError(
            f"--data must be a data set in LeRobot v3 layout, but there is no folder {args.data}; the demo's own data "
            "is not in the installed package: run wam demo in a clone of the repository, or pass --data DIR"
        )
    make_demo(args.out, args.data, camera=args.camera, seconds=args.seconds, seed=args.seed)
    return 0


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
) -> dict:
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
    data = read_data(root, camera=camera, progress=progress)
    dataset = LeRobotDataset(root, camera)
    if not data.held_out:
        raise ValueError(f"--data: {root} has no held-out episodes to evaluate on; give meta/info.json such a split")

    if device.type == "cpu":
        threads = pick_threads(lambda: train(replace(config, steps=2), data, progress=False))
        precision = f"float32, {threads} thread{'s' if threads > 1 else ''}"
    else:
        precision = "bf16 autocast"
    print(f"2. train for {seconds:.0f} s on {len(data.train)} episodes ({device}, {precision})")
    out.mkdir(parents=True, exist_ok=True)
    page_file.write_text(f"# Demo on {root}\n\nNot finished.\n", encoding="utf-8")
    trained = train(
        config, data, seed=seed, device=device, seconds=seconds, out=out, overwrite=again, progress=progress
    )
    policy = trained.policy
    parameters = sum(p.numel() for p in policy.model.parameters())
    took = trained.log[-1]["seconds"]
    size, losses = f"{parameters / 1e6:.2f} M parameters", loss_line(trained)
    print(f"   {size}, {trained.step} steps of {config.batch} clips in {took:.0f} s; {losses}")
    curves(
        {s: [row[f"{s}_loss"] for row in trained.log] for s in STREAMS},
        out / "loss.png",
        title="Flow-matching loss of both streams",
        x_label="training step",
    )

    count = min(EPISODES, len(data.held_out))
    chosen = [data.held_out[i * len(data.held_out) // count] for i in range(count)]
    print(f"3. predict {count} held-out episodes with every objective and program")
    clips = [policy.clip(dataset, i) for i in chosen]
    evaluation = evaluate(policy, clips, chunks=chunks, samples=SAMPLES, seed=seed, progress=progress)
    rows = table(evaluation)
    print(f"\n{rows}\n")

    print("4. draw")
    clip = clips[-1]
    chunks_shown = min(IMAGINED_CHUNKS, (clip["video"].shape[2] - 1) // policy.rollout.chunk_size)
    joint = imagine(policy, clip, objective="joint", chunks=chunks_shown, seed=seed)
    guided = imagine(policy, clip, objective="forward_dynamics", chunks=chunks_shown, seed=seed)
    videos = {
        "real": clip["frames"][: len(joint)],
        "imagined from the first frame and the instruction": joint,
        "imagined from the first frame and the expert's actions": guided,
    }
    film_strip(videos, out / "imagined.png", title=f'Held-out episode {chosen[-1]}: "{clip["text"]}"')
    film(videos, out / "imagined.gif", milliseconds=round(1000 * STRIDE / data.fps))
    for program in PROGRAMS:
        save_small(draw_mask(replace(small_geometry(program))), out / "masks" / f"{program}.png")
    save_small(draw_programs(), out / "masks.png")

    sentences = verdicts(evaluation)
    promises = beaten(evaluation)
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
        "beaten": promises,
        "verdicts": sentences,
    }
    with new_file(out / "report.json") as part:
        part.write_text(json.dumps(report, indent=1) + "\n")
    mixture = ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in config.mixture.items())
    facts = (
        f"Trained for {took:.0f} s ({trained.step} steps of {config.batch} clips of {config.frames} latent frames; "
        f"{size}; {device}, {precision}; seed {seed}; objectives {mixture}; the joint objective's program drawn from "
        f"{len(config.programs)}). {losses[0].upper() + losses[1:]}. The whole demo took {total:.0f} s."
    )
    page = f"""# Demo: a generalist joint-denoising world-action model on {root}

{facts}

![loss](loss.png)

## How well it predicts

{how_to_read(evaluation, chosen, policy.rollout.chunk_size)}

{rows}

{chr(10).join("- " + s for s in sentences)}

{chr(10).join(f"- {'Yes' if ok else 'NO'}: {what}." for what, ok in promises.items())}

Repeating the last frame as a picture, which never went through the latent transform, gives {_raw(evaluation)}.

## What it imagines

Open loop from one observed frame ([animation](imagined.gif)): no real frame is seen after the first.

![imagined](imagined.png)

## Who sees whom

![masks](masks.png)

Next: `wam rollout --checkpoint {out / "checkpoint"} --data {root}`
"""
    with new_file(page_file) as part:
        part.write_text(page, encoding="utf-8")
    for sentence in sentences:
        print(f"   {sentence}")
    for what, ok in promises.items():
        print(f"   {'yes' if ok else 'NO'}: {what}")
    print(f"\n{total:.0f} s in all. Read {page_file}; roll out with")
    print(f"  wam rollout --checkpoint {out / 'checkpoint'} --data {root}")
    return report


def how_to_read(evaluation: Evaluation, episodes: list[int], chunk_size: int) -> str:
    """What the table's episodes, errors and chunks are."""
    (first, end), steps = evaluation.frames, evaluation.steps
    return (
        f"Held-out episodes {', '.join(map(str, episodes))}, frames {first} to {end - 1} of each, real history before "
        f"every chunk, {steps} denoising step{'s' if steps > 1 else ''}, the mean of {SAMPLES} predictions. Action "
        "errors are root mean squares over the dimensions that vary, in units of their standard deviation in "
        f"training; a chunk has {STRIDE * chunk_size} actions ({chunk_size} frames), of a conditional objective "
        f"{STRIDE * CONDITIONAL_CHUNK} ({CONDITIONAL_CHUNK} frame). PSNR is against the recorded pictures; "
        '"repeat last" repeats the last latent frame before the chunk; seconds are the median for one episode.'
    )


def _raw(evaluation: Evaluation) -> str:
    raw = {r.chunk_frames: r.repeat_picture_psnr for r in evaluation.rows if r.repeat_picture_psnr is not None}
    return ", ".join(f"{v:.2f} dB over {k} frame{'s' if k > 1 else ''}" for k, v in sorted(raw.items()))
