"""cached_attention compared with what a rollout does without it.   python -m bench.suites cached_attention

One chunk of LIBERO (128 video and 16 action rows) over a cache of 256 to 8,640 slots and its own 144. Three fills:
``one run``, all slots in a row (the window is full), ``three runs``, a ring with a hole of one chunk, as after an
eviction, and ``a quarter``, as early in an episode. All providers get the same views of one ``[layers, 2, B, N, H, D]``
buffer:

- ``sdpa dense mask``: SDPA over all slots with a boolean mask, which is built outside;
- ``concat + sdpa``: the ranges are concatenated, then SDPA without a mask: what a cache of lists does;
- ``sdpa, copied before``: the same without the copy, a bound that no cache with holes can reach;
- ``flash_attn_with_kvcache`` (CUDA, where flash-attn is installed; one run only: it reads a prefix of the slots).

FLOPs are 4 H D for each visible pair, bytes the visible k and v, q and out once each (``README.md`` of the op); no
speed is printed for an answer that misses the float64 reference. 8 heads of 64 in float32 on a CPU, 24 of 128 in bf16
on a CUDA device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench import harness
from bench.harness import Options
from bench.rows import Row
from wam_kernels import cached_attention
from wam_kernels.cached_attention.reference import visible_slots

ROWS = (128, 16)
CACHED = (256, 1024, 2160, 4320, 8640)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def fills(cached: int) -> dict[str, list[tuple[int, int]]]:
    """Visible slots of a cache with ``cached`` slots of history, followed by the chunk's own."""
    own, chunk = (cached, cached + sum(ROWS)), min(144, cached // 4)
    hole = cached * 5 // 8
    return {
        "one run": [(0, own[1])],
        "three runs": [(hole + chunk, cached), (0, hole), own],
        "a quarter": [(0, cached // 4), own],
    }


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def concatenated(t: Tensor, runs: list[tuple[int, int]]) -> Tensor:
    return torch.cat([t[:, start:end] for start, end in runs], 1)


def of_backend(ranges: Tensor, impl: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return cached_attention(q, k, v, ranges, group_rows=ROWS, impl=impl)


def make_providers(
    runs: list[tuple[int, int]], ranges: Tensor, k: Tensor, v: Tensor
) -> tuple[dict[str, Attend], dict[str, str]]:
    """Every provider that runs here, as a function of q and the two caches; of the others why they do not."""
    device = k.device.type
    mask = visible_slots(ranges, k.shape[1])[:, :1, None]  # both groups attend to the same
    dense_k, dense_v = concatenated(k, runs), concatenated(v, runs)
    providers: dict[str, Attend] = {
        "sdpa dense mask": lambda q, k, v: sdpa(q, k, v, mask),
        "concat + sdpa": lambda q, k, v: sdpa(q, concatenated(k, runs), concatenated(v, runs)),
        "sdpa, copied before": lambda q, k, v: sdpa(q, dense_k, dense_v),
    }
    impls, missing = harness.own_backends("cached_attention", device)
    if device == "cpu" or find_spec("flash_attn") is None:
        reason = "runs on cuda only" if device == "cpu" else "flash-attn is not installed"
        missing["flash_attn_with_kvcache"] = f"not run here: {reason}"
    elif len(runs) == 1:
        from flash_attn import flash_attn_with_kvcache

        lengths = torch.full((k.shape[0],), runs[0][1], dtype=torch.int32, device=device)
        providers["flash_attn_with_kvcache"] = lambda q, k, v: flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)
    for impl in impls:
        providers[f"wam {impl}"] = partial(of_backend, ranges, impl)
    return providers, missing


def rows(options: Options) -> Iterable[Row]:
    device = options.device
    H, D, dtype = (8, 64, torch.float32) if device == "cpu" else (24, 128, torch.bfloat16)
    S = sum(ROWS)
    sizes = CACHED[:2] if options.quick else CACHED
    for cached in tqdm(sizes, desc="cached_attention"):
        for fill, runs in fills(cached).items():
            generator = torch.Generator().manual_seed(options.seed)
            buffer = torch.randn(2, 2, 1, cached + S, H, D, generator=generator).to(device, dtype)
            q = torch.randn(1, S, H, D, generator=generator).to(device, dtype)
            # two layers take turns, as in a rollout
            inputs = [(q, layer[0], layer[1]) for layer in buffer]
            ranges = torch.tensor([[runs, runs]], dtype=torch.int32, device=device)
            providers, missing = make_providers(runs, ranges, *inputs[0][1:])
            truth = of_backend(ranges, "reference", *(t.double() for t in inputs[0]))
            rtol = 1e-5 if dtype == torch.float32 else 1e-2
            for name, provider in providers.items():
                harness.require_equal(name, provider(*inputs[0]), truth, rtol)
            del truth

            visible = sum(end - start for start, end in runs)
            flops, size = 4 * H * D * S * visible, 2 * (visible + S) * H * D * dtype.itemsize
            repeats = 5 if options.quick else 25 if device == "cpu" else 50
            times = harness.measure({n: harness.rotated(p, inputs) for n, p in providers.items()}, device, repeats)
            for name, t in times.items():
                yield {
                    "fill": fill, "cached": cached, "visible": visible, "rows": S, "heads": H, "D": D,
                    "dtype": str(dtype), "provider": name, **{key: round(value, 4) for key, value in t.items()},
                    "GFLOP/s": round(flops / t["ms_min"] / 1e6, 1), "GB/s": round(size / t["ms_min"] / 1e6, 1),
                    "x dense": round(times["sdpa dense mask"]["ms_min"] / t["ms_min"], 2),
                    "x concat": round(times["concat + sdpa"]["ms_min"] / t["ms_min"], 2),
                }  # fmt: skip
    yield from ({"provider": name, "error": reason, "where": ["every case"]} for name, reason in missing.items())
