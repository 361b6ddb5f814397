"""block_attention compared with its peers, on every program, length, chunk and window.

    python -m bench.suites block_attention

Every provider gets the same q, k, v and gradient (two sets that take turns), and is compared with the float64 truth
straight from the predicate (all heads up to 1,000 tokens, the first and the last beyond) before its speed is printed.
What a provider needs once for a geometry (plan, mask, block mask) is built outside and timed apart: ``build_ms`` cold,
``plan_warm_ms`` for a plan that the cache holds. ``same_bits``: is the backward the same from run to run?

FLOPs are counted twice: over the visible pairs (``visible``), and over the pairs whose scores a provider
computes (``computed``; its own tiles). ``ratio`` is against SDPA with the dense boolean mask, as OpenWAM runs
without a GPU. ``%_of_matmul`` is visible FLOPs against this machine's matrix product in the same dtype.

24 heads of 128 in bf16 on a CUDA device; 8 heads of 64 in float32 on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import harness
from bench.harness import Options
from bench.peers.attention import ATTENTION, Attend, Provider
from bench.peers.availability import Unavailable
from bench.rows import Row
from bench.workloads import attention as workloads
from bench.workloads.attention import CHUNKS, LENGTHS, ROBOTWIN, WINDOWS, Workload, cold_plan, packed
from wam_kernels import Plan, block_attention

BASELINE = "sdpa_dense_mask"
COMPILED = ("flex", "flex_openwam", "flex_flash", "flash_attn_4")  # up to a minute of compilation for each workload


def cases(options: Options) -> list[tuple[Workload, tuple[str, ...], int]]:
    """(workload, peers, repeats)."""
    every, baseline = tuple(peer.name for peer in ATTENTION), (BASELINE,)
    ready = tuple(name for name in every if name not in COMPILED)
    if options.device == "cpu":
        size: dict[str, Any] = {"heads": 8, "head_dim": 64}
        if options.quick:
            return [(packed(1000, **size), ready, 3), (workloads.dense(512, **size), ready, 3)]
        out = [
            (packed(n, **size), peers, repeats)
            for n, peers, repeats in ((2448, every, 4), (4896, ready, 3), (9360, baseline, 1))
        ]
        out += [(w, baseline, 2) for w in workloads.all_programs(2448, **size) if w.name != out[0][0].name]
        out += [
            (packed(2448, chunk=c, window=w, **size), baseline, 2) for c in CHUNKS for w in WINDOWS if (c, w) != (4, 64)
        ]
        out += [(packed(5000, per_frame=ROBOTWIN, window=30, **size), baseline, 2)]
        return out + [(workloads.dense(2048, **size), ready, 2), (workloads.block_causal(4096, 4, **size), ready, 2)]
    return _gpu_cases(every, ready, options.quick)


def _gpu_cases(
    every: tuple[str, ...], ready: tuple[str, ...], quick: bool
) -> list[tuple[Workload, tuple[str, ...], int]]:
    size: dict[str, Any] = {"heads": 24, "head_dim": 128}
    figures: list[tuple[Workload, tuple[str, ...]]]
    figures = [(workloads.dense(8192, **size), ready), (workloads.block_causal(8192, 4, **size), ready)]
    if quick:
        libero = [(packed(4896, **size), ready), (packed(9360, **size), every), (packed(25_000, **size), ready)]
        return [(work, peers, 10) for work, peers in (*libero, *figures)]
    out = [(packed(n, **size), every) for n in (2448, 4896, 9360)]
    out += [(packed(n, **size), every if n == 100_000 else ready) for n in LENGTHS]
    out += [(packed(n, per_frame=ROBOTWIN, window=30, **size), ready) for n in (5_000, 25_000, 100_000)]
    out += [(w, ready) for w in workloads.all_programs(9360, **size)]
    corners = ((1, 8), (4, 64))
    out += [
        (packed(9360, chunk=c, window=w, **size), every if (c, w) in corners else ready)
        for c in CHUNKS
        for w in WINDOWS
    ]
    figures += [(workloads.dense(32_768, **size), every), (workloads.block_causal(32_768, 8, **size), every)]
    return [(work, peers, 30) for work, peers in (*out, *figures)]


def own_providers(work: Workload, plan: Plan) -> dict[str, Provider]:
    """block_attention as it runs by default on a CPU; on a GPU with every backend that the machine has."""
    if plan.device.type == "cpu":  # it multiplies runs, which hold visible pairs only
        own = Provider(lambda q, k, v: block_attention(q, k, v, plan), plan.visible_pairs, same_bits=True)
        return {"wam": own}
    impls, _ = harness.own_backends("block_attention", plan.device.type)

    def computed(impl: str) -> int:
        """Forward and dq walk the query side (2 + 3 products), dk and dv the key side (4)."""
        sides = plan.boxes if impl == "cuda" else plan
        queries, keys = sides.queries.computed_pairs, sides.keys.computed_pairs
        return queries if queries == keys else (5 * queries + 4 * keys) // 9

    def call(impl: str) -> Provider:
        return Provider(lambda q, k, v: block_attention(q, k, v, plan, impl=impl), computed(impl), same_bits=True)

    return {f"wam {impl}": call(impl) for impl in impls}


def check(
    name: str, attend: Attend, inputs: list[Tensor], truth: list[Tensor], heads: list[int], backward: bool
) -> None:
    leaves = [t.detach().requires_grad_(backward) for t in inputs[:3]]
    got = [attend(*leaves)]
    if backward:
        got += torch.autograd.grad(got[0], leaves, inputs[3])
    rtol = 1e-5 if inputs[0].dtype == torch.float32 else 1e-2
    for what, a, b in zip(("out", "dq", "dk", "dv"), got, truth, strict=False):
        harness.require_equal(f"{what} of {name}", a.detach()[:, :, heads], b, rtol)


def bench(work: Workload, peers: tuple[str, ...], repeats: int, options: Options) -> list[Row]:
    device, dtype = options.device, torch.float32 if options.device == "cpu" else torch.bfloat16
    torch._dynamo.reset()  # a mask is a new function each time: past its limit of recompilations dynamo would run eager
    inputs = [work.inputs(device, dtype, options.seed + i) for i in range(2)]
    heads = list(range(work.heads)) if work.tokens <= 1000 else [0, work.heads - 1]
    truth = workloads.truth(work, inputs[0], heads)
    plan = work.plan(device)
    build_ms = {"wam": _build_ms(lambda: cold_plan(work, device), device)}
    warm_ms = _build_ms(lambda: work.plan(device), device)
    providers, errors = own_providers(work, plan), {}
    for peer in ATTENTION:
        if peer.name not in peers:
            continue
        try:
            made = peer.provider(work, plan, dtype)
            check(peer.name, made.attend, inputs[0], truth, heads, backward=False)
            providers[peer.name] = made
            if made.build is not None:
                build_ms[peer.name] = _build_ms(made.build, device, repeats=1)
        except Unavailable as reason:
            errors[peer.name] = f"not run here: {reason}"
        except Exception as error:  # a peer may fail in any way; its error is what the row says
            errors[peer.name] = harness.first_line(error)
    train, refused = {}, dict(errors)
    for name, provider in providers.items():
        try:
            if provider.no_backward is not None:
                raise Unavailable(provider.no_backward)
            check(name, provider.attend, inputs[0], truth, heads, backward=True)
            train[name] = provider
        except Exception as error:
            if name.startswith("wam"):
                raise
            unavailable = isinstance(error, Unavailable)
            refused[name] = f"not run here: {error}" if unavailable else harness.first_line(error)
    del truth
    matmul = harness.ceilings(device)["float32_GFLOP/s" if dtype == torch.float32 else "bf16_GFLOP/s"]
    found = []
    for what, ready, missing, times_forward in (
        ("forward", providers, errors, 1.0),
        ("forward+backward", train, refused, 3.5),
    ):
        calls = {name: _call(provider.attend, inputs, what != "forward") for name, provider in ready.items()}
        times = harness.measure(calls, device, repeats)
        common = {
            "what": what, "workload": work.name, "tokens": work.tokens, "heads": work.heads, "D": work.head_dim,
            "dtype": str(dtype), "density": round(plan.density, 4), "efficiency": round(plan.efficiency, 4),
        }  # fmt: skip
        for name, t in times.items():
            gflops = times_forward * work.flops(1) / t["ms"] / 1e6
            built = build_ms.get(name.split()[0])
            found.append({
                **common, "provider": name, "ms": round(t["ms"], 4),
                **{key: round(value, 4) for key, value in t.items() if key != "ms"},
                "ratio": round(times[BASELINE]["ms"] / t["ms"], 2) if BASELINE in times else None,
                "GFLOP/s_visible": round(gflops * plan.visible_pairs, 1),
                "GFLOP/s_computed": round(gflops * ready[name].computed_pairs, 1),
                "%_of_matmul": round(100 * gflops * plan.visible_pairs / matmul, 1),
                "peak_MB": round(harness.peak_megabytes(calls[name], device), 1),
                "build_ms": None if built is None else round(built, 3),
                "plan_warm_ms": round(warm_ms, 4) if name.startswith("wam") else None,
                "same_bits": ready[name].same_bits if what != "forward" else None,
            })  # fmt: skip
        found += [
            {"provider": name, "error": reason, "where": f"{what} {work.name}"} for name, reason in missing.items()
        ]
    return found


def _build_ms(build: Callable[[], object], device: str, repeats: int = 10) -> float:
    def finished() -> None:
        build()
        if device == "cuda":
            torch.cuda.synchronize()

    return harness.measure({"": finished}, "cpu", repeats)[""]["ms_min"]


def _call(attend: Attend, inputs: list[list[Tensor]], backward: bool) -> Callable[[], object]:
    if not backward:
        return harness.rotated(attend, [qkvo[:3] for qkvo in inputs])
    sets = [([t.detach().requires_grad_() for t in qkvo[:3]], qkvo[3]) for qkvo in inputs]
    return harness.rotated(lambda leaves, dout: torch.autograd.grad(attend(*leaves), leaves, dout), sets)


def rows(options: Options) -> Iterable[Row]:
    failed: dict[tuple[str, str], list[str]] = {}
    for work, peers, repeats in tqdm(cases(options), desc="attention", unit="workload"):
        for row in bench(work, peers, repeats, options):
            if "error" in row:
                failed.setdefault((row["provider"], row["error"]), []).append(row["where"])
            else:
                yield row
    # one row for each reason: most hold for every workload of a machine
    yield from ({"provider": name, "error": error, "where": where} for (name, error), where in failed.items())
