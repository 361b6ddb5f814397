"""qk_norm_rope against the plain PyTorch glue and torch.compile.   python -m bench.bench_qk_norm_rope

24 heads of 128, one norm over all heads, interleaved pairs (Wan), fresh outputs. GB/s count compulsory traffic: each
input read once, each output written once (q, k, their gradients, the table, the weights). The machine's ceiling is a
copy of q and k into tensors that are there, timed in the same run and taking turns with the arms: ``% of copy``. The
eager arm is the glue of ``wam_models.model`` before this op: norm in float32, rounded, rotation in float32, rounded.

bf16 with the Triton and CUDA kernels on a CUDA device, float32 on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config
from tqdm import tqdm

from bench import harness
from wam_kernels.qk_norm_rope import qk_norm_rope, rope_table

HEADS, D, EPS = 24, 128, 1e-6
TOKENS = (144, 4896, 8704)

Both = tuple[Tensor, Tensor]


def glue(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    normed = (F.rms_norm(x.float(), weight.shape, eps=EPS) * weight.float()).to(x.dtype)
    even, odd = normed.unflatten(-1, (HEADS, D)).float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table[:, None].unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def eager(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor) -> Both:
    return glue(q, weight_q, table), glue(k, weight_k, table)


def backends(device: str, inputs: list[Tensor]) -> dict[str, Callable[..., Both]]:
    """The arms that run here; one that does not says why and is left out."""
    arms: dict[str, Callable[..., Both]] = {"eager": eager}
    functorch_config.donated_buffer = False  # the backward is timed on a graph that is kept
    candidates = {"torch.compile": torch.compile(eager, dynamic=False)}
    for impl in ("triton", "cuda") if device == "cuda" else ("cpu",):
        candidates[f"wam {impl}"] = lambda *args, impl=impl: qk_norm_rope(*args, head_dim=D, eps=EPS, impl=impl)
    for name, arm in candidates.items():
        try:
            arm(*inputs)
        except (RuntimeError, ImportError) as error:
            print(f"bench: {name} does not run here and is left out: {str(error).splitlines()[0]}")
        else:
            arms[name] = arm
    return arms


def require_right(arms: dict[str, Callable[..., Both]], leaves: list[Tensor], table: Tensor, douts: Both) -> None:
    """Forward and gradients of every arm against the float64 reference."""
    double = [t.detach().double().requires_grad_() for t in leaves]
    outs = qk_norm_rope(*double, table, head_dim=D, eps=EPS, impl="reference")
    truth = [*outs, *torch.autograd.grad(outs, double, [t.double() for t in douts])]
    rtol = 1e-5 if leaves[0].dtype == torch.float32 else 1e-2
    for name, arm in arms.items():
        outs = arm(*leaves, table)
        got = [*outs, *torch.autograd.grad(outs, leaves, douts)]
        for what, a, b in zip(("q_out", "k_out", "dq", "dk", "dweight_q", "dweight_k"), got, truth, strict=True):
            harness.require_equal(f"{what} of {name}", a, b, rtol)


def bench(tokens: int, device: str, repeats: int) -> list[dict]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    leaves = [randn(1, tokens, HEADS * D) for _ in range(2)] + [1 + 0.1 * randn(HEADS * D) for _ in range(2)]
    leaves = [t.requires_grad_() for t in leaves]
    douts = randn(1, tokens, HEADS, D), randn(1, tokens, HEADS, D)
    table = rope_table(torch.rand(tokens, 3, generator=generator, dtype=torch.float64).to(device) * 60, D)
    arms = backends(device, [*leaves, table])
    require_right(arms, leaves, table, douts)

    row, weights = HEADS * D * dtype.itemsize, 2 * HEADS * D * dtype.itemsize
    size = {
        "copy": 4 * row * tokens,
        "forward": (4 * row + 4 * D) * tokens + weights,
        "backward": (6 * row + 4 * D) * tokens + 2 * weights,
    }
    plain = [t.detach() for t in leaves]
    targets = [torch.empty_like(t) for t in plain[:2]]

    def copy() -> None:
        for target, x in zip(targets, plain, strict=False):
            target.copy_(x)

    def forward(arm: Callable[..., Both]) -> Callable[[], Both]:
        return lambda: arm(*plain, table)

    def backward(arm: Callable[..., Both]) -> Callable[[], object]:
        outs = arm(*leaves, table)
        return lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True)

    rows = []
    for what, make in (("forward", forward), ("backward", backward)):
        calls = {name: make(arm) for name, arm in arms.items()}
        times = harness.measure({"copy": copy} | calls, device, repeats)
        ceiling = size["copy"] / times.pop("copy")["ms"] / 1e6
        for name, t in times.items():
            speed = size[what] / t["ms"] / 1e6
            rows.append({
                "what": what, "arm": name, "tokens": tokens, "heads": HEADS, "D": D, "dtype": str(dtype),
                **{key: round(value, 4) for key, value in t.items()},
                "peak_MB": round(harness.peak_megabytes(calls[name], device), 1), "bytes": size[what],
                "GB/s": round(speed, 1), "copy_GB/s": round(ceiling, 1), "%_of_copy": round(100 * speed / ceiling, 1),
                "ratio": round(times["eager"]["ms"] / t["ms"], 2),
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="only 144 tokens, 3 repeats, and record nothing")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for tokens in tqdm(TOKENS[: 1 if args.quick else None], desc="qk_norm_rope"):
        rows += bench(tokens, device, 3 if args.quick else args.repeats)
    for r in rows:
        print(
            f"{r['tokens']:6} tokens  {r['what']:8}  {r['arm']:13}  {r['ms']:9.3f} ms  {r['GB/s']:7.1f} GB/s  "
            f"{r['%_of_copy']:5.1f} % of copy  {r['ratio']:5.2f}x eager  {r['peak_MB']:7.1f} MB"
        )
    if not args.quick:
        print("recorded", harness.record("qk_norm_rope", rows, device))


if __name__ == "__main__":
    main()
