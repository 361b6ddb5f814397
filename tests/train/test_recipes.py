"""Configs from files and the command line, the recipes of the repository, and what ``wam validate`` finds."""

import json
from pathlib import Path

import pytest

from wam_models import cli
from wam_models.config import TOPOLOGIES
from wam_models.objectives import GJD, GJD_MIXTURE, MODEL_PROGRAMS
from wam_models.runtime.config_files import read_config, with_settings
from wam_models.train.recipe import Recipe, recipe_faults

from .conftest import TINY

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.toml")), ids=lambda p: str(p.relative_to(RECIPES)))
def test_every_recipe_is_one(path):
    assert Recipe.read(path).train.steps


def test_libero_has_every_program_in_both_topologies():
    for base, topology in (("libero", "dual_expert"), ("libero_parallel_stream", "parallel_stream")):
        assert topology in TOPOLOGIES
        common = Recipe.read(RECIPES / f"{base}.toml").train
        assert {p.stem for p in (RECIPES / base).iterdir()} == set(MODEL_PROGRAMS)
        for name in MODEL_PROGRAMS:
            found = Recipe.read(RECIPES / base / f"{name}.toml").train
            assert found.model == common.model and found.model.topology == topology
            assert found.programs == ("joint" if name == GJD else name,)
            assert found.mixture == (dict(GJD_MIXTURE) if name == GJD else {"joint": 1.0})
            assert found.learning_rate == 1e-5 and found.windows == (4, 64)


def test_a_config_extends_another(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "base.json").write_text(
        json.dumps({"steps": 5, "model": {"layers": 2, "hidden": 64}, "windows": [4, 8]})
    )
    (tmp_path / "middle.toml").write_text('extends = "base.json"\nsteps = 6\n[model]\nlayers = 3\n')
    (tmp_path / "below/top.toml").write_text('extends = "../middle.toml"\nwindows = [2, 4]\n')
    expected = {"steps": 6, "model": {"layers": 3, "hidden": 64}, "windows": [2, 4]}
    assert read_config(tmp_path / "below/top.toml") == expected
    (tmp_path / "base.json").write_text('{"extends": "middle.toml"}')
    for name, text, message in (
        ("below/top.toml", None, "base.json|middle.toml.*: extends itself"),
        ("a.toml", "steps = ", "a.toml: not valid TOML"),
        ("a.toml", "extends = 3", "a.toml: extends must be the name of a config"),
        ("a.json", "[]", "a.json: must be an object"),
        ("a.yaml", "", "a.yaml: a config must be a .toml or a .json file"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path / name)


def test_settings_are_typed():
    held = {"model": {"layers": 2}, "data": [{"path": "a"}, {"path": "b"}], "schedule": "decay"}
    settings = [
        "model.layers=4", "model.hidden = 64", "learning_rate=1e-4", "schedule=cosine", "data.1.path=c",
        'programs=["joint"]', "mixture={joint = 1}", "out=a=b", "mixture.joint=2",
    ]  # fmt: skip
    assert with_settings(held, settings) == {
        "model": {"layers": 4, "hidden": 64},
        "learning_rate": 1e-4,
        "schedule": "cosine",
        "data": [{"path": "a"}, {"path": "c"}],
        "programs": ["joint"],
        "mixture": {"joint": 2},
        "out": "a=b",
    }
    assert held["model"] == {"layers": 2}
    for setting, message in (
        ("steps", "--set must be NAME=VALUE"),
        ("=3", "--set must be NAME=VALUE"),
        ("schedule.x=3", "--set schedule.x: there is no x in 'decay'"),
        ("data.2.path=c", "--set data.2.path: 2 must be a place from 0 to 1"),
        ("programs=[joint", "not valid TOML"),
    ):
        with pytest.raises(ValueError, match=message):
            with_settings(held, [setting])


def test_an_unknown_name_is_refused_with_a_near_one():
    for values, message in (
        ({"stpes": 3}, r"unknown fields \['stpes'\] \(is steps meant\?\)"),
        ({"ouut": "x", "stpes": 3}, r"\(for ouut out, stpes steps\?\)"),
        ({"model": {"hiden": 3}}, r"model: unknown fields \['hiden'\] \(is hidden meant\?\)"),
        ({"data": {"pth": "x"}}, r"data: unknown fields \['pth'\], missing fields \['path'\] \(is path meant\?\)"),
        ({"out": 3}, "Recipe: out must be text, got 3"),
        ({"data": []}, "data must have at least one data set"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe.from_dict(values)


def test_all_faults_are_found_at_once():
    model = {"layers": 0, "head_dim": 7, "topology": "tripod"}
    wrong = {"stpes": 1, "batch": "x", "frames": 1, "data": [{"path": "", "weight": -1}], "seed": -1, "model": model}
    found = recipe_faults(wrong, "here")
    named = ("stpes", "path", "weight", "layers", "head_dim", "topology", "batch", "frames", "seed")
    assert len(found) == len(named)
    for name, fault in zip(named, found, strict=True):
        assert fault.startswith("here: ") and name in fault
    # what is wrong between fields that are right
    streams = {"topology": "parallel_stream", "hidden": 64, "action_hidden": 32}
    assert [f for f in recipe_faults({"model": streams}, "here") if "must have the width" in f]
    assert recipe_faults({"model": {"layers": 1}, "steps": 3, "data": "x"}, "here") == []


def test_validate_looks_at_the_config_the_data_and_the_machine(root, tmp_path, capsys):
    config = tmp_path / "config.toml"
    config.write_text(f'data = "{root}"\nout = "{tmp_path}/run"\nframes = 5\n')
    assert cli.main(["validate", str(config)]) == 0
    printed = capsys.readouterr().out
    assert "3 episodes of 60 frames to train on" in printed and "parameters" in printed and "GB a step" in printed
    (tmp_path / "file").touch()
    for flags, messages in (
        (["--set", "frames=9", "--set", "model.action_dim=6", "--device", "toaster", "--out", str(tmp_path / "file")], [
            "--device must be cpu", "--out must be a folder", "model.action_dim must be 7, got 6",
            "frames must be at most 6",
        ]),
        (["--set", "stpes=3", "--set", "batch=0"], ["unknown fields ['stpes'] (is steps meant?)", "batch must be"]),
        (["--data", str(tmp_path / "none"), "--set", "init=none"], ["none/meta/info.json: not", "there is no none"]),
        (["--set", "cell=12", "--set", "data.camera=x"], ["features has no camera 'x'"]),
        (["--set", "cell=12"], ["rows of pictures must be a multiple of cell x patch, 12 x 2, got 32", "columns"]),
        (["--set", "batch=1000000"], ["a step needs"]),
    ):  # fmt: skip
        assert cli.main(["validate", str(config), *flags]) == 2
        err = capsys.readouterr().err
        assert err.endswith(f"{len(messages)} fault{'s' * (len(messages) > 1)}\n"), err
        assert all(m in line for m, line in zip(messages, err.splitlines(), strict=False)), err
    assert not (tmp_path / "run").exists()


def test_flags_come_before_the_recipe(root, tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY | {"data": "nowhere", "out": "nowhere", "seed": 5, "steps": 2}))
    flags = ["--data", str(root), "--out", str(tmp_path / "run"), "--set", "model.layers=2"]
    assert cli.main(["train", str(config), *flags]) == 0
    saved = json.loads((tmp_path / "run/checkpoint/config.json").read_text())
    assert saved["metadata"]["training"]["seed"] == 5 and saved["model"]["layers"] == 2
    capsys.readouterr()
    for flags, message in (([], "--data must be given, or data in CONFIG"), (["--data", "x"], "--out must be given")):
        assert cli.main(["train", *flags]) == 2
        assert message in capsys.readouterr().err
