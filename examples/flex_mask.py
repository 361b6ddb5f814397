"""A mask from FlexAttention: your ``mask_mod`` as a plan, and a program as a ``mask_mod``.

python examples/flex_mask.py
"""

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from wam_kernels import Geometry, block_attention, compile_plan, dense_mask, plan_from_mask_mod

torch.manual_seed(0)
S, BLOCK, WINDOW = 256, 32, 3


def block_causal(b, h, q, k):
    """Blocks of 32 tokens, each of which attends to itself and the two before it."""
    return (q // BLOCK >= k // BLOCK) & (q // BLOCK - k // BLOCK < WINDOW)


plan = plan_from_mask_mod(block_causal, S)  # every pair is checked; do it once
q, k, v = (torch.randn(1, S, 4, 32) for _ in range(3))
ours = block_attention(q, k, v, plan)
block_mask = create_block_mask(block_causal, None, None, S, S, device="cpu")
theirs = flex_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=block_mask).transpose(1, 2)
print(f"your mask: density {plan.density:.2f}, differs from flex_attention by {(ours - theirs).abs().max():.0e}")
assert torch.allclose(ours, theirs, atol=1e-5)

# The other way round: an interaction program in FlexAttention. The mask is a table, which costs S x S.
geometry = Geometry(
    program="joint", video_frames=8, video_tokens=4, action_frames=8, action_tokens=1, chunk_size=2, window=6
)
table = torch.from_numpy(dense_mask(geometry))
same = plan_from_mask_mod(lambda b, h, q, k: table[q, k], geometry)  # refused, with the first pair, if it differs
print(f"a program: {same.length} tokens, density {same.density:.2f}")
assert same.visible_pairs == compile_plan(geometry).visible_pairs
