"""qk_norm_rope against eager PyTorch and torch.compile.   python -m bench.suites qk_norm_rope

One norm over all heads, interleaved pairs (Wan), fresh outputs. "eager" is the glue of ``wam_models.model`` before this
op: norm in float32, rounded, rotation in float32, rounded. Outputs and gradients of every provider are compared with
eager in float64 first. Bytes are the compulsory ones: each input read once, each output written once (q, k, their
gradients, the table, the weights).

bf16 with the Triton and CUDA kernels on a CUDA device, float32 on a CPU. With --quick the two small sizes on a CPU,
every size on a GPU; torch.compile, which takes some 10 s for each size, then runs at 4,896 x 3,072 alone, on a CPU up
to that size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config
from tqdm import tqdm

from bench import harness
from bench.harness import Options
from bench.peers.plain import rotate
from bench.rows import Row
from bench.workloads.norms import repeats_of
from wam_kernels.qk_norm_rope import qk_norm_rope, rope_table
from wam_models.model.blocks import at_least_float32

# Tokens, heads, channels of a head.
SIZES = [(8704, 24, 128), (4896, 24, 128), (144, 24, 128), (8704, 16, 128), (64, 9, 64)]
LIBERO = (4896, 24, 128)
EPS = 1e-6


def glue(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    normed = (F.rms_norm(at_least_float32(x), weight.shape, eps=EPS) * at_least_float32(weight)).to(x.dtype)
    return rotate(normed.unflatten(-1, (-1, 2 * table.shape[1])), table)


def eager(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    return glue(q, weight_q, table), glue(k, weight_k, table)


def bench(S: int, H: int, D: int, options: Options, repeats: int, compiles: bool) -> Iterable[Row]:
    device = options.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(options.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    leaves = [randn(1, S, H * D) for _ in range(2)] + [1 + 0.1 * randn(H * D) for _ in range(2)]
    leaves = [t.requires_grad_() for t in leaves]
    incoming = [randn(1, S, H, D) for _ in range(2)]
    table = rope_table(torch.rand(S, 3, generator=generator, dtype=torch.float64).to(device) * 60, D)

    functions: dict[str, harness.Function] = {"eager": eager}
    if compiles:
        torch._dynamo.reset()  # past its limit of recompilations dynamo would run eager
        functions["torch.compile"] = torch.compile(eager, dynamic=False)
    impls, failed = harness.own_backends("qk_norm_rope", device)
    for impl in impls:
        functions[f"wam {impl}"] = lambda *args, impl=impl: qk_norm_rope(*args, head_dim=D, eps=EPS, impl=impl)
    providers = {name: lambda *leaves, fn=fn: fn(*leaves, table) for name, fn in functions.items()}
    providers, wrong = harness.correct_providers(providers, leaves, incoming, 1e-5 if dtype == torch.float32 else 1e-2)

    def forward(fn: harness.Function) -> Callable[[], object]:
        return torch.no_grad()(lambda: fn(*leaves))

    def backward(fn: harness.Function) -> Callable[[], object]:
        outs = fn(*leaves)
        return lambda: torch.autograd.grad(outs, leaves, incoming, retain_graph=True)

    row, weights, angles = H * D * dtype.itemsize, 2 * H * D * dtype.itemsize, 4 * D
    for what, wrap, moved in (
        ("forward", forward, (4 * row + angles) * S + weights),
        ("backward", backward, (6 * row + angles) * S + 2 * weights),
    ):
        calls = {name: wrap(fn) for name, fn in providers.items()}
        times = harness.measure(calls, device, repeats)
        for name, t in times.items():
            yield {
                "what": what, "provider": name, "tokens": S, "heads": H, "D": D, "dtype": str(dtype),
                **harness.bandwidth(t, moved, device),
                "peak_MB": round(harness.peak_megabytes(calls[name], device), 1),
                "ratio": round(times["eager"]["ms"] / t["ms"], 2),
            }  # fmt: skip
    case = f"{S} tokens, {H} heads of {D}"
    yield from ({"provider": name, "error": reason, "where": [case]} for name, reason in (failed | wrong).items())


def rows(options: Options) -> Iterable[Row]:
    functorch_config.donated_buffer = False  # the backward is timed on a graph that is kept
    cuda, quick = options.device == "cuda", options.quick
    for size in tqdm([size for size in SIZES if cuda or not quick or size[0] < 1000], desc="qk_norm_rope"):
        compiles = size == LIBERO if quick else cuda or size[0] < 5000
        S, H, D = size
        yield from bench(S, H, D, options, repeats_of(S, options), compiles)
