"""``wam bench tune``: the fastest launch choice of every tunable op, into ``wam_kernels/runtime/tuned/<device>.json``.

A candidate counts only if it compiles, fits the device and gives the result of the default within rounding. A choice
other than the default is recorded where it is at least 3 % faster; every entry keeps both times, so the file says what
tuning gained. Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from tqdm import tqdm

from bench import harness
from bench.workloads.attention import packed
from wam_kernels import (
    FrameIndex,
    TileShape,
    ada_layer_norm,
    block_attention,
    compile_plan,
    gate_residual_ada_layer_norm,
    qk_norm_rope,
    rope_table,
)
from wam_kernels.plan import tile_shape
from wam_kernels.runtime import tuning

GAIN = 0.03
REPEATS = 20
DEFAULT = -1  # among the numbers of candidates: the launch as it is
WARPS = (1, 2, 4, 8, 16)
STAGED = [{"num_warps": w, "num_stages": s} for w, s in product((4, 8), (1, 2, 3, 4))]
TILES = [
    {"rows": rows, "step": step, "key_rows": key_rows}
    for rows, step, key_rows in (
        (32, 32, 32), (32, 64, 32), (64, 64, 32), (64, 64, 64), (64, 128, 64),
        (128, 64, 64), (128, 128, 64), (128, 64, 128),
    )
]  # fmt: skip

Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One key of an op's choices, and a call at the size that it is tuned for."""

    key: str
    call: Call


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)


def attention_cases(backward: bool) -> Iterator[Case]:
    sizes = [(D, torch.bfloat16, rows) for D in (64, 128) for rows in (32, 64, 128)]
    for D, dtype, rows in [*sizes, *((D, torch.float32, rows) for D in (64, 128) for rows in (64, 128))]:
        chunk, window = (1, 8) if rows == 32 else (4, 64)
        work = packed(9360, heads=24, head_dim=D, chunk=chunk, window=window)
        q, k, v, dout = work.inputs("cuda", dtype, 0)
        plan = compile_plan([work.samples], device="cuda", tile=TileShape(rows, min(rows, 64), key_rows=rows))

        def forward(q=q, k=k, v=v, plan=plan) -> tuple[Tensor, ...]:
            return (block_attention(q, k, v, plan, impl="triton"),)

        def grads(q=q, k=k, v=v, dout=dout, plan=plan) -> tuple[Tensor, ...]:
            leaves = [t.requires_grad_() for t in (q, k, v)]
            return torch.autograd.grad(block_attention(q, k, v, plan, impl="triton"), leaves, dout)

        yield Case(tuning.key_of(D=D, itemsize=dtype.itemsize, rows=rows), grads if backward else forward)


def tile_cases() -> Iterator[Case]:
    """Forward and backward at D = 128 under whatever tile is on trial: the plan is part of the choice."""
    for long_window, chunk, window in ((True, 4, 64), (False, 1, 8)):
        work = packed(9360, heads=24, head_dim=128, chunk=chunk, window=window)
        q, k, v, dout = work.inputs("cuda", torch.bfloat16, 0)
        leaves = [t.requires_grad_() for t in (q, k, v)]

        def call(work=work, leaves=leaves, dout=dout, long_window=long_window) -> tuple[Tensor, ...]:
            # cached by its tile
            plan = compile_plan([work.samples], device="cuda", tile=tile_shape(long_window))
            q, k, v = leaves
            out = block_attention(q, k, v, plan, impl="triton")
            return out, *torch.autograd.grad(out, leaves, dout)

        yield Case(tuning.key_of(long_window=long_window), call)


def fused_outputs(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, index: FrameIndex
) -> tuple[Tensor, Tensor]:
    r, h = gate_residual_ada_layer_norm(x, y, gate, shift, scale, index, impl="triton")
    assert h is not None  # with a norm it is there
    return r, h


def adaln_cases(backward: bool) -> Iterator[Case]:
    for D in (3072, 2048, 576):
        S = 8704
        index = FrameIndex.from_runs([32] * (S // 32), device="cuda")
        x, y, dout = (randn(1, S, D) for _ in range(3))
        gate, shift, scale = (randn(1, index.frames, D, dtype=torch.float32) for _ in range(3))

        def forward(x=x, y=y, gate=gate, shift=shift, scale=scale, index=index) -> tuple[Tensor, ...]:
            h = ada_layer_norm(x, shift, scale, index, impl="triton")
            return (h, *fused_outputs(x, y, gate, shift, scale, index))

        def grads(x=x, y=y, gate=gate, shift=shift, scale=scale, index=index, dout=dout) -> tuple[Tensor, ...]:
            leaves = [t.requires_grad_() for t in (x, y, gate, shift, scale)]
            outs = fused_outputs(x, y, gate, shift, scale, index)
            return torch.autograd.grad(outs, leaves, [dout, dout])

        yield Case(tuning.key_of(D=D), grads if backward else forward)


def qk_cases() -> Iterator[Case]:
    for heads, head_dim in ((24, 128), (16, 128)):
        S, inner = 8704, heads * head_dim
        leaves = [randn(1, S, inner) for _ in range(2)] + [randn(inner) for _ in range(2)]
        leaves = [t.requires_grad_() for t in leaves]
        table = rope_table(60 * torch.rand(S, 3, dtype=torch.float64), head_dim).cuda()
        douts = [randn(1, S, heads, head_dim) for _ in range(2)]

        def call(leaves=leaves, table=table, douts=douts, head_dim=head_dim) -> tuple[Tensor, ...]:
            q, k, weight_q, weight_k = leaves
            outs = qk_norm_rope(q, k, weight_q, weight_k, table, head_dim=head_dim, impl="triton")
            return (*outs, *torch.autograd.grad(outs, leaves, douts))

        yield Case(tuning.key_of(heads=heads, head_dim=head_dim), call)


# key in tuning.TUNABLE, which has no other -> (its candidates, its cases)
TARGETS: dict[str, tuple[list, Callable[[], Iterator[Case]]]] = {
    "block_attention.forward": (STAGED, lambda: attention_cases(False)),
    "block_attention.dq": (STAGED, lambda: attention_cases(True)),
    "block_attention.dkdv": (STAGED, lambda: attention_cases(True)),
    # with the launches that were just tuned
    "plan.tile_shape": (TILES, tile_cases),
    "adaln.forward_warps": (list(WARPS), lambda: adaln_cases(False)),
    "adaln.backward_warps": (list(WARPS), lambda: adaln_cases(True)),
    "qk_norm_rope.launch": ([{"num_warps": w} for w in WARPS], qk_cases),
}


def tune_case(op: str, candidates: list, case: Case, device: str = "cuda", repeats: int = REPEATS) -> dict:
    """The entry of one key: the winner, its time, the default's time, and why candidates dropped out."""
    expected = [t.clone() for t in case.call()]
    calls: dict[int, Call] = {DEFAULT: case.call}
    refused: dict[str, str] = {}
    for i, choice in enumerate(candidates):
        try:
            with tuning.trying(op, choice):
                for n, (a, b) in enumerate(zip(case.call(), expected, strict=True)):
                    rounding = 1e-2 if a.dtype == torch.bfloat16 else 1e-3
                    harness.require_equal(f"output {n} of {op} with {choice}", a, b, rounding)
        except Exception as error:  # out of registers, of shared memory, or wrong: not a choice on this device
            refused[json.dumps(choice)] = harness.first_line(error)
        else:
            calls[i] = _under(op, choice, case.call)
    times = harness.measure(calls, device, repeats)
    default_ms = times.pop(DEFAULT)["ms"]
    best = min(times, key=lambda i: times[i]["ms"], default=None)
    entry = {"default_ms": round(default_ms, 4), "refused": refused}
    if best is None or times[best]["ms"] > (1 - GAIN) * default_ms:
        return {"choice": None, "ms": round(default_ms, 4), **entry}
    return {"choice": candidates[best], "ms": round(times[best]["ms"], 4), **entry}


def _under(op: str, choice: object, call: Call) -> Call:
    def tried() -> tuple[Tensor, ...]:
        with tuning.trying(op, choice):
            return call()

    return tried


def run(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise ValueError("wam bench tune needs a CUDA device, found none; defaults stay in force")
    choices: dict[str, dict[str, dict]] = {}
    name = torch.cuda.get_device_name()
    path = tuning.path_of(name)
    for op, (candidates, cases) in TARGETS.items():
        for case in tqdm(cases(), desc=op, unit="key"):
            choices.setdefault(op, {})[case.key] = tune_case(op, candidates, case)
        if not args.no_record:
            # after each op: the next ones are tuned on top of it, and nothing is lost if time runs out
            found = {"device": name, **harness.environment("cuda"), "choices": choices}
            path.write_text(json.dumps(found, indent=1) + "\n")
            tuning.reload()
    print(table(choices))
    if not args.no_record:
        print(f"wrote {path}")
    return 0


def table(choices: dict[str, dict[str, dict]]) -> str:
    return harness.table([
        {"op": op, "key": key, "choice": json.dumps(e["choice"]), "ms": e["ms"], "default_ms": e["default_ms"],
         "refused": len(e["refused"])}
        for op, keys in choices.items() for key, e in keys.items()
    ])  # fmt: skip
