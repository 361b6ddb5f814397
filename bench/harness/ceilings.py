"""What the machine of a run reaches: the roofs of every roofline."""

from __future__ import annotations

from functools import lru_cache, partial

import torch

from .timing import measure


@lru_cache
def ceilings(device: str) -> dict[str, float]:
    """What this machine reaches here and now: GB/s of a copy (read + write), GFLOP/s of bf16 and float32 products.

    Random data: a product of zeros draws less power and runs faster than any real one. float32 means float32 (no tf32).
    """
    generator = torch.Generator().manual_seed(0)
    cuda = device == "cuda"
    size = 1 << (31 if cuda else 27)
    products = {"bf16": 8192, "float32": 4096} if cuda else {"bf16": 256, "float32": 1024}
    source = torch.randint(0, 255, (1 << 20,), dtype=torch.uint8, generator=generator).to(device).repeat(size >> 20)
    target = torch.empty_like(source)
    repeats = 20 if cuda else 5
    ms = measure({"": partial(target.copy_, source)}, device, repeats)[""]["ms"]
    out = {"copy_GB/s": 2 * size / ms / 1e6}
    del source, target
    for name, n in products.items():
        a, b = (torch.randn(n, n, generator=generator).to(device) for _ in range(2))
        if name == "bf16":
            a, b = a.bfloat16(), b.bfloat16()
        ms = measure({"": partial(torch.matmul, a, b)}, device, repeats)[""]["ms"]
        out[f"{name}_GFLOP/s"] = 2 * n**3 / ms / 1e6
    return {key: round(value, 1) for key, value in out.items()}


def bandwidth(t: dict[str, float], moved: int, device: str) -> dict[str, float]:
    """Columns of a memory-bound row: milliseconds (of ``measure``), and how fast ``moved`` bytes went."""
    speed = moved / t["ms"] / 1e6
    return {
        "MB": round(moved / 1e6, 2), **{key: round(value, 4) for key, value in t.items()}, "GB/s": round(speed, 1),
        "%_of_copy": round(100 * speed / ceilings(device)["copy_GB/s"], 1),
    }  # fmt: skip
