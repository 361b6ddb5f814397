"""Forks of the systems: served with the original's numbers, or refused by name."""

import pytest
import torch
from torch import nn

from tests.integrations import test_dreamzero as dreamzero
from tests.integrations import test_fast_wam as fast_wam
from tests.integrations import test_lingbot_va as lingbot
from tests.integrations import test_openpi as openpi
from tests.integrations.checks import CLOSE, check_patch, numbers
from tests.integrations.stand_ins import fast_wam as fast_wam_stand_in
from tests.integrations.stand_ins import rlinf, vpp2
from wam_kernels.integrations import Unsupported, patch

# ---- VPP 2 ----


def vpp2_model(num_layers: int = 2, **options) -> vpp2.MoT:
    torch.manual_seed(0)
    sizes = {"num_layers": num_layers, "attn_head_dim": fast_wam.D}
    own = {"video_dim": 24, "num_heads": 3} if options.get("use_video_tokens") else {"num_heads": fast_wam.HEADS}
    video = vpp2.fast_wam.Expert(24, 40, num_heads=fast_wam.HEADS, **sizes)
    return vpp2.MoT({"video": video, "action": vpp2.ActionExpert(16, 20, **sizes, **own)}, **options).train()


def vpp2_inputs(gated: bool) -> tuple:
    data = fast_wam.inputs(fast_wam.VIDEO)
    by = lambda field: {name: one[field] for name, one in data.items()}  # noqa: E731
    arguments = by("x"), fast_wam.mask("fast_wam_joint"), by("freqs"), by("context"), by("t_mod")
    return *arguments, torch.tensor([True, False]) if gated else None


def vpp2_train(mot: vpp2.MoT, gated: bool):
    return mot(*vpp2_inputs(gated))


@pytest.mark.parametrize("gated", [False, True], ids=["one mask", "a mask a sample"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_fixed_video_layers": 1},
        {"use_video_tokens": True},
        {"use_video_tokens": True, "use_fixed_video_layers": 0},
    ],
    ids=["joint", "fixed layer", "video tokens", "video tokens of a fixed layer"],
)
def test_vpp2_training(options, gated):
    mot = vpp2_model(**options)
    check_patch(mot, lambda: vpp2_train(mot, gated and bool(options)), fast_wam.REPLACED)


def test_vpp2_cached_action_steps():
    mot = vpp2_model(use_fixed_video_layers=1).eval()
    gated = vpp2_train(mot, True)["action"], vpp2_train(mot, False)["action"]
    assert not torch.allclose(gated[0][1], gated[1][1], atol=1e-3), (
        "the mask must hide the video from the second sample"
    )
    done = patch(mot)
    with torch.no_grad():
        for hides, expected in zip((True, False), gated, strict=True):
            torch.testing.assert_close(vpp2_train(mot, hides)["action"], expected, **CLOSE)
    assert done.calls["MoT._mixed_attention"] == 8  # 2 calls of 2 video and 2 action layers


def test_vpp2_is_one_graph():
    mot, inputs = vpp2_model(1, use_fixed_video_layers=0), vpp2_inputs(True)
    expected = numbers(mot(*inputs))
    patch(mot)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *inputs: mot(*inputs), backend="eager", fullgraph=True)
    for got, want in zip(numbers(compiled(*inputs)), expected, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


# ---- LoongForge ----


def test_loongforge_fast_wam(monkeypatch):
    """Its rope comes as a pair of tables, cosines and sines ``[S, D / 2]``."""
    rope, original = fast_wam_stand_in.rope_apply, fast_wam.inputs

    def of_pair(x, freqs, num_heads):
        return rope(x, torch.complex(*freqs)[:, None], num_heads)

    def with_pairs(video):
        data = original(video)
        for one in data.values():
            one["freqs"] = one["freqs"][:, 0].real.float(), one["freqs"][:, 0].imag.float()
        return data

    monkeypatch.setattr(fast_wam_stand_in, "rope_apply", of_pair)
    monkeypatch.setattr(fast_wam, "inputs", with_pairs)
    mot = fast_wam.model()
    check_patch(mot, lambda: fast_wam.train(mot, "fast_wam_joint"), fast_wam.REPLACED)
    check_patch(mot, lambda: fast_wam.cached_actions(mot, "fast_wam_joint"), fast_wam.REPLACED)


def loongforge_attention(model: nn.Module, monkeypatch) -> None:
    """Its attention takes the registers' frequencies ready made, if the caller has them."""
    attention = type(model.blocks[0].self_attn)
    original = attention.forward

    def forward(
        self, x, freqs, freqs_action, freqs_state, action_register_length, kv_cache=None, current_start_frame=0,
        is_tf=True, freqs_action_state=None,
    ):  # fmt: skip
        arguments = (x, freqs, freqs_action, freqs_state, action_register_length, kv_cache, current_start_frame, is_tf)
        return original(self, *arguments)

    monkeypatch.setattr(attention, "forward", forward)


def test_loongforge_dreamzero(monkeypatch):
    model = dreamzero.model()
    loongforge_attention(model, monkeypatch)
    expected = [t.clone() for t in numbers(dreamzero.train(model, 2))]
    done = patch(model)
    for got, want in zip(numbers(dreamzero.train(model, 2)), expected, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)
    assert done.calls["CausalWanSelfAttention.forward"] == len(model.blocks)
    attn = model.blocks[0].self_attn
    with pytest.raises(Unsupported, match="forward must be called without freqs_action_state, which this library does"):
        attn.forward(None, None, None, None, None, freqs_action_state=torch.ones(1))


def test_loongforge_dreamzero_with_context_parallelism():
    model = dreamzero.model()
    model.blocks[1].self_attn._dreamzero_context_parallel_enabled = True
    with pytest.raises(Unsupported, match="DreamZero as LoongForge has it must have context_parallel_size=1"):
        patch(model)


def test_loongforge_lingbot_va():
    """Its transformer is for training alone: an attention without a cache, and ``forward`` for ``forward_train``."""
    model = lingbot.model("flex")
    for block in model.blocks:
        del block.attn1.attn_caches
    with pytest.raises(Unsupported, match="LingBot-VA's WanAttention must have attn_caches, but it has none"):
        patch(model)


# ---- RLinf ----


def test_rlinf_dreamzero(monkeypatch):
    model = dreamzero.model()
    monkeypatch.setattr(type(model), "forward", rlinf.forward_train)
    check_patch(model, lambda: dreamzero.train(model, 2), dreamzero.REPLACED)


def test_rlinf_openpi():
    """Its policy derives from ``PI0Pytorch``: the masks that its module makes stay two vectors as well."""
    torch.manual_seed(0)
    pi, make = rlinf.OpenPi0ForRLActionPrediction(), rlinf.make_att_2d_masks
    names = {f"{type(pi).__name__}.{name}" for name in ("make_att_2d_masks", "_prepare_attention_masks_4d")}
    check_patch(pi, lambda: pi(*openpi.batch()), openpi.REPLACED | names)
    assert rlinf.make_att_2d_masks is make
    patch(pi)
    prefix, pads, suffix = openpi.batch()
    with openpi.Squares(prefix.shape[1] + suffix.shape[1]) as squares:
        pi(prefix, pads, suffix)
    assert squares.found == []


def test_rlinf_s_own_pi0():
    with pytest.raises(Unsupported, match="model must be one of Fast-WAM, .*, OpenWAM, got Pi0"):
        patch(rlinf.Pi0())


# ---- others ----


def test_a_fork_without_a_mask():
    """One that may leave the mask out has no mask to make a plan of."""
    mot = fast_wam.model()
    q = torch.randn(3, 1, fast_wam.VIDEO, 32)
    patch(mot)
    with pytest.raises(Unsupported, match="attention_mask must be torch.bool .*, got None"):
        mot._mixed_attention(*q, None)
