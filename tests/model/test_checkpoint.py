"""Configs, strict loading, checkpoint folders, the text slot, the public names."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import wam_models
from wam_models import (
    ModelConfig,
    WordEmbedding,
    WorldActionModel,
    demo_config,
    from_diffusers,
    golden_config,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    umt5_encoder,
    wan_5b_config,
    wan_5b_small_action_config,
)

from .cases import META, golden_model, weights

SMALL = dataclasses.replace(golden_config(), text_dim=8, freq_dim=16)


def test_golden_config_is_that_of_the_recording():
    shared = {k: v for k, v in golden_config().to_dict().items() if k in META}
    assert len(shared) >= 11 and all(META[k] == v for k, v in shared.items())


def test_sizes():
    with torch.device("meta"):
        models = [WorldActionModel(c()) for c in (demo_config, wan_5b_config, wan_5b_small_action_config)]
    demo, large, small_action = (sum(p.numel() for p in m.parameters()) for m in models)
    assert 2e6 < demo < 4e6
    assert 7e9 < large < 8.5e9 and 5e9 < small_action < 6e9
    for model in models:
        assert 0.9 < model.config.matrices / sum(p.numel() for p in model.parameters() if p.ndim == 2) <= 1
    assert models[1].config.rope_split == (44, 42, 42) and golden_config().rope_split == (12, 10, 10)


def test_config_round_trip_and_refusals():
    values = json.loads(json.dumps(demo_config().to_dict()))
    assert ModelConfig.from_dict(values) == demo_config()
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\], missing fields \['ffn'\]"):
        ModelConfig.from_dict({k: v for k, v in values.items() if k != "ffn"} | {"colour": 1})
    for change in ({"heads": 0}, {"hidden": 2.5}, {"head_dim": 7}, {"patch": (2, 2, 2)}, {"eps": 0}, {"ffn": True}):
        with pytest.raises(ValueError, match=next(iter(change))):
            dataclasses.replace(demo_config(), **change)


def test_loading_is_strict_and_reports_what_it_leaves():
    model = WorldActionModel(golden_config())
    unused = load_weights(model, weights())
    assert len(unused) == 25
    assert all(k.startswith(("core.action_", "core.runtime_", "action_expert.hidden_context_proj")) for k in unused)
    assert set(model.state_dict()) <= set(weights())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    broken = dict(weights())
    del broken["core.proj_out.bias"]
    broken["core.text_proj.linear_1.weight"] = torch.zeros(3, 4)
    with pytest.raises(
        ValueError, match=r"core\.proj_out\.bias.*linear_1\.weight: expected \[64, 4096\], got \[3, 4\]"
    ):
        load_weights(model, broken)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_diffusers_names_cover_the_video_expert():
    ours = golden_model().state_dict()
    video = {k: v for k, v in ours.items() if ".video_block." in k or k.startswith("core.")}
    theirs = {}
    for key, value in video.items():
        key = key.replace("packed_block_stack.packed_blocks", "blocks").replace("video_block.", "")
        key = key.replace("core.text_proj", "condition_embedder.text_embedder")
        key = key.replace("core.time_conditioner", "condition_embedder").removeprefix("core.")
        if key.startswith("patch_embedding_mlp"):
            key = key.replace("_mlp", "")
            value = value.unflatten(-1, (48, 1, 2, 2)) if key.endswith("weight") else value
        theirs[key] = value
    assert "blocks.0.attn1.to_q.weight" in theirs and "patch_embedding.weight" in theirs
    back = from_diffusers(theirs)
    assert set(back) == set(video) and all(torch.equal(back[k], video[k]) for k in video)


def test_checkpoint_folder_round_trip(tmp_path):
    model, text = WorldActionModel(SMALL), WordEmbedding.from_instructions(["Pick up the soup"], 8)
    optimizer = torch.optim.AdamW(model.parameters())
    generator = torch.Generator().manual_seed(4)
    training = {"optimizer": optimizer.state_dict(), "generator": generator.get_state(), "step": 7}
    codec = {"codec.mean": torch.randn(48)}
    metadata = {"program": "joint", "scale": 1.5}
    save_checkpoint(tmp_path / "a", model, text=text, extra=codec, metadata=metadata, training_state=training)
    back = load_checkpoint(tmp_path / "a")
    assert back.model.config == SMALL and back.metadata == metadata and not back.model.training
    assert all(torch.equal(v, back.model.state_dict()[k]) for k, v in model.state_dict().items())
    assert set(back.extra) == {"codec.mean"} and torch.equal(back.extra["codec.mean"], codec["codec.mean"])
    assert torch.equal(back.text(["pick the spoon"]), text(["pick the spoon"]))
    assert back.training_state["step"] == 7
    assert torch.equal(back.training_state["generator"], training["generator"])
    save_checkpoint(tmp_path / "a", model)
    again = load_checkpoint(tmp_path / "a")
    assert again.training_state is None and again.text is None and again.extra == {}
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "config.json",
        "extra.safetensors",
        "model.safetensors",
    ]


def test_broken_checkpoint_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(ValueError, match="must not start with"):
        save_checkpoint(tmp_path, WorldActionModel(SMALL), extra={"text.words": torch.zeros(1)})
    save_checkpoint(tmp_path, WorldActionModel(SMALL))
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="'model' entry"):
        load_checkpoint(tmp_path)


def test_word_embedding():
    text = WordEmbedding.from_instructions(["Pick up the red cup.", "open the drawer"], 8)
    assert text.vocabulary == ("cup", "drawer", "open", "pick", "red", "the", "up") and text.tokens == 5
    out = text(["open THE drawer", "open the drawer!", "lift the drawer", "drawer the open"])
    assert out.shape == (4, 5, 8) and torch.equal(out[0], out[1])
    assert not out[:, 3:].any() and out[:, :3].all()
    assert not torch.equal(out[0], out[2]) and not torch.equal(out[0], out[3])  # unknown words, and order, count
    assert torch.equal(text(["lift the"])[0, 0], text(["raise the"])[0, 0])
    out.sum().backward()
    assert text.words.weight.grad.any()
    with pytest.raises(ValueError, match="at most 5 words, got 6"):
        text(["a b c d e f"])
    with pytest.raises(ValueError, match="single lower-case words"):
        WordEmbedding(["Two words"], 8)


def test_umt5_needs_a_local_folder(tmp_path):
    with pytest.raises(ValueError, match="local folder"):
        umt5_encoder(tmp_path / "nothing")


def test_umt5_needs_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        umt5_encoder(tmp_path)


def test_public_names():
    assert wam_models.__all__ == sorted(wam_models.__all__)
    assert all(getattr(wam_models, name) is not None for name in wam_models.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = wam_models.nonsense
    code = "import sys, wam_models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
