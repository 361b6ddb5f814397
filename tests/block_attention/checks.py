"""What every backend must pass; called by the CPU suite, the interpreter suite and the GPU suite."""

import contextlib

import torch

from tests.budget import assert_within_budget
from tests.geometries import small
from wam_kernels import NAMED_PROGRAMS, Plan, Ranges, block_attention, compile_plan

NAMES = ("out", "lse", "dq", "dk", "dv")


@contextlib.contextmanager
def poisoned_allocations():
    """Every uninitialised float holds NaN, so an element that no kernel writes is found."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def make_inputs(
    plan: Plan, B: int, H: int, D: int, dtype: torch.dtype, device: str = "cpu", kv_heads: int | None = None
) -> list[torch.Tensor]:
    """q, dout ``[B, S, H, D]``, k, v ``[B, T, kv_heads, D]``, dlse ``[B, H, S]``, drawn on the CPU for every device."""
    g = torch.Generator().manual_seed(0)
    queries, keys = (B, plan.length, H, D), (B, plan.key_length, kv_heads or H, D)
    q, k, v, dout = (torch.randn(shape, generator=g).to(dtype) for shape in (queries, keys, keys, queries))
    return [t.to(device) for t in (q, k, v, dout, torch.randn(B, H, plan.length, generator=g))]


def run(plan: Plan, inputs: list[torch.Tensor], impl: str | None, scale: float | None = None) -> list[torch.Tensor]:
    """out, lse, dq, dk, dv with gradients flowing in through both outputs."""
    q, k, v, dout, dlse = inputs
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out, lse = block_attention(q, k, v, plan, scale=scale, impl=impl, return_lse=True)
    # a row that sees nothing has lse -inf and no gradient through it
    dlse = dlse.to(lse.dtype).masked_fill(torch.isinf(lse), 0.0)
    grads = torch.autograd.grad((out, lse), (q, k, v), (dout.to(out.dtype), dlse))
    return [out.detach(), lse.detach(), *grads]


def check_against_reference(
    plan: Plan, inputs: list[torch.Tensor], impl: str | None, scale: float | None = None
) -> None:
    with poisoned_allocations():
        actual = run(plan, inputs, impl, scale)
    eager = run(plan, inputs, "reference", scale)
    truth = run(plan, [t.double() for t in inputs], "reference", scale)
    S, dtype = plan.length, inputs[0].dtype
    assert actual[0].dtype == dtype and actual[0].is_contiguous() and actual[1].shape[-1] == S
    # tensor cores take p and ds in the input dtype: two roundings where the reference, all float32, has one; and they
    # cut float32 sums off where the reference rounds (tests/interpreter/test_tensor_cores.py)
    slack = 3.0 if dtype.itemsize == 2 else 4.0 if impl == "triton" else 2.0
    for name, a, e, t in zip(NAMES, actual, eager, truth, strict=True):
        assert_within_budget(name, a, e, t, slack)


def ragged_plan() -> Plan:
    """Two batch elements of different programs and geometries, packed and padded."""
    return compile_plan(
        [
            [small("joint"), small("video_then_action", chunk_size=3, history="full")],
            [small("action_noisy_to_video", prefix_frames=1, singleton_frame=2, history="video_queries_video_only")],
        ],
        length=180,
    )


def rectangular_plan() -> Plan:
    """Two batch elements of queries over more keys: a program, and ranges with keys and queries that meet nothing."""
    text = NAMED_PROGRAMS["lingbot_va_text"](samples=2, video=7, actions=3, text_tokens=20, padding=3)
    loose = Ranges([(0, 9), (4, 30), (30, 40)], [(3, 50), (60, 61), (20, 45)], 45, 70)
    plan = compile_plan([[text], [loose]])
    assert plan.length != plan.key_length and (plan.mask().sum(-1) == 0).any() and (plan.mask().sum(-2) == 0).any()
    return plan


def blind_plan() -> Plan:
    """One sample whose keys are cut away from the later frames, and padding: rows that see nothing."""
    alone = small("decoupled_same_step", video_frames=0, action_frames=2, startup_action_frames=2)
    plan = compile_plan([[alone, small()]], length=100)
    assert (plan.mask().sum(-1) == 0).any()
    return plan
