"""What video_then_action acts by: its actions' error beside the true, the imagined and a repeated future.

    python -m tools.exposure RUN DATA > docs/results/exposure.jsonl

RUN is the folder of `wam ablate`, DATA a data set of states with held-out episodes. Each chunk is proposed from the
real history; errors are root mean squares over all held-out episodes, in the policy's units.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wam_kernels.masks.visibility import VIDEO
from wam_models.data import LeRobotDataset
from wam_models.rollout import RolloutEngine
from wam_models.rollout.policy import Policy

PROGRAM, BASELINE = "video_then_action", "joint"
FUTURES = {BASELINE: ("imagined",), PROGRAM: ("imagined", "true", "repeated")}
SEEDS, CHUNKS, WINDOW = (0, 1, 2), (2, 4), 4


def errors(policy: Policy, dataset: LeRobotDataset, program: str, chunk: int, future: str) -> dict[str, Any]:
    """Of the actions; where the future is imagined, also of it and of the last frame repeated."""
    config = replace(policy.rollout, program=program, chunk_size=chunk, window=WINDOW, steps=1)
    actions: list[Tensor] = []
    imagined: list[Tensor] = []
    still: list[Tensor] = []
    for number in [e.index for e in dataset.episodes if e.split != "train"]:
        clip = policy.clip(dataset, number)
        video, action = clip["video"], clip["action"]
        chunks = (video.shape[2] - 1) // chunk
        if not chunks:
            continue
        episode = RolloutEngine(policy.model, config).start(video[:, :, :1], policy.text([clip["text"]]))
        generator = torch.Generator().manual_seed(number)
        run_clean = episode.forward.run_clean
        for first in range(1, 1 + chunks * chunk, chunk):
            true, reached = video[:, :, first : first + chunk], action[:, first : first + chunk]
            last = video[:, :, first - 1 : first].expand_as(true)
            given = {"true": true, "repeated": last, "imagined": None}[future]

            def with_future(streams, *more, given=given, episode=episode, inner=run_clean):
                if given is not None and VIDEO in streams:
                    episode.chunk[VIDEO].copy_(given)
                return inner(streams, *more)

            episode.forward.run_clean = with_future  # type: ignore[method-assign]
            candidate = episode.propose(generator=generator)
            episode.forward.run_clean = run_clean  # type: ignore[method-assign]
            actions.append((candidate.action - reached).square().flatten())
            if future == "imagined":
                imagined.append((candidate.video - true).square().mean())
                still.append((last - true).square().mean())
            episode.observe(true, reached)
    squares = torch.cat(actions)
    found = {"action_rmse": squares.mean().sqrt().item(), "actions": len(squares) // len(policy.action_mean)}
    if imagined:
        found |= {"frame_mse": torch.stack(imagined).mean().item(), "still_mse": torch.stack(still).mean().item()}
    return found


def rows(run: Path, data: Path) -> Iterator[dict[str, Any]]:
    """One for each seed, program, chunk and future."""
    dataset = LeRobotDataset(data)
    for seed in SEEDS:
        for program, futures in FUTURES.items():
            policy, _ = Policy.load(run / "state" / program / f"seed{seed}" / "policy", training=False)
            for chunk in CHUNKS:
                for future in futures:
                    head = {
                        "what": "exposure",
                        "program": program,
                        "seed": seed,
                        "chunk": chunk,
                        "steps": 1,
                        "future": future,
                    }
                    yield head | errors(policy, dataset, program, chunk, future)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for row in rows(Path(sys.argv[1]), Path(sys.argv[2])):
        print(json.dumps(row), flush=True)
