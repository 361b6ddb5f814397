"""Another source of episodes than LeRobot's layout, and the units that are made of any."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data import tiny
from wam_models import LeRobotDataset
from wam_models.data import ClipDataset
from wam_models.data.clips import NORMALIZATIONS, units_of

EXAMPLE = Path(__file__).parents[2] / "examples/npz_source.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("npz_source", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_another_source_gives_the_same_clips(example, tmp_path):
    dataset = LeRobotDataset(tiny.write(tmp_path / "tiny"))
    (tmp_path / "npz").mkdir()
    for e in dataset.episodes:
        name = f"held_out{e.index}" if e.split == "held_out" else f"episode{e.index}"
        held = {"pictures": dataset.frames(e), "state": dataset.state(e), "action": dataset.action(e), "task": e.task}
        np.savez(tmp_path / "npz" / f"{name}.npz", **held)
    ours, theirs = ClipDataset(dataset, states=True), ClipDataset(example.NpzSource(tmp_path / "npz"), states=True)
    assert theirs.train == ours.train and theirs.held_out == ours.held_out and theirs.tasks == ours.tasks
    for i in range(4):
        found = theirs.episode(i)
        for name, value in ours.episode(i).items():
            assert torch.equal(value, found[name]), name
    assert len(EXAMPLE.read_text().splitlines()) < 100
    with pytest.raises(ValueError, match="holds no .npz files"):
        example.NpzSource(tmp_path)


def test_units_are_what_their_names_say():
    values = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([2.0, 5.0, 0.0]) + 3
    scaled = {kind: (values - m) / s for kind in NORMALIZATIONS for m, s, _ in [units_of(values, kind)]}
    assert torch.equal(scaled["none"], values)
    torch.testing.assert_close(scaled["mean_std"][:, :2].std(0, correction=0), torch.ones(2))
    torch.testing.assert_close(scaled["min_max"][:, :2].aminmax(dim=0)[1], torch.ones(2))
    outside = (scaled["quantile"][:, :2].abs() > 1 + 1e-5).float().mean(0)
    assert (outside - 0.02).abs().max() < 2e-3
    for kind in NORMALIZATIONS:  # what never varies stays finite, and is known
        assert scaled[kind][:, 2].isfinite().all() and units_of(values, kind)[2].tolist() == [True, True, False]


def test_units_are_saved_with_the_policy(tmp_path):
    root = tiny.write(tmp_path / "tiny")
    data = ClipDataset(root, normalization="min_max")
    actions = torch.cat([data.episode(i)["action"][0, 1:].flatten(0, 1) for i in data.train])
    low, high = actions[:, ~data.constant_actions].aminmax(dim=0)
    assert (low >= -1 - 1e-5).all() and (high <= 1 + 1e-5).all() and high.max() > 0.99
    back = data.denormalize_action(torch.from_numpy(data.clip(0, 1, 2)["action"][1]))
    torch.testing.assert_close(back, torch.from_numpy(tiny.actions(0)[4:8]), atol=1e-3, rtol=1e-4)
    with pytest.raises(ValueError, match="normalization must be one of"):
        ClipDataset(root, normalization="z-score")
