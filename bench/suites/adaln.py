"""The adaLN ops against eager PyTorch and torch.compile.   python -m bench.suites adaln

Every provider gets the same tensors: x and y [1, S, D], the timestep projection [1, F, 6, D] and the table [6, D], with
32 or 200 tokens a frame (the last frame takes what is left). "eager" is the glue of ``wam_models.model`` as plain
PyTorch. Outputs and gradients of every provider are compared with eager in float64 first. Bytes are the compulsory
ones: every input read once, every output written once, modulation at frame resolution; the backward reads what it needs
again.

bf16 on a CUDA device, float32 on a CPU. With --quick the two small sizes on a CPU, every size on a GPU. torch.compile
takes 5 to 10 s for each case, so on a CPU it runs with 32 tokens a frame and up to 4,896 tokens alone, with --quick
only at 4,896 x 3,072.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench import harness
from bench.harness import Options
from bench.rows import Row
from bench.workloads.norms import repeats_of
from wam_kernels.adaln import ada_layer_norm, gate_residual_ada_layer_norm
from wam_kernels.frame_index import FrameIndex
from wam_models.model.blocks import at_least_float32

SIZES = [(8704, 3072), (4896, 3072), (144, 3072), (8704, 2048), (64, 576)]
LIBERO = (4896, 3072)
TOKENS_A_FRAME = (32, 200)
EPS = 1e-6


# ---- providers: functions of the index and the leaves; they return the outputs that are compared ----


def wam_norm(index: FrameIndex, x: Tensor, t_proj: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    modulation, tables = t_proj.unbind(2), table.unbind(0)
    return (
        ada_layer_norm(x, modulation[0], modulation[1], index, shift_table=tables[0], scale_table=tables[1], eps=EPS),
    )


def wam_gate_norm(index: FrameIndex, x: Tensor, t_proj: Tensor, table: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    modulation, tables = t_proj.unbind(2), table.unbind(0)
    r, h = gate_residual_ada_layer_norm(
        x, y, modulation[2], modulation[0], modulation[1], index,
        gate_table=tables[2], shift_table=tables[0], scale_table=tables[1], eps=EPS,
    )  # fmt: skip
    return r, cast(Tensor, h)  # with a norm it is there


def of_token(rows_BFD: Tensor, index: FrameIndex, even: bool) -> Tensor:
    """Where frames are ``even``, of one length, a view does, as in the model; else the rows are gathered."""
    B, frames, D = rows_BFD.shape
    if even:
        return rows_BFD[:, :, None].expand(B, frames, index.length // frames, D)
    return rows_BFD.index_select(1, index.row_of_token)


def eager_norm(index: FrameIndex, x: Tensor, t_proj: Tensor, table: Tensor, *, even: bool) -> tuple[Tensor, ...]:
    shift, scale = (of_token(t, index, even) for t in (table + t_proj).unbind(2)[:2])
    normed = F.layer_norm(at_least_float32(x), x.shape[-1:], eps=EPS).view(shift.shape)
    return ((normed * (1 + scale) + shift).view(x.shape).to(x.dtype),)


def eager_gate_norm(
    index: FrameIndex, x: Tensor, t_proj: Tensor, table: Tensor, y: Tensor, *, even: bool
) -> tuple[Tensor, ...]:
    gate = of_token((table + t_proj).unbind(2)[2], index, even)
    r = (at_least_float32(x) + (y.view(gate.shape) * gate).view(x.shape)).to(x.dtype)
    return r, *eager_norm(index, r, t_proj, table, even=even)


OPS: dict[str, tuple[harness.Function, harness.Function]] = {
    "ada_layer_norm": (wam_norm, eager_norm),
    "gate_residual_ada_layer_norm": (wam_gate_norm, eager_gate_norm),
}


# ---- cases ----


def compulsory_bytes(op: str, S: int, D: int, frames: int, itemsize: int, backward: bool) -> int:
    """Rows of the tokens, and float32 rows of the frames, that one call cannot avoid moving."""
    fused = op != "ada_layer_norm"
    rows, sums = (4, 3) if fused else (2, 2)  # x, y, r, h; or x, h
    if backward:
        # dr, dh, r, y in and dx, dy out; or dh, x in and dx out. Then scale (and gate) in, the sums out
        rows += 6 if fused else 3
        sums += (2 + 3) if fused else (1 + 2)
    return S * D * rows * itemsize + frames * D * sums * 4


def bench(op: str, S: int, D: int, tokens: int, options: Options, repeats: int, compiles: bool) -> Iterable[Row]:
    device, fused = options.device, op != "ada_layer_norm"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    index = FrameIndex.from_runs([min(tokens, S - i) for i in range(0, S, tokens)], device=device)
    generator = torch.Generator().manual_seed(options.seed)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    leaves = [randn(1, S, D, dtype=dtype), randn(1, index.frames, 6, D), randn(6, D)]
    leaves += [randn(1, S, D, dtype=dtype)] if fused else []  # y
    for t in leaves:
        t.requires_grad_()
    incoming = [randn(1, S, D, dtype=dtype) for _ in range(2 if fused else 1)]  # of r and h, or of h

    wam, of_rows = OPS[op]
    eager = partial(of_rows, even=min(tokens, S) * index.frames == S)
    functions: dict[str, harness.Function] = {"eager": eager, "wam": wam}
    if compiles:
        torch._dynamo.reset()  # past its limit of recompilations dynamo would run eager
        functions["compile"] = torch.compile(eager, dynamic=False)
    of_leaves: dict[str, harness.Function] = {name: partial(fn, index) for name, fn in functions.items()}
    providers, failed = harness.correct_providers(of_leaves, leaves, incoming, 1e-5 if dtype == torch.float32 else 1e-2)

    def forward(fn: harness.Function) -> Callable[[], object]:
        return torch.no_grad()(lambda: fn(*leaves))

    def train(fn: harness.Function) -> Callable[[], object]:
        return lambda: torch.autograd.grad(fn(*leaves), leaves, incoming)

    for what, wrap in (("forward", forward), ("forward+backward", train)):
        moved = compulsory_bytes(op, S, D, index.frames, dtype.itemsize, what != "forward")
        times = harness.measure({name: wrap(fn) for name, fn in providers.items()}, device, repeats)
        for provider, spent in times.items():
            yield {
                "op": op, "what": what, "provider": provider, "tokens": S, "D": D, "tokens_a_frame": tokens,
                "dtype": str(dtype),
                **harness.bandwidth(spent, moved, device), "ratio": round(times["eager"]["ms"] / spent["ms"], 2),
            }  # fmt: skip
    case = f"{op} {S} x {D}, {tokens} tokens a frame"
    yield from ({"provider": name, "error": reason, "where": [case]} for name, reason in failed.items())


def rows(options: Options) -> Iterable[Row]:
    cuda, quick = options.device == "cuda", options.quick
    sizes = [size for size in SIZES if cuda or not quick or size[0] < 1000]
    for op, (S, D), tokens in tqdm([(o, s, n) for o in OPS for s in sizes for n in TOKENS_A_FRAME], desc="adaln"):
        compiles = (S, D) == LIBERO if quick else cuda or (S < 5000 and tokens == TOKENS_A_FRAME[0])
        yield from bench(op, S, D, tokens, options, repeats_of(S, options), compiles)
