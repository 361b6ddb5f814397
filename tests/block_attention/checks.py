"""What every backend must pass; called by the CPU suite, the interpreter suite and the GPU suite."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch

from tests.budget import assert_within_budget
from tests.geometries import small
from wam_kernels import (
    RULE_PROGRAMS,
    Geometry,
    Plan,
    Ranges,
    TileShape,
    block_attention,
    compile_plan,
    varlen_attention,
)

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
    # a fully masked row has lse -inf and no gradient through it
    dlse = dlse.to(lse.dtype).masked_fill(torch.isinf(lse), 0.0)
    grads = torch.autograd.grad((out, lse), (q, k, v), (dout.to(out.dtype), dlse))
    return [out.detach(), lse.detach(), *grads]


def run_rounded(plan: Plan, inputs: list[torch.Tensor], scale: float | None = None) -> list[torch.Tensor]:
    """As :func:`run`, exact but for the roundings that tensor cores make necessary: what a kernel may err by.

    In float64, with these rounded to the dtype of the inputs: exp(s - max s) and p before they are multiplied by v and
    dout, ds before it is multiplied by k and q, delta from the stored out; and what is stored.
    """
    dtype = inputs[0].dtype
    q, k, v, dout = (t.double().transpose(1, 2) for t in inputs[:4])
    scale, group = q.shape[-1] ** -0.5 if scale is None else scale, q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).double()

    scores = (q @ k.mT * scale).masked_fill(~plan.mask(), float("-inf"))
    lse = scores.logsumexp(-1)
    blind = torch.isinf(lse)
    weights = (scores - scores.amax(-1, keepdim=True).masked_fill(blind[..., None], 0.0)).exp()
    out = rounded((rounded(weights) @ v) / weights.sum(-1, keepdim=True).masked_fill(blind[..., None], 1.0))
    p = (scores - lse.masked_fill(blind, 0.0)[..., None]).exp()
    delta = (dout * out).sum(-1) - inputs[4].double().masked_fill(blind, 0.0)
    ds = rounded(p * (dout @ v.mT - delta[..., None]))
    of_queries = ds.masked_fill(plan.frozen_queries()[:, None, :, None], 0.0)
    flow = plan.mask(gradient=True)
    dk, dv = (ds * flow).mT @ q * scale, (rounded(p) * flow).mT @ dout
    dk, dv = (t.unflatten(1, (-1, group)).sum(2) for t in (dk, dv))
    out, dq, dk, dv = (t.transpose(1, 2).to(dtype) for t in (out, of_queries @ k * scale, dk, dv))
    return [out, lse.float(), dq, dk, dv]


def run_detached(plan: Plan, inputs: list[torch.Tensor], scale: float | None = None) -> list[torch.Tensor]:
    """As :func:`run`, by autograd of plain products: what gets no gradient is detached, k and v for single pairs."""
    q, k, v = (t.detach().requires_grad_() for t in inputs[:3])
    out, lse = attend_detached(plan, q, k, v, scale)
    dout, dlse = inputs[3], inputs[4].to(lse.dtype).masked_fill(torch.isinf(lse), 0.0)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))]


def attend_detached(plan: Plan, q, k, v, scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse. Fully masked rows have a score of 0 for the key that they do not attend to."""
    mask, flow = plan.mask(), plan.mask(gradient=True)
    q = torch.where(plan.frozen_queries()[:, :, None, None], q.detach(), q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.where(flow, q @ k.mT, q @ k.detach().mT) * scale
    blind = ~mask.any(-1)
    scores = scores.masked_fill(~(mask | blind[..., None]), float("-inf")).masked_fill(blind[..., None], 0.0)
    p = scores.softmax(-1).masked_fill(blind[..., None], 0.0)
    lse = scores.logsumexp(-1).masked_fill(blind, float("-inf"))
    return ((p * flow) @ v + (p * ~flow) @ v.detach()).transpose(1, 2), lse


def stopped_plan() -> Plan:
    """Two programs of uneven ends, padding, fully masked rows; video gets no gradients from actions."""
    alone = small("decoupled_same_step", video_frames=0, action_frames=2, startup_action_frames=2)
    short = {"video_frames": 3, "action_frames": 3, "history": "full"}
    batch = [[alone, small("joint", video_tokens=7, **short)], [small("video_then_action", prefix_frames=1, **short)]]
    plan = compile_plan(batch, length=75, stop_gradient=[("action", "video")])
    assert 0 < plan.gradient_pairs < plan.visible_pairs and (plan.mask().sum(-1) == 0).any()
    return plan


def frozen_plan() -> Plan:
    """A program and a rule of which one stream is frozen, ranges of which some queries are, fully masked ones too."""
    tower = RULE_PROGRAMS["tri_tower"](video=20, actions=9, understanding=12)
    plan = compile_plan([[small("joint", history="full", video_tokens=4)], [tower]], length=80, frozen=["video"])
    assert 0 < plan.query_gradient_pairs < plan.visible_pairs and (plan.mask().sum(-1) == 0).any()
    return plan


def frozen_ranges() -> Plan:
    """Frozen queries at both ends and amid a range of others; their keys are not, others have a stop-gradient."""
    spans = [(0, 9), (4, 30), (30, 40)], [(3, 50), (60, 61), (20, 45)]
    sample = Ranges(*spans, 45, 70, stop_gradient=[False, True, False], frozen_queries=[(0, 6), (12, 20), (38, 45)])
    return compile_plan([[sample]], length=50)


def insulated_plan() -> Plan:
    """Knowledge insulation of pi-0: the prefix gets no gradients from the state and the actions that attend to it."""
    sample = RULE_PROGRAMS["prefix_suffix"](prefix=45, actions=9, states=1, padding=((20, 26),))
    plan = compile_plan(sample, length=70, stop_gradient=[("action", "prefix"), ("state", "prefix")])
    assert 0 < plan.gradient_pairs < plan.visible_pairs
    return plan


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
    """Two batch elements of queries over more keys: a program, and ranges with keys and queries without a pair."""
    text = RULE_PROGRAMS["lingbot_va_text"](samples=2, video=7, actions=3, text_tokens=20, padding=3)
    loose = Ranges([(0, 9), (4, 30), (30, 40)], [(3, 50), (60, 61), (20, 45)], 45, 70)
    plan = compile_plan([[text], [loose]])
    assert plan.length != plan.key_length and (plan.mask().sum(-1) == 0).any() and (plan.mask().sum(-2) == 0).any()
    return plan


def blind_plan() -> Plan:
    """One sample whose keys are cut away from the later frames, and padding: fully masked rows."""
    alone = small("decoupled_same_step", video_frames=0, action_frames=2, startup_action_frames=2)
    plan = compile_plan([[alone, small()]], length=100)
    assert (plan.mask().sum(-1) == 0).any()
    return plan


@dataclass(frozen=True)
class Scene:
    """Tokens of a sample that hold NaN and Inf, and those whose numbers must be as without."""

    name: str
    sample: Geometry | Ranges
    bad: dict[str, list[int]]  # of q, dout; k, v
    kept_queries: list[int]
    kept_keys: list[int]
    kept_dk: list[int] = field(default_factory=list)  # of dk alone


def _all_of(tokens: list[int]) -> dict[str, list[int]]:
    return dict.fromkeys(("q", "dout", "k", "v"), tokens)


def _span(*spans: tuple[int, int]) -> list[int]:
    return [i for begin, end in spans for i in range(begin, end)]


def _each(n: int, keys_of) -> Ranges:
    return Ranges([(i, i + 1) for i in range(n)], [keys_of(i) for i in range(n)], n)


def _pairless(name: str, sample: Geometry | Ranges) -> Scene:
    """All without a pair is bad: fully masked queries, keys that no query attends to."""
    mask = compile_plan(sample).mask()[0, 0]
    q, k = ((~mask.any(dim)).nonzero().flatten().tolist() for dim in (1, 0))
    assert q or k
    others = [[i for i in range(n) if i not in bad] for n, bad in zip(mask.shape, (q, k), strict=True)]
    return Scene(name, sample, {"q": q, "dout": q, "k": k, "v": k}, *others)


STARTING = small("decoupled_same_step", video_frames=0, action_frames=4, startup_action_frames=2)
DOCUMENTS = [(0, 12), (12, 20), (20, 29)]
SCENES = [
    Scene(
        "middle document", Ranges(DOCUMENTS, DOCUMENTS, 29), _all_of(_span((12, 20))),
        *[_span((0, 12), (20, 29))] * 2,
    ),
    Scene("values of a document", Ranges(DOCUMENTS, DOCUMENTS, 29), {"v": [3]}, *[_span((12, 29))] * 2),
    # rows that attend to a token in common may share a tile: here those within 7 of each other
    Scene(
        "end of a sliding window", _each(32, lambda i: (max(0, i - 7), i + 1)), _all_of(_span((27, 32))),
        _span((0, 20)), _span((0, 6)),
    ),
    # the first shares a token with the second and the second with the third, but the third not with the first
    Scene(
        "chain", Ranges([(0, 5), (5, 9), (9, 14)], [(0, 6), (5, 10), (9, 14)], 14), _all_of(_span((0, 5))),
        _span((9, 14)), _span((10, 14)),
    ),
    _pairless("key between ranges, query in no range", Ranges([(0, 9), (2, 7)], [(0, 4), (6, 8)], 11)),
    # in the second column of a tile whose rows have a key of the first in common
    _pairless("key between the ranges of two rows", Ranges([(0, 12), (0, 6), (6, 12)], [(0, 2), (3, 5), (8, 12)], 12)),
    _pairless("program", STARTING),
    # fully masked rows get 0 also where all else of their tile is bad
    Scene("bad program", STARTING, _all_of(_span((0, STARTING.length))), [], []),
    # the second keys share a tile with those of the bad queries; in dv these are multiplied by 0, in dk left out
    Scene("gradients of queries", Ranges([(0, 8), (4, 8)], [(0, 4), (4, 8)], 8), {"dout": _span((0, 4))},
          _span((4, 8)), [], _span((4, 8))),
]  # fmt: skip


def check_nan_stays(impl: str) -> None:
    """NaN and Inf reach what the formula says, no other document, sample or batch element; tokens in no pair get 0."""
    samples = [scene.sample for scene in SCENES]
    # the second element is bad, and so is the padding that ends both
    length = sum(s.length for s in samples) + 5
    plan = compile_plan([samples, [samples[0]]], length=length, tile=TileShape(16, 16))
    inputs = make_inputs(plan, 2, 2, 16, torch.float32, kv_heads=1)
    expected = run(plan, inputs, "reference")
    values = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for name, t in zip(("q", "k", "v", "dout"), inputs, strict=False):
        t[1], t[0, -5:] = torch.nan, torch.inf
        first = 0
        for scene in SCENES:
            at = first + torch.tensor(scene.bad.get(name, []), dtype=torch.long)
            t[0, at] = values[torch.arange(at.numel()) % 3, None, None]
            first += scene.sample.length
    actual = run(plan, inputs, impl)
    for name, *both in zip(NAMES, actual, expected, strict=True):
        got, want = (t[0].mT if name == "lse" else t[0] for t in both)
        of_keys, first = name in ("dk", "dv"), 0
        for scene in SCENES:
            kept = scene.kept_keys if of_keys else scene.kept_queries
            at = first + torch.tensor(kept + scene.kept_dk * (name == "dk"), dtype=torch.long)
            torch.testing.assert_close(
                got[at],
                want[at],
                atol=1e-5,
                rtol=1e-5,
                msg=lambda m, scene=scene, name=name: f"{scene.name}: {name}: {m}",
            )
            first += scene.sample.length
        alone = ~plan.mask()[0, 0].any(0 if of_keys else 1)
        assert (got[alone] == (-torch.inf if name == "lse" else 0)).all(), f"{name} of what has no pair"
        assert not got[~alone].isfinite().all(), f"{name} hides what is not finite"


def check_infinite_scores(impl: str) -> None:
    """A row whose scores all overflow to -inf is as a fully masked one; +inf is NaN, in that row alone."""
    plan = compile_plan(Ranges([(0, 3), (3, 6)], [(0, 3), (3, 6)], 6), tile=TileShape(16, 16))
    inputs = make_inputs(plan, 1, 1, 16, torch.float32)
    (out_before, _, dq_before, *_), (q, k, v, *douts) = run(plan, inputs, impl, scale=1.0), inputs
    q[0, 4], k[0, 3:] = 3e38, -10
    out, lse, dq, dk, dv = run(plan, inputs, impl, scale=1.0)
    assert (out[0, 4] == 0).all() and (lse[0, :, 4] == -torch.inf).all() and (dq[0, 4] == 0).all()
    assert all(t.isfinite().all() for t in (out, dq, dk, dv))
    k[0, 3:] *= -1
    out, _, dq, *_ = run(plan, [q, k, v, *douts], impl, scale=1.0)
    assert out[0, 4].isnan().all() and out[0, [3, 5]].isfinite().all()
    assert torch.equal(out[0, :3], out_before[0, :3]) and torch.equal(dq[0, :3], dq_before[0, :3])


# q_ranges, k_ranges, queries, keys: where some or all attend to nothing, or are not there
EDGES = {
    "no-ranges": ([], [], 3, 4),
    "ranges-without-queries": ([(0, 0), (1, 1)], [(0, 3), (1, 2)], 3, 4),
    "ranges-without-keys": ([(0, 3), (1, 3)], [(0, 0), (2, 2)], 3, 4),
    "some-without-keys": ([(0, 2), (1, 3)], [(1, 3), (2, 2)], 3, 4),
    "no-queries": ([(0, 0)], [(0, 4)], 0, 4),
    "no-keys": ([(0, 3)], [(0, 0)], 3, 0),
    "neither": ([], [], 0, 0),
}


def check_edge(name: str, impl: str) -> None:
    """Zeros, lse -inf and finite gradients, as the reference has them."""
    q_ranges, k_ranges, queries, keys = EDGES[name]
    results = []
    for i in (impl, "reference"):
        g = torch.Generator().manual_seed(0)
        shapes = (queries, 2, 8), (keys, 1, 8), (keys, 1, 8)
        leaves = [torch.randn(shape, generator=g).requires_grad_() for shape in shapes]
        with poisoned_allocations():
            out, lse = varlen_attention(*leaves, q_ranges, k_ranges, impl=i, return_lse=True)
            loss = out.square().sum() + lse.masked_fill(lse == float("-inf"), 0.0).sum()
            results.append([out, lse, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
    attends = torch.zeros(queries, dtype=torch.bool)
    for (begin, end), (k_begin, k_end) in zip(q_ranges, k_ranges, strict=True):
        attends[begin:end] |= k_begin < k_end
    out, lse, dq, *_ = results[0]
    assert (out[~attends] == 0).all() and (dq[~attends] == 0).all() and (lse[:, ~attends] == float("-inf")).all()


def check_every_kernel(impl: str, device: str = "cuda") -> None:
    """Once or twice at small shapes: what ``tools.gpu.sanitize`` runs."""
    for plan in (compile_plan(small(chunk_size=1)), ragged_plan()):
        plan = plan.to(device)
        inputs = make_inputs(plan, plan.batch, 2, 64, torch.bfloat16, device)
        check_against_reference(plan, inputs, impl)
