"""Short masked attention: a plan against the dense mask.   python -m bench.suites short_calls

The integrations run a call of few pairs of a query and a key by PyTorch's fused kernel under the mask as it is
(``DENSE_PAIRS`` of ``wam_kernels/integrations/_kernels.py``). These rows are where that number comes from: Fast-WAM's
masks from its released size upwards, forward and backward. The plan is built outside: a model has a handful of masks.

One thread; 8 heads of 64 in float32 on a CPU, 24 heads of 128 in bf16 on a CUDA device. ``ratio_min`` is the dense
mask's least time against the provider's: CPU time on a CPU, which a busy machine changes least.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from bench import harness
from bench.harness import Options
from bench.rows import Row
from wam_kernels import RULE_PROGRAMS, block_attention, compile_plan

# program, video frames, tokens of a frame, actions: 326 and 620 tokens are Fast-WAM's released size
CASES = [
    ("fast_wam_joint", 3, 98, 32),
    ("fast_wam_joint", 5, 96, 32),
    ("fast_wam_idm", 3, 98, 32),
    ("fast_wam_joint", 8, 98, 32),
    ("fast_wam_idm", 6, 98, 32),
]
BASELINE = "sdpa_dense_mask"


def bench(program: str, frames: int, tokens: int, actions: int, options: Options) -> Iterable[Row]:
    device = options.device
    heads, D, dtype = (24, 128, torch.bfloat16) if device == "cuda" else (8, 64, torch.float32)
    sample = RULE_PROGRAMS[program](video_frames=frames, video_tokens=tokens, actions=actions)
    plan = compile_plan(sample, device=device)
    mask = plan.mask()[0, 0]
    generator = torch.Generator().manual_seed(options.seed)
    q, k, v, incoming = (torch.randn(1, plan.length, heads, D, generator=generator).to(device, dtype) for _ in range(4))

    def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return (scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2),)

    functions: dict[str, harness.Function] = {BASELINE: dense}
    impls, failed = harness.own_backends("block_attention", device)
    for impl in impls:
        functions[f"wam {impl}"] = lambda q, k, v, impl=impl: (block_attention(q, k, v, plan, impl=impl),)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    providers, wrong = harness.correct_providers(functions, leaves, [incoming], rtol)
    calls = {name: lambda fn=fn: torch.autograd.grad(fn(*leaves), leaves, [incoming]) for name, fn in providers.items()}
    repeats = 3 if options.quick else 15
    times = harness.measure(calls, device, repeats, time.thread_time if device == "cpu" else time.perf_counter)
    for name, t in times.items():
        yield {
            "program": program, "tokens": plan.length, "pairs": plan.length**2, "density": round(plan.density, 3),
            "heads": heads, "D": D, "dtype": str(dtype), "what": "forward + backward", "provider": name,
            **{key: round(value, 3) for key, value in t.items()},
            "ratio_min": round(times[BASELINE]["ms_min"] / t["ms_min"], 2),
        }  # fmt: skip
    case = f"{program}, {plan.length} tokens"
    yield from ({"provider": name, "error": reason, "where": [case]} for name, reason in (failed | wrong).items())


def rows(options: Options) -> Iterable[Row]:
    cases = CASES[:1] if options.quick else CASES
    for program, frames, tokens, actions in tqdm(cases, desc="short_calls", unit="mask"):
        yield from bench(program, frames, tokens, actions, options)
