"""The adaLN ops against eager PyTorch and torch.compile.   python -m bench.bench_adaln

Every arm gets the same tensors: x and y [1, S, D], the timestep projection [1, F, 6, D] and the table [6, D], with 32
or 200 tokens a frame (the last frame takes what is left). "eager" is the glue of ``wam_models.model`` as plain PyTorch.
Bytes are the compulsory ones: every input read once, every output written once, modulation at frame resolution; the
backward reads what it needs again. The ceiling is a copy of 256 MB, measured in the same run.

On a CUDA device the same command runs bf16; on a CPU float32.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench import harness
from wam_kernels.adaln import ada_layer_norm, gate_residual_ada_layer_norm
from wam_kernels.frame_index import FrameIndex

SIZES = [(8704, 3072), (4896, 3072), (144, 3072), (8704, 2048), (64, 576)]
TOKENS_A_FRAME = (32, 200)
COPY_BYTES = 1 << 28
EPS = 1e-6


# ---- arms: each returns the outputs that are compared ----


def wam_norm(x, y, t_proj, table, index):
    rows, tables = t_proj.unbind(2), table.unbind(0)
    return (ada_layer_norm(x, rows[0], rows[1], index, shift_table=tables[0], scale_table=tables[1], eps=EPS),)


def wam_gate_norm(x, y, t_proj, table, index):
    rows, tables = t_proj.unbind(2), table.unbind(0)
    return gate_residual_ada_layer_norm(
        x, y, rows[2], rows[0], rows[1], index,
        gate_table=tables[2], shift_table=tables[0], scale_table=tables[1], eps=EPS,
    )  # fmt: skip


def of_token(rows_BFD: Tensor, index: FrameIndex) -> Tensor:
    """Where frames have one length a view does, as in the model; else the rows are gathered."""
    B, frames, D = rows_BFD.shape
    if index.length % frames == 0:
        return rows_BFD[:, :, None].expand(B, frames, index.length // frames, D)
    return rows_BFD.index_select(1, index.row_of_token)


def eager_norm(x, y, t_proj, table, index):
    shift, scale, *_ = (of_token(t, index) for t in (table + t_proj).unbind(2)[:2])
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=EPS).view(shift.shape)
    return ((normed * (1 + scale) + shift).view(x.shape).to(x.dtype),)


def eager_gate_norm(x, y, t_proj, table, index):
    gate = of_token((table + t_proj).unbind(2)[2], index)
    r = (x.float() + (y.view(gate.shape) * gate).view(x.shape)).to(x.dtype)
    return r, *eager_norm(r, y, t_proj, table, index)


OPS = {"ada_layer_norm": (wam_norm, eager_norm), "gate_residual_ada_layer_norm": (wam_gate_norm, eager_gate_norm)}


def compulsory_bytes(op: str, S: int, D: int, frames: int, itemsize: int, backward: bool) -> int:
    """Rows of the tokens, and float32 rows of the frames, that one call cannot avoid moving."""
    fused = op != "ada_layer_norm"
    rows, sums = (4, 3) if fused else (2, 2)  # x, y, r, h; or x, h
    if backward:
        # dr, dh, r, y in and dx, dy out; or dh, x in and dx out. Then scale (and gate) in, the sums out
        rows += 6 if fused else 3
        sums += (2 + 3) if fused else (1 + 2)
    return S * D * rows * itemsize + frames * D * sums * 4


def copy_speed(device: str, repeats: int) -> float:
    """GB/s of a large copy, counting what it reads and what it writes."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    ms = harness.measure({"copy": lambda: target.copy_(source)}, device, repeats)["copy"]["ms"]
    return 2 * COPY_BYTES / ms / 1e6


def bench(op: str, S: int, D: int, tokens: int, device: str, repeats: int, copy: float) -> list[dict]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    index = FrameIndex.from_runs([min(tokens, S - i) for i in range(0, S, tokens)], device=device)
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (1, S, D), "y": (1, S, D), "t_proj": (1, index.frames, 6, D), "table": (6, D)}
    inputs = {n: torch.randn(shape, generator=generator).to(device) for n, shape in shapes.items()}
    inputs |= {n: inputs[n].to(dtype) for n in ("x", "y")}
    incoming = [torch.randn((1, S, D), generator=generator).to(device, dtype) for _ in range(2)]
    names = [n for n in inputs if n != "y" or op != "ada_layer_norm"]
    leaves = {n: t.requires_grad_(n in names) for n, t in inputs.items()}

    def forward(fn):
        def call():
            with torch.no_grad():
                return fn(*leaves.values(), index)

        return call

    def train(fn):
        def call():
            outputs = fn(*leaves.values(), index)
            return torch.autograd.grad(outputs, [leaves[n] for n in names], incoming[-len(outputs) :])

        return call

    wam, eager = OPS[op]
    functions = {"eager": eager, "wam": wam}
    try:
        torch._dynamo.reset()
        compiled = torch.compile(eager, dynamic=False)
        train(compiled)()
        functions["compile"] = compiled
    except Exception as error:  # the peer is optional: without a C++ compiler, for one, it does not run
        print(f"torch.compile left out: {type(error).__name__}")
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    rows = []
    for what, wrap in (("forward", forward), ("forward+backward", train)):
        arms = {name: wrap(fn) for name, fn in functions.items()}
        results = {name: arm() for name, arm in arms.items()}
        for i, expected in enumerate(results["eager"]):
            for name in functions:
                harness.require_equal(f"{op} {what} {i} of {name}", results[name][i], expected, rtol)
        del results
        moved = compulsory_bytes(op, S, D, index.frames, dtype.itemsize, what != "forward")
        times = harness.measure(arms, device, repeats)
        for arm, t in times.items():
            rows.append({
                "op": op, "what": what, "arm": arm, "tokens": S, "D": D, "tokens_a_frame": tokens, "dtype": str(dtype),
                "MB": round(moved / 1e6, 2), **{key: round(value, 4) for key, value in t.items()},
                "GB/s": round(moved / t["ms"] / 1e6, 1), "copy_GB/s": round(copy, 1),
                "%_of_copy": round(100 * moved / t["ms"] / 1e6 / copy, 1),
                "ratio": round(times["eager"]["ms"] / t["ms"], 2),
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="only the two small sizes, and record nothing")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    copy = copy_speed(device, args.repeats)
    sizes = [size for size in SIZES if size[0] < 1000] if args.quick else SIZES
    cases = [(op, *size, tokens) for op in OPS for size in sizes for tokens in TOKENS_A_FRAME]
    rows = []
    for case in tqdm(cases, desc="adaln"):
        rows += bench(*case, device, args.repeats, copy)
    for r in rows:
        print(
            "{op:28} {tokens:5} x {D:4}, {tokens_a_frame:3} a frame  {what:16} {arm:8} {ms:9.3f} ms {GB/s:8.1f} GB/s "
            "{%_of_copy:6.1f} %  {ratio:5.2f}x".format(**r)
        )
    if not args.quick:
        print("recorded", harness.record("adaln", rows, device))


if __name__ == "__main__":
    main()
