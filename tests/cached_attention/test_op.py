"""cached_attention on the CPU: the cpu backend against the reference, the reference against a loop, refusals."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from tests.budget import assert_within_budget
from tests.cached_attention import checks
from tests.cached_attention.checks import WRAPPED, Case, run
from tests.integrations import counts
from tests.integrations.counts import python_calls
from wam_kernels.cached_attention import cached_attention


@pytest.mark.parametrize("case", checks.CASES)
def test_shapes_and_dtypes(case):
    checks.check_against_reference(case, "cpu")


@pytest.mark.parametrize("D", [8, 40, 256])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_head_dims_and_float64(D, dtype):
    checks.check_against_reference(Case([[WRAPPED, [(64, 73)]]], (20, 4), 80, D=D, dtype=dtype), "cpu")


def test_reference_is_softmax_over_the_gathered_slots():
    case = Case([[WRAPPED, [(5, 9)]], [[(0, 3)], []]], (3, 2), 80, dtype=torch.float64)
    q, k, v = case.inputs()
    out, lse = run(case, [q, k, v], "reference")
    for b, groups in enumerate(case.samples):
        for row in range(5):
            slots = [slot for start, end in groups[row // 3] for slot in range(start, end)]
            for h in range(case.H):
                scores = k[b, slots, h] @ q[b, row, h] * case.D**-0.5
                expected = scores.softmax(0) @ v[b, slots, h]
                torch.testing.assert_close(out[b, row, h], expected)
                torch.testing.assert_close(lse[b, h, row], scores.logsumexp(0))
    assert (out[1, 3:] == 0).all() and (lse[1, :, 3:] == -torch.inf).all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_strides_are_free(impl):
    checks.check_strides_are_free(Case([[[(5, 60)]], [[(5, 60)]]], (7,), 64), impl)
    checks.check_strides_are_free(Case([[[(5, 30), (33, 60)]], [[(6, 30), (33, 60)]]], (7,), 64), impl)


@st.composite
def fills(draw):
    """Any disjoint ranges in any order, for every group of every sample."""
    N, B, G = draw(st.integers(1, 90)), draw(st.integers(1, 3)), draw(st.integers(1, 3))

    def group():
        cuts = sorted(draw(st.sets(st.integers(0, N), max_size=8)))
        pairs = [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
        return draw(st.permutations(pairs))

    samples = [[list(group()) for _ in range(G)] for _ in range(B)]
    if all(not g for groups in samples for g in groups):
        samples[0][0] = [(0, N)]
    rows = tuple(draw(st.integers(0, 9)) for _ in range(G))
    return Case(samples, rows, N, H=draw(st.integers(1, 3)), D=8 * draw(st.integers(1, 5)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(fills())
def test_any_ranges(case):
    inputs = case.inputs()
    checks.assert_right(case, inputs, run(case, inputs, "cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_nan_stays(impl, dtype):
    checks.check_nan_stays(lambda case, inputs: run(case, inputs, impl), dtype)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_autocast_leaves_the_op_alone(impl):
    case = Case([[[(0, 1)], [(1, 9)]]], (2, 3), 9)
    q, k, v = case.inputs()
    q[:, :2] = 0  # over one slot: lse 0
    expected = run(case, [q, k, v], impl)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(case, [q, k, v], impl)
    assert all(torch.equal(a, b) for a, b in zip(mixed, expected, strict=True))


def test_slots_of_one_group_do_not_reach_another():
    # a slot that another group attends to holds numbers, not NaN: only a missing mask would let it in, so poison it
    case = Case([[[(0, 20)], [(20, 40)]]], (4, 4), 40)
    q, k, v = case.inputs()
    for impl in ("reference", "cpu"):
        expected = run(case, [q, k, v], impl)
        spoiled = [q, k.clone(), v.clone()]
        spoiled[1][:, 20:], spoiled[2][:, 20:] = torch.nan, torch.inf
        out, lse = run(case, spoiled, impl)
        assert torch.equal(out[:, :4], expected[0][:, :4]) and torch.equal(lse[..., :4], expected[1][..., :4])
        assert not out[:, 4:].isfinite().any()


def test_ranges_of_a_program_add_up():
    """Attention over two halves, merged by their lse, is attention over both: what a split over keys relies on."""
    whole = Case([[[(3, 71)]]], (11,), 80)
    inputs = whole.inputs()
    parts = [run(whole, inputs, None, torch.tensor([[[part]]], dtype=torch.int32)) for part in ([3, 40], [40, 71])]
    out, lse = run(whole, inputs, None)
    weights = torch.softmax(torch.stack([lse for _, lse in parts]), 0).transpose(2, 3)[..., None]
    torch.testing.assert_close(sum(w * o for w, (o, _) in zip(weights, parts, strict=True)), out)
    torch.testing.assert_close(torch.logsumexp(torch.stack([lse for _, lse in parts]), 0), lse)


def test_same_bits_from_run_to_run():
    checks.check_same_bits_from_run_to_run(Case([[[(0, 900), (950, 1999)]]], (144,), 2000, H=4, D=64), None)


def test_lse_only_on_request():
    case = Case([[WRAPPED]], (5,), 80)
    out = cached_attention(*case.inputs(), case.ranges(), group_rows=case.rows)
    assert torch.equal(out, run(case, case.inputs(), None)[0])


def test_a_plain_call_goes_around_the_checks_and_the_op():
    """A denoising step makes one for every layer. Calls into Python are the same on every machine."""
    case = Case([[WRAPPED, [(64, 73)]], [[(0, 30)], [(64, 73)]]], (6, 2), 80)
    arguments = *case.inputs(), case.ranges()
    with torch.no_grad():
        plain = cached_attention(*arguments, group_rows=case.rows)
        assert torch.equal(plain, cached_attention(*arguments, group_rows=case.rows, impl="cpu"))
        calls = [
            python_calls(lambda r=r: cached_attention(*arguments, group_rows=r)) for r in (case.rows, [*case.rows])
        ]
        assert calls[0] <= 10 < calls[1], calls
        with counts.Launches() as mode:  # what watches is told of the op as it is registered
            cached_attention(*arguments, group_rows=case.rows)
        assert mode.of["cached_attention"] == 1


# ---- registration ----


def test_registration():
    case = Case([[WRAPPED, [(64, 73)]], [[(0, 30)], [(64, 73)]]], (6, 2), 80, dtype=torch.bfloat16)
    q, k, v = (t.nan_to_num() for t in case.inputs())  # opcheck compares results, and NaN is not itself
    torch.library.opcheck(torch.ops.wam.cached_attention.default, (q, k, v, case.ranges(), [6, 2], 0.25, "cpu"))


def test_compiles_whole_and_reads_the_ranges_of_each_call():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    case = Case([[WRAPPED, [(64, 73)]]], (6, 2), 80)
    inputs = case.inputs()

    @torch.compile(fullgraph=True, backend=counter)
    def step(q, k, v, ranges):
        return cached_attention(q, k, v, ranges, group_rows=(6, 2)).sin()

    ranges = case.ranges()
    for shrink in (0, 3, 5):
        ranges[..., 1] -= shrink
        expected = cached_attention(*inputs, ranges, group_rows=(6, 2)).sin()
        torch.testing.assert_close(step(*inputs, ranges), expected)
    assert counter.frame_count == 1


def test_inputs_may_require_a_gradient_only_without_grad_mode():
    case = Case([[WRAPPED]], (5,), 80)
    inputs = [t.requires_grad_() for t in case.inputs()]
    for impl in ("cpu", "reference"):
        with pytest.raises(ValueError, match=r"cached_attention: is for inference.*use torch.no_grad\(\)"):
            run(case, inputs, impl)
        with torch.no_grad():
            assert not run(case, inputs, impl)[0].requires_grad


# ---- refusals ----

GOOD = Case([[[(0, 5), (8, 10)], [(0, 5)]], [[(1, 5)], []]], (3, 2), 12)


def call(**change):
    q, k, v = GOOD.inputs()
    arguments = {"q": q, "k_cache": k, "v_cache": v, "ranges": GOOD.ranges(), "group_rows": GOOD.rows} | change
    return cached_attention(**arguments)


def heads(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


REFUSED = {
    "q-rank": ({"q": heads(2, 5, 64)}, r"q must have shape \[B, S, H, D\], got \[2, 5, 64\]"),
    "heads": ({"k_cache": heads(2, 12, 3, 32)}, r"k_cache must have shape \[.*N=12, H=2.*got \[2, 12, 3, 32\]"),
    "q-heads-first": (
        {"q": heads(2, 2, 5, 32)}, r"q must have shape \[B, S=5, H, D\] .*; q looks like \[B, H, S, D\]: use",
    ),
    "cache-heads-first": (
        {"k_cache": heads(2, 2, 12, 32)},
        r"k_cache must have .* got \[2, 2, 12, 32\]; k_cache looks like \[C, H, N, D\]: use k_cache.transpose\(1, 2\)",
    ),
    "cache-rows": (
        {"k_cache": heads(3, 12, 2, 32), "v_cache": heads(3, 12, 2, 32)},
        "k_cache must have a batch that divides B=2, that of q, got 3",
    ),
    "slots": ({"v_cache": heads(2, 11, 2, 32)}, r"v_cache must have shape \[.*N=12, H=2.*got \[2, 11, 2, 32\]"),
    "dtype": ({"k_cache": heads(2, 12, 2, 32, dtype=torch.float16)}, "k_cache must be torch.float32 on cpu"),
    "batch": ({"ranges": GOOD.ranges()[:1]}, r"ranges must have shape \[B=2, G, R, 2\], got \[1, 2, 2, 2\]"),
    "pairs": ({"ranges": torch.zeros(2, 2, 2, 3, dtype=torch.int32)}, r"ranges must have shape .*got \[2, 2, 2, 3\]"),
    "no-group": ({"ranges": torch.zeros(2, 0, 2, 2, dtype=torch.int32)}, r"ranges must have shape .*G >= 1"),
    "int64": ({"ranges": GOOD.ranges().long()}, "ranges must be torch.int32 on cpu like q, got torch.int64"),
    "strided-ranges": ({"ranges": GOOD.ranges().transpose(1, 2)}, "ranges must be contiguous, got strides"),
    "group-rows-sum": ({"group_rows": (3, 3)}, r"group_rows must be G=2 counts .* sum to S=5 .*got \(3, 3\)"),
    "group-rows-count": ({"group_rows": (5,)}, r"group_rows must be G=2 counts .*got \(5,\)"),
    "group-rows-negative": ({"group_rows": (6, -1)}, r"group_rows\[1\] must be at least 0, got -1"),
    "impl": ({"impl": "best"}, r"impl must be None or one of \('reference', 'cpu'.*got 'best'"),
    "outside": ({"ranges": GOOD.ranges() + 3}, r"ranges\[0, 0\] must lie in the 12 slots, got \[11, 13\)"),
    "before": ({"ranges": GOOD.ranges() - 1}, r"ranges\[0, 0\] must lie in the 12 slots, got \[-1, 4\)"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_refusals_say_what_to_do(change, message):
    assert call().shape == (2, 5, 2, 32)
    with pytest.raises(ValueError, match=f"cached_attention: {message}"):
        call(**change)


def test_refuses_other_dtypes_head_dims_and_channels_apart():
    whole = {"q": heads(2, 5, 2, 32).int(), "k_cache": heads(2, 12, 2, 32).int(), "v_cache": heads(2, 12, 2, 32).int()}
    with pytest.raises(ValueError, match="cached_attention: q must be .* for impl='.*got torch.int32"):
        call(**whole)
    for D in (12, 264):
        tensors = {"q": heads(2, 5, 2, D), "k_cache": heads(2, 12, 2, D), "v_cache": heads(2, 12, 2, D)}
        with pytest.raises(ValueError, match=f"D must be a multiple of 8 from 8 to 256, got {D}; pad the heads"):
            call(**tensors)
    with pytest.raises(ValueError, match="v_cache must have last-dim stride 1, got 2; use .contiguous"):
        call(v_cache=heads(2, 12, 2, 64)[..., ::2])


def test_refuses_overlap_on_the_cpu():
    ranges = GOOD.ranges()
    ranges[1, 0, 1] = torch.tensor([3, 7])
    with pytest.raises(ValueError, match=r"ranges\[1, 0\] must not overlap, got one up to 5 and \[3, 7\)"):
        call(ranges=ranges)


def test_reference_cuts_ranges_off_at_the_cache():
    case = dataclasses.replace(GOOD, samples=[[[(-4, 5), (8, 99)], [(0, 5)]], [[(1, 5)], [(12, 15)]]])
    inside = dataclasses.replace(GOOD, samples=[[[(0, 5), (8, 12)], [(0, 5)]], [[(1, 5)], []]])
    inputs = case.inputs()
    own, expected = run(case, inputs, "reference"), run(case, inputs, "reference", inside.ranges())
    for name, a, b in zip(("out", "lse"), own, expected, strict=True):
        assert_within_budget(name, a, b, b.double())
