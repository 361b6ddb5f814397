"""Latency and memory over the length of an episode: a chunk must cost the same at its end.

python -m bench.suites streaming

One episode of ``joint`` at LIBERO geometry, chunk 4, window 30, that imagines on; the time of a chunk is that of
``propose`` and ``accept``. Providers: ``wam`` (persistent cache), ``wam recomputed`` (the window computed anew before
each chunk, as rollouts of OpenWAM do), and at some chunks ``packed``: the whole visible history in every denoising
step, no cache. A chunk of each cache is compared with the packed one before anything is timed.

CPU: the demo's model, float32, 5 steps, 40 chunks. CUDA: full size, bf16, 4 steps (so that an episode of 500 chunks
fits), every 10th chunk recorded as the median of ten; the first includes compilation and the capture of a graph.
``held_MB`` is what the process (on CUDA the device) holds after the chunk beyond what it held before the first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm

from bench import harness
from bench.harness import Options
from bench.rows import Row
from bench.workloads.models import make_model
from bench.workloads.rollout import (
    GRIDS,
    accepted_history,
    make_episode,
    noise_for,
    packed_chunk,
    require_equal_chunks,
)
from wam_models import RolloutConfig
from wam_models.config import demo_config, wan_5b_config
from wam_models.rollout import Episode
from wam_models.rollout.config import CACHES

GRID = GRIDS["libero"]


def milliseconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def chunk(episode: Episode, seed: int) -> None:
    episode.accept(episode.propose(**noise_for(episode, GRID, seed)))


def rows(options: Options) -> Iterable[Row]:
    device, cuda = options.device, options.device == "cuda"
    size, dtype = (wan_5b_config(), torch.bfloat16) if cuda else (demo_config(), torch.float32)
    config = RolloutConfig(program="joint", history="video_only", window=30, steps=4 if cuda else 5)
    chunks, span = (100 if options.quick else 500, 10) if cuda else (6 if options.quick else 40, 1)
    every = 20 if cuda else 3 if options.quick else 8  # chunks between two of the packed provider
    small = make_model(replace(size, layers=2), device, dtype, options.seed).eval().requires_grad_(False)
    for cache in CACHES:
        require_equal_chunks(small, replace(config, steps=2, cache=cache), GRID, options.seed, 3e-2 if cuda else 1e-4)
    model = make_model(size, device, dtype, options.seed).eval().requires_grad_(False)
    configs = {"wam": config, "wam recomputed": replace(config, cache="recomputed")}
    episodes = {name: make_episode(model, c, GRID, 0, options.seed) for name, c in configs.items()}
    _, text = episodes["wam"]
    times: dict[str, list[float]] = {name: [] for name in (*episodes, "packed")}
    begun = harness.held_megabytes(device)
    for n in tqdm(range(chunks), desc="streaming", unit="chunk"):
        memory = {}
        for name, (episode, _) in episodes.items():
            times[name].append(milliseconds(partial(chunk, episode, n), device))
            memory[name] = harness.held_megabytes(device)
        if n == 0 or n % every == every - 1:
            episode = episodes["wam"][0]
            noise, at = noise_for(episode, GRID, n), episode.next_frame[0]
            call = lambda: packed_chunk(model, config, accepted_history(episode), at, text, noise)  # noqa: B023, E731
            times["packed"].append(milliseconds(call, device))
            memory["packed"] = harness.held_megabytes(device)
        if n == 0 or n % span == span - 1:
            yield from (
                {
                    "program": config.program,
                    "provider": name,
                    "chunk": n,
                    "frames": (n + 1) * config.chunk_size + 1,
                    "steps": config.steps,
                    "window": config.window,
                    "dtype": str(dtype),
                    "ms": round(statistics.median(times[name][-span:] if name in episodes else times[name][-1:]), 3),
                    "held_MB": round(memory[name] - begun, 1),
                }
                for name in memory
                if times[name]
            )
