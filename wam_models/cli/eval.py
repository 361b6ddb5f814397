"""``wam eval``: how often a policy succeeds in simulators, with intervals, and its errors on recorded episodes; every
episode is stored, with a film where asked."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..checkpoint import saved_as
from ..draw.charts import save_film
from ..evaluate import RECORDED_CHUNKS, fewest_frames, joint_errors
from ..objectives import MODEL_PROGRAMS
from ..rollout.policy import Policy
from ..runtime.checks import check_device, choice, writable_folder
from ..runtime.files import new_file
from ..runtime.json_fields import read_json
from ..runtime.threads import restores_threads, set_threads
from ..simulator.evaluate import EpisodeResult, Rate, Task, evaluate, summary
from ..simulator.named import file_name
from ..simulator.process import Description, SimulatorFailure, SimulatorPool
from .eight_bit import check_eight_bit_flags, with_eight_bits
from .live import drawing
from .parser import UserError


@restores_threads
def run(args) -> int:
    """``wam eval``."""
    names = list(dict.fromkeys(args.simulator))
    if not names and args.data is None:
        raise ValueError("--simulator or --data must say what to evaluate on; give --simulator metaworld/reach-v3, say")
    if args.films is not None and not names:
        raise ValueError("--films needs --simulator: what is recorded has a film by wam rollout --data")
    check_eight_bit_flags(args)
    device = check_device(args.device)
    if args.program is not None:
        choice("--program", args.program, MODEL_PROGRAMS)
    out = args.out or args.checkpoint.parent / "eval"
    writable_folder("--out, by default beside the checkpoint,", out)
    if args.films is not None:
        writable_folder("--films", args.films)
    policy, _ = Policy.load(args.checkpoint, device, training=False, robot=args.robot)
    given = {"program": args.program, "chunk_size": args.chunk, "steps": args.steps, "window": args.window}
    config = replace(policy.rollout, **{name: value for name, value in given.items() if value is not None})
    policy = replace(policy, rollout=config)
    saved = saved_as(args.checkpoint)
    settings = {
        "checkpoint": saved and saved[0], "simulators": names, "episodes": args.episodes, "seed": args.seed,
        "rollout": asdict(config), "horizon": args.horizon,
    }  # fmt: skip
    if args.eight_bit is not None:
        settings["eight_bit"] = [str(args.eight_bit), args.eight_bit_keep]
    clips = [] if args.data is None else _held_out(policy, args.data, args.episodes)
    rows = _read_rows(out, settings, overwrite=args.overwrite)
    policy = with_eight_bits(args, policy, config, out)
    if device.type == "cpu":
        set_threads(1)  # the simulators have the other cores
    print(f"program        {config.program}, chunks of {config.chunk_size}, {config.steps} denoising steps")
    found: dict = {"settings": settings}
    if names:
        found |= _play(args, policy, names, rows, out)
    if clips:
        found["recorded"] = {"data": str(args.data), **joint_errors(policy, clips, chunks=RECORDED_CHUNKS)}
        _print_recorded(found["recorded"])
    with new_file(out / "summary.json") as part:
        part.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written        {out}: {'episodes.jsonl, ' if names else ''}summary.json")
    return 0


def _play(args, policy: Policy, names: list[str], rows: list[dict], out: Path) -> dict:
    """Play what is left, and print and return the summary of all."""
    done = {(row["simulator"], row["episode"]) for row in rows}
    tasks = [Task(name, i, args.seed + i) for name in names for i in range(args.episodes) if (name, i) not in done]
    if rows and tasks:
        print(f"{len(rows)} episodes of {out} are kept, {len(tasks)} are left")
    seconds: list[float] = []
    began = time.perf_counter()
    batch = min(args.batch, len(tasks))
    if tasks:
        try:
            with SimulatorPool(batch, policy.cameras, timeout=args.timeout) as pool:
                results = evaluate(
                    policy, policy.rollout, tasks, batch=batch, horizon=args.horizon, chunk_seconds=seconds, pool=pool
                )
                for result in tqdm(results, total=len(tasks), desc="eval", unit="episode", dynamic_ncols=True):
                    rows.append(_store(out, result, frames=args.keep_frames))
                    if args.films is not None:
                        film_of(policy, result, pool.describe(result.simulator), args.films)
        except SimulatorFailure as failure:
            raise UserError(str(failure)) from failure
    took = time.perf_counter() - began
    rows.sort(key=lambda row: (names.index(row["simulator"]), row["episode"]))
    found = summary(rows)
    if tasks:
        found["timing"] = {"seconds": took, "episodes": len(tasks), "batch": batch}
        if seconds:
            found["timing"]["chunk_seconds"] = dict(zip(("p50", "p95"), np.percentile(seconds, [50, 95]), strict=True))
    _print(rows, found, names)
    return found


def _held_out(policy: Policy, root: Path, most: int) -> list[dict]:
    """Clips of the episodes of a data set that are not for training, of all where it does not say.

    Raises:
        ValueError: none is long enough for a chunk to observe and one to predict.
    """
    dataset = policy.dataset(root)
    chosen = [e for e in dataset.episodes if e.split != "train"] or list(dataset.episodes)
    least = fewest_frames(policy.rollout.chunk_size)
    clips = [policy.clip(dataset, e) for e in chosen if (e.length - 1) // policy.actions_per_frame + 1 >= least][:most]
    if not clips:
        raise ValueError(
            f"--data: {root} has no held-out episode of {least} latent frames or more; --chunk shortens them"
        )
    return clips


def film_of(policy: Policy, result: EpisodeResult, described: Description, folder: Path) -> Path | None:
    """Write a film of an episode beside what was imagined before each chunk; its name says whether it succeeded.

    Returns:
        None where there is nothing to show: the episode did not begin, or its states hold no places.
    """
    draw = drawing(policy, described)
    if draw is None or not result.frames:
        return None
    end = "success" if result.success else "broken" if result.broken else "failure"
    path = folder / f"{file_name(result.simulator)}_{result.episode:05d}_{end}.gif"
    real = np.stack(result.frames)
    expected = np.concatenate([real[:1], *result.imagined])[: len(real)]
    frames_a_second = described.control_freq / policy.actions_per_frame
    save_film(draw(real, expected, 0), path, round(1000 / frames_a_second))
    return path


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
        path = out / "frames" / file_name(result.simulator) / f"{result.episode:05d}.npz"
        with new_file(path) as part:
            imagined = np.stack(result.imagined) if result.imagined else np.empty((0, 0))
            np.savez(part, frames=np.stack(result.frames), imagined=imagined)
    with (out / "episodes.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def _print_recorded(found: dict) -> None:
    print(f"recorded       {found['episodes']} episodes of {found['data']}, each chunk from the real history")
    print(
        f"action error   {found['action_rmse']:.3f} (units of the training split's std; the last action repeated "
        f"{found['repeat_action_rmse']:.3f}, the mean action {found['mean_action_rmse']:.3f})"
    )
    frame, still = found["frame_rmse"], found["repeat_frame_rmse"]
    print(f"frame error    {frame:.3f} (in latent units; the last frame repeated {still:.3f})")


def _print(rows: Sequence[dict], found: dict, names: Sequence[str]) -> None:
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
