"""The data sets that ship: each folder of ``data`` has a README, a script that makes it, and what is listed here."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from wam_models.data import LeRobotDataset

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Shipped:
    script: str  # that makes it, named by its README
    requirements: str  # of the script, pinned
    train: int  # episodes
    held_out: int
    frames: int  # of all episodes
    tasks: int
    fps: float
    pictures: tuple[int, int]  # height, width
    action: int  # numbers
    state: int
    megabytes: float  # at most


SHIPPED = {
    "libero_demo": Shipped(
        script="tools/data/make_libero_demo.py",
        requirements="requirements/libero.txt",
        train=40,
        held_out=11,
        frames=9281,
        tasks=11,
        fps=20,
        pictures=(128, 256),
        action=7,
        state=8,
        megabytes=10,
    ),
    "metaworld_demo": Shipped(
        script="wam_models/cli/record.py",
        requirements="requirements/runtime.txt",
        train=313,
        held_out=22,
        frames=17837,
        tasks=4,
        fps=80,
        pictures=(1, 1),
        action=4,
        state=17,
        megabytes=2,
    ),
}
each = pytest.mark.parametrize("name", SHIPPED)


def test_every_folder_is_listed():
    assert sorted(path.name for path in (ROOT / "data").iterdir() if path.is_dir()) == sorted(SHIPPED)


@each
def test_how_it_was_made(name):
    expected = SHIPPED[name]
    readme = (ROOT / "data" / name / "README.md").read_text()
    assert expected.script in readme and (ROOT / expected.script).is_file()
    pinned = [line for line in (ROOT / expected.requirements).read_text().splitlines() if line and line[0] not in "#-"]
    assert pinned and all("==" in line or " @ " in line for line in pinned)
    for count in (expected.train + expected.held_out, expected.frames):
        assert str(count) in readme


@each
def test_counts_and_splits(name):
    expected, dataset = SHIPPED[name], LeRobotDataset(ROOT / "data" / name)
    splits = [episode.split for episode in dataset.episodes]
    assert (splits.count("train"), splits.count("held_out")) == (expected.train, expected.held_out)
    assert len(splits) == expected.train + expected.held_out
    assert sum(episode.length for episode in dataset.episodes) == expected.frames
    assert (dataset.fps, dataset.picture_size) == (expected.fps, expected.pictures)
    tasks = {split: {e.task for e in dataset.episodes if e.split == split} for split in ("train", "held_out")}
    assert len(tasks["train"]) == expected.tasks and tasks["held_out"] <= tasks["train"]
    info = json.loads((dataset.root / "meta/info.json").read_text())
    assert (info["total_frames"], info["total_tasks"]) == (expected.frames, expected.tasks)
    assert sum(f.stat().st_size for f in dataset.root.rglob("*") if f.is_file()) < expected.megabytes * 1e6


@each
def test_units(name):
    """Every action and state, in the units that meta/stats.json states."""
    expected, dataset = SHIPPED[name], LeRobotDataset(ROOT / "data" / name)
    for read, feature, width in (
        (dataset.action, "action", expected.action),
        (dataset.state, "observation.state", expected.state),
    ):
        values = np.concatenate([read(episode) for episode in dataset.episodes])
        assert values.shape == (expected.frames, width) and np.isfinite(values).all()
        stats = dataset.stats[feature]
        np.testing.assert_allclose(values.min(0), stats["min"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(values.max(0), stats["max"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(values.astype(np.float64).mean(0), stats["mean"], rtol=1e-4, atol=1e-5)
