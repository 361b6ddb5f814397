"""Seconds of every chunk of a rollout: unmodified OpenWAM, and this library's model, same weights.

    python -m bench.suites rollout_openwam

Needs ``openwam``, as in requirements/test.txt. Dual expert, 4 layers, 256 (action expert 128) wide, 2 heads of 128,
32 video tokens and 4 actions a frame, chunks of 4 frames, window 64, 5 steps, 512 text tokens, float32. Both start from
the same frame and text and draw the same noise; before a speed is recorded, their chunks are compared as long as
nothing was evicted (later, the package computes its window anew, and the cache of ``wam`` keeps what training saw).
``s_chunk_N`` is the N-th chunk. A chunk of ``wam`` is ``propose`` and ``accept``, with the pass that makes it history;
the package does that in the next chunk.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from bench import harness
from bench.harness import Options
from bench.rows import Row
from bench.workloads import openwam
from wam_models import RolloutConfig, RolloutEngine, WorldActionModel, load_weights

CHUNKS, CHUNKS_OF_OTHERS = 40, 12  # `joint` first; each of the others takes the package minutes even so
SHOWN = (1, 2, 5, 10, 12, 20, 30, 40)
RTOL = 1e-4
SIZES = openwam.SIZES


@contextmanager
def recorded() -> Iterator[dict[str, list[Tensor]]]:
    """What the package draws: its text and frame with ``randn``, its noise with ``randn_like``."""
    drawn: dict[str, list[Tensor]] = {"randn": [], "randn_like": []}
    originals = {name: getattr(torch, name) for name in drawn}

    def recorder(name: str):
        def draw(*args, **kwargs):
            drawn[name].append(originals[name](*args, **kwargs))
            return drawn[name][-1].clone()

        return draw

    for name in drawn:
        setattr(torch, name, recorder(name))
    try:
        yield drawn
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def compared(program: str, chunks: int) -> dict[str, list[float]]:
    """Seconds of every chunk of both providers.

    Raises:
        RuntimeError: a chunk within the window that differs.
    """
    pipeline = openwam.make_pipeline("dual_expert", program)
    with recorded() as drawn:
        theirs, results = openwam.episode(pipeline, chunks, "openwam")
    model = WorldActionModel(openwam.wam_config())
    load_weights(model, openwam.golden_names(pipeline))
    config = RolloutConfig(
        program=program, chunk_size=SIZES["chunk"], window=SIZES["window"], steps=SIZES["steps"], history="video_only"
    )  # fmt: skip
    frame = results["1"][:, :, :1]
    (text,) = (t for t in drawn["randn"] if t.shape == (1, openwam.TEXT_TOKENS, model.config.text_dim))
    episode = RolloutEngine(model.eval(), config).start(frame, text)
    ours = []
    for i in range(chunks):
        # one draw for each stream, in the order in which the program resolves them
        video, action = sorted(drawn["randn_like"][2 * i : 2 * i + 2], key=lambda t: -t.ndim)
        begin = time.perf_counter()
        candidate = episode.propose(video_noise=video, action_noise=action.unflatten(1, (SIZES["chunk"], -1)))
        episode.accept(candidate)
        ours.append(time.perf_counter() - begin)
        assert candidate.action is not None and candidate.video is not None  # both were asked for
        if (i + 1) * SIZES["chunk"] < SIZES["window"] // 2 * SIZES["chunk"]:
            harness.require_equal(
                f"{program}, chunk {i + 1}", candidate.action.flatten(1, 2), results[str(3 * i)], RTOL
            )
            latents = results[str(3 * i + 1)][:, :, -SIZES["chunk"] :]
            harness.require_equal(f"{program}, chunk {i + 1}", candidate.video, latents, RTOL)
    return {"openwam": theirs, "wam": ours}


def rows(options: Options) -> Iterable[Row]:
    programs = sorted(openwam.openwam_package().PROGRAMS, key=lambda program: program != "joint")
    for program in tqdm(programs, desc="rollout, openwam", unit="program"):
        chunks = 3 if options.quick else CHUNKS if program == "joint" else CHUNKS_OF_OTHERS
        times = compared(program, chunks)
        for provider, seconds in times.items():
            yield {
                "program": program, "provider": provider, "dtype": "float32", "chunks": chunks,
                **{f"s_chunk_{n}": round(seconds[n - 1], 4) for n in SHOWN if n <= chunks},
                "s_max_after_first": round(max(seconds[1:]), 4), "s_total": round(sum(seconds), 2),
                "ratio_last": round(times["openwam"][-1] / seconds[-1], 1),
                "ratio_total": round(sum(times["openwam"]) / sum(seconds), 1),
            }  # fmt: skip
