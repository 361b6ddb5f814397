"""What every backend must pass; called by the CPU suite, the interpreter suite, the csrc suite and the GPU suite."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.block_attention.checks import poisoned_allocations
from tests.budget import assert_within_budget
from wam_kernels.cached_attention import cached_attention

Group = list[tuple[int, int]]  # slots [start, end)


@dataclass(frozen=True)
class Case:
    """One call: ranges of every group of every sample, N slots, H heads of D channels."""

    samples: list[list[Group]]
    rows: tuple[int, ...]
    N: int
    H: int = 2
    D: int = 32
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    scale: float | None = None
    spread: float = 1.0  # of q: large gives a peaked softmax

    def ranges(self) -> Tensor:
        """``[B, G, R, 2]``; shorter lists are filled up with empty ranges that a careless kernel would notice."""
        R = max([1, *(len(group) for groups in self.samples for group in groups)])
        pad = [(7, 7), (self.N, 3)]
        rows = [[group + [pad[i % 2] for i in range(R - len(group))] for group in groups] for groups in self.samples]
        return torch.tensor(rows, dtype=torch.int32).view(len(self.samples), len(self.rows), R, 2).to(self.device)

    def inputs(self) -> list[Tensor]:
        """q and two views of one ``[layers, 2, B, N, H, D]`` buffer, NaN in slots that no group attends to.

        Drawn on the CPU so that devices get the same numbers.
        """
        g = torch.Generator().manual_seed(0)
        B, shape = len(self.samples), (self.H, self.D)
        q = self.spread * torch.randn(B, sum(self.rows), *shape, generator=g)
        buffer = torch.full((2, 2, B, self.N, *shape), torch.nan)
        for b, groups in enumerate(self.samples):
            for start, end in {r for group in groups for r in group}:
                start, end = max(start, 0), min(end, self.N)
                if start < end:
                    buffer[1, :, b, start:end] = torch.randn(2, end - start, *shape, generator=g)
        buffer = buffer.to(self.device, self.dtype)
        return [q.to(self.device, self.dtype), buffer[1, 0], buffer[1, 1]]


WRAPPED = [(40, 64), (0, 17), (64, 73)]  # a ring whose oldest slots come last, and the chunk's own slots

CASES = [
    pytest.param(Case([[[(0, 90), (100, 140)], [(0, 140)]]], (32, 8), 160, H=3, D=64), id="video-and-action-rows"),
    pytest.param(Case([[WRAPPED]], (19,), 80), id="wrap-around"),
    pytest.param(Case([[[(3, 50)]], [[(0, 80)]], [[(60, 61)]]], (21,), 80), id="per-sample-fill"),
    pytest.param(Case([[[], [(5, 30)]]], (6, 6), 40), id="fully-masked-group"),
    pytest.param(Case([[[]], [[(2, 9)]]], (5,), 20), id="fully-masked-sample"),
    pytest.param(Case([[[]]], (5,), 20), id="nothing-at-all"),
    pytest.param(Case([[[(0, 9)], [(9, 30)], [(30, 33)]]], (4, 0, 3), 40), id="group-without-rows"),
    pytest.param(Case([[[(0, 9)]]], (0,), 40), id="no-rows"),
    pytest.param(Case([[[], []]], (4, 1), 0), id="no-slots"),
    pytest.param(Case([[[(0, 9)]]], (4,), 40, H=0), id="no-heads"),
    pytest.param(Case([[[(7 * i, 7 * i + 1 + i % 6) for i in range(23)]]], (17,), 170), id="many-ranges"),
    pytest.param(Case([[[(1, 2)]]], (1,), 3, H=1, D=8), id="smallest"),
    pytest.param(Case([[[(0, 130), (140, 199)]]], (70,), 200, H=1, D=128), id="D128"),
    pytest.param(Case([[[(0, 130), (140, 199)]]], (70,), 200, H=1, D=96), id="D96"),
    pytest.param(Case([[[(3, 50)]]], (9,), 64, H=2, D=72), id="D-not-a-power-of-two"),
    pytest.param(Case([[WRAPPED]], (20,), 80, spread=30.0), id="peaked-softmax"),
    pytest.param(Case([[WRAPPED]], (20,), 80, scale=0.7), id="own-scale"),
    pytest.param(
        Case([[WRAPPED, [(64, 73)]], [[(0, 73)], []]], (33, 16), 80, H=3, D=64, dtype=torch.bfloat16), id="bf16"
    ),
    pytest.param(
        Case([[WRAPPED, [(64, 73)]], [[(0, 73)], []]], (33, 16), 80, H=3, D=64, dtype=torch.float16), id="fp16"
    ),
]


def run(case: Case, inputs: list[Tensor], impl: str | None, ranges: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return cached_attention(
        *inputs, case.ranges() if ranges is None else ranges, group_rows=case.rows, scale=case.scale, impl=impl,
        return_lse=True,
    )  # fmt: skip


def check_against_reference(case: Case, impl: str | None) -> None:
    inputs = case.inputs()
    with poisoned_allocations():
        actual = run(case, inputs, impl)
    # PyTorch's CPU kernel takes exp to 20 bits only where the inputs have 16
    assert_right(case, inputs, actual, lse_slack=1e-4 if impl == "cpu" and case.dtype.itemsize == 2 else 0.0)


def assert_right(case: Case, inputs: list[Tensor], actual: tuple[Tensor, Tensor], lse_slack: float = 0.0) -> None:
    eager = run(case, inputs, "reference")
    truth = run(case, [t.double() for t in inputs], "reference")
    assert truth[0].isfinite().all(), "the reference let a NaN of an unseen slot through"
    assert actual[0].dtype == case.dtype and actual[0].is_contiguous() and actual[1].dtype == eager[1].dtype
    # tensor cores take p in the input dtype: two roundings where the reference, all float32, has one
    slack = 3.0 if case.dtype.itemsize == 2 else 2.0
    assert_within_budget("out", actual[0], eager[0], truth[0], slack)
    if lse_slack:
        torch.testing.assert_close(actual[1].double(), truth[1], rtol=0, atol=lse_slack)
    else:
        assert_within_budget("lse", actual[1], eager[1], truth[1], slack)


def check_strides_are_free(case: Case, impl: str | None) -> None:
    """Heads first, a shared cache, a slice of a projection: the same bits as from dense tensors."""
    q, k, v = case.inputs()
    expected = run(case, [q, k.contiguous(), v.contiguous()], impl)
    strided = [
        torch.cat((q, q + 1), 2)[:, :, : case.H],
        k.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack((v + 1, v), 1)[:, 1],
    ]
    assert not any(t.is_contiguous() for t in strided[:2])
    for a, b in zip(run(case, strided, impl), expected, strict=True):
        assert torch.equal(a, b)
    check_rows_that_are_shared(case, impl)
    one_cache = [q, k[:1].expand_as(k), v[:1].expand_as(v)]  # as guidance does with text
    for a, b in zip(run(case, one_cache, impl), run(case, [t.contiguous() for t in one_cache], impl), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def shared(case: Case, queries: int) -> tuple[Case, list[Tensor]]:
    """The case with ``queries`` samples of q for each row of the cache, each attending to less than the one before."""
    lists = [[group[i:] for group in groups] for groups in case.samples for i in range(queries)]
    q, k, v = case.inputs()
    more = [q if i == 0 else q.roll(i, 1) for i in range(queries)]
    return replace(case, samples=lists), [torch.stack(more, 1).flatten(0, 1), k, v]


def check_rows_that_are_shared(case: Case, impl: str | None, queries: int = 3) -> None:
    """Samples that share a row of the cache get the bits that they get from a copy of it."""
    many, inputs = shared(case, queries)
    q, k, v = inputs
    copied = [q, k.repeat_interleave(queries, 0), v.repeat_interleave(queries, 0)]
    for a, b in zip(run(many, inputs, impl), run(many, copied, impl), strict=True):
        assert torch.equal(a, b)
    assert_right(many, inputs, run(many, inputs, impl), lse_slack=1e-4 if impl == "cpu" else 0.0)


def check_nan_stays(attend, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    """NaN and Inf reach the rows that hold or attend to them; a row whose scores are all -inf is as a fully masked one.

    ``attend(case, inputs)`` gives out and lse.
    """
    groups = [[(0, 40), (50, 60)], [(40, 50)]]
    case = Case([groups, groups], (20, 4), 70, H=1, dtype=dtype, device=device, scale=1.0)
    q, k, v = inputs = case.inputs()
    expected, _ = attend(case, inputs)
    # the second sample; a row; slots that only the second group attends to, beside those of the first
    q[1], k[1], v[1] = torch.nan, torch.inf, torch.nan
    q[0, 3], q[0, 7] = torch.nan, torch.inf
    v[0, 40:50] = torch.nan
    q[0, 23], k[0, 40:50] = 3e38, -10
    out, lse = attend(case, inputs)
    kept = [i for i in range(20) if i not in (3, 7)]
    assert torch.equal(out[0, kept], expected[0, kept])
    assert not out[1].isfinite().any() and not out[0, [3, 7, 20, 21, 22]].isfinite().all(-1).any()
    v[0, 40:50] = 1.0
    out, lse = attend(case, inputs)
    assert (out[0, 23] == 0).all() and (lse[0, :, 23] == -torch.inf).all()
    assert torch.equal(out[0, kept], expected[0, kept])


def check_same_bits_from_run_to_run(case: Case, impl: str | None, runs: int = 2) -> None:
    inputs, ranges = case.inputs(), case.ranges()
    first = run(case, inputs, impl, ranges)
    for _ in range(runs - 1):
        assert all(torch.equal(a, b) for a, b in zip(run(case, inputs, impl, ranges), first, strict=True))


def check_every_kernel(impl: str, device: str = "cuda") -> None:
    """Once or twice at small shapes: what ``tools.gpu.sanitize`` runs."""
    case = Case([[WRAPPED, [(64, 73)]], [[(0, 73)], []]], (33, 16), 80, H=3, D=64, dtype=torch.bfloat16)
    check_against_reference(replace(case, device=device), impl)
