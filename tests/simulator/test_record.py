"""Data sets from experts: the same again from a seed, in any number of processes, after any interruption."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from wam_models import cli
from wam_models.data import LeRobotDataset
from wam_models.simulator import record as record_module
from wam_models.simulator.record import RecordConfig, record

POINT = "point_simulator:Point"
CONFIG = RecordConfig(episodes=3, held_out=1, interrupted=1.0, interrupt_after=(3, 5), start=(0, 2), tail=2)
HALF = """
from point_simulator import Point
from wam_models.simulator import Outcome

class Half(Point):
    "Its expert succeeds from half of the initial states, at once."

    def act(self, action):
        return Outcome(self.target[0] > 0, None if self.target[0] > 0 else "unlucky")

class Never(Half):
    def act(self, action):
        return Outcome(False, "unlucky")

class Camera(Point):
    def observe(self):
        from wam_models.simulator import Observation
        return Observation(super().observe().state, {"top": self.picture()})

class Slow(Point):
    control_freq = 7.5
"""


@pytest.fixture
def recorded(folder):
    assert record(folder / "data", [POINT], CONFIG, jobs=2) == {POINT: (4, 4)}
    (folder / "others.py").write_text(HALF)
    return folder / "data"


def contents(root):
    return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()}


def test_only_the_expert_is_recorded(recorded):
    data = LeRobotDataset(recorded)
    assert data.has_states_as_frames and data.fps == 20 and {e.task for e in data.episodes} == {"reach the target"}
    assert len(data.episodes) > 4 and {e.split for e in data.episodes} == {"train", "held_out"}
    for episode in data.episodes:
        state, action = data.state(episode), data.action(episode)
        expert = np.clip((state[:, 2:] - state[:, :2]) / 0.1, -1, 1)  # of the state before each action
        np.testing.assert_allclose(action, expert, atol=1e-5)
    table = pq.read_table(recorded / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["wam/piece"] for row in table if row["wam/attempt"] == 0] == [0, 1]
    starts = [json.loads(row["wam/initial_state"])["point"] for row in table]
    assert len({tuple(start) for start in starts}) == 4
    stats = json.loads((recorded / "meta/stats.json").read_text())
    states = np.concatenate([data.state(e) for e in data.episodes])
    np.testing.assert_allclose(stats["observation.state"]["mean"], states.mean(0), rtol=1e-5)


def test_the_same_again_after_a_kill(recorded, monkeypatch):
    again, stored = recorded.with_name("again"), []
    store = record_module.store_attempt

    def killed(*args):
        store(*args)
        stored.append(args[0])
        if len(stored) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(record_module, "store_attempt", killed)
    with pytest.raises(KeyboardInterrupt):
        record(again, [POINT], CONFIG, jobs=2)
    assert not again.exists()
    record(again, [POINT], CONFIG, jobs=1)
    assert len(set(stored)) == len(stored) == 4  # the two attempts that were done were not done again
    assert contents(again) == contents(recorded)
    assert not again.with_name("again.attempts").exists()


def test_attempts_that_fail_are_left_out(recorded):
    rates = record(recorded.with_name("half"), ["others:Half"], RecordConfig(episodes=5, start=(0, 0)), jobs=2)
    assert rates["others:Half"][0] == 5 < rates["others:Half"][1]
    with pytest.raises(ValueError, match="others:Never: its expert succeeded in 0 of 5 attempts, too few"):
        record(recorded.with_name("never"), ["others:Never"], RecordConfig(episodes=1), jobs=1)


def test_pictures(recorded):
    camera = recorded.with_name("camera")
    record(camera, ["others:Camera"], RecordConfig(episodes=1), jobs=1)
    data = LeRobotDataset(camera)
    assert data.camera == "observation.images.top" and data.picture_size == (16, 16)
    frames, state = data.frames(0, 2), data.state(0)[::2]
    assert frames.dtype == np.uint8 and len(frames) == len(state)
    column, row = ((np.clip(state[1, :2], -1, 1) + 1) / 2 * 15).round().astype(int)
    assert frames[1, row, column].tolist() == [200, 0, 0]
    as_states = LeRobotDataset(camera, "observation.state")
    np.testing.assert_array_equal(as_states.frames(0), as_states.state(0))


def test_the_rate_is_that_of_the_simulator(recorded):
    slow = recorded.with_name("slow")
    record(slow, ["others:Slow"], RecordConfig(episodes=1, interrupted=0.0), jobs=1)
    assert LeRobotDataset(slow).fps == 7.5
    times = pq.read_table(slow / "data/chunk-000/file-000.parquet")["timestamp"].to_numpy()
    np.testing.assert_allclose(np.diff(times), 1 / 7.5, rtol=1e-4)


@pytest.mark.parametrize(
    "flags, message",
    [
        (f"--simulator {POINT} --out data", "exists; name another folder, or replace it with --overwrite"),
        ("--simulator broken:NoExpert --out new", "broken:NoExpert has no expert to record"),
        (
            f"--simulator {POINT} --simulator others:Slow --out new",
            "control_freq must be that of point_simulator",
        ),
        (
            "--simulator others:Nothing --out new",
            "others:Nothing failed: ValueError: --simulator others:Nothing",
        ),
        (f"--simulator {POINT} --out new --interrupted 2", "interrupted must be a number from 0 to 1, got 2"),
    ],
)
def test_mistakes_are_one_line(flags, message, recorded, capsys):
    assert cli.main(["record", *flags.split(), "--jobs", "1"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_attempts_of_other_settings_are_not_mixed(recorded, capsys):
    new = recorded.with_name("new")
    new.with_name("new.attempts").mkdir()
    (new.with_name("new.attempts") / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="new.attempts holds attempts of other settings"):
        record(new, [POINT], CONFIG, jobs=1)
    flags = ["--simulator", POINT, "--out", str(new), "--episodes", "1", "--overwrite"]
    assert cli.main(["record", *flags]) == 0
    assert "1 of 1 attempts" in capsys.readouterr().out
