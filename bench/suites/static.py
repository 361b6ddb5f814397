"""What the compiled code of the attention kernels allows an H100 to do: counted from SASS, predicted, nothing timed.

    python -m bench.suites static

Runs on any machine: Triton kernels are compiled ahead of time, those of CUDA are in the extension, and both are
disassembled by what triton brings. For every step (a turn of the innermost loop with a product) the clocks of an SM for
a block: tensor cores, issue, MUFU, ALU, shared memory, L2, and the chain of one warpgroup; the largest is the limit and
gives TFLOP/s of computed pairs. The model, its assumptions and what it cannot tell: ``bench/static/model.py`` and
docs/benchmarks.md. Rows with ``published`` are what peers' authors report of full masks, not measured here.
"""

from __future__ import annotations

from collections.abc import Iterable

from bench.harness import Options
from bench.rows import Row
from bench.static.kernels import Counted, all_kernels

DTYPE = "bfloat16"
SOURCE = "kernel benchmarks published by MagiAttention, H100, full mask of 32k tokens"
# provider -> TFLOP/s forward and backward at head dim 128
PUBLISHED = {
    "FlashAttention-3": (700, 600),
    "MagiAttention FFA": (635, 576),
    "FlexAttention (Triton)": (390, 288),
    "FlashMask": (360, 299),
}


def row_of(found: Counted) -> Row:
    step = found.predicted
    return {
        "predicted": True, "op": found.op, "what": found.what, "provider": found.provider, "D": found.head_dim,
        "dtype": DTYPE, "rows": found.rows, "step": found.step, "warps": found.block.warps,
        "blocks_an_SM": found.block.an_sm, "registers": found.block.registers, "instructions": step.instructions,
        "producer_instructions": found.producer, "spills": found.loop.count("LDL", "STL"),
        **{f"{name}_clocks": round(clocks) for name, clocks in step.clocks.items()},
        "limit": step.limit, "TFLOP/s": round(step.tflops),
    }  # fmt: skip


def published() -> Iterable[Row]:
    for provider, speeds in PUBLISHED.items():
        for what, speed in zip(("forward", "backward"), speeds, strict=True):
            yield {"published": SOURCE, "op": "attention", "what": what, "provider": provider, "D": 128,
                   "dtype": DTYPE, "TFLOP/s": speed}  # fmt: skip


def rows(options: Options) -> Iterable[Row]:
    for found in all_kernels():
        yield row_of(found)
    yield from published()
