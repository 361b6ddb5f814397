"""Which kernels are counted: attention of both backends in bf16, as the library launches them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wam_kernels.plan import tile_shape

from .model import Block, Step, predict
from .sass import Body, Loop, producer_steps, steps

HEAD_DIMS = (128, 64)
WARPGROUP = 128  # threads
LAUNCH_REGISTERS = {128: 168, 384: 168, 512: 128}  # of a thread, before setmaxnreg moves them; by threads of a block


@dataclass(frozen=True)
class Counted:
    """A step of a kernel, and what is predicted of it."""

    op: str
    what: str  # which kernel of the op
    provider: str  # triton or cuda
    head_dim: int
    rows: int  # of a block's tile
    step: str  # full, masked, or step where there is one kind
    block: Block
    loop: Loop
    predicted: Step
    producer: int | None  # instructions of a producer's turn, the longest


@dataclass(frozen=True)
class CudaKernel:
    """A kernel of the extension: what its mangled name begins with, and how it is launched."""

    op: str
    what: str
    name: str  # of the function
    warpgroups: int  # that multiply
    threads: int
    rows: int
    products: int = 0  # of a step by all its tokens; two operands of them come by TMA. 0: by the threads' own copies

    def block(self, head_dim: int, flops: int) -> Block:
        if not self.products:
            return Block(self.threads // 32, self.threads, LAUNCH_REGISTERS[self.threads], 0)
        tokens = flops // (self.products * 2 * self.rows * head_dim)
        registers, copied = LAUNCH_REGISTERS[self.threads], 2 * tokens * head_dim * 2
        return Block(4 * self.warpgroups, self.threads, registers, 0, copied)


CUDA = (
    CudaKernel("block_attention", "forward", "forward_kernel", 2, 3 * WARPGROUP, 128, products=2),
    CudaKernel("block_attention", "dq", "dq_kernel", 2, 3 * WARPGROUP, 128, products=3),
    CudaKernel("block_attention", "dkdv", "dkdv_kernel", 2, 3 * WARPGROUP, 128, products=4),
    CudaKernel("cached_attention", "part", "part_kernel", 1, WARPGROUP, 64),
    CudaKernel("cached_attention", "streamed part", "streamed_part_kernel", 3, 4 * WARPGROUP, 192, products=2),
)


def cuda_kernels(bodies: Mapping[str, Body]) -> Iterator[Counted]:
    """Of the disassembled extension, by mangled name.

    Raises:
        ValueError: a kernel of ``CUDA`` is not in it.
    """
    for kernel in CUDA:
        for D in HEAD_DIMS:
            pattern = re.compile(rf"{kernel.op}_detail.*\d{kernel.name}I13__nv_bfloat16Li{D}E")
            body = next((body for name, body in bodies.items() if pattern.search(name)), None)
            if body is None:
                raise ValueError(f"static: no {kernel.name} of {kernel.op} for head dim {D}; build the extension anew")
            loops = steps(body)
            flops = [predict(loop, kernel.block(D, 0)).flops for loop in loops]
            blocks = [kernel.block(D, f) for f in flops]
            producer = max((len(loop.body) for loop in producer_steps(body)), default=None)
            yield from _counted(kernel.op, kernel.what, "cuda", D, kernel.rows, loops, blocks, producer)


def triton_launches(head_dim: int) -> Iterator[tuple[str, str, int, Any]]:
    """Op, kernel, rows of a block and launch: the tiles of plans with long windows, and of the forward 128 rows too."""
    from .launches import block_attention, cached_part  # loads triton

    tile = tile_shape(True)
    rows = {"forward": (tile.rows, 128), "dq": (tile.rows,), "dkdv": (tile.key_rows or tile.rows,)}
    for name, tiles in rows.items():
        for n in dict.fromkeys(tiles):
            for launch in block_attention(name, head_dim, n, "bf16"):
                yield "block_attention", name, n, launch
    part = cached_part(128, head_dim, "bf16")
    yield "cached_attention", "part", part.constants["BLOCK_M"], part


def triton_kernels(op: str | None = None, what: str | None = None, head_dim: int | None = None) -> Iterator[Counted]:
    """Compiled here; all of them, or those of an op, of a kernel, of a head dim."""
    from . import aot

    for D in HEAD_DIMS if head_dim is None else (head_dim,):
        for of_op, name, n, launch in triton_launches(D):
            if op in (None, of_op) and what in (None, name):
                built = aot.compile_sm90(launch)
                loops = steps(built.body)
                block = Block(launch.num_warps, 32 * launch.num_warps, built.registers, built.shared)
                yield from _counted(of_op, name, "triton", D, n, loops, [block] * len(loops), None)


def _counted(
    op: str, what: str, provider: str, head_dim: int, rows: int, loops: list[Loop], blocks: list[Block],
    producer: int | None,
) -> Iterator[Counted]:  # fmt: skip
    """A step that masks issues more instructions for its products."""
    found = [(loop, block, predict(loop, block)) for loop, block in zip(loops, blocks, strict=True)]
    found.sort(key=lambda item: item[2].instructions / item[2].flops)
    names = ["step"] if len(found) == 1 else ["full", "masked", *(f"other {n}" for n in range(1, len(found) - 1))]
    for name, (loop, block, predicted) in zip(names, found, strict=True):
        yield Counted(op, what, provider, head_dim, rows, name, block, loop, predicted, producer)


def extension_path() -> Path:
    """The extension that is installed.

    Raises:
        RuntimeError: it is not built; the message says why.
    """
    from wam_kernels.runtime.cuda import extension

    return Path(str(extension().__file__))
