"""block_attention against dense-mask SDPA, the way the reference system runs.   python -m bench.bench_block_attention

LIBERO geometry (32 + 4 tokens a frame), program ``joint`` with ``video_only`` history, 8 heads of 64, chunk 4, window
64. FLOPs are counted over visible pairs only: 4 H D pairs forward, 2.5 times that backward. Both arms get the same
tensors; the plan is built outside and timed apart, cold (cache cleared). Peak memory is that of one call.

On a CUDA device the same command runs bf16 with the Triton kernels; those rows are not recorded yet.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench import harness
from wam_kernels import Geometry, block_attention, compile_plan
from wam_kernels.plan import _compile

HEADS, D = 8, 64
FRAMES = {"2,448 tokens": 34, "4,896 tokens": 68, "9,360 tokens": 130}


def geometry(frames: int) -> Geometry:
    return Geometry(
        program="joint", video_frames=frames, video_tokens=32, action_frames=frames, action_tokens=4,
        chunk_size=4, window=64, history="video_only",
    )  # fmt: skip


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    heads = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)


def bench(frames: int, device: str, repeats: int) -> list[dict]:
    geo = geometry(frames)
    plan = compile_plan(geo, device=device)
    mask = plan.mask()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, plan.length, HEADS, D, generator=generator).to(device, dtype) for _ in range(4)
    )
    forwards = {"sdpa_dense_mask": lambda: dense(q, k, v, mask), "wam": lambda: block_attention(q, k, v, plan)}
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]

    def train(attend):
        return lambda: torch.autograd.grad(attend(*leaves), leaves, dout)

    both = {
        "sdpa_dense_mask": train(lambda *qkv: dense(*qkv, mask)),
        "wam": train(lambda *qkv: block_attention(*qkv, plan)),
    }
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    harness.require_equal("out", forwards["wam"](), forwards["sdpa_dense_mask"](), rtol)
    for name, a, b in zip(("dq", "dk", "dv"), both["wam"](), both["sdpa_dense_mask"](), strict=True):
        harness.require_equal(name, a, b, rtol)

    def build():
        _compile.cache_clear()
        compile_plan(geo, device=device)

    plan_ms = harness.measure({"plan": build}, "cpu", repeats)["plan"]["ms"]
    rows = []
    for what, arms, factor in (("forward", forwards, 1.0), ("forward+backward", both, 3.5)):
        times = harness.measure(arms, device, repeats)
        peaks = {arm: harness.peak_megabytes(fn, device) for arm, fn in arms.items()}
        for arm, t in times.items():
            rows.append({
                "what": what, "arm": arm, "tokens": plan.length, "heads": HEADS, "D": D, "dtype": str(dtype),
                "density": round(plan.density, 4), "efficiency": round(plan.efficiency, 4), "plan_ms": round(plan_ms, 2),
                **{key: round(value, 2) for key, value in t.items()}, "peak_MB": round(peaks[arm], 1),
                "GFLOP/s_visible": round(factor * 4 * HEADS * D * plan.visible_pairs / t["ms"] / 1e6, 1),
                "ratio": round(times["sdpa_dense_mask"]["ms"] / t["ms"], 2),
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="only 2,448 tokens, and record nothing")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for label, frames in tqdm(list(FRAMES.items())[: 1 if args.quick else None], desc="block_attention"):
        rows += bench(frames, device, args.repeats)
    for r in rows:
        print("{tokens:6} tokens  {what:17} {arm:16} {ms:9.1f} ms  {GFLOP/s_visible:7.1f} GFLOP/s  {ratio:5.2f}x  {peak_MB:7.1f} MB".format(**r))
    if not args.quick:
        print("recorded", harness.record("block_attention", rows, device))


if __name__ == "__main__":
    main()
