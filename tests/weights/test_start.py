"""Weights to start from: an action expert made of the video's, as OpenWAM makes it, and ``wam train --init``."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.data import tiny
from tests.train.conftest import TINY
from wam_models import ClipDataset, WorldActionModel, save_checkpoint, sizes_from, weights_from, weights_to
from wam_models.cli import main
from wam_models.train import TrainConfig
from wam_models.train.trainer import Trainer
from wam_models.weights.convert import shapes_of
from wam_models.weights.start import action_from_video, initial_weights

CONFIG = TrainConfig.from_dict(TINY)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("start") / "tiny")


def model_like(config, seed=0):
    torch.manual_seed(seed)
    return WorldActionModel(config)


@pytest.mark.parametrize("how, action_hidden", [("copy", 32), ("interpolate", 16), ("interpolate", 48)])
def test_an_action_expert_of_the_video_s_weights_is_openwam_s(how, action_hidden):
    pytest.importorskip("open_wam", reason="openwam is in requirements/test.txt")
    from bench.workloads.openwam_models import build

    policy = {"action_expert_init_mode": f"video_weight_{how}", "action_hidden_size": action_hidden}
    policy["action_ffn_dim"] = 2 * action_hidden
    theirs = build("dual_expert", "joint", hidden=32, heads=4, layers=2, ffn=64, policy=policy).state_dict()
    config = sizes_from("openwam", theirs, head_dim=8, actions_per_frame=2)
    state = weights_from("openwam", theirs, config).state
    made = action_from_video({name: value for name, value in state.items() if "action" not in name}, config, how)
    assert len(made) == 2 * 27 + 7
    for name, value in made.items():
        torch.testing.assert_close(value, state[name], rtol=1e-6, atol=1e-7)
    if action_hidden != 32:
        with pytest.raises(ValueError, match="experts of other sizes are made with 'interpolate'"):
            action_from_video(state, config, "copy")


def test_what_an_action_expert_cannot_be_made_of_is_named():
    config = CONFIG.model
    with pytest.raises(ValueError, match="state lacks .*video_block"):
        action_from_video({"core.scale_shift_table": torch.zeros(1, 2, 32)}, config, "copy")
    with pytest.raises(ValueError, match="how must be one of"):
        action_from_video({}, config, "resize")


def test_training_starts_from_a_checkpoint_or_from_other_weights(root, tmp_path):
    data, model = ClipDataset(root), model_like(CONFIG.model)
    save_checkpoint(tmp_path / "ours", model)
    theirs = weights_to("diffusers", model.state_dict(), CONFIG.model, without=["action"])
    save_file(theirs, tmp_path / "video.safetensors")

    def started(**options):
        init = initial_weights(options.pop("path"), CONFIG.model, **options)
        trainer = Trainer(CONFIG, data, seed=5, device=torch.device("cpu"), init=init)
        return trainer.model.state_dict(), trainer.average

    state, average = started(path=tmp_path / "ours")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert torch.equal(average["model.core.proj_out.weight"], model.core.proj_out.weight)
    fresh = Trainer(CONFIG, data, seed=5, device=torch.device("cpu")).model.state_dict()
    state, _ = started(path=tmp_path / "video.safetensors", layout="diffusers")
    for name, value in state.items():
        own = "action" in name
        assert torch.equal(value, (fresh if own else model.state_dict())[name]), name
    state, _ = started(path=tmp_path / "video.safetensors", layout="diffusers", action="copy")
    block = "packed_block_stack.packed_blocks.0.{}.ffn.net.2.weight"
    assert torch.equal(state[block.format("action_block")], state[block.format("video_block")])


def test_weights_that_do_not_fit_are_named(root, tmp_path):
    other = replace(CONFIG.model, ffn=64)
    save_checkpoint(tmp_path / "ours", WorldActionModel(other))
    with pytest.raises(ValueError, match=r"the model in .* has other sizes than the config, as of .*ffn.net.0.proj"):
        initial_weights(tmp_path / "ours", CONFIG.model)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is no checkpoint of wam train; say whose keys it has"):
        initial_weights(tmp_path / "a.safetensors", CONFIG.model)
    with pytest.raises(ValueError, match="unexpected keys"):
        initial_weights(tmp_path / "a.safetensors", CONFIG.model, layout="openwam")
    arguments = {"seed": 0, "device": torch.device("cpu")}
    with pytest.raises(ValueError, match=r"init holds keys that the model does not have: \['a'\]"):
        Trainer(CONFIG, ClipDataset(root), init={"a": torch.zeros(1)}, **arguments)
    name, shape = next(iter(shapes_of(CONFIG.model).items()))
    with pytest.raises(ValueError, match=f"{name} must hold finite numbers"):
        Trainer(CONFIG, ClipDataset(root), init={name: torch.full(shape, float("nan"))}, **arguments)


def test_wam_train_init(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    theirs = weights_to("openwam", model_like(CONFIG.model).state_dict(), CONFIG.model)
    save_file(theirs, tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"steps": 1}))
    command = ["train", "--data", str(root), str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]
    init = ["--init", str(tmp_path / "w.safetensors"), "--init-layout", "openwam"]
    assert main([*command, *init]) == 0
    assert main([*command, "--overwrite", "--init-layout", "openwam"]) == 2
    assert "--init-layout must be left out without --init" in capsys.readouterr().err
    resume = ["train", "--data", str(root), "--out", str(tmp_path / "run"), "--steps", "2"]
    assert main([*resume, "--resume", str(tmp_path / "run" / "checkpoint"), *init]) == 2
    assert "--init cannot be given with --resume" in capsys.readouterr().err
