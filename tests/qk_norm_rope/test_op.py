"""qk_norm_rope on the CPU: the cpu backend against the reference, what a rotation keeps, registration, refusals."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from tests.qk_norm_rope import checks
from tests.qk_norm_rope.checks import VARIANTS, Case, run
from wam_kernels.qk_norm_rope import cpu, qk_norm_rope, rope_table


@pytest.mark.parametrize("case", [*checks.SHAPES, pytest.param(Case(2, 4, 3, 32, torch.float64), id="float64")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_and_dtypes(case, variant):
    checks.check_against_reference(case, "cpu", **VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_many_chunks(variant, monkeypatch):
    # 4 rows a chunk on one thread: 2 x 11 tokens are 3 chunks of each sample, the last shorter
    monkeypatch.setattr(cpu, "CPU_CHUNK", 4 * 48)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    checks.check_against_reference(Case(2, 11, 3, 16), "cpu", **VARIANTS[variant])
    checks.check_out_into_a_cache_slot(Case(2, 11, 3, 16), "cpu")


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("variant", checks.VARIANTS)
def test_nan_stays(variant, impl):
    checks.check_nan_stays(impl, **checks.VARIANTS[variant])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_are_free(dtype):
    checks.check_strides_are_free(Case(2, 6, 3, 16, dtype), "cpu")


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_into_a_cache_slot(dtype, impl):
    checks.check_out_into_a_cache_slot(Case(2, 6, 3, 16, dtype), impl)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_graph_notices_that_out_was_written_to(impl):
    checks.check_a_graph_notices_that_out_was_written_to(impl)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_table_per_sample_is_one_call_a_sample(impl):
    checks.check_a_table_per_sample_is_one_call_a_sample(impl)


@pytest.mark.parametrize("per_head", [False, True])
def test_same_bits_from_run_to_run(per_head):
    checks.check_same_bits_from_run_to_run(Case(2, 200, 6, 64), None, per_head)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_match_finite_differences(variant):
    # everything else is tested against the reference's autograd; this needs the formula of the forward only
    inputs = Case(1, 2, 2, 8, torch.float64).inputs(VARIANTS[variant]["per_head"])
    leaves = [inputs[n].requires_grad_() for n in ("q", "k", "weight_q", "weight_k")]

    def call(*leaves):
        return qk_norm_rope(*leaves, inputs["table"], head_dim=8, **VARIANTS[variant])

    assert torch.autograd.gradcheck(call, leaves)


# ---- what a rotation keeps ----


def rotated(q, k, positions, interleaved=True):
    ones = torch.ones(q.shape[-1], dtype=q.dtype)
    table = rope_table(positions, 32, dtype=torch.float64)
    return qk_norm_rope(q, k, ones, ones, table, head_dim=32, interleaved=interleaved, eps=0.0)


@pytest.mark.parametrize("interleaved", [True, False])
def test_scores_depend_on_differences_of_positions_only(interleaved):
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 7, 96, generator=g, dtype=torch.float64) for _ in range(2))
    positions = torch.rand(7, 3, generator=g, dtype=torch.float64) * 40 - 5
    scores = []
    for shift in ([0.0, 0.0, 0.0], [17.25, -3.5, 1000.0]):
        q_out, k_out = rotated(q, k, positions + torch.tensor(shift, dtype=torch.float64), interleaved)
        scores.append(torch.einsum("bshd,bthd->bhst", q_out, k_out))
    torch.testing.assert_close(*scores, rtol=0, atol=1e-10)
    q_out, k_out = rotated(q, k, positions * 1.5, interleaved)
    assert not torch.allclose(torch.einsum("bshd,bthd->bhst", q_out, k_out), scores[0], atol=0.1)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_keeps_norms_and_position_zero_keeps_all(interleaved):
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 5, 96, generator=g, dtype=torch.float64) for _ in range(2))
    q_out, _ = rotated(q, k, torch.rand(5, 3, generator=g, dtype=torch.float64) * 100, interleaved)
    plain = (q / q.square().mean(-1, keepdim=True).sqrt()).unflatten(-1, (3, 32))
    torch.testing.assert_close(q_out.norm(dim=-1), plain.norm(dim=-1), rtol=1e-12, atol=0)
    still, _ = rotated(q, k, torch.zeros(5, 3, dtype=torch.float64), interleaved)
    torch.testing.assert_close(still, plain, rtol=1e-12, atol=0)


def test_per_head_norm_is_one_norm_a_head():
    inputs = Case(1, 3, 4, 16).inputs(per_head=True)
    call = {n: inputs[n] for n in ("weight_q", "weight_k", "table")} | {"head_dim": 16}
    q_out, _ = qk_norm_rope(inputs["q"], inputs["k"], **call, per_head=True)
    for h in range(4):
        one = slice(16 * h, 16 * h + 16)
        alone, _ = qk_norm_rope(inputs["q"][..., one], inputs["k"][..., one], **call)
        torch.testing.assert_close(q_out[:, :, h : h + 1], alone)


def test_a_row_of_zeros_gives_zeros_and_finite_gradients():
    inputs = Case(1, 3, 2, 16).inputs(per_head=False)
    inputs["q"][:, 1] = 0.0
    q_out, _, dq, _, dweight_q, _ = run(inputs, "cpu")
    assert (q_out[:, 1] == 0).all() and dq.isfinite().all() and dweight_q.isfinite().all()


# ---- registration ----


@pytest.mark.parametrize("variant", ["wan", "cosmos"])
def test_registration(variant):
    options = VARIANTS[variant]
    inputs = Case(2, 3, 2, 16).inputs(options["per_head"])
    tensors = [inputs[n] for n in ("q", "k", "weight_q", "weight_k")]
    args = (*tensors, inputs["table"], 16, options["per_head"], options["interleaved"], 1e-6, "cpu")
    torch.library.opcheck(torch.ops.wam.qk_norm_rope.default, args)
    outs = [torch.empty_like(inputs["dq_out"]) for _ in range(2)]
    torch.library.opcheck(torch.ops.wam.qk_norm_rope_out.default, (*args, *outs, None, None, 0, 0))
    v, v_out = torch.ones_like(inputs["q"]), torch.empty_like(inputs["dq_out"])
    torch.library.opcheck(torch.ops.wam.qk_norm_rope_out.default, (*args, *outs, v, v_out, 0, 0))
    backward = (inputs["dq_out"], inputs["dk_out"], *args)
    torch.library.opcheck(torch.ops.wam.qk_norm_rope_backward.default, backward)
    for t in tensors:
        t.requires_grad_()
    torch.library.opcheck(torch.ops.wam.qk_norm_rope.default, args)


def test_compiles_whole_and_not_for_every_length():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(q, k, weight_q, weight_k, positions):
        table = rope_table(positions, 16)
        q, k = qk_norm_rope(q * 2, k, weight_q, weight_k, table, head_dim=16)
        return (q * k).sin()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for S in (5, 8, 13):
        inputs = Case(2, S, 3, 16).inputs(per_head=False)
        leaves = [inputs[n].requires_grad_() for n in ("q", "k", "weight_q", "weight_k")]
        positions = torch.rand(S, 3, dtype=torch.float64)
        out, expected = compiled(*leaves, positions), step(*leaves, positions)
        torch.testing.assert_close(out, expected)
        for a, b in zip(*(torch.autograd.grad(o.sum(), leaves) for o in (out, expected)), strict=True):
            torch.testing.assert_close(a, b)
        compilations.append(counter.frame_count)
    # the first call may take two attempts: dynamo starts over when it learns that eps and theta are constants
    assert compilations[0] == compilations[-1]


def test_compiles_with_a_cache_slot():
    torch._dynamo.reset()
    inputs = Case(2, 4, 3, 16).inputs(per_head=False)
    call = {n: inputs[n] for n in ("q", "k", "weight_q", "weight_k", "table")} | {"head_dim": 16}

    def step(caches, q_buffer):
        if len(caches) == 1:
            qk_norm_rope(**call, out=(q_buffer, caches[0][:, 2:6]))
        else:
            qk_norm_rope(**call, v=inputs["q"], out=(q_buffer, *(cache[:, 2:6] for cache in caches)))
        return sum(cache.sum() for cache in caches), q_buffer + 1

    for count in (1, 2):
        results = []
        for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            caches, q_buffer = [torch.zeros(2, 9, 3, 16) for _ in range(count)], torch.empty(2, 4, 3, 16)
            results.append([*fn(caches, q_buffer), *caches, q_buffer])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        assert all(cache[:, 2:6].abs().sum() > 0 for cache in results[0][2:-1])


def test_activation_checkpointing():
    inputs = Case(2, 5, 3, 16).inputs(per_head=False)
    q = inputs["q"].requires_grad_()

    def call(q):
        return qk_norm_rope(q, inputs["k"], inputs["weight_q"], inputs["weight_k"], inputs["table"], head_dim=16)[0]

    expected = torch.autograd.grad(call(q), q, inputs["dq_out"])[0]
    actual = torch.autograd.grad(checkpoint(call, q, use_reentrant=False), q, inputs["dq_out"])[0]
    assert torch.equal(actual, expected)


def test_saves_nothing_but_the_inputs():
    inputs = Case(1, 5, 3, 16, torch.bfloat16).inputs(per_head=False)
    names = ("q", "k", "weight_q", "weight_k", "table")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        qk_norm_rope(**{n: inputs[n].requires_grad_(n != "table") for n in names}, head_dim=16)
    assert set(saved) == {inputs[n].data_ptr() for n in names}


# ---- refusals ----


def good_call() -> dict:
    inputs = Case(2, 5, 3, 16).inputs(per_head=False)
    return {n: inputs[n] for n in ("q", "k", "weight_q", "weight_k", "table")} | {"head_dim": 16}


def pair(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)


WITH_V = {"v": torch.zeros(2, 5, 48), "out": tuple(torch.zeros(3, 2, 5, 3, 16))}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(5, 48)}, r"q must have shape \[B, S, inner\], got \[5, 48\]"),
        ({"k": torch.zeros(2, 4, 48)}, r"k must have shape \[B=2, S=5, inner=48\], got \[2, 4, 48\]"),
        ({"k": torch.zeros(2, 5, 48).double()}, "k must be torch.float32 on cpu like q, got torch.float64"),
        ({"head_dim": 12}, "head_dim must be a multiple of 8 from 8 to 256, got 12"),
        ({"head_dim": 264}, "head_dim must be a multiple of 8 from 8 to 256, got 264"),
        ({"head_dim": 32}, "q must have inner a multiple of head_dim=32 from 32 to 8192, got 48"),
        ({"weight_q": torch.zeros(16)}, r"weight_q must have shape \[48\] \(all heads, since per_head=False\)"),
        ({"per_head": True}, r"weight_q must have shape \[16\] \(a head, since per_head=True\), got \[48\]"),
        ({"weight_q": torch.zeros(48).half()}, "weight_q must be torch.float32 on cpu, got torch.float16"),
        ({"weight_k": torch.zeros(48, device="meta")}, "weight_k must be .* on cpu, got torch.float32 on meta"),
        ({"table": torch.zeros(5, 8)}, r"table must have shape \[S=5, 8, 2\] or .*, got \[5, 8\]; use rope_table"),
        ({"table": torch.zeros(3, 5, 8, 2)}, r"table must have shape .* or \[B=2, S=5, 8, 2\], got \[3, 5, 8, 2\]"),
        ({"table": torch.zeros(5, 8, 2).expand(2, 5, 8, 2)}, "table must be contiguous, got strides"),
        ({"table": torch.zeros(5, 8, 2).half()}, "table must be torch.float32 on cpu, got torch.float16 on cpu"),
        ({"table": torch.zeros(5, 2, 8).mT}, "table must be contiguous, got strides"),
        ({"table": torch.zeros(5, 8, 2).requires_grad_()}, "table must not require a gradient"),
        ({"q": torch.zeros(2, 48, 5).mT}, r"q must have last-dim stride 1, got 5; use .contiguous\(\)"),
        ({"impl": "flash"}, "impl must be None or one of .*got 'flash'"),
        ({"impl": "triton"}, r"impl='triton' needs CUDA tensors \(or TRITON_INTERPRET=1\), got cpu"),
        ({"impl": "cuda"}, "impl='cuda' needs CUDA tensors, got cpu"),
        ({"out": pair(2, 5, 48)}, r"out\[0\] must have shape \[B, S, H, D\] = \[2, 5, 3, 16\], got \[2, 5, 48\]"),
        ({"out": pair(2, 5, 3, 16, dtype=torch.float16)}, r"out\[0\] must be torch.float32 on cpu like q, got torch.f"),
        ({"out": [t.mT for t in pair(2, 5, 16, 3)]}, r"out\[0\] must have last-dim stride 1, got 3"),
        ({"out": [t.expand(2, 5, 3, 16) for t in pair(1, 5, 3, 16)]}, r"out\[0\] must not be expanded"),
        ({"out": pair(2, 7, 3, 16), "out_first": (2, 3)}, r"out\[1\] must have shape .*got \[2, 7, 3, 16\]"),
        ({"out": pair(2, 7, 3, 16), "out_first": (2,)}, "out_first must be 2 tokens"),
        ({"out": pair(2, 7, 3, 16), "out_first": (-1, 0)}, r"out_first\[0\] must be at least 0, got -1"),
        ({"v": torch.zeros(2, 5, 48)}, r"v must be None without out, got a tensor; pass out=\(q_out, k_out, v_out\)"),
        (WITH_V | {"out": pair(2, 5, 3, 16)}, r"out must be \(q_out, k_out, v_out\) with v, got 2 tensors"),
        (WITH_V | {"v": None}, r"out must be \(q_out, k_out\) without v, got 3 tensors; v and v_out go together"),
        (WITH_V | {"v": torch.zeros(2, 5, 32)}, r"v must have shape \[B=2, S=5, inner=48\], got \[2, 5, 32\]"),
        (WITH_V | {"v": torch.zeros(2, 5, 48).half()}, "v must be torch.float32 on cpu like q, got torch.float16"),
        (WITH_V | {"v": torch.zeros(2, 48, 5).mT}, "v must have last-dim stride 1, got 5"),
        (WITH_V | {"out": (*WITH_V["out"][:2], torch.zeros(2, 5, 48))}, r"out\[2\] must have shape .*got \[2, 5, 48\]"),
    ],
)
def test_refusals_name_the_argument(change, message):
    with pytest.raises(ValueError, match="^qk_norm_rope: " + message):
        qk_norm_rope(**(good_call() | change))


def test_refuses_unequal_weights_and_wide_rows():
    call = good_call()
    call |= {"q": call["q"].bfloat16(), "k": call["k"].bfloat16(), "weight_q": call["weight_q"].bfloat16()}
    with pytest.raises(ValueError, match="weight_k must be torch.bfloat16 on cpu like weight_q, got torch.float32"):
        qk_norm_rope(**call)
    wide = torch.zeros(1, 5, 8208)
    with pytest.raises(ValueError, match="inner a multiple of head_dim=16 from 16 to 8192, got 8208"):
        qk_norm_rope(**(good_call() | {"q": wide, "k": wide}))


def test_refuses_out_where_a_gradient_is_needed():
    call = good_call() | {"out": pair(2, 5, 3, 16)}
    call["weight_k"].requires_grad_()
    with pytest.raises(ValueError, match=r"an input requires a gradient; use torch.no_grad\(\)"):
        qk_norm_rope(**call)
    with torch.no_grad():
        qk_norm_rope(**call)
