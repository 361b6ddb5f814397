"""``wam demo``: training on the shipped Meta-World demonstrations, acting, and the page; without a renderer."""

import base64
import json
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wam_models.cli.closed_loop_demo import (
    SIMULATORS,
    bounds,
    demo_training,
    films,
    horizons,
    make_closed_loop_demo,
)
from wam_models.cli.closed_loop_page import weaknesses
from wam_models.simulator.evaluate import EpisodeResult
from wam_models.train import TrainConfig

ROOT = Path(__file__).parents[2]
DATA = ROOT / "data/metaworld_demo"


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """(folder, report) of two steps of training and one short episode."""
    out = tmp_path_factory.mktemp("out") / "demo"
    config = replace(demo_training(), steps=2, batch=4, warmup=1)
    return out, make_closed_loop_demo(out, DATA, SIMULATORS[2:3], config=config, episodes=1, horizon=20, progress=False)


def test_the_report(tiny_run):
    out, report = tiny_run
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["steps"] == 2 and report["all"]["episodes"] == 1 and not report["episodes"][0]["broken"]
    assert [(row["frame"], row["chunks"]) for row in report["imagined"]] == [(1, 3), (2, 2)]  # 20 actions are 5 frames
    assert not report["bounds"]["at least four of five new episodes succeed"]
    assert [row["objective"] for row in report["dynamics"]["rows"]] == ["forward_dynamics", "inverse_dynamics"]


def test_the_page_is_one_file_that_says_what_is_not_good(tiny_run):
    out, report = tiny_run
    page = (out / "demo.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page
    pictures = re.findall(r"src=\"data:image/png;base64,([^\"]+)", page)
    assert [base64.b64decode(p) for p in pictures] == [(out / f"{n}.png").read_bytes() for n in ("loss", "masks")]
    (film,) = json.loads(re.search(r"const FILMS = (\[.*?\]);\n?", page)[1])
    assert "<h3>button-press-topdown-v3, episode 0: fails: not done after 20 actions</h3>" in page
    sizes = [Image.open(BytesIO(base64.b64decode(frame))).size for frame in film]
    assert sizes == [(880, 400)] * 6
    found = weaknesses(report)
    assert "metaworld/button-press-topdown-v3, episode 0 fails: not done after 20 actions." in found
    assert sum("Not kept" in sentence for sentence in found) == sum(not kept for kept in report["bounds"].values())


def test_a_demo_is_run_again_over_a_demo_alone(tiny_run, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="holds a run"):
        make_closed_loop_demo(tmp_path, DATA, progress=False)


def test_horizons_are_distances_in_millimetres():
    """Two chunks of two frames, the second cut short: hand and object move 1 cm a frame, imagined 3 mm too high."""
    frames = [np.zeros(17, np.float32) for _ in range(4)]
    for t, frame in enumerate(frames):
        frame[0] = frame[4] = 0.01 * t
    imagined = [np.stack(frames[1:3]).copy(), np.stack([frames[3], frames[3]]).copy()]
    for chunk in imagined:
        chunk[:, 2] += 0.003
    result = EpisodeResult("metaworld/reach-v3", 0, 0, frames=frames, imagined=imagined)
    first, second = horizons([result], 2)
    assert (first["chunks"], second["chunks"]) == (2, 1)
    assert first["hand_imagined"] == pytest.approx(3, rel=1e-4) and first["object_imagined"] == 0
    assert first["path_imagined"] == pytest.approx(1.5, rel=1e-4)
    assert first["path_still"] == pytest.approx(10, rel=1e-4) and second["path_still"] == pytest.approx(20, rel=1e-4)
    (film,) = films([result], ["metaworld/reach-v3"])
    assert len(film["frames"]) == 4 and film["title"] == "reach-v3, episode 0"
    with pytest.raises(ValueError, match="no episode reached frame 1"):
        horizons([], 2)


def test_bounds_follow_the_numbers():
    good = {"path_imagined": 1, "path_still": 2}
    report = {
        "all": {"successes": 16, "episodes": 20},
        "imagined": [good, good],
        "dynamics": {
            "rows": [
                {"frame_rmse": 1, "repeat_frame_rmse": 2},
                {"action_rmse": 1, "repeat_action_rmse": 2},
            ]
        },
    }
    assert list(bounds(report).values()) == [True] * 4
    report["all"]["successes"] = 15
    report["imagined"][1] = {"path_imagined": 2, "path_still": 2}
    report["dynamics"]["rows"][0]["frame_rmse"] = report["dynamics"]["rows"][1]["action_rmse"] = 3
    assert list(bounds(report).values()) == [False] * 4


def test_the_training_is_that_of_the_example():
    example = json.loads((ROOT / "examples/metaworld_train.json").read_text())
    assert TrainConfig.from_dict(example) == demo_training()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_keeps_its_bounds(seed, tmp_path):
    """A minute and a half of one core each; the steps decide, not the time."""
    report = make_closed_loop_demo(tmp_path / "demo", DATA, seconds=3000, seed=seed, progress=False)
    assert report["all"]["episodes"] == 20 and report["all"]["broken"] == 0
    assert all(report["bounds"].values()), report["bounds"]
