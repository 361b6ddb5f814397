"""Masks that a model passes: which plan they get, and how much of them is read on the host."""

import numpy as np
import pytest
import torch

from wam_kernels.integrations._kernels import MaskPlans, staircase_ranges, staircase_vectors
from wam_kernels.masks.ranges import Ranges

CPU = torch.device("cpu")


def prompts(samples: int, tokens: int, blocks: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """bool ``[B, S, S]``: blocks that attend to those before them, with padding anywhere; from the two vectors that
    openpi makes it of."""
    g = torch.Generator().manual_seed(seed)
    pad = torch.rand(samples, tokens, generator=g) < 0.8
    block = torch.zeros(tokens, dtype=torch.int64)
    for begin in blocks:
        block[begin:] += 1
    return (block[None, None] <= block[None, :, None]) & pad[:, None] & pad[:, :, None]


@pytest.mark.parametrize("blocks", [(), (9,), (9, 10), (1, 2, 3, 4)])
@pytest.mark.parametrize("queries", [slice(None), slice(9, None)])
def test_vectors_spell_out_a_staircase(blocks, queries):
    mask = prompts(3, 14, blocks)[:, queries]
    keys, counts, staircase = staircase_vectors(mask)
    assert staircase
    for sample, vectors in zip(mask.numpy(), zip(keys.numpy(), counts.numpy(), strict=True), strict=True):
        ranges = staircase_ranges(vectors)
        assert ranges == Ranges.from_mask(sample) and np.array_equal(ranges.dense_mask(), sample)


def test_what_is_no_staircase_is_read_whole():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        mask = torch.rand(2, 7, 9, generator=g) < 0.5
        stair = [bool(staircase_vectors(m[None])[2]) for m in mask]
        again = [
            np.array_equal(staircase_ranges((k.numpy(), c.numpy())).dense_mask(), m.numpy())
            for m, k, c in zip(mask, *staircase_vectors(mask)[:2], strict=True)
        ]
        assert stair == again
        bias = torch.where(mask[:, None], 0.0, -2e38)
        assert torch.equal(MaskPlans().of(bias, CPU).mask()[:, 0], mask)


def test_an_empty_staircase():
    for mask in (torch.zeros(1, 5, 6, dtype=torch.bool), torch.ones(1, 5, 6, dtype=torch.bool)):
        assert torch.equal(MaskPlans().of(mask[0], CPU).mask()[0], mask)


def test_a_prompt_s_mask_comes_to_the_host_as_two_vectors(monkeypatch):
    copied, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: copied.append(t.numel()) or cpu(t))
    plans = MaskPlans()
    mask = prompts(4, 50, (40, 41))
    bias = torch.where(mask[:, None], 0.0, -2.38e38)
    first = plans.of(bias, CPU)
    assert copied == [2 + 2 * 4 * 50] and torch.equal(first.mask()[:, 0], mask)
    assert plans.of(bias.clone(), CPU) is first and len(plans) == 1
    other = bias.clone()
    other[0, 0, 3, 7] = 0 if other[0, 0, 3, 7] else -2.38e38  # no staircase any more
    assert not torch.equal(plans.of(other, CPU).mask(), first.mask())
    assert copied[2:] == [402, 4 * 50 * 50]


def test_views_of_one_mask():
    """Each denoising step takes a slice of its own; what is written to the base is noticed."""
    plans, mask = MaskPlans(), torch.ones(8, 8, dtype=torch.bool)
    first = plans.of(mask[4:], CPU)
    assert plans.of(mask[4:], CPU) is first and plans.of(mask[:4], CPU) is not plans.of(mask, CPU)
    mask[5, 0] = False
    assert torch.equal(plans.of(mask[4:], CPU).mask()[0, 0], mask[4:])
