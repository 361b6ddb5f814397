"""Fast-WAM: training under its three masks, prefill and cached action steps, refusals."""

import copy
import re
import warnings

import pytest
import torch

from tests.integrations.checks import CLOSE, check_patch
from tests.integrations.stand_ins.fast_wam import Expert, MoT
from wam_kernels import RULE_PROGRAMS, compile_plan
from wam_kernels.integrations import Unsupported, patch, unpatch
from wam_kernels.integrations._kernels import MaskPlans

FRAMES, TOKENS, ACTIONS, HEADS, D = 3, 5, 4, 2, 16
VIDEO = FRAMES * TOKENS
REPLACED = {"MoT._mixed_attention", "MoT._build_expert_attention_io", "MoT._apply_expert_post_block"}


def mask(program: str) -> torch.Tensor:
    """Painted from the rule in words: frame 0 attends to itself, later frames to all video, actions to actions and to
    the video of the program."""
    copies = 2 if program == "fast_wam_idm" else 1
    end = copies * VIDEO
    m = torch.zeros(end + ACTIONS, end + ACTIONS, dtype=torch.bool)
    for at in range(0, end, VIDEO):
        m[at : at + VIDEO, at : at + VIDEO] = True
        m[at : at + TOKENS, at + TOKENS : at + VIDEO] = False
    m[end:, end:] = True
    seen = {"fast_wam_uncond": slice(0, TOKENS), "fast_wam_joint": slice(0, VIDEO), "fast_wam_idm": slice(VIDEO, end)}
    m[end:, seen[program]] = True
    return m


def model(head_dim: int = D) -> MoT:
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "attn_head_dim": head_dim, "num_heads": HEADS}
    return MoT({"video": Expert(24, 40, **sizes), "action": Expert(16, 20, **sizes)}).train()


def inputs(video: int, head_dim: int = D) -> dict[str, dict]:
    g = torch.Generator().manual_seed(2)
    one = {}
    for name, tokens, dim in (("video", video, 24), ("action", ACTIONS, 16)):
        angle = torch.randn(tokens, 1, head_dim // 2, generator=g, dtype=torch.float64)
        text_mask = torch.ones(2, tokens, 6, dtype=torch.bool)
        text_mask[1, :, 4:] = False
        one[name] = {
            "x": torch.randn(2, tokens, dim, generator=g),
            "freqs": torch.polar(torch.ones_like(angle), angle),
            # video is modulated for each token, the action expert for each sample
            "t_mod": torch.randn(2, tokens, 6, dim, generator=g)
            if name == "video"
            else torch.randn(2, 6, dim, generator=g),
            "context": {"context": torch.randn(2, 6, dim, generator=g), "mask": text_mask},
        }
    return one


def train(mot: MoT, program: str):
    data = inputs(VIDEO * (2 if program == "fast_wam_idm" else 1))
    by = lambda field: {name: one[field] for name, one in data.items()}  # noqa: E731
    return mot(by("x"), mask(program), by("freqs"), by("context"), by("t_mod"))


def cached_actions(mot: MoT, program: str):
    """Prefill the video once, then an action step on its keys and values."""
    video, action = inputs(VIDEO).values()
    m = mask(program)
    cache = mot.prefill_video_cache(video["x"], video["freqs"], video["t_mod"], video["context"], m[:VIDEO, :VIDEO])
    arguments = (action["x"], action["freqs"], action["t_mod"], action["context"], cache, m, VIDEO)
    return mot.forward_action_with_video_cache(*arguments)


PROGRAMS = ["fast_wam_uncond", "fast_wam_joint", "fast_wam_idm"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_training(program):
    mot = model()
    check_patch(mot, lambda: train(mot, program), REPLACED)


def test_checkpointed_blocks():
    mot = model()
    for expert in mot.mixtures.values():
        expert.use_gradient_checkpointing = True
    check_patch(mot, lambda: train(mot, "fast_wam_uncond"), REPLACED)


def test_explain_lists_the_glue():
    mot = model()
    done = patch(mot)
    train(mot, "fast_wam_uncond")
    assert "_apply_expert_post_block, 1x, 4 calls so far: gate + residual + norm, residual + norm" in done.explain()


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda block: setattr(block, "norm1", torch.nn.LayerNorm(24)), "that it modulates has weights"),
        (lambda block: setattr(block, "norm3", torch.nn.LayerNorm(24, bias=False)), "only one of weight and bias"),
        (lambda block: setattr(block, "norm2", torch.nn.RMSNorm(24)), "its norm is RMSNorm"),
        (lambda block: setattr(block, "gate", torch.nn.Identity()), "gate is no GateModule"),
    ],
)
def test_glue_that_is_not_known_is_kept(change, reason):
    mot = model()
    change(mot.mixtures["video"].blocks[1])
    done = patch(mot)
    assert re.search(f"kept .*gates, residual sums and norms: .*{reason}", done.explain())
    assert "_apply_expert_post_block" not in vars(mot) and "_build_expert_attention_io" in vars(mot)


def test_rows_in_bfloat16():
    """The error against float32 is the original's at most; no table is added to the modulation of every token."""
    truth = train(model(), "fast_wam_uncond")
    mot = model().bfloat16()
    half = lambda t: t.bfloat16() if t.is_floating_point() and t.dtype == torch.float32 else t  # noqa: E731
    data = inputs(VIDEO)
    by = lambda field: {name: one[field] for name, one in data.items()}  # noqa: E731
    context = {name: {k: half(t) for k, t in one.items()} for name, one in by("context").items()}
    x, t_mod = ({name: half(t) for name, t in by(field).items()} for field in ("x", "t_mod"))
    call = lambda: mot(x, mask("fast_wam_uncond"), by("freqs"), context, t_mod)  # noqa: E731
    error = lambda out: {name: (out[name].float() - truth[name]).abs().mean().item() for name in truth}  # noqa: E731
    before = error(call())
    patch(mot)
    after = error(call())
    assert all(after[name] <= 1.05 * before[name] for name in truth), (before, after)


@pytest.mark.parametrize("program", PROGRAMS[:2])
def test_prefill_and_cached_action_steps(program):
    mot = model()
    check_patch(mot, lambda: cached_actions(mot, program), REPLACED)


@pytest.mark.parametrize("program", PROGRAMS)
def test_masks_are_the_named_programs(program):
    named = RULE_PROGRAMS[program](video_frames=FRAMES, video_tokens=TOKENS, actions=ACTIONS)
    plan = MaskPlans().of(mask(program), torch.device("cpu"))
    assert torch.equal(plan.mask()[0, 0], mask(program))
    assert plan.visible_pairs == compile_plan(named).visible_pairs
    assert torch.equal(plan.mask(), compile_plan(named).mask())


def test_a_mask_is_converted_once():
    plans, m = MaskPlans(), mask("fast_wam_joint")
    cpu = torch.device("cpu")
    first = plans.of(m, cpu)
    assert plans.of(m, cpu) is first and plans.of(m.clone(), cpu) is first
    assert plans.of(mask("fast_wam_uncond"), cpu) is not first
    m[0, -1] = True  # changed in place: the plan that it had is wrong now
    assert torch.equal(plans.of(m, cpu).mask()[0, 0], m)


def test_inside_a_larger_model_and_in_a_copy():
    whole = torch.nn.ModuleDict({"mot": model()})
    expected = train(whole["mot"], "fast_wam_joint")
    patch(whole)
    twin = copy.deepcopy(whole)
    with torch.no_grad():
        for p in whole.parameters():
            p.zero_()
    # the copy runs on its own weights, not on those of the model that it was copied from
    for name, t in train(twin["mot"], "fast_wam_joint").items():
        torch.testing.assert_close(t, expected[name], **CLOSE)
    unpatch(twin)
    for name, t in train(twin["mot"], "fast_wam_joint").items():
        assert torch.equal(t, expected[name])
    assert "_mixed_attention" in vars(whole["mot"])


def test_an_expert_alone_stays_the_model_s_own():
    """The first stage of idm calls the video expert, not the mixture."""
    mot = model()
    data = inputs(VIDEO)["video"]
    call = lambda: mot.mixtures["video"](**data, mask=mask("fast_wam_joint")[:VIDEO, :VIDEO])  # noqa: E731
    expected = call()
    done = patch(mot)
    assert torch.equal(call(), expected) and not any(done.calls.values())
    with pytest.raises(Unsupported, match="got Expert"):
        patch(model().mixtures["video"])


def test_refuses_a_head_dim_without_a_kernel():
    mot = model(head_dim=12)
    with pytest.raises(Unsupported, match="Fast-WAM has heads of 12 channels; block_attention takes multiples of 8"):
        patch(mot)
    assert "_mixed_attention" not in vars(mot)
    with pytest.warns(UserWarning, match="heads of 12 channels.*original code of Fast-WAM runs"):
        assert patch(mot, on_unsupported="original") is None


def test_a_mask_that_is_not_boolean():
    mot = model()
    data = inputs(VIDEO)["video"]
    additive = torch.zeros(VIDEO, VIDEO)
    call = lambda: mot.prefill_video_cache(data["x"], data["freqs"], data["t_mod"], data["context"], additive)  # noqa: E731
    expected = call()
    patch(mot)
    with pytest.raises(Unsupported, match=r"attention_mask must be torch.bool \[Sq, Sk\] or .*, got torch.float32"):
        call()
    unpatch(mot)
    patch(mot, on_unsupported="original")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        got = [call(), call()][1]
    assert len([w for w in seen if "original code of Fast-WAM runs" in str(w.message)]) == 1
    torch.testing.assert_close(got[-1]["k"], expected[-1]["k"], **CLOSE)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: patch(torch.nn.Linear(2, 2)), Unsupported, "model must be one of Fast-WAM, lerobot.*got Linear"),
        (lambda: patch(model(), "ignore"), ValueError, r"on_unsupported must be one of \('error', 'original'\)"),
        (lambda: unpatch(model()), ValueError, "this MoT was not"),
        (lambda: patch(MoT({"video": Expert(8, 8, 1, 8, 1)})), Unsupported, "has no action"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_patching_twice_is_refused():
    mot = model()
    patch(mot)
    with pytest.raises(ValueError, match="must not be patched already"):
        patch(torch.nn.ModuleList([mot]))
    with pytest.raises(ValueError, match="unpatch it first"):
        patch(mot)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"freqs": lambda t: t[1:]}, f"rope must be of {VIDEO} tokens and {D} channels on cpu like its queries"),
        ({"t_mod": lambda t: t[:1].expand(3, -1, -1, -1)}, "must have rows of one shape"),
        ({"t_mod": lambda t: t[..., :16]}, "must have rows of one shape"),
        (
            {"t_mod": lambda t: t.double()},
            "floats of at most 32 bits, or float64 alone, got .* torch.float32, torch.float64",
        ),
    ],
)
def test_what_does_not_go_with_the_tokens(change, message):
    """The ops' own checks are left out, so these stand between a wrong call and memory of others."""
    mot, data = model(), inputs(VIDEO)["video"]
    data |= {name: cut(data[name]) for name, cut in change.items()}
    patch(mot)
    with pytest.raises(Unsupported, match=message):
        mot.prefill_video_cache(
            data["x"], data["freqs"], data["t_mod"], data["context"], mask("fast_wam_joint")[:VIDEO, :VIDEO]
        )
