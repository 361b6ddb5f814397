"""``wam eval``: how often a policy succeeds in simulators, with intervals; every episode is stored."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..checkpoint import saved_as
from ..objectives import MODEL_PROGRAMS
from ..rollout.policy import Policy
from ..runtime.checks import check_device, choice, writable_folder
from ..runtime.files import new_file
from ..runtime.json_fields import read_json
from ..runtime.threads import restores_threads, set_threads
from ..simulator.evaluate import EpisodeResult, Rate, Task, evaluate, summary
from ..simulator.process import SimulatorFailure
from .parser import UserError


@restores_threads
def run(args) -> int:
    """``wam eval``."""
    names = list(dict.fromkeys(args.simulator))
    device = check_device(args.device)
    if args.program is not None:
        choice("--program", args.program, MODEL_PROGRAMS)
    out = args.out or args.checkpoint.parent / "eval"
    writable_folder("--out, by default beside the checkpoint,", out)
    policy, _ = Policy.load(args.checkpoint, device, training=False, robot=args.robot)
    given = {"program": args.program, "chunk_size": args.chunk, "steps": args.steps, "window": args.window}
    config = replace(policy.rollout, **{name: value for name, value in given.items() if value is not None})
    saved = saved_as(args.checkpoint)
    settings = {
        "checkpoint": saved and saved[0], "simulators": names, "episodes": args.episodes, "seed": args.seed,
        "rollout": asdict(config), "horizon": args.horizon,
    }  # fmt: skip
    rows = _read_rows(out, settings, overwrite=args.overwrite)
    done = {(row["simulator"], row["episode"]) for row in rows}
    tasks = [Task(name, i, args.seed + i) for name in names for i in range(args.episodes) if (name, i) not in done]
    if rows and tasks:
        print(f"{len(rows)} episodes of {out} are kept, {len(tasks)} are left")
    if device.type == "cpu":
        set_threads(1)  # the simulators have the other cores
    seconds: list[float] = []
    began = time.perf_counter()
    if tasks:
        options = {"batch": args.batch, "horizon": args.horizon, "timeout": args.timeout, "chunk_seconds": seconds}
        try:
            results = evaluate(policy, config, tasks, **options)
            for result in tqdm(results, total=len(tasks), desc="eval", unit="episode", dynamic_ncols=True):
                rows.append(_store(out, result, frames=args.keep_frames))
        except SimulatorFailure as failure:
            raise UserError(str(failure)) from failure
    took = time.perf_counter() - began
    rows.sort(key=lambda row: (names.index(row["simulator"]), row["episode"]))
    found = summary(rows)
    if tasks:
        batch = min(args.batch, len(tasks))
        found["timing"] = {"seconds": took, "episodes": len(tasks), "batch": batch}
        if seconds:
            found["timing"]["chunk_seconds"] = dict(zip(("p50", "p95"), np.percentile(seconds, [50, 95]), strict=True))
    with new_file(out / "summary.json") as part:
        part.write_text(json.dumps({"settings": settings, **found}, indent=1) + "\n")
    _print(rows, found, config, names)
    print(f"written        {out}: episodes.jsonl, summary.json")
    return 0


def _read_rows(out: Path, settings: dict, *, overwrite: bool) -> list[dict]:
    """The rows of an earlier call with the same settings, which is gone on with."""
    file, rows = out / "settings.json", out / "episodes.jsonl"
    settings = json.loads(json.dumps(settings))
    if not overwrite and file.exists() and read_json(file) != settings:
        raise ValueError(f"--out: {out} holds an evaluation of other settings; name another folder, or --overwrite it")
    if overwrite or not file.exists():
        rows.unlink(missing_ok=True)
        with new_file(file) as part:
            part.write_text(json.dumps(settings, indent=1) + "\n")
    if not rows.exists():
        return []
    lines = rows.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]  # a kill can leave half a row
    rows.write_bytes(b"".join(whole))
    return [json.loads(line) for line in whole]


def _store(out: Path, result: EpisodeResult, *, frames: bool) -> dict:
    row = result.row()
    if frames and result.frames:
        path = out / "frames" / result.simulator.replace("/", "+").replace(":", "+") / f"{result.episode:05d}.npz"
        with new_file(path) as part:
            imagined = np.stack(result.imagined) if result.imagined else np.empty((0, 0))
            np.savez(part, frames=np.stack(result.frames), imagined=imagined)
    with (out / "episodes.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def _print(rows: Sequence[dict], found: dict, config, names: Sequence[str]) -> None:
    print(f"program        {config.program}, chunks of {config.chunk_size}, {config.steps} denoising steps")
    width = max(map(len, [*names, "all"]))
    for name in (*names, "all") if len(names) > 1 else names:
        rate = Rate(**(found["all"] if name == "all" else found["simulators"][name]))
        broken = f", {rate.broken} broken" if rate.broken else ""
        print(
            f"{name.ljust(width)}  {rate.successes}/{rate.episodes} = {100 * rate.successes / rate.episodes:.1f} % "
            f"[{100 * rate.low:.0f}, {100 * rate.high:.0f}]{broken}"
        )
    for row in rows:
        if row["broken"]:
            print(f"broken         {row['simulator']}, episode {row['episode']}: {row['failure']}")
    pairs = zip(found["imagined_mse"], found["still_mse"], strict=True)
    errors = ", ".join(f"{own:.3g} ({still:.3g})" for own, still in pairs if own is not None)
    if errors:
        print(f"imagined       mean square error of each frame of a chunk, in latent units (standing still): {errors}")
    timing = found.get("timing", {})
    if "chunk_seconds" in timing:
        p50, p95 = (timing["chunk_seconds"][name] for name in ("p50", "p95"))
        print(f"seconds/chunk  p50 {p50:.4f}, p95 {p95:.4f}, of up to {timing['batch']} episodes at once")
        print(f"seconds        {timing['seconds']:.1f} for {timing['episodes']} episodes")
