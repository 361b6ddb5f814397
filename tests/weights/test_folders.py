"""Folders of other systems, read and written: shards, config.json, pickles."""

import json

import pytest
import torch
from safetensors.torch import load_file

from wam_models import WorldActionModel, read_weights, save_checkpoint, weights_to
from wam_models.cli import main
from wam_models.weights.convert import sizes_from, weights_from
from wam_models.weights.folders import read_folder, write_folder

from .test_layouts import weights


def test_a_folder_of_diffusers_is_read_and_written(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is in requirements/test.txt")
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=1,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "in", max_shard_size="10KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    state, told = read_folder(tmp_path / "in")
    assert told == {"head_dim": 12, "patch": [1, 2, 2], "eps": 1e-6}
    config = sizes_from("diffusers", state, **told)
    model = WorldActionModel(config)
    model.load_state_dict(model.state_dict() | weights_from("diffusers", state, config).state)
    for folder, most in (("one", 10**9), ("many", 10_000)):
        keys = weights_to("diffusers", model.state_dict(), config, without=["action"])
        write_folder(tmp_path / folder, "diffusers", keys, config, shard_bytes=most)
        assert (len(list((tmp_path / folder).glob("*.safetensors"))) > 1) == (folder == "many")
        back = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / folder)
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in back.state_dict().items())
        assert back.config.items() >= {"ffn_dim": 32, "num_attention_heads": 2, "eps": 1e-6}.items()
    with pytest.raises(ValueError, match="must be new or empty"):
        write_folder(tmp_path / "one", "diffusers", state, config)
    settings = json.loads((tmp_path / "in" / "config.json").read_text()) | {"cross_attn_norm": False}
    (tmp_path / "in" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="config.json: cross_attn_norm must be True"):
        read_folder(tmp_path / "in")


def test_other_layouts_are_one_file_without_a_config(tmp_path):
    state = weights("fast_wam")
    write_folder(tmp_path, "fast_wam", state, sizes_from("fast_wam", state, head_dim=12))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors").keys() == state.keys()
    assert read_folder(tmp_path)[1] == {}


@pytest.mark.parametrize("name", ["model_state.pt", "diffusion_pytorch_model.bin"])
def test_pickles_are_refused_by_name(name, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=rf"{name} is a torch pickle.*safetensors.torch.save_file"):
            read_weights(path)


def test_wam_export(tmp_path, capsys):
    config = sizes_from("openwam", weights("openwam"), head_dim=12)
    save_checkpoint(tmp_path / "ours", model := WorldActionModel(config))
    command = ["export", "--checkpoint", str(tmp_path / "ours"), "--layout"]
    assert main([*command, "diffusers", "--out", str(tmp_path / "video")]) == 2
    assert "no place for our stream action" in capsys.readouterr().err
    assert main([*command, "diffusers", "--without", "action", "--out", str(tmp_path / "video")]) == 0
    assert main([*command, "openwam", "--out", str(tmp_path / "both")]) == 0
    state = read_folder(tmp_path / "both")[0]
    assert len(state) == len(model.state_dict()) and f"{len(state)} tensors" in capsys.readouterr().out
    assert read_folder(tmp_path / "video")[1]["head_dim"] == 12
