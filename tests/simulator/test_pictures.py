"""Policies whose frames are pictures, from recording to acting: a drawn simulator, and Meta-World where it renders."""

import base64
import json
import re

import numpy as np
import pytest
from PIL import Image

from wam_models import cli
from wam_models.ablate.protocol import Arm, Protocol, Track
from wam_models.ablate.run import collect, read_track, run_all
from wam_models.ablate.units import EXPERT, SANITY
from wam_models.cli.pictures_demo import make_pictures_demo
from wam_models.data import ClipDataset, LeRobotDataset
from wam_models.simulator import load
from wam_models.simulator.process import SimulatorFailure, SimulatorProcess
from wam_models.simulator.record import RecordConfig
from wam_models.train.recipe import Recipe

from .conftest import EXAMPLES

DRAWN = "drawn:Drawn"
SIMULATOR = """
import numpy as np
from point_simulator import Point
from wam_models.simulator import Observation


class Drawn(Point):
    "The example with two cameras and words of its own; a file counts its pictures."

    instruction = "touch the mark"

    def state(self):
        return super().observe().state

    def observe(self):
        with open("pictures", "a") as file:
            file.write(".")
        picture = self.picture()
        return Observation(self.state(), {"top": picture, "side": picture[:, ::-1]})
"""
RECORD = ["record", "--simulator", DRAWN, "--episodes", "6", "--jobs", "1", "--size", "16", "--interrupted", "0"]


@pytest.fixture
def drawn(folder):
    (folder / "drawn.py").write_text(SIMULATOR)
    return folder


def counted(folder):
    """Pictures since the last call."""
    file = folder / "pictures"
    found = len(file.read_text()) if file.exists() else 0
    file.unlink(missing_ok=True)
    return found


def point_training(folder, **changes):
    """A training config: cells of 4 x 4 pixels, tokens of 2 x 2 cells, frames of 2 actions."""
    config = json.loads((EXAMPLES / "point_train.json").read_text()) | {"cell": 4, "steps": 2, "batch": 2} | changes
    config["model"] |= {"latent_channels": 8, "patch": [1, 2, 2]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


def train(folder, **changes):
    point_training(folder, **changes)
    flags = ["--data", "data", "config.json", "--out", "run", "--overwrite"]
    return cli.main(["train", *flags, "--camera", "observation.images.top"])


def test_two_cameras_slower_than_the_actions(drawn):
    assert cli.main([*RECORD, "--camera", "top", "--camera", "side", "--picture-every", "2", "--out", "data"]) == 0
    rendered = counted(drawn) - 1  # one to check the cameras
    top, side = (LeRobotDataset("data", f"observation.images.{camera}") for camera in ("top", "side"))
    assert top.picture_size == side.picture_size == (16, 16) and top.picture_every == 2
    assert rendered == sum(-(-e.length // 2) for e in top.episodes) < sum(e.length for e in top.episodes)
    point = load("point_simulator:Point")
    for episode in top.episodes:
        frames, state = top.frames(episode), top.state(episode)
        np.testing.assert_array_equal(side.frames(episode), frames[:, :, ::-1])
        assert len(state) == len(frames) and (state[0] != state[1]).any()  # of every action
        for t in range(len(frames)):
            point.point, point.target = state[t - t % 2].reshape(2, 2)  # the last picture is that of an even action
            np.testing.assert_array_equal(frames[t], point.picture())
    with pytest.raises(
        ValueError, match="has a picture of observation.images.top every 2 actions, expected a divisor of 3"
    ):
        ClipDataset(top, actions_per_frame=3)


def test_from_recording_to_acting(drawn, capsys):
    """Every command on pictures; each renders only the frames that it needs."""
    assert cli.main([*RECORD, "--camera", "top", "--picture-every", "2", "--out", "data"]) == 0
    assert list(LeRobotDataset("data").features)[-1] == "observation.images.top"
    assert train(drawn) == 0
    counted(drawn)
    flags = ["--checkpoint", "run/checkpoint", "--simulator", DRAWN, "--out", "eval"]
    assert cli.main(["eval", *flags, "--episodes", "3", "--keep-frames", "--chunk", "2", "--horizon", "9"]) == 0
    rows = [json.loads(line) for line in (drawn / "eval/episodes.jsonl").read_text().splitlines()]
    frames = [np.load(file)["frames"] for file in sorted((drawn / "eval/frames").rglob("*.npz"))]
    assert [row["actions"] // 2 + 1 for row in rows] == [len(f) for f in frames]  # the first, and one every 2 actions
    assert counted(drawn) == sum(map(len, frames)) and all(row["still_mse"] for row in rows)
    point = load("point_simulator:Point")
    point.reset(rows[0]["initial_state"])
    np.testing.assert_array_equal(frames[0][0], point.picture())
    assert np.load(drawn / "eval/frames/drawn+Drawn/00000.npz")["imagined"].shape[1:] == (2, 16, 16, 3)

    assert cli.main(["rollout", *flags, "--chunks", "2", "--program", "joint"]) == 0
    with Image.open(drawn / "eval/simulated_drawn+Drawn_joint_joint_seed0.gif") as film:
        assert film.n_frames == 5 and film.width > film.height  # what happened beside what was imagined
    assert f'simulator      {DRAWN}: "touch the mark"' in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--camera wrist", "its pictures are top (16 x 16), side (16 x 16), but --camera asks for wrist (16 x 16)"),
        ("--camera top --size 32", "but --camera asks for top (32 x 32); a simulator of MODULE:FACTORY decides itself"),
        ("--picture-every 2", "--picture-every needs --camera"),
    ],
)
def test_what_cannot_be_recorded_is_refused_at_once(flags, message, drawn, capsys):
    assert cli.main([*RECORD, *flags.split(), "--out", "data"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cell": 5}, "are 16 x 16, expected multiples of 5, the codec's cells"),
        ({"cell": 1}, "channels is 8, expected 1 to 3 for patches of 1"),
        ({"cell": 0}, "cell must be a whole number from 1"),
    ],
)
def test_a_codec_that_does_not_fit_is_refused(changes, message, drawn, capsys):
    if not (drawn / "data").exists():
        assert cli.main([*RECORD, "--camera", "top", "--out", "data"]) == 0
    assert train(drawn, **changes) == 2
    assert message in capsys.readouterr().err


def test_the_demo_of_pictures(drawn):
    """The page is one file; the demonstrations of a second demo are those of the first."""
    config = point_training(drawn)
    options = {"camera": ("top", 16), "episodes": 2, "horizon": 9, "progress": False}
    options |= {"config": Recipe.read(config).train, "recording": RecordConfig(episodes=3, picture_every=2)}
    report = make_pictures_demo(drawn / "demo", [DRAWN], **options)
    assert report["steps"] == 2 and [row["frame"] for row in report["imagined"]] == [1, 2]
    assert report["all"]["episodes"] == 2 and report["imagined"][0]["imagined"] > report["imagined"][0]["still"] >= 0
    page = (drawn / "demo/demo.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page
    film = base64.b64decode(re.findall(r"image/gif;base64,([^\"]+)", page)[0])
    assert film == (drawn / "demo/film0.gif").read_bytes()
    assert "Drawn, episode 1: fails: not done after 9 actions" in page and "are imagined worse" in page
    counted(drawn)
    made = (drawn / "demo/data/meta/info.json").stat().st_mtime_ns
    make_pictures_demo(drawn / "demo", [DRAWN], **options)
    assert (drawn / "demo/data/meta/info.json").stat().st_mtime_ns == made


def test_the_demo_of_pictures_records_its_own(folder, capsys):
    assert cli.main(["demo", "--pictures", "--data", "data"]) == 2
    assert "--data must be left out with --pictures" in capsys.readouterr().err


def test_an_ablation_on_pictures(drawn):
    """Every kind of unit; the expert's replay renders nothing."""
    training = json.loads(point_training(drawn).read_text())
    recording = {"episodes": 2, "interrupted": 0.0, "picture_every": 2}
    track = Track(
        name="pixels", simulators=(DRAWN,), camera="top", size=16, record=recording, training=training,
        settings=((2, 1),), episodes=1, horizon=9, batch=1,
    )  # fmt: skip
    run_all(drawn / "run", Protocol(suite="drawn", arms=(Arm(name="joint", program="joint"),), tracks=(track,)))
    assert read_track(drawn / "run", track).latent_shape == (8, 4, 4)
    rows, trainings = collect(drawn / "run")
    assert {row["arm"] for row in rows} == {"joint", *SANITY} and not any(row["broken"] for row in rows)
    assert all(len(row["imagined_mse"]) == 2 for row in rows if row["arm"] != EXPERT)
    assert [t["steps"] for t in trainings if t["arm"] == "joint"] == [2]


def test_metaworld_renders():
    """Where it can: the same picture again from a stored initial state, beside a process that renders nothing."""
    pytest.importorskip("metaworld", reason="an optional package")
    name, cameras = "metaworld/drawer-open-v3", {"behindGripper": (64, 64), "corner2": (32, 48)}
    with SimulatorProcess() as blind, SimulatorProcess(cameras) as process:
        blind.send("begin", name, 0)
        begun = blind.receive()
        assert begun.observation.pictures == {}
        found = []
        for _ in range(2):
            process.send("begin", name, begun.initial_state)
            try:
                found.append(process.receive().observation)
            except SimulatorFailure as failure:
                if "pictures need EGL" in str(failure):
                    pytest.skip(f"no renderer: {failure}")
                raise
    first, again = found
    np.testing.assert_array_equal(first.state, begun.observation.state)
    for camera, size in cameras.items():
        picture = first.pictures[camera]
        assert picture.shape == (*size, 3) and picture.std() > 10
        np.testing.assert_array_equal(picture, again.pictures[camera])
