"""The workloads are what their names say, and the truth of the benchmarks is the reference backend's."""

import pytest
import torch

from bench.peers import attention as peers
from bench.peers import masks
from bench.peers.availability import Unavailable
from bench.workloads import attention as workloads
from bench.workloads.attention import LIBERO, ROBOTWIN, block_causal, dense, gjd, packed
from wam_kernels import PROGRAMS, block_attention

SIZE = {"heads": 2, "head_dim": 16}


@pytest.mark.parametrize("per_frame", [LIBERO, ROBOTWIN])
@pytest.mark.parametrize("target", workloads.LENGTHS)
def test_lengths(target, per_frame):
    work = packed(target, per_frame=per_frame, **SIZE)
    assert abs(work.tokens - target) <= 0.05 * target
    assert max(g.video_frames for g in work.samples) <= per_frame[2]


def test_figures_of_the_literature():
    plan = dense(96, **SIZE).plan("cpu")
    assert plan.length == 192 and plan.visible_pairs == 2 * 96**2
    work = block_causal(4 * 32, 2, block=32, **SIZE)
    # two documents of two blocks: block 0 attends to itself, block 1 to both
    assert work.tokens == 128 and work.plan("cpu").visible_pairs == 2 * 3 * 32**2


def test_programs_and_the_mixture():
    names = [w.name for w in workloads.all_programs(800, **SIZE)]
    assert len(set(names)) == len(PROGRAMS) + 1 and all(any(p in name for name in names) for p in (*PROGRAMS, "gjd"))
    conditional = [g for g in gjd(800, **SIZE).samples if g.conditional_history is not None]
    assert len(conditional) == 2


SMALL = [
    packed(300, chunk=2, window=8, **SIZE),
    gjd(400, **SIZE),
    dense(40, **SIZE),
    block_causal(128, 2, block=32, **SIZE),
]


@pytest.mark.parametrize("work", SMALL, ids=lambda w: w.name)
def test_truth_is_the_reference(work):
    inputs = work.inputs("cpu", torch.float64, 0)
    leaves = [t.requires_grad_() for t in inputs[:3]]
    out = block_attention(*leaves, work.plan("cpu"), impl="reference")
    expected = [out, *torch.autograd.grad(out, leaves, inputs[3])]
    got = workloads.truth(work, [t.detach() for t in inputs], [1], rows=50)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b[:, :, 1:], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("work", SMALL, ids=lambda w: w.name)
def test_bounds_are_the_mask(work):
    plan = work.plan("cpu")
    lo, hi = masks.bounds(plan).unbind(-1)
    keys = torch.arange(plan.length)
    attended = ((lo[:, :, None] <= keys) & (keys < hi[:, :, None])).any(1)
    assert torch.equal(attended, plan.mask()[0, 0]) and torch.equal(masks.dense_mask(plan), plan.mask())


@pytest.mark.parametrize("work", SMALL, ids=lambda w: w.name)
def test_variable_blocks_are_the_mask(work):
    plan = work.plan("cpu")
    rows, columns, attended = masks.blocks(plan)
    mask = attended.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    assert torch.equal(mask, plan.mask()[0, 0])


TWO = workloads.Workload("two samples", SMALL[0].samples * 2, 2, 16)


@pytest.mark.parametrize("kind", ["ranges", "openwam"])
@pytest.mark.parametrize("work", [SMALL[0], TWO], ids=lambda w: w.name)
def test_flex_masks_are_the_mask(work, kind):
    plan = work.plan("cpu")
    by_kind = {
        "ranges": lambda: masks.ranges_mask_mod(masks.bounds(plan)),
        "openwam": lambda: masks.openwam_mask_mod(work, plan.device),
    }
    tokens = torch.arange(plan.length)
    assert torch.equal(by_kind[kind]()(0, 0, tokens[:, None], tokens[None, :]), plan.mask()[0, 0])


def test_openwam_has_one_rule_for_all_samples():
    with pytest.raises(Unavailable, match="one rule for all samples"):
        masks.openwam_mask_mod(SMALL[1], torch.device("cpu"))


def test_a_peer_says_why_it_cannot():
    work = SMALL[0]
    plan = work.plan("cpu")
    by_name = {peer.name: peer for peer in peers.ATTENTION}
    for name, reason in (
        ("sdpa_cudnn", "runs on cuda only"),
        ("sdpa_flash", "cannot express this visibility"),
        ("flash_attn_4", "runs on cuda only"),
        ("flex_flash", "runs on cuda only"),
    ):
        with pytest.raises(Unavailable, match=reason):
            by_name[name].provider(work, plan, torch.float32)
    missing = peers.Peer("none", lambda *_: None, "no_such_module.at_all", "no-such-package", ("cpu",))
    with pytest.raises(Unavailable, match="no-such-package is not installed"):
        missing.provider(work, plan, torch.float32)


def test_flex_flash_asks_for_the_kernels_of_flash_attn_4(monkeypatch):
    """They run on a GPU only; what reaches FlexAttention is seen here. Its name for the backend is torch's own."""
    asked = []

    def attend(q, k, v, block_mask, kernel_options):
        asked.append((block_mask.BLOCK_SIZE, kernel_options))
        return q

    monkeypatch.setattr(torch, "compile", lambda *_, **__: attend)
    work = SMALL[0]
    peer = {peer.name: peer for peer in peers.ATTENTION}["flex_flash"]
    made = peer.make(work, work.plan("cpu"), torch.float32)
    made.attend(*work.inputs("cpu", torch.float32, 0)[:3])
    assert asked == [((128, 128), {"BACKEND": "FLASH"})]
    assert made.same_bits is False and peer.module == "flash_attn.cute" and peer.devices == ("cuda",)


@pytest.mark.parametrize(
    "name, work", [("sdpa_dense_mask", SMALL[0]), ("sdpa_dense_mask", SMALL[1]), ("sdpa_flash", SMALL[2])]
)
def test_peers_that_run_here_are_right(name, work):
    provider = {peer.name: peer for peer in peers.ATTENTION}[name].provider(work, work.plan("cpu"), torch.float64)
    inputs = work.inputs("cpu", torch.float64, 0)
    truth = workloads.truth(work, inputs, [0, 1])
    torch.testing.assert_close(provider.attend(*inputs[:3]), truth[0], atol=1e-12, rtol=1e-9)
    assert provider.computed_pairs >= work.plan("cpu").visible_pairs
