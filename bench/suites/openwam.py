"""Unmodified OpenWAM against OpenWAM with ``wam_kernels.integrations.openwam.install()``: the real package, on a CPU.

    python -m bench.suites openwam

Needs ``openwam``, as in requirements/test.txt. Three things are timed, both ways in one run, with the same weights and
draws:

- training step: forward, loss and backward of ``forward_train_from_latents`` on one packed sample;
- rollout chunk: one ``VariantRolloutRunner.infer_step`` over a history that fills the sequence, after the chunk before;
- episode: every chunk of a rollout from one observed frame.

Sizes: 4 layers, 256 (action expert 128) wide, 2 heads of 128, 32 video tokens and 4 actions a frame, chunks of 4
frames, window 64, 5 steps, 512 text tokens. Before a speed is printed, losses, gradients, actions and latents are
compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from torch import Tensor
from tqdm import tqdm

from bench import harness
from bench.harness import Options
from bench.rows import Row
from bench.workloads.openwam import (
    FRAMES,
    RTOL,
    SIZES,
    Chunk,
    episode,
    make_pipeline,
    openwam_package,
    train_step,
)

PROGRAM = "joint"


def require_same(what: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    if ours.keys() != theirs.keys():
        raise RuntimeError(
            f"bench: {what} gives {sorted(ours.keys() ^ theirs.keys())} for one provider only; no speed for it"
        )
    for name, expected in theirs.items():
        if expected.any():
            harness.require_equal(f"{what}: {name}", ours[name], expected, RTOL)


def compare(run: Callable[[str], tuple[float, dict[str, Tensor]]], what: str, repeats: int) -> dict[str, dict]:
    """Times of both providers, which take turns; every round is compared. The first round is not timed."""
    times: dict[str, list[float]] = {"openwam": [], "wam": []}
    for turn in range(repeats + 1):
        results = {}
        for name, values in times.items():
            ms, results[name] = run(name)
            if turn:
                values.append(ms)
        require_same(what, results["wam"], results["openwam"])
    return {name: harness.percentiles(values) for name, values in times.items()}


def rows_of(what: str, architecture: str, tokens: int, times: dict[str, dict]) -> list[Row]:
    return [
        {
            "what": what, "architecture": architecture, "program": PROGRAM, "tokens": tokens, "dtype": "float32",
            "provider": name,
            **{key: round(value, 1) for key, value in t.items()},
            "ratio": round(times["openwam"]["ms"] / t["ms"], 2),
            "ratio_min": round(times["openwam"]["ms_min"] / t["ms_min"], 2),
        }
        for name, t in times.items()
    ]  # fmt: skip


def rows(options: Options) -> Iterable[Row]:
    sizes = {576: 8} if options.quick else FRAMES
    repeats = 1 if options.quick else 2
    for architecture in tqdm(openwam_package().ARCHITECTURES, desc="openwam", unit="architecture"):
        for tokens, frames in sizes.items():
            pipeline = make_pipeline(architecture, PROGRAM, frames)

            def step(provider: str, pipeline=pipeline, frames=frames) -> tuple[float, dict[str, Tensor]]:
                begin = time.perf_counter()
                results = train_step(pipeline, frames, provider)
                return (time.perf_counter() - begin) * 1e3, results

            yield from rows_of("training step", architecture, tokens, compare(step, "training step", repeats))
        for tokens, frames in sizes.items() if not options.quick else [(1_152, 16)]:
            chunk = Chunk(make_pipeline(architecture, PROGRAM), frames - SIZES["chunk"])
            yield from rows_of("rollout chunk", architecture, tokens, compare(chunk.run, "rollout chunk", repeats))
    chunks = 3 if options.quick else 20
    pipeline = make_pipeline("dual_expert", PROGRAM)
    runs = {name: episode(pipeline, chunks, name) for name in ("openwam", "wam")}
    require_same("episode", runs["wam"][1], runs["openwam"][1])
    for name, (seconds, _) in runs.items():
        marks = {f"s_chunk_{i}": round(seconds[i - 1], 3) for i in (1, 2, 5, 10, 20, 40) if i <= chunks}
        yield {
            "what": "episode", "architecture": "dual_expert", "program": PROGRAM, "dtype": "float32", "provider": name,
            "chunks": chunks, **marks, "s_total": round(sum(seconds), 2),
        }  # fmt: skip
