"""varlen_attention and plan_from_mask_mod."""

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import and_masks, create_block_mask, create_mask, flex_attention, or_masks

from tests.block_attention.checks import EDGES, check_edge
from tests.geometries import small
from wam_kernels import (
    RULE_PROGRAMS,
    Ranges,
    block_attention,
    compile_plan,
    plan_from_mask_mod,
    varlen_attention,
)
from wam_kernels.masks.ranges import MAX_COLUMNS
from wam_kernels.plan.compile import compiled


def qkv(total_q: int, total_k: int, H: int = 4, kv_heads: int = 2, D: int = 16) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (total_q, H, D), (total_k, kv_heads, D), (total_k, kv_heads, D)
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


# documents of 5, 12 and 8 queries over keys of 9, 12 and 8, with one shared stretch of keys in front of them
Q_RANGES = [(0, 5), (5, 17), (17, 25), (0, 25)]
K_RANGES = [(4, 13), (13, 25), (25, 33), (0, 4)]


@pytest.mark.parametrize("form", [list, np.array, torch.tensor], ids=["pairs", "array", "tensor"])
def test_varlen_attention(form):
    q, k, v = qkv(26, 40)
    out, lse = varlen_attention(q, k, v, form(Q_RANGES), form(K_RANGES), return_lse=True, softmax_scale=0.3)
    mask = torch.zeros(26, 40, dtype=torch.bool)
    for (q0, q1), (k0, k1) in zip(Q_RANGES, K_RANGES, strict=True):
        mask[q0:q1, k0:k1] = True
    group = torch.tensor([0, 0, 1, 1])
    scores = torch.einsum("qhd,khd->hqk", q, k[:, group]) * 0.3
    scores = scores.masked_fill(~mask, float("-inf"))
    expected = torch.einsum("hqk,khd->qhd", scores[:, :25].softmax(-1), v[:, group])
    torch.testing.assert_close(out[:25], expected)
    torch.testing.assert_close(lse[:, :25], scores[:, :25].logsumexp(-1))
    assert (out[25] == 0).all() and (lse[:, 25] == float("-inf")).all()
    grads, truth = (torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (out, expected))
    torch.testing.assert_close(grads, truth)


@pytest.mark.parametrize("name", EDGES)
def test_varlen_attention_at_the_edges(name):
    check_edge(name, "cpu")


def test_varlen_attention_keeps_its_plan():
    q, k, v = qkv(26, 40)
    compiled.cache_clear()
    for _ in range(3):
        varlen_attention(q, k, v, Q_RANGES, K_RANGES)
    assert compiled.cache_info().misses == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(1, 26, 4, 16)}, r"varlen_attention: q must have shape \[total_q, H, D\]"),
        ({"v": torch.zeros(39, 2, 16)}, r"varlen_attention: v must have shape \[total_k=40, Hkv=2, D=16\]"),
        ({"q_ranges": torch.zeros(1, 2, device="meta")}, "q_ranges must be on the host, got meta"),
        ({"k_ranges": [(0, 41)] * 4}, r"k_ranges\[0\] must be .* <= 40, got \[0, 41\]"),
        ({"k_ranges": torch.tensor([[0.0, 5.9]] * 4)}, r"k_ranges must be integers, got torch.float32 \[4, 2\]"),
        ({"k_ranges": [(0, 4)]}, "k_ranges must have R=4 rows like q_ranges, got 1"),
    ],
)
def test_varlen_refusals(change, message):
    q, k, v = qkv(26, 40)
    call = {"q": q, "k": k, "v": v, "q_ranges": Q_RANGES, "k_ranges": K_RANGES}
    with pytest.raises(ValueError, match=message):
        varlen_attention(**(call | change))


def lingbot_mask_mod():
    """The training rule as mask functions over per-token ids, as its users write it. 4 + 3 numbers, 2 samples."""
    sample = torch.tensor([0] * 8 + [1] * 8 + [0] * 8 + [1] * 8)
    number = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2] * 4)
    clean = torch.tensor([0] * 16 + [1] * 16)
    same = lambda b, h, q, k: sample[q] == sample[k]  # noqa: E731
    clean_clean = lambda b, h, q, k: (clean[q] == 1) & (clean[k] == 1) & (number[k] <= number[q])  # noqa: E731
    noisy_clean = lambda b, h, q, k: (clean[q] == 0) & (clean[k] == 1) & (number[k] < number[q])  # noqa: E731
    noisy_noisy = lambda b, h, q, k: (clean[q] == 0) & (clean[k] == 0) & (number[k] == number[q])  # noqa: E731
    return and_masks(or_masks(clean_clean, noisy_clean, noisy_noisy), same)


LINGBOT = {"samples": 2, "video_frames": 2, "video_tokens": 4, "action_frames": 0, "action_tokens": 1, "chunk_size": 1}


def test_a_mask_mod_that_is_a_known_program():
    program = RULE_PROGRAMS["lingbot_va_train"](**LINGBOT, window=64)
    assert plan_from_mask_mod(lingbot_mask_mod(), program) is compile_plan(program)


def test_a_mask_mod_that_is_not_is_refused_with_the_pair():
    program = RULE_PROGRAMS["lingbot_va_train"](**LINGBOT, window=1)
    with pytest.raises(ValueError, match=r"at \(b=0, q=4, k=16\) mask_mod says True and geometry False"):
        plan_from_mask_mod(lingbot_mask_mod(), program)


def test_a_mask_mod_by_its_lengths_runs_as_flex_attention_does():
    mask_mod = lingbot_mask_mod()
    plan = plan_from_mask_mod(mask_mod, 32)
    assert torch.equal(plan.mask()[0, 0], create_mask(mask_mod, None, None, 32, 32, "cpu")[0, 0])
    q, k, v = (torch.randn(2, 32, 2, 16) for _ in range(3))
    block_mask = create_block_mask(mask_mod, None, None, 32, 32, device="cpu")
    expected = flex_attention(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=block_mask).transpose(1, 2)
    torch.testing.assert_close(block_attention(q, k, v, plan), expected, atol=1e-5, rtol=1e-5)


def test_blocks_of_queries_are_put_together():
    # 1,300 queries are three blocks; a band of 40 keys crosses their borders
    def band(b, h, q, k):
        return (k >= q) & (k < q + 40)

    plan = plan_from_mask_mod(band, (1300, 1200))
    assert torch.equal(plan.mask()[0, 0], create_mask(band, None, None, 1300, 1200, "cpu")[0, 0])
    assert plan_from_mask_mod(band, Ranges.from_mask(plan.mask()[0, 0].numpy())).visible_pairs == plan.visible_pairs


def test_a_mask_mod_that_depends_on_the_batch():
    lengths = torch.tensor([3, 9])

    def valid(b, h, q, k):
        return k < lengths[b]

    plan = plan_from_mask_mod(valid, (5, 9), batch=2)
    assert plan.batch == 2 and plan.mask().sum((2, 3)).flatten().tolist() == [15, 45]
    known = [[Ranges([(0, 5)], [(0, n)], 5, 9)] for n in (3, 9)]
    assert plan_from_mask_mod(valid, known, batch=2) is compile_plan(known)
    with pytest.raises(ValueError, match=r"at \(b=0, q=0, k=3\) mask_mod says False and geometry True"):
        plan_from_mask_mod(valid, known[1][0], batch=2)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: plan_from_mask_mod(lambda b, h, q, k: q >= k + h, 9, heads=2),
            "heads 0 and 1 differ at .b=0, q=0, k=0",
        ),
        (lambda: plan_from_mask_mod(lambda b, h, q, k: q - k, 9), "must return a bool tensor, got torch.int64"),
        (lambda: plan_from_mask_mod(lambda b, h, q, k: True, 9), "must return a bool tensor, got bool"),
        (
            lambda: plan_from_mask_mod(lambda b, h, q, k: (q >= k)[None], 9),
            r"must return what broadcasts to \[1, 1, 9, 9\] like its arguments, got \[1, 1, 1, 9, 9\]",
        ),
        (
            lambda: plan_from_mask_mod(lambda b, h, q, k: torch.ones(3, dtype=torch.bool), 9),
            r"must return what broadcasts to \[1, 1, 9, 9\] like its arguments, got \[3\]",
        ),
        (lambda: plan_from_mask_mod(lambda b, h, q, k: q >= k, 0), "geometry must be at least 1, got 0"),
        (lambda: plan_from_mask_mod(lambda b, h, q, k: q >= k, (4, 2.0)), "geometry must be an int, got 2.0"),
        (lambda: plan_from_mask_mod(lambda b, h, q, k: q >= k, 40_000), "at most max_length=32768 tokens.*got 40000"),
        (
            lambda: plan_from_mask_mod(lambda b, h, q, k: q >= k, [[small()]] * 3, batch=2),
            "batch must be 3 like geometry",
        ),
        (lambda: plan_from_mask_mod(lambda b, h, q, k: (q + k) % 2 == 0, 99), f"must fit {MAX_COLUMNS} columns"),
    ],
)
def test_mask_mod_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
