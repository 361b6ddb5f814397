"""What every backend must pass; called by the CPU suite, the interpreter suite and the GPU suite."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.block_attention.checks import poisoned_allocations
from tests.budget import assert_within_budget
from wam_kernels.qk_norm_rope import qk_norm_rope, rope_table

NAMES = ("q_out", "k_out", "dq", "dk", "dweight_q", "dweight_k")
VARIANTS = {
    "wan": {"per_head": False, "interleaved": True},
    "cosmos": {"per_head": True, "interleaved": False},
    "row-norm-rotate-half": {"per_head": False, "interleaved": False},
    "head-norm-interleaved": {"per_head": True, "interleaved": True},
}


@dataclass(frozen=True)
class Case:
    """One call: B samples of S tokens, H heads of D channels."""

    B: int
    S: int
    H: int
    D: int
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None
    device: str = "cpu"
    table_per_sample: bool = False

    def inputs(self, per_head: bool, seed: int = 0) -> dict[str, Tensor]:
        """Drawn on the CPU so that devices get the same numbers; dq_out, dk_out are what flows back."""
        g = torch.Generator().manual_seed(seed)
        inner, dtype = self.H * self.D, self.weight_dtype or self.dtype
        width = self.D if per_head else inner
        x = {name: torch.randn(self.B, self.S, inner, generator=g).to(self.dtype) for name in ("q", "k")}
        # weights around one, far from symmetric: a weight applied to the wrong channel must show
        w = {f"weight_{n}": (1 + 0.5 * torch.randn(width, generator=g)).to(dtype) for n in ("q", "k")}
        heads = (self.B, self.S, self.H, self.D)
        d = {f"d{n}_out": torch.randn(heads, generator=g).to(self.dtype) for n in ("q", "k")}
        tokens = (self.B, self.S) if self.table_per_sample else (self.S,)
        positions = torch.rand(*tokens, 3, generator=g, dtype=torch.float64) * 60 - 10
        return {n: t.to(self.device) for n, t in (x | w | {"table": rope_table(positions, self.D)} | d).items()}


SHAPES = [
    pytest.param(Case(1, 2, 24, 128), id="typical"),
    pytest.param(Case(2, 4, 3, 32), id="heads-not-a-power-of-two"),
    pytest.param(Case(2, 2, 5, 72), id="D-not-a-power-of-two"),
    pytest.param(Case(1, 1, 1, 8), id="smallest"),
    pytest.param(Case(1, 1, 32, 256), id="largest"),
    pytest.param(Case(2, 0, 3, 16), id="no-tokens"),
    pytest.param(Case(0, 4, 3, 16), id="no-batch"),
    pytest.param(Case(2, 3, 3, 32, torch.bfloat16), id="bf16"),
    pytest.param(Case(2, 3, 3, 32, torch.float16), id="fp16"),
    pytest.param(Case(2, 3, 3, 32, torch.bfloat16, torch.float32), id="bf16-float32-weights"),
    pytest.param(Case(3, 2, 3, 24, table_per_sample=True), id="table-per-sample"),
    pytest.param(Case(0, 4, 3, 16, table_per_sample=True), id="table-per-sample-no-batch"),
]


def run(inputs: dict[str, Tensor], impl: str | None, **options) -> list[Tensor]:
    """q_out, k_out, dq, dk, dweight_q, dweight_k."""
    leaves = {n: inputs[n].detach().requires_grad_() for n in ("q", "k", "weight_q", "weight_k")}
    head_dim = inputs["dq_out"].shape[-1]
    outs = qk_norm_rope(**leaves, table=inputs["table"], head_dim=head_dim, impl=impl, **options)
    grads = torch.autograd.grad(outs, list(leaves.values()), [inputs["dq_out"], inputs["dk_out"]])
    return [t.detach() for t in outs] + list(grads)


def check_against_reference(case: Case, impl: str | None, per_head: bool, interleaved: bool) -> None:
    options = {"per_head": per_head, "interleaved": interleaved}
    inputs = case.inputs(per_head)
    with poisoned_allocations():
        actual = run(inputs, impl, **options)
    eager = run(inputs, "reference", **options)
    truth = run({n: t.double() for n, t in inputs.items()}, "reference", **options)
    for name, a, e, t in zip(NAMES, actual, eager, truth, strict=True):
        assert a.dtype == e.dtype and a.is_contiguous(), name
        assert_within_budget(name, a, e, t)


def check_strides_are_free(case: Case, impl: str | None) -> None:
    """Slices of fused projections, gradients in unequal layouts: the same bits as from dense tensors."""
    inputs = case.inputs(per_head=False)
    expected = run(inputs, impl)
    # every stride of q differs from that of k, so one taken for the other shows
    strided = {
        "q": torch.cat((inputs["q"], inputs["k"] + 1, inputs["k"]), -1).chunk(3, -1)[0],
        "k": torch.cat((inputs["q"] + 1, inputs["k"]), -1).chunk(2, -1)[1],
        "dq_out": inputs["dq_out"].transpose(1, 2).contiguous().transpose(1, 2),
        "dk_out": torch.cat((inputs["dk_out"], inputs["dk_out"] + 1), 1)[:, : case.S],
    }
    for a, b in zip(run(inputs | strided, impl), expected, strict=True):
        assert torch.equal(a, b)
    # the gradient of a sum: one number, expanded over everything
    ones = {n: torch.ones_like(inputs[n]) for n in ("dq_out", "dk_out")}
    expanded = {n: t[:1, :1, :1, :1].expand_as(t) for n, t in ones.items()}
    for a, b in zip(run(inputs | expanded, impl), run(inputs | ones, impl), strict=True):
        assert torch.equal(a, b)


def check_a_table_per_sample_is_one_call_a_sample(impl: str | None, device: str = "cpu") -> None:
    case = Case(3, 5, 3, 16, device=device, table_per_sample=True)
    inputs = case.inputs(per_head=False)
    both = run(inputs, impl)
    alone = []
    for b in range(case.B):
        of_sample = {n: t if n.startswith("weight") else t[b : b + 1] for n, t in inputs.items()}
        alone.append(run(of_sample | {"table": inputs["table"][b]}, impl))
    for name, actual, parts in zip(NAMES, both, zip(*alone, strict=True), strict=True):
        if name.startswith("dweight"):
            torch.testing.assert_close(actual, sum(parts))
        else:
            assert torch.equal(actual, torch.cat(parts)), name


def check_out_into_a_cache_slot(case: Case, impl: str | None) -> None:
    """A slot holds what a call without ``out`` returns, or v itself; the rest of a cache what it held. Any layout."""
    inputs = case.inputs(per_head=False)
    call = {n: inputs[n] for n in ("q", "k", "weight_q", "weight_k", "table")} | {"head_dim": case.D, "impl": impl}
    expected = qk_norm_rope(**call)
    B, S, H, D = expected[0].shape
    # a slice of a fused projection, as q and k may be; its strides differ from theirs
    v = torch.cat((inputs["k"], inputs["q"] + 1), -1).chunk(2, -1)[1]
    start, length = 3, S + 7
    for heads_first in ((False, True), (True, False), (False, True, True), (True, True, False), (True, False, False)):
        shapes = [(B, H, length, D) if first else (B, length, H, D) for first in heads_first]
        caches = [torch.full(shape, torch.nan, dtype=case.dtype, device=case.device) for shape in shapes]
        views = [c.transpose(1, 2) if first else c for c, first in zip(caches, heads_first, strict=True)]
        slots = tuple(view[:, start : start + S] for view in views)
        with_v = len(slots) == 3
        wanted = (*expected, v.unflatten(-1, (H, D))) if with_v else expected
        for out, out_first in ((slots, None), (tuple(views), (start, start))):
            for cache in caches:
                cache.fill_(torch.nan)
            got = qk_norm_rope(**call, v=v if with_v else None, out=out, out_first=out_first)
            for g, given, slot, view, e in zip(got, out, slots, views, wanted, strict=True):
                assert g is given and torch.equal(slot, e)
                rest = torch.cat((view[:, :start], view[:, start + S :]), 1)
                assert rest.isnan().all()


def check_nan_stays(impl: str | None, per_head: bool, interleaved: bool, device: str = "cpu") -> None:
    """NaN and Inf in a token of q or k stay in it, with ``per_head`` in its head; only weight gradients get them."""
    case = Case(2, 5, 3, 24, device=device)
    inputs = case.inputs(per_head)
    bad = {name: t.clone() for name, t in inputs.items()}
    bad["q"][1, 2, case.D + 3], bad["k"][1, 4, 0], bad["dk_out"][0, 1, 2] = torch.nan, torch.inf, -torch.inf
    options = {"per_head": per_head, "interleaved": interleaved}
    expected, actual = run(inputs, impl, **options), run(bad, impl, **options)
    for name, got, want in zip(NAMES[:4], actual, expected, strict=False):
        got, want = (t.view(case.B, case.S, case.H, case.D).clone() for t in (got, want))
        hit = {"q": [(1, 2, 1)], "k": [(1, 4, 0)] + [(0, 1, 2)] * (name == "dk")}[name.removeprefix("d")[0]]
        for b, s, h in hit:
            heads = slice(h, h + 1) if per_head else slice(None)
            assert not got[b, s, heads].isfinite().all(), name
            got[b, s, heads] = want[b, s, heads] = 0
        assert torch.equal(got, want), name


def check_same_bits_from_run_to_run(case: Case, impl: str | None, per_head: bool) -> None:
    inputs = case.inputs(per_head)
    first, second = (run(inputs, impl, per_head=per_head) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_a_graph_notices_that_out_was_written_to(impl: str) -> None:
    t = Case(1, 2, 1, 8).inputs(False)
    out = tuple(torch.ones(1, 2, 1, 8) for _ in range(2))
    saves_out = (out[0] * torch.ones_like(out[0]).requires_grad_()).sum()
    with torch.no_grad():
        args = (t[name] for name in ("q", "k", "weight_q", "weight_k", "table"))
        qk_norm_rope(*args, head_dim=8, out=out, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saves_out.backward()


def check_every_kernel(impl: str, device: str = "cuda") -> None:
    """Once or twice at small shapes: what ``tools.gpu.sanitize`` runs."""
    for case in (Case(2, 3, 24, 128, torch.bfloat16), Case(1, 5, 5, 72)):
        for variant in ("wan", "cosmos"):
            on_gpu = replace(case, device=device)
            check_against_reference(on_gpu, impl, **VARIANTS[variant])
