"""``wam rollout``: predict one recorded episode chunk by chunk, show how fast and how well."""

from __future__ import annotations

import resource
import sys
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from .data import LeRobotDataset
from .data.clips import STRIDE
from .evaluate import mean_psnr, rmse, stream
from .objectives import GJD, MODEL_PROGRAMS, OBJECTIVES
from .pictures import film
from .policy import Policy
from .rollout import CONDITIONAL_CHUNK, RolloutEngine
from .train import check_device


def run(args) -> int:
    """``wam rollout``."""
    objective = args.objective or "joint"
    if objective not in OBJECTIVES:
        raise ValueError(f"--objective must be one of {tuple(OBJECTIVES)}, got {objective!r}")
    goal = OBJECTIVES[objective]
    if args.program is not None and args.program not in MODEL_PROGRAMS:
        raise ValueError(f"--program must be one of {MODEL_PROGRAMS}, got {args.program!r}")
    if goal.conditional and args.program not in (None, GJD):
        raise ValueError(f"--program must be {GJD} for --objective {objective}, got {args.program}; leave it out")
    device = check_device(args.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    policy, _ = Policy.load(args.checkpoint, device)
    dataset = LeRobotDataset(args.data)
    number = args.episode
    if number is None:
        number = next((e.index for e in dataset.episodes if e.split and e.split != "train"), 0)
    if number >= len(dataset.episodes):
        raise ValueError(f"--episode must be below {len(dataset.episodes)}, got {number}")
    clip = policy.clip(dataset, number)

    config = policy.rollout
    config = replace(config, program=GJD if goal.conditional else args.program or config.program)
    config = replace(config, steps=args.steps or config.steps)
    size = CONDITIONAL_CHUNK if goal.conditional else config.chunk_size
    frames = clip["video"].shape[2]
    total = (frames - 1) // size
    if total < 1:
        raise ValueError(f"--episode {number} has {frames} latent frames, too few for one chunk of {size}")
    with torch.no_grad():
        text = policy.text([clip["text"]])
    chunks = stream(
        RolloutEngine(policy.model, config), clip["video"], clip["action"], text, objective=objective,
        generator=torch.Generator().manual_seed(args.seed), closed_loop=not args.open_loop,
    )  # fmt: skip
    done = list(tqdm(chunks, total=total, desc="rollout", unit="chunk", dynamic_ncols=True))

    seconds = np.array([c.seconds for c in done])
    p50, p95 = np.percentile(seconds, [50, 95])
    actions = size * clip["action"].shape[2]
    split = dataset.episodes[number].split or "no split"
    print(f'episode        {number} ({split}), {frames} latent frames: "{clip["text"]}"')
    print(
        f"objective      {objective}, program {config.program}, {config.steps} denoising steps, {policy.model.device}"
    )
    history = "predicted frames become history" if args.open_loop else "recorded frames become history"
    print(f"chunks         {len(done)} of {size} frames ({actions} actions); {history}")
    print(f"seconds/chunk  p50 {p50:.4f}, p95 {p95:.4f}")
    print(f"actions/second {actions / p50:.1f} (the recording runs at {dataset.fps:g})")
    print(f"peak memory    {_peak_memory(device)}")

    span = slice(1, 1 + len(done) * size)
    if goal.action:
        guess, real = torch.cat([c.action.cpu() for c in done], 1), clip["action"][:, span]
        print(f"action error   {rmse(guess, real, policy.varying):.3f} (units of the training split's std)")
    if goal.video:
        imagined = policy.codec.decode(torch.cat([clip["video"][:, :, :1], *(c.video.cpu() for c in done)], 2)[0])
        real = clip["frames"][: len(imagined)]
        print(f"video          {mean_psnr(imagined[None, 1:], real[None, 1:]):.2f} dB PSNR")
        path = (args.out or args.checkpoint) / f"episode{number:03d}_{objective}_{config.program}.gif"
        film({"real": real, "imagined": imagined}, path, milliseconds=round(1000 * STRIDE / dataset.fps))
        print(f"written        {path}")
    return 0


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB on {device}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kilobytes on Linux, bytes on macOS
    return f"{peak / (2**20 if sys.platform == 'darwin' else 2**10):.0f} MiB (whole process)"
