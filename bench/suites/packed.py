"""A packed training with its loader, against the same steps on packs that are in memory already.

    python -m bench.suites packed

The ratio of ``loader`` is its tokens a second over those of ``memory``: what is left of the speed when clips are drawn,
cut, and balanced beside the steps. ``ratio_cpu`` is of CPU seconds of all threads, for a machine that others use. Two
trainings of one seed take turns, a block of steps each, on the demonstrations of ``data/metaworld_demo``; before a
speed is printed, the losses of every step are compared. The model is that of ``recipes/tiny.toml``, 256 wide.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from itertools import islice

import torch
from tqdm import tqdm

from bench import harness
from bench.harness import Options
from bench.rows import ROOT, Row
from wam_models.data import ClipDataset
from wam_models.train.config import TrainConfig
from wam_models.train.recipe import Recipe
from wam_models.train.trainer import Trainer

WIDTH, TOKENS, BLOCK, BLOCKS = 256, 2_000, 5, 6  # steps of a block; one more block is not timed


def packed_config() -> TrainConfig:
    found = Recipe.read(ROOT / "recipes/tiny.toml").train
    model = replace(found.model, hidden=WIDTH, ffn=4 * WIDTH, action_hidden=WIDTH, action_ffn=4 * WIDTH)
    return replace(found, model=model, tokens=TOKENS, frames=12, chunk_sizes=(1, 4), windows=(2, 16), steps=10**6)


def rows(options: Options) -> Iterable[Row]:
    config = packed_config()
    data = ClipDataset(ROOT / "data/metaworld_demo", actions_per_frame=config.actions_per_frame)
    device = torch.device(options.device)
    runs = {name: Trainer(config, data, seed=options.seed, device=device) for name in ("loader", "memory")}
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}  # by the clock, by CPU time
    block, blocks = (2, 1) if options.quick else (BLOCK, BLOCKS)
    with closing(runs["loader"].steps()) as coming:  # reads ahead from one block to the next, as in a training
        for turn in tqdm(range(blocks + 1), desc="packed", unit="block"):
            found = {}
            for name, run in runs.items():
                packs: Iterable = islice(coming, block)
                if name == "memory":
                    with closing(run.steps()) as its:
                        packs = list(islice(its, block))
                begin = time.perf_counter(), time.process_time()
                found[name] = [run.train_step(step) for step in packs]
                end = time.perf_counter(), time.process_time()
                if turn:
                    tokens = sum(row["tokens"] for row in found[name])
                    rates[name].append((tokens / (end[0] - begin[0]), tokens / (end[1] - begin[1])))
            ours, theirs = (torch.tensor([row["loss"] for row in found[name]]) for name in runs)
            harness.require_equal("losses of the loader's steps", ours, theirs, 1e-6)
    medians = {name: [statistics.median(of) for of in zip(*values, strict=True)] for name, values in rates.items()}
    for name in runs:
        yield {
            "workload": "metaworld_demo", "provider": name, "tokens": TOKENS, "steps": block * blocks,
            "parameters": sum(p.numel() for p in runs[name].model.parameters()), "dtype": "float32",
            "tokens/s": round(medians[name][0]), "tokens/CPU s": round(medians[name][1]),
            "ratio": round(medians[name][0] / medians["memory"][0], 3),
            "ratio_cpu": round(medians[name][1] / medians["memory"][1], 3),
        }  # fmt: skip
