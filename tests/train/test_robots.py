"""Robots of several widths in one training: each in its own units, none touched by what the others have besides."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.train.conftest import TINY, TINY_MODEL
from wam_models import Policy, WorldActionModel, cli
from wam_models.cli.train import read_data
from wam_models.data.config import DataConfig
from wam_models.rollout.robot import Robot, model_of
from wam_models.text import WordEmbedding
from wam_models.train import TrainConfig, train
from wam_models.train.samples import StepConfig
from wam_models.train.step import training_step

CONFIG = TrainConfig.from_dict(
    TINY
    | {
        "model": TINY_MODEL | {"state_dim": 8},
        "batch": 4,
        "steps": 3,
        "schedule": "constant",
        "mixture": {"joint": 1.0},
    }
)


@pytest.fixture(scope="module")
def sets(root, tmp_path_factory):
    """The tiny data set, and one with four numbers of an action, ten times as large, and three of a state."""
    folders = []
    for name, widths, factor in (("wide", (7, 8), 1.0), ("narrow", (4, 3), 10.0)):
        folders.append(shutil.copytree(root, tmp_path_factory.mktemp("robots") / name))
        columns = dict(zip(("action", "observation.state"), widths, strict=True))
        for path in (folders[-1] / "data").rglob("*.parquet"):
            table = pq.read_table(path)
            for column, width in columns.items():
                values = np.stack(table[column].to_numpy())[:, :width] * (factor if column == "action" else 1)
                held = pa.array(values.tolist(), pa.list_(pa.float32()))
                table = table.set_column(table.column_names.index(column), column, held)
            pq.write_table(table, path)
        path = folders[-1] / "meta/info.json"
        info = json.loads(path.read_text())
        info["features"] |= {column: {"dtype": "float32", "shape": [width]} for column, width in columns.items()}
        path.write_text(json.dumps(info))
    return (
        DataConfig(path=str(folders[0]), robot="wide"),
        DataConfig(path=str(folders[1]), robot="narrow", normalization="min_max"),
    )


@pytest.fixture(scope="module")
def both(sets):
    return read_data(sets, CONFIG, progress=False)


def test_each_robot_has_its_own_units(sets, both):
    alone = [read_data([replace(one, robot=None)], narrower(one), progress=False) for one in sets]
    masks = [both.clip(i, 0, 3)["action_mask"] for i in (0, 4)]
    assert masks[0].all() and masks[1].tolist() == [True] * 4 + [False] * 3
    for i, (own, first) in enumerate(zip(alone, (0, 4), strict=True)):
        width, states = own.own_widths
        for episode in range(4):
            a, b = own.clip(episode, 0, 5), both.clip(first + episode, 0, 5)
            np.testing.assert_array_equal(a["action"], b["action"][..., :width])
            np.testing.assert_array_equal(a["state"], b["state"][..., :states])
            assert not b["action"][..., width:].any() and not b["state"][..., states:].any(), i


def narrower(one):
    model = CONFIG.model if one.robot == "wide" else replace(CONFIG.model, action_dim=4, state_dim=3)
    return replace(CONFIG, model=model)


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_model_of_a_robot_is_the_model_on_what_it_has(tokens):
    """On what a training step gives the model of a clip of the narrow robot."""
    torch.manual_seed(0)
    big = replace(CONFIG.model, action_dim=3 * tokens, actions_per_frame=4 // tokens, state_dim=5)
    model = WorldActionModel(big)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    units = torch.zeros(2), torch.ones(2), torch.ones(2, dtype=torch.bool)
    small = model_of(Robot(*units, (torch.zeros(3), torch.ones(3)), {}), model, tokens)
    assert small.config.action_dim == 2 * tokens and small.config.state_dim == 3
    mask = torch.tensor([True, True, False] * tokens)
    state = torch.randn(2, 4, 5)
    state[..., 3:] = 0
    batch = {"video": torch.randn(2, 48, 4, 2, 4), "text": torch.randn(2, 3, 8), "state": state}
    batch |= {"action": torch.randn(2, 4, 4 // tokens, 3 * tokens) * mask, "action_mask": mask.repeat(2, 1)}
    given = []
    hook = model.register_forward_pre_hook(lambda module, args, more: given.append((args, more)), with_kwargs=True)
    config = StepConfig(program="joint", chunk_sizes=(2, 2), windows=(8, 8))
    training_step(model, batch, torch.Generator().manual_seed(0), config)
    hook.remove()
    (args, more), flows = given[0], model(*given[0][0], **given[0][1])
    assert not args[2][..., ~mask].any() and args[2][..., mask].any()
    args = [*args[:2], args[2][..., mask], args[3][..., mask], *args[4:]]
    video, action, *_ = small(*args, **{**more, "state": more["state"][..., :3]})
    torch.testing.assert_close(video, flows[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(action, flows[1][..., mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [0, 400])
def test_what_a_robot_lacks_has_no_part_in_its_loss(tokens, both):
    """Other weights of the numbers that the narrow robot lacks: the same losses, where it alone is drawn."""
    both._weights, kept = [1e-12, 1.0], both._weights
    try:
        config = replace(CONFIG, tokens=tokens, steps=1)
        losses = []
        for change in (0.0, 3.0):
            torch.manual_seed(1)
            weights = {k: torch.randn_like(v) * 0.1 for k, v in WorldActionModel(config.model).state_dict().items()}
            weights["action_expert.action_embedder.weight"][:, 4:] += change
            weights["action_expert.action_proj_out.weight"][4:] += change
            weights["core.proprio_hidden_context_encoder.proj.weight"][:, 3:] += change
            losses.append(train(config, both, init=weights, progress=False).log[0]["loss"])
        assert losses[0] == losses[1]
    finally:
        both._weights = kept


def test_a_training_of_two_robots_by_its_config(sets, tmp_path, capsys, monkeypatch):
    config, out = tmp_path / "config.json", tmp_path / "run"
    values = CONFIG.to_dict() | {"data": [one.to_dict() for one in sets], "out": str(out)}
    config.write_text(json.dumps(values))
    assert cli.main(["validate", str(config)]) == 0
    assert cli.main(["train", str(config), "--eval-every", "3", "--eval-chunk", "1"]) == 0, capsys.readouterr().err
    checkpoint = out / "checkpoint"
    wide, narrow = (Policy.load(checkpoint, robot=name)[0] for name in (None, "narrow"))
    assert wide.model.config.action_dim == 7 and narrow.model.config.action_dim == 4
    assert narrow.state_units[0].shape == (3,) and narrow.action_std[0] > 5 * wide.action_std[0]
    flags = ["rollout", "--checkpoint", str(checkpoint), "--data", sets[1].path, "--chunks", "1"]
    assert cli.main([*flags, "--robot", "narrow"]) == 0
    server, served = pytest.importorskip("wam_models.serve", reason="an extra of wam serve").PolicyServer, []
    monkeypatch.setattr(server, "run", lambda server: served.append(server.robots.policy))
    for robot in (["--robot", "narrow"], []):
        assert cli.main(["serve", "--checkpoint", str(checkpoint), "--port", "0", *robot]) == 0
    assert [len(policy.action_mean) for policy in served] == [4, 7]
    for wrong, message in ((["--robot", "none"], "must be one of"), ([], "actions have 4 numbers, those of the")):
        assert cli.main([*flags, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["train", str(config), "--resume", str(checkpoint), "--steps", "5"]) == 0
    whole = train(replace(CONFIG, steps=5), read_data(sets, CONFIG, progress=False), progress=False)
    logged = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert logged == [row["loss"] for row in whole.log]
    assert isinstance(whole.policy.text, WordEmbedding) and list(whole.policy.robots) == ["wide", "narrow"]
    values["data"][1]["robot"] = None
    config.write_text(json.dumps(values))
    assert cli.main(["train", str(config), "--overwrite"]) == 2
    assert "data: robot must be given of all data sets or of none, got" in capsys.readouterr().err
