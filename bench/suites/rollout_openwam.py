"""Seconds of every chunk of a rollout: unmodified OpenWAM, and this library's model, same weights.

    python -m bench.suites rollout_openwam

Needs ``openwam``, as in requirements/test.txt. Dual expert, 4 layers, 256 (action expert 128) wide, 2 heads of 128,
32 video tokens and 4 actions a frame, chunks of 4 frames, window 64, 5 steps, 512 text tokens, float32. The package has
``use_cache`` on, which keeps keys of the history from one step of a stage to the next: of its options of inference the
only one that its dual expert reads beside steps and sizes. Both start from the same frame and text and draw the same
noise; before a speed is recorded, their chunks are compared as long as nothing was evicted (later, the package computes
its window anew, and the cache of ``wam`` keeps what training saw).
``s_chunk_N`` is the N-th chunk. A chunk of ``wam`` is ``propose`` and ``accept``, with the pass that makes it history;
the package does that in the next chunk.
"""

from __future__ import annotations

from collections.abc import Iterable

from tqdm import tqdm

from bench.harness import Options
from bench.rows import Row
from bench.workloads import openwam

CHUNKS = 40
SHOWN = (1, 2, 5, 10, 12, 20, 30, 40)


def rows(options: Options) -> Iterable[Row]:
    programs = sorted(openwam.openwam_package().PROGRAMS, key=lambda program: program != "joint")
    for program in tqdm(programs, desc="rollout, openwam", unit="program"):
        chunks = 3 if options.quick else CHUNKS
        times = openwam.compared(program, chunks)
        for provider, seconds in times.items():
            yield {
                "program": program, "provider": provider, "dtype": "float32", "chunks": chunks,
                **{f"s_chunk_{n}": round(seconds[n - 1], 4) for n in SHOWN if n <= chunks},
                "s_max_after_first": round(max(seconds[1:]), 4), "s_total": round(sum(seconds), 2),
                "ratio_last": round(times["openwam"][-1] / seconds[-1], 1),
                "ratio_total": round(sum(times["openwam"]) / sum(seconds), 1),
            }  # fmt: skip
