"""What the compiled code of the kernels allows an H100 to do: counted from SASS, predicted, nothing timed.

    python -m bench.suites static

Runs on any machine: Triton kernels are compiled ahead of time, those of CUDA are in the extension, and both are
disassembled by what triton brings. For every step (a turn of the innermost loop with a product) the clocks of an SM for
a block: tensor cores, issue, MUFU, ALU, shared memory, L2, and the chain of one warpgroup; the largest is the limit and
gives TFLOP/s of computed pairs. For the norms the clocks of a row, and the share of a copy's speed that they allow. The
model, its assumptions and what it cannot tell: ``bench/static/model.py`` and
docs/benchmarks.md. Rows with ``published`` are what peers' authors report of full masks, not measured here.
"""

from __future__ import annotations

from collections.abc import Iterable

from bench.harness import Options
from bench.rows import Row
from bench.static.kernels import Counted, cuda_kernels, extension_path, triton_kernels
from bench.static.norms import HEAD_DIM, WIDTH, CountedRow, cuda_rows, triton_rows
from bench.static.sass import disassemble

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


def row_of_norm(found: CountedRow) -> Row:
    return {
        "predicted": True, "op": found.op, "what": found.what, "provider": found.provider,
        "D": WIDTH if found.op == "adaln" else HEAD_DIM, "dtype": DTYPE, "rows": 1, "step": "row", "warps": found.warps,
        "instructions": len(found.loop.body), "spills": found.loop.count("LDL", "STL"),
        **{f"{name}_clocks": round(clocks) for name, clocks in found.clocks.items()},
        "limit": found.limit, "%_of_copy": round(100 * found.share_of_copy),
    }  # fmt: skip


def published() -> Iterable[Row]:
    for provider, speeds in PUBLISHED.items():
        for what, speed in zip(("forward", "backward"), speeds, strict=True):
            yield {"published": SOURCE, "op": "attention", "what": what, "provider": provider, "D": 128,
                   "dtype": DTYPE, "TFLOP/s": speed}  # fmt: skip


def predicted() -> Iterable[Row]:
    """Of every kernel: those of Triton, which are compiled, then those of the extension."""
    yield from map(row_of, triton_kernels())
    yield from map(row_of_norm, triton_rows())
    bodies = disassemble(extension_path())
    yield from map(row_of, cuda_kernels(bodies))
    yield from map(row_of_norm, cuda_rows(bodies))


def rows(options: Options) -> Iterable[Row]:
    yield from predicted()
    yield from published()
