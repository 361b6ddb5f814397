"""openpi: joint training pass, prefix cache and action steps, with padding; several models on one function."""

import copy
import gc
from weakref import ref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.integrations.checks import CLOSE, check_patch
from tests.integrations.stand_ins import lerobot_pi05, openpi
from tests.integrations.stand_ins.openpi import PaliGemmaWithExpertModel, PI0Pytorch
from wam_kernels import RULE_PROGRAMS, compile_plan
from wam_kernels.integrations import Unsupported, _kernels, patch, unpatch
from wam_kernels.integrations._kernels import MaskPlans, PaddedBlocks

PREFIX, ACTIONS, HIDDEN = 9, 4, -2.3819763e38
PADDING = ((2, 4), (7, 9))  # a missing image and the end of the prompt, of sample 1; sample 0 has none
ATTENTION, MASKS = openpi.eager_attention_forward, openpi.make_att_2d_masks  # before anything is patched
REPLACED = {"GemmaAttention.eager_attention_forward"}


def model(**sizes) -> PaliGemmaWithExpertModel:
    torch.manual_seed(0)
    return PaliGemmaWithExpertModel(**sizes)


def forget_compiled() -> None:
    """Patched models of other tests, which compiled code may hold."""
    torch.compiler.reset()
    gc.collect()


def visible(states: int) -> torch.Tensor:
    """bool ``[2, S, S]`` in loops: a token attends to the blocks up to its own (prefix, state, actions), padding is
    out."""
    block = [0] * PREFIX + [1] * states + [2] * ACTIONS
    mask = torch.zeros(2, len(block), len(block), dtype=torch.bool)
    for sample in range(2):
        padded = {t for begin, end in PADDING for t in range(begin, end)} if sample else set()
        for i in range(len(block)):
            for j in range(len(block)):
                mask[sample, i, j] = block[j] <= block[i] and not {i, j} & padded
    return mask


def bias(mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask[:, None], 0.0, HIDDEN)


def tokens(states: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, PREFIX, 20, generator=g), torch.randn(2, states + ACTIONS, 12, generator=g)


@pytest.mark.parametrize("states", [0, 1], ids=["pi-0.5", "pi-0"])
def test_training(states):
    # padding comes out as zeros here and as a mean of everything there; nobody reads it
    gemmas, mask = model(), bias(visible(states))
    read = visible(states).any(-1)[..., None]

    def call():
        prefix, suffix = gemmas(tokens(states), mask)
        return prefix * read[:, :PREFIX], suffix

    check_patch(gemmas, call, REPLACED)


@pytest.mark.parametrize("states", [0, 1], ids=["pi-0.5", "pi-0"])
def test_prefix_cache_and_action_steps(states):
    gemmas, mask = model(), visible(states)
    prefix, suffix = tokens(states)

    def call():
        _, cache = gemmas((prefix, None), bias(mask[:, :PREFIX, :PREFIX]))
        return gemmas((None, suffix), bias(mask[:, PREFIX:]), past=cache)

    check_patch(gemmas, call, REPLACED)


def test_a_mask_for_every_prompt(monkeypatch):
    """Prompts have lengths, so masks differ from step to step: each is read once, and none is kept."""
    monkeypatch.setattr(_kernels, "PLANS", MaskPlans())
    converted, make = [], _kernels.plan_of_ranges
    monkeypatch.setattr(
        _kernels, "plan_of_ranges", lambda samples, shape: converted.append(shape) or make(samples, shape)
    )
    gemmas, kept = model(), []
    masks = [visible(1).clone() for _ in range(3)]
    for length, mask in enumerate(masks):
        mask[0, PREFIX - length : PREFIX] = False
        mask[0, :, PREFIX - length : PREFIX] = False
    expected = [gemmas(tokens(1), bias(mask))[1] for mask in (*masks, *masks)]
    patch(gemmas)
    for mask, want in zip((*masks, *masks), expected, strict=True):
        additive = bias(mask)  # a new tensor in every step
        kept.append(ref(additive))
        torch.testing.assert_close(gemmas(tokens(1), additive)[1], want, **CLOSE)
        del additive
    assert len(converted) == len(masks)
    assert not any(mask() is not None for mask in kept)
    plans = MaskPlans()
    for i in range(2 * MaskPlans.KEPT):
        plans.of(torch.arange(64)[None] <= torch.arange(64)[:, None] + i - 40, torch.device("cpu"))
    assert len(plans) == MaskPlans.KEPT


def test_masks_are_the_named_program():
    plan = MaskPlans().of(bias(visible(1)), torch.device("cpu"))
    sizes = {"prefix": PREFIX, "states": 1, "actions": ACTIONS}
    programs = [RULE_PROGRAMS["prefix_suffix"](**sizes, padding=p) for p in ((), PADDING)]
    assert torch.equal(plan.mask(), compile_plan(programs).mask())


def test_heads_of_pi05():
    gemmas = model(widths=(16, 8), heads=8, head_dim=256, layers=1)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, PREFIX, 16, generator=g), torch.randn(2, ACTIONS, 8, generator=g)
    mask = bias(visible(0))
    expected = gemmas(x, mask)[1]
    patch(gemmas)
    torch.testing.assert_close(gemmas(x, mask)[1], expected, **CLOSE)


def test_compiles():
    # openpi compiles sample_actions: a plan must not become part of a graph, and the dispatch must survive tracing
    gemmas, x, mask = model(layers=1), tokens(), bias(visible(0))
    expected = gemmas(x, mask)[1]
    patch(gemmas)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(gemmas, backend="eager")(x, mask)[1], expected, **CLOSE)


def test_several_models_share_the_function():
    forget_compiled()
    mask, x = bias(visible(0)), tokens()
    gemmas = [model() for _ in range(3)]
    expected = gemmas[0](x, mask)[1]
    patch(gemmas[0])
    patch(gemmas[1])
    twin = copy.deepcopy(gemmas[0])
    assert torch.equal(gemmas[2](x, mask)[1], expected) and not torch.equal(twin(x, mask)[1], expected)
    unpatch(gemmas[0])
    assert torch.equal(gemmas[0](x, mask)[1], expected)
    assert all(not torch.equal(gemma(x, mask)[1], expected) for gemma in (gemmas[1], twin))
    unpatch(gemmas[1])
    unpatch(twin)
    assert openpi.eager_attention_forward is ATTENTION


def test_refusals():
    gemmas, x = model(), tokens()
    patch(gemmas)
    slope = bias(visible(0)).masked_fill(visible(0)[:, None], -0.5)
    for mask, message in (
        (slope, "must hold 0 and at most -1e30"),
        (visible(0), r"must be additive \[B, 1, Sq, Sk\], got torch.bool \[2, 13, 13\]"),
        (None, "or additive .*, got None"),
        (bias(visible(0)[:, :9]), "has 13 queries and 13 keys, but its mask is for 9 and 13"),
    ):
        with pytest.raises(Unsupported, match=message):
            gemmas(x, mask)
    function = openpi.eager_attention_forward
    with pytest.raises(Unsupported, match="openpi has heads of 12 channels"):
        patch(model(head_dim=12))
    assert openpi.eager_attention_forward is function


# ---- the model around them, whose masks stay two vectors ----


def whole(states: int = 1, made=PI0Pytorch, **options) -> PI0Pytorch:
    torch.manual_seed(0)
    return made(states, **options)


def batch(states: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    prefix, suffix = tokens(states)
    return prefix, visible(states)[:, 0, :PREFIX], suffix


@pytest.mark.parametrize("call", ["forward", "sample_actions"])
@pytest.mark.parametrize("states, checkpointing", [(0, False), (1, False), (1, True)])
def test_the_whole_model(call, states, checkpointing):
    pi = whole(states, checkpointing=checkpointing)
    made = {"PI0Pytorch.make_att_2d_masks", "PI0Pytorch._prepare_attention_masks_4d"}
    if call == "forward":
        check_patch(pi, lambda: pi(*batch(states)), REPLACED | made)
        return
    expected = pi.sample_actions(*batch(states))
    done = patch(pi)
    torch.testing.assert_close(pi.sample_actions(*batch(states)), expected, **CLOSE)
    assert all(done.calls.values())


class Squares(TorchDispatchMode):
    """Operators that give something of S x S."""

    def __init__(self, S: int) -> None:
        super().__init__()
        self.S, self.found = S, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.shape[-2:] == (self.S, self.S):
                self.found.append(func)
        return out


@pytest.mark.parametrize("made", [PI0Pytorch, lerobot_pi05.PI05Pytorch], ids=["openpi", "lerobot"])
def test_nothing_of_s_times_s_and_one_plan_a_batch(monkeypatch, made):
    monkeypatch.setattr(_kernels, "PLANS", MaskPlans())
    plans, make = [], _kernels.plan_of_ranges
    monkeypatch.setattr(_kernels, "plan_of_ranges", lambda samples, shape: plans.append(shape) or make(samples, shape))
    pi, (prefix, pads, suffix) = whole(made=made), batch()
    S = prefix.shape[1] + suffix.shape[1]

    def step(pads) -> list:
        with Squares(S) as squares:
            pi(prefix, pads, suffix).sum().backward()
        return squares.found

    assert step(pads), "the original makes masks and scores"
    patch(pi)
    assert step(pads) == [] and plans == [(2, S, S)]
    assert step(pads.flip(0)) == [] and len(plans) == 2
    assert step(pads.clone()) == [] and len(plans) == 2, "known by the digest of the two vectors"
    assert len(_kernels.PLANS) == 2
    unpatch(pi)


def test_masks_are_what_the_original_makes():
    forget_compiled()
    pi = whole()
    g = torch.Generator().manual_seed(3)
    cases = [(torch.rand(3, 12, generator=g) > 0.3, torch.rand(3, 12, generator=g).round()) for _ in range(20)]
    cases.append((torch.ones(1, 12, dtype=torch.bool), torch.tensor([[1.0, 0, 0, -1, 0, 1, 0, -1, -1, 0, 0, 3]])))
    expected = [(mask := MASKS(*case), pi.additive(mask)) for case in cases]
    patch(pi)
    for case, (want, additive) in zip(cases, expected, strict=True):
        mask = openpi.make_att_2d_masks(*case)
        assert isinstance(mask, PaddedBlocks) and mask.shape == want.shape and mask.dtype == want.dtype
        assert torch.equal(MaskPlans().of(mask, mask.device).mask()[:, 0].expand(want.shape), want)
        assert torch.equal(mask[:, 3:], want[:, 3:]) and torch.equal(mask & want.mT, want & want.mT)
        again = pi.additive(mask)
        assert isinstance(again, PaddedBlocks) and again.dtype == additive.dtype and torch.equal(again + 0, additive)
        with pytest.raises(RuntimeError, match="a patched model's mask cannot be written to"):
            mask &= want
    with pytest.raises(Unsupported, match=r"masks must be of bool pads and of blocks \[B, S\], got torch.float32"):
        openpi.make_att_2d_masks(torch.ones(1, 4), torch.ones(1, 4))
    unpatch(pi)
    assert openpi.make_att_2d_masks is MASKS


def test_the_function_that_makes_a_mask_additive_is_lent():
    """lerobot's has a dtype, serves models that are not patched, and is given back with the last patch."""
    own = lerobot_pi05.prepare_attention_masks_4d
    first, second, other = (whole(made=lerobot_pi05.PI05Pytorch) for _ in range(3))
    expected = [first(*batch()), first.sample_actions(*batch())]
    patches = [patch(first), patch(second)]
    torch.testing.assert_close([first(*batch()), first.sample_actions(*batch())], expected, **CLOSE)
    assert all(sum(done.calls.values()) for done in patches[1:]), "calls count for the model that was patched last"
    torch.testing.assert_close(other(*batch()), expected[0], **CLOSE)
    dense = torch.eye(5, dtype=torch.bool)[None]
    assert torch.equal(lerobot_pi05.prepare_attention_masks_4d(dense, torch.bfloat16), own(dense, torch.bfloat16))
    vectors = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 5)
    mask = lerobot_pi05.prepare_attention_masks_4d(lerobot_pi05.make_att_2d_masks(*vectors), torch.bfloat16)
    assert isinstance(mask, PaddedBlocks) and mask.dtype == torch.bfloat16
    assert torch.equal(mask + 0, own(MASKS(*vectors), torch.bfloat16))
    unpatch(second)
    assert lerobot_pi05.prepare_attention_masks_4d is not own
    torch.testing.assert_close(first(*batch()), expected[0], **CLOSE)
    unpatch(first)
    assert lerobot_pi05.prepare_attention_masks_4d is own and lerobot_pi05.make_att_2d_masks is MASKS


def test_masks_that_are_made_in_another_way_stay_the_model_s_own(monkeypatch):
    pi = whole()
    expected = pi(*batch())
    monkeypatch.setattr(openpi, "make_att_2d_masks", lambda blocks, pads: torch.ones(0))
    done = patch(pi)
    assert "masks of S x S: patch: tests.integrations.stand_ins.openpi.make_att_2d_masks must take" in done.explain()
    monkeypatch.undo()
    torch.testing.assert_close(pi(*batch()), expected, **CLOSE)


def test_a_model_that_is_not_patched_runs_beside_one_that_is():
    pi, other = whole(), whole()
    expected = other(*batch())
    done = patch(pi)
    assert torch.equal(other(*batch()), expected)
    pi(*batch())
    assert done.calls["PI0Pytorch.make_att_2d_masks"] > 0
    unpatch(pi)
    assert torch.equal(pi(*batch()), expected)


@pytest.mark.parametrize("part", ["all", "pair"])
def test_the_whole_model_compiles(part):
    pi = whole(layers=1)
    expected = pi(*batch())
    patch(pi)
    torch._dynamo.reset()
    (pi if part == "all" else pi.paligemma_with_expert).compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(pi(*batch()), expected, **CLOSE)
