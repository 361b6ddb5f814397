"""Attention in 30 lines: one training sample of a world-action model, six programs, forward and backward.

python examples/attention.py
"""

import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from wam_kernels import PROGRAMS, Geometry, block_attention, compile_plan

torch.manual_seed(0)
for program in PROGRAMS:
    geometry = Geometry(
        program=program, history="video_only", chunk_size=4, window=8,
        video_frames=16, video_tokens=8, action_frames=16, action_tokens=2,
    )  # fmt: skip
    plan = compile_plan(geometry)  # once for a geometry; plan.to("cuda") for a GPU
    q, k, v = (torch.randn(1, plan.length, 4, 32, requires_grad=True) for _ in range(3))

    began = time.perf_counter()
    out = block_attention(q, k, v, plan)  # [B, S, H, D]
    out.square().mean().backward()
    ours = time.perf_counter() - began

    heads_first = [x.detach().transpose(1, 2) for x in (q, k, v)]
    dense = scaled_dot_product_attention(heads_first[0], heads_first[1], heads_first[2], attn_mask=plan.mask())
    error = (out - dense.transpose(1, 2)).abs().max().item()
    assert error < 1e-5 and q.grad is not None and q.grad.isfinite().all()
    print(f"{program:22} {plan.length} tokens, density {plan.density:.2f}, {1000 * ours:.1f} ms, error {error:.0e}")
