"""A training step of this library's model, against OpenWAM's of the same weights and tokens, on a CPU.

    python -m bench.suites training_openwam

Needs ``openwam``, as in requirements/test.txt. A step is the loss of one packed sample, its backward and AdamW: of
``wam`` ``training_step`` and the fused AdamW of a training; of ``openwam``, unmodified, ``forward_train_from_latents``
and AdamW as its configs have it, neither fused nor over lists. Dual expert, sizes as in the suite ``openwam``, the
``joint`` program at one chunk size and window. Both take turns in one process, each drawing its own noise; before a
speed is printed, two chunks that both models denoise from the same noise are compared. ``peak_MB`` is what a step takes
beyond weights, gradients and moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from tqdm import tqdm

from bench import harness
from bench.harness import Options
from bench.rows import Row
from bench.workloads import openwam
from wam_models import WorldActionModel, load_weights
from wam_models.train.samples import StepConfig
from wam_models.train.step import training_step

PROGRAM = "joint"
SIZES, FRAME = openwam.SIZES, openwam.FRAME


def our_step(model: WorldActionModel, frames: int) -> Callable[[], None]:
    generator, c = torch.Generator().manual_seed(0), model.config
    batch = {
        "video": torch.randn(1, c.latent_channels, frames, FRAME["height"], FRAME["width"], generator=generator),
        "action": torch.randn(1, frames, c.actions_per_frame, c.action_dim, generator=generator),
        "text": torch.randn(1, openwam.TEXT_TOKENS, c.text_dim, generator=generator),
    }
    config = StepConfig(
        program=PROGRAM, history="video_only", chunk_sizes=(SIZES["chunk"],) * 2, windows=(SIZES["window"],) * 2
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        training_step(model, batch, generator, config)[0].backward()
        optimizer.step()

    return step


def their_step(pipeline: Any, frames: int) -> Callable[[], None]:
    learned = [p for p in pipeline.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        learned, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, foreach=False, fused=False
    )  # fmt: skip

    def step() -> None:
        openwam.train_step(pipeline, frames, "openwam")
        optimizer.step()

    return step


def rows(options: Options) -> Iterable[Row]:
    cases = {576: 8} if options.quick else openwam.FRAMES
    repeats = 1 if options.quick else 5
    openwam.compared(PROGRAM, 2)
    for tokens, frames in tqdm(cases.items(), desc="training, openwam", unit="case"):
        pipeline = openwam.make_pipeline("dual_expert", PROGRAM, frames)
        model = WorldActionModel(openwam.wam_config())
        load_weights(model, openwam.golden_names(pipeline))
        calls = {"openwam": their_step(pipeline, frames), "wam": our_step(model, frames)}
        times = harness.measure(calls, "cpu", repeats)
        peaks = {name: harness.peak_megabytes(call, "cpu") for name, call in calls.items()}
        for name, t in times.items():
            yield {
                "program": PROGRAM, "tokens": tokens, "provider": name, "dtype": "float32",
                "parameters": sum(p.numel() for p in model.parameters()),
                **{key: round(value, 1) for key, value in t.items()},
                "peak_MB": round(peaks[name], 1),
                "ratio": round(times["openwam"]["ms"] / t["ms"], 2),
                "ratio_min": round(times["openwam"]["ms_min"] / t["ms_min"], 2),
                "ratio_peak": round(peaks["openwam"] / peaks[name], 2),
            }  # fmt: skip
