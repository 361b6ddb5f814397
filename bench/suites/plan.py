"""Building plans: milliseconds of a cold and of a warm ``compile_plan``, of a cold frame index, and of the dense mask.

python -m bench.suites plan

A training step draws its chunk size and window, so a plan is built for every step: it must cost a few milliseconds at
100,000 packed tokens. Cold means that nothing about the geometry is cached; warm that the plan itself is. One thread.
"plan cold" makes what Triton walks (and the CPU's runs), "plan cold cpu" the runs alone, "plan cold boxes" what CUDA's
kernels walk; "plan warm" is what a call of ``compile_plan`` costs whose plan is there.
A plan compiles equal samples once; the workload "libero mixed" has none, as a batch of training that draws everything.
Before anything is timed, the plan is compared with the predicate: its pairs, and every entry of a mask that is small
enough to build. ``cpu_ms_min`` is the least CPU time of 20 calls: what the code costs. ``ms`` is what a busy machine
makes of it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any

import torch
from tqdm import tqdm

from bench import harness
from bench.harness import Options
from bench.rows import Row
from bench.workloads.attention import (
    CHUNKS,
    LENGTHS,
    LIBERO,
    ROBOTWIN,
    WINDOWS,
    Workload,
    cold_plan,
    count_pairs,
    packed,
    visible_kinds,
)
from wam_kernels import PROGRAMS, FrameIndex, Geometry, Plan
from wam_kernels.frame_index import forget_frame_indices

REPEATS = 20
SIZE: dict[str, Any] = {"heads": 1, "head_dim": 64}
MASK_TOKENS = 5_000  # the largest dense mask that is built for comparison: it is what a plan replaces


def rows(options: Options) -> Iterable[Row]:
    lengths = [n for n in LENGTHS if not options.quick or n in (1_000, 10_000, 100_000)]
    works = [packed(n, chunk=c, window=w, **SIZE) for n in lengths for c, w in ((4, 64), (1, 8))]
    works += [packed(n, per_frame=ROBOTWIN, window=30, **SIZE) for n in lengths if n >= 10_000]
    works += [mixed(n) for n in lengths if n >= 10_000]
    for work in tqdm(works, desc="plan", unit="workload"):
        plan = cold_plan(work, options.device, "triton")
        require_predicate(work, plan)

        def cold(impl: str, work=work) -> None:
            cold_plan(work, options.device, impl)
            _synchronize(options.device)

        def warm(work=work) -> None:
            work.plan(options.device, "triton")

        def frames(work=work) -> None:
            forget_frame_indices()
            lengths = [g.video_tokens for g in work.samples for _ in range(2 * g.video_frames)]
            FrameIndex.from_runs(lengths, device=options.device)
            _synchronize(options.device)

        calls: dict[str, Callable[[], object]] = {
            "plan cold cpu": partial(cold, "cpu"),
            "plan cold boxes": partial(cold, "cuda"),
            "plan cold": partial(cold, "triton"),  # as all plans were before each backend had a form of its own
            "plan warm": warm,  # after a call that made what it looks for
            "frame index cold": frames,
        }
        times = harness.measure(calls, "cpu", REPEATS)  # the host's clock: this is work of the host
        cpu = harness.measure(calls, "cpu", REPEATS, time.thread_time)
        if work.tokens <= MASK_TOKENS:
            times |= harness.measure({"dense mask": plan.mask}, "cpu", 3)
        for provider, t in times.items():
            yield {
                "workload": work.name,
                "tokens": work.tokens,
                "samples": len(work.samples),
                "provider": provider,
                "cpu_ms_min": round(cpu[provider]["ms_min"], 4) if provider in cpu else None,
                **{key: round(value, 4) for key, value in t.items()},
                "tiles": plan.queries.tiles.shape[0],
                "ranges": plan.queries.bounds.shape[1],
                "plan_MB": round(sum(x.numel() for x in plan.tensors()) * 4 / 1e6, 3),
                "efficiency": round(plan.efficiency, 4),
            }


def require_predicate(work: Workload, plan: Plan) -> None:
    """Every pair of a plan that is small enough for a dense mask, and the number of pairs of any.

    Raises:
        RuntimeError: the plan is not what the predicate says.
    """
    pairs = sum(count_pairs(g) * n for g, n in Counter(work.samples).items())
    if plan.visible_pairs != pairs:
        raise RuntimeError(f"bench: the plan of {work.name} is wrong: {plan.visible_pairs} visible pairs, not {pairs}")
    if work.tokens <= MASK_TOKENS:
        mask = torch.zeros(work.tokens, work.tokens, dtype=torch.bool)
        for start, geometry in zip(work.starts, work.samples, strict=False):
            attends, kind = visible_kinds(geometry, mask.device)
            rows = slice(start, start + geometry.length)
            mask[rows, rows] = attends[kind][:, kind]
        if not torch.equal(plan.mask()[0, 0].cpu(), mask):
            raise RuntimeError(f"bench: the plan of {work.name} is wrong: its mask is not the predicate's")


def mixed(target: int) -> Workload:
    """At least ``target`` tokens of samples that all differ: 40 to 68 frames, every program, chunk size and window."""
    kinds = list(product(PROGRAMS, CHUNKS, WINDOWS))
    samples: list[Geometry] = []
    while sum(g.length for g in samples) < target:
        # strides without a factor in common with the 54 kinds and the 29 numbers of frames: all of them come up
        program, chunk, window = kinds[25 * len(samples) % len(kinds)]
        frames = 40 + 11 * len(samples) % 29
        sample = Geometry(
            program=program, video_frames=frames, video_tokens=LIBERO[0], action_frames=frames,
            action_tokens=LIBERO[1], chunk_size=chunk, window=window, history="video_only",
        )  # fmt: skip
        samples.append(sample)
    return Workload("libero mixed", tuple(samples), **SIZE)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
