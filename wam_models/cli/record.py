"""``wam record``: demonstrations of scripted experts, as a data set in LeRobot layout."""

from __future__ import annotations

import time

from tqdm import tqdm

from ..data import LeRobotDataset
from ..runtime.checks import writable_folder
from ..simulator.process import SimulatorFailure
from ..simulator.record import RecordConfig, record
from .parser import UserError


def run(args) -> int:
    """``wam record``."""
    names = list(dict.fromkeys(args.simulator))
    writable_folder("--out", args.out)
    config = RecordConfig(
        episodes=args.episodes, held_out=args.held_out, seed=args.seed, interrupted=args.interrupted,
        picture_every=args.picture_every,
    )  # fmt: skip
    cameras = {camera: (args.size, args.size) for camera in args.camera or ()}
    if args.picture_every > 1 and not cameras:
        raise ValueError("--picture-every needs --camera: without one, nothing is rendered")
    began = time.perf_counter()
    try:
        rates = record(
            args.out, names, config, cameras=cameras, jobs=args.jobs, timeout=args.timeout, overwrite=args.overwrite,
            progress=lambda e: tqdm(e, desc="record", unit="demonstration", dynamic_ncols=True),
        )  # fmt: skip
    except SimulatorFailure as failure:
        raise UserError(str(failure)) from failure
    for name, (wanted, tried) in rates.items():
        print(f"{name}: {wanted} of {tried} attempts")
    data = LeRobotDataset(args.out, args.camera and f"observation.images.{args.camera[0]}")
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    frames = sum(e.length for e in data.episodes)
    splits = {split: sum(e.split == split for e in data.episodes) for split in ("train", "held_out")}
    counts = ", ".join(f"{count} {split}" for split, count in splits.items())
    what = f"{len(data.episodes)} episodes ({counts}), {frames} frames at {data.fps:g} Hz, {size / 1e6:.1f} MB"
    print(f"{args.out}: {what}, in {time.perf_counter() - began:.0f} s")
    return 0
