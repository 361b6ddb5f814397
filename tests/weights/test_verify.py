"""``wam verify``: no layer of the real packages differs, and one that does is named."""

import dataclasses
import sys

import pytest
import torch
from safetensors.torch import save_file

from wam_models import WorldActionModel, golden_config, save_checkpoint, weights_to
from wam_models.cli import main
from wam_models.weights import layers, verify

from .test_layouts import sizes

SMALL = dataclasses.replace(golden_config(), text_dim=8, freq_dim=16)
BLOCK = "packed_block_stack.packed_blocks.1.video_block.ffn.net.2.bias"


def needs(against):
    pytest.importorskip({"openwam": "open_wam"}.get(against, against), reason="it is in requirements/test.txt")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = WorldActionModel(SMALL)
    for name, value in made.named_parameters():  # nothing at 0, as a new model has its heads; attention that chooses
        torch.nn.init.normal_(value, std=0.1, mean=2.0 if ".norm_" in name else 0.0)
    return made


@pytest.mark.parametrize("against", ["diffusers", "openwam"])
def test_our_checkpoint_is_the_package_s_model(against, model, tmp_path, capsys):
    needs(against)
    save_checkpoint(tmp_path, model)
    assert main(["verify", str(tmp_path), "--against", against]) == 0
    printed = capsys.readouterr().out
    assert ("action flow" in printed) == (against == "openwam") and "video flow" in printed
    assert f"no layer differs from {against} by more than" in printed
    rows = verify.verify(tmp_path, against, seed=1)
    assert max(row.difference for row in rows) < 5e-6
    assert [row.layer for row in rows][:3] == ["video text", "video timesteps", "video tokens"]


@pytest.mark.parametrize("against", ["openwam", "openwam_parallel"])
def test_a_model_that_is_told_the_robot_s_state_is_openwam_s(against, tmp_path):
    needs("openwam")
    torch.manual_seed(0)
    one = {"topology": "parallel_stream", "action_hidden": 64, "action_ffn": 128}
    told = WorldActionModel(dataclasses.replace(SMALL, state_dim=3, **(one if "parallel" in against else {})))
    for value in told.parameters():
        torch.nn.init.normal_(value, std=0.2)
    save_checkpoint(tmp_path, told)
    rows = verify.verify(tmp_path, against)
    assert max(row.difference for row in rows) < 5e-6
    assert {row.layer for row in rows} >= {"action tokens", "block 1, action", "action flow"}
    if against == "openwam_parallel":
        with torch.no_grad():
            told.action_expert.action_proj_out.bias += 1
        real = verify.our_model
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verify, "our_model", lambda config, state: real(config, told.state_dict()))
            found = verify.first_difference(verify.verify(tmp_path, against), verify.TOLERANCE)
        assert found is not None and found.layer == "action flow"
        return
    state = weights_to("openwam", told.state_dict(), told.config)
    assert {key for key in state if "proprio" in key or "hidden_context" in key} == {
        f"{module}.{p}"
        for module in (
            "visual_tower.core.proprio_hidden_context_encoder.proj",
            "policy_variant.action_expert.hidden_context_proj",
        )
        for p in ("weight", "bias")
    }


@pytest.mark.parametrize("against", ["diffusers", "openwam"])
def test_the_package_s_own_weights(against, model, tmp_path, capsys):
    needs(against)
    state = weights_to(against, model.state_dict(), SMALL, without=["action"] if against == "diffusers" else [])
    part = "image" if against == "diffusers" else "state"
    key = {"image": "blocks.0.attn2.norm_added_k.weight", "state": "core.proprio_context_encoder.proj.bias"}[part]
    save_file(state | {key: torch.zeros(3)}, tmp_path / "weights.safetensors")
    command = ["verify", str(tmp_path / "weights.safetensors"), "--against", against]
    command += ["--head-dim", "32", "--actions-per-frame", "2"]
    assert main([*command, "--without", part]) == 0
    assert main(command) == 2
    assert f"leave parts out with without=['{part}']" in capsys.readouterr().err


@pytest.mark.parametrize("against", ["diffusers", "openwam"])
def test_the_first_layer_that_differs_is_named(against, model, tmp_path, capsys, monkeypatch):
    needs(against)
    save_checkpoint(tmp_path, model)
    real = layers.our_model

    def other(config, state):
        return real(config, state | {BLOCK: state[BLOCK] + 1})

    monkeypatch.setattr(verify, "our_model", other)
    assert main(["verify", str(tmp_path), "--against", against]) == 1
    out = capsys.readouterr().out
    assert f"the first layer that differs from {against}: block 1, video, by" in out
    assert "block 0, video  " in out and "*" not in out[: out.index("block 1, video")]


def test_another_rope_differs_from_the_first_block_on(model):
    needs("diffusers")
    inputs = layers.Inputs.drawn(SMALL, 0, torch.device("cpu"))
    theirs = layers.diffusers_layers(
        SMALL, weights_to("diffusers", model.state_dict(), SMALL, without=["action"]), inputs
    )
    turned = layers.our_model(dataclasses.replace(SMALL, rope_theta=10.0), model.state_dict())
    rows = verify.compare(layers.our_layers(turned, inputs, actions=False), theirs)
    found = verify.first_difference(rows, verify.TOLERANCE)
    assert found is not None and found.layer == "block 0, video"


def test_what_is_missing_is_named(model, tmp_path, capsys, monkeypatch):
    save_checkpoint(tmp_path, model)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["verify", str(tmp_path), "--against", "diffusers"]) == 2
    assert "diffusers" in capsys.readouterr().err
    with pytest.raises(ValueError, match="hidden must be 32, heads times head_dim, got 24"):
        narrow = dataclasses.replace(sizes("diffusers"), head_dim=16)
        save_checkpoint(tmp_path, WorldActionModel(narrow))
        verify.verify(tmp_path, "diffusers")
