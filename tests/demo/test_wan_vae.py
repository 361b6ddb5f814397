"""A policy on the latents of Wan's VAE: trained, saved, loaded, evaluated and rolled out like any other."""

import importlib.util
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.data import tiny
from wam_models import ClipDataset, LeRobotDataset, Policy, cli
from wam_models.data import PatchPCA
from wam_models.data.latents import WanVAECodec
from wam_models.evaluate import Chunk, evaluate, mean_psnr
from wam_models.train import train

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("needs diffusers", allow_module_level=True)


@pytest.fixture(scope="module")
def wan(root, config, tmp_path_factory):
    """(clips, checkpoint folder) of one step."""
    torch.manual_seed(0)
    data = ClipDataset(root, WanVAECodec(tiny.wan_vae([0.1, -0.2, 0.3, 0.0], [1.5, 0.5, 2.0, 1.0])))
    config = replace(config, model=replace(config.model, latent_channels=4, patch=(1, 2, 2)), steps=1)
    out = tmp_path_factory.mktemp("wan")
    train(config, data, out=out, progress=False)
    return data, out / "checkpoint"


def test_a_clip_is_what_training_had(wan, root):
    data, folder = wan
    policy, _ = Policy.load(folder)
    assert isinstance(policy.codec, WanVAECodec)
    for episode in range(4):
        clip, whole = policy.clip(LeRobotDataset(root), episode), data.episode(episode)
        assert torch.equal(clip["video"], whole["video"])
        torch.testing.assert_close(clip["action"], whole["action"], atol=1e-6, rtol=0)
        assert len(clip["frames"]) == data.length(episode) == clip["video"].shape[2]
        np.testing.assert_array_equal(clip["frames"], LeRobotDataset(root).frames(episode, 4)[: data.length(episode)])


def test_it_is_evaluated_and_rolled_out(wan, root, tmp_path, capsys):
    _, folder = wan
    policy, _ = Policy.load(folder)
    clip = policy.clip(LeRobotDataset(root), 1)
    (row,) = evaluate(policy, [clip], cases=[("joint", "joint")], timed=1, progress=False).rows
    decoded = policy.codec.decode(clip["video"][0])[::4]
    assert row.ceiling_psnr == mean_psnr(clip["frames"][None, 3:], decoded[None, 3:])
    base = ["rollout", "--checkpoint", str(folder), "--data", str(root), "--out", str(tmp_path)]
    assert cli.main([*base, "--chunks", "1"]) == 0
    assert "dB PSNR" in capsys.readouterr().out
    assert {p.suffix for p in tmp_path.iterdir()} == {".gif", ".npz"}


def test_a_perfect_prediction_is_at_the_ceiling(wan, root, monkeypatch):
    """The pictures of a chunk are decoded behind the frames before it."""
    policy, _ = Policy.load(wan[1])

    def recorded(engine, video, action, text, *, begin, end=None, **_):
        for frame in range(begin, (end or video.shape[2]) - 1, 2):
            span = slice(frame, frame + 2)
            yield Chunk(frame, video[:, :, span], action[:, span], 0.1)

    monkeypatch.setattr("wam_models.evaluate.stream", recorded)
    clip = policy.clip(LeRobotDataset(root), 0)
    (row,) = evaluate(policy, [clip], cases=[("joint", "joint")], progress=False).rows
    assert row.psnr == pytest.approx(row.ceiling_psnr) and row.action_rmse == 0


class Own(PatchPCA):
    """A codec that nothing knows how to save."""


def test_a_codec_that_cannot_be_saved_is_refused_before_the_run(root, config, data, tmp_path):
    own = ClipDataset(root, Own.from_state_dict(data.codec.state_dict()))
    with pytest.raises(
        ValueError, match="a PatchPCA or a WanVAECodec or a StateCodec to be saved with a policy, got a Own"
    ):
        train(config, own, out=tmp_path / "out", progress=False, stop=pytest.fail)
    assert not (tmp_path / "out").exists()
    train(config, own, progress=False, stop=lambda: True)


def _edit(folder, change):
    settings = json.loads((folder / "config.json").read_text())
    change(settings["metadata"])
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(codec="wan"), r"config.json: metadata.codec must have a config and a kind .*, got 'wan'"),
        (lambda m: m["codec"].update(kind=["wan_vae"]), "config.json: metadata.codec must have a config and a kind"),
        (lambda m: m["codec"].update(kind="patch_pca"), "extra.safetensors: PatchPCA.from_state_dict: keys are"),
        (lambda m: m["codec"].update(config=None), "extra.safetensors: WanVAECodec: diffusers refuses the config"),
        (lambda m: m["codec"]["config"].update(dim_mult="x"), "extra.safetensors: WanVAECodec: diffusers refuses the"),
        (lambda m: m["codec"]["config"].update(z_dim=8), r"WanVAECodec: \d+ tensors are missing, .* of another shape"),
    ],
)
def test_a_damaged_description_is_refused(wan, tmp_path, change, message):
    folder = shutil.copytree(wan[1], tmp_path / "copy")
    _edit(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        Policy.load(folder)
    assert len(str(error.value)) < 1000


def test_what_is_missing_is_named(wan, monkeypatch, capsys):
    codec = wan[0].codec
    state = codec.state_dict()
    key = next(k for k in state if k.startswith("decoder"))
    for broken in ({k: v for k, v in state.items() if k != key}, {**state, key: state[key] * float("nan")}):
        with pytest.raises(ValueError, match=f"WanVAECodec: 1 tensors are missing, .* not finite .*{key}"):
            WanVAECodec.from_state_dict(broken, codec.config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="needs diffusers: pip install diffusers"):
        Policy.load(wan[1])
    assert cli.main(["rollout", "--checkpoint", str(wan[1]), "--data", "none"]) == 2
    assert "the Python package 'diffusers' is not installed" in capsys.readouterr().err
