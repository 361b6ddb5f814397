import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data import tiny
from wam_models.data import Episode, LeRobotDataset, psnr

DEMO = Path(__file__).parents[2] / "data/libero_demo"


def test_episodes(shared_tiny_root):
    dataset = LeRobotDataset(shared_tiny_root)
    assert dataset.fps == 20
    assert dataset.episodes == [
        Episode(i, tiny.LENGTHS[i], tiny.TASKS[i], "train" if i < 3 else "held_out") for i in range(4)
    ]
    assert dataset.stats["action"]["count"] == [sum(tiny.LENGTHS)]


@pytest.mark.parametrize("index", range(4))
def test_every_episode_reads_its_own_rows_and_frames(shared_tiny_root, index):
    dataset = LeRobotDataset(shared_tiny_root)
    action, state, frames = dataset.action(index), dataset.state(index), dataset.frames(dataset.episodes[index])
    assert action.dtype == state.dtype == np.float32
    np.testing.assert_array_equal(action, tiny.actions(index))
    np.testing.assert_array_equal(state, tiny.states(index))
    assert frames.dtype == np.uint8
    expected = tiny.frames(index)
    assert psnr(frames, expected) > 35
    # brightness rises by 5 a frame: half of that shows a frame that is off by one
    brightness = frames.mean(axis=(1, 2, 3)) - expected.mean(axis=(1, 2, 3))
    assert abs(brightness).max() < 2.5
    np.testing.assert_array_equal(dataset.frames(index, every=4), frames[::4])


def test_demo_counts():
    dataset = LeRobotDataset(DEMO)
    train = [e for e in dataset.episodes if e.split == "train"]
    held_out = [e for e in dataset.episodes if e.split == "held_out"]
    assert len(dataset.episodes) == len(train) + len(held_out) >= 40
    assert len(held_out) >= 8
    assert {e.task for e in held_out} <= {e.task for e in train}
    info = json.loads((DEMO / "meta/info.json").read_text())
    assert sum(e.length for e in dataset.episodes) == info["total_frames"]
    assert len({e.task for e in dataset.episodes}) == info["total_tasks"]
    assert sum(f.stat().st_size for f in DEMO.rglob("*") if f.is_file()) < 10e6


def test_demo_starts_apart():
    table = pq.read_table(DEMO / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    starts = {"train": set(), "held_out": set()}
    for row in table:
        starts[row["libero/split"]].add((row["libero/suite"], row["libero/task"], row["libero/init_state"]))
    assert starts["held_out"] and not starts["train"] & starts["held_out"]


def test_demo_decodes_to_the_rendered_frames():
    """example.png holds undistorted frames 0, 40, 80 and 120 of the first held-out episode, from top to bottom."""
    dataset = LeRobotDataset(DEMO)
    episode = next(e for e in dataset.episodes if e.split == "held_out" and e.length > 120)
    raw = np.asarray(Image.open(DEMO / "example.png").convert("RGB")).reshape(4, 128, 256, 3)
    frames = dataset.frames(episode)
    for t, picture in zip((0, 40, 80, 120), raw, strict=True):
        fits = [psnr(frames[s], picture) for s in range(t - 2, t + 3) if s >= 0]
        assert psnr(frames[t], picture) == max(fits) > 33


def test_demo_states_follow_the_actions():
    """The hand moves the way the action before points, so actions and states are aligned."""
    dataset = LeRobotDataset(DEMO)
    action, state = dataset.action(0), dataset.state(0)
    moved = np.diff(state[:, :3], axis=0)
    # the arm lags by a step or two: compare with the last three actions
    asked = action[:-1, :3].copy()
    asked[1:] += action[:-2, :3]
    asked[2:] += action[:-3, :3]
    assert np.corrcoef(moved.ravel(), asked.ravel())[0, 1] > 0.8
    assert not action[:, 3:6].any()
    assert set(np.unique(action[:, 6])) == {-1, 1}


def _edit(root, change):
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.pop("fps"), "field 'fps' is missing"),
        (lambda i: i.update(fps="20"), "field 'fps' is '20'"),
        (lambda i: i.update(fps=0), "expected a positive number"),
        (lambda i: i.update(codebase_version="v2.1"), "expected v3"),
        (lambda i: i.update(splits={"train": "first"}), 'expected episode numbers "start:stop"'),
        (lambda i: i.update(total_episodes=5), "total_episodes is 5"),
        (lambda i: i.update(features={}), "video_key"),
    ],
)
def test_refuses_malformed_info(tiny_root, change, message):
    _edit(tiny_root, change)
    with pytest.raises(ValueError, match=message) as error:
        LeRobotDataset(tiny_root)
    assert "info.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_refuses_json_that_is_none(tiny_root):
    (tiny_root / "meta/info.json").write_text("{")
    with pytest.raises(ValueError, match="info.json: not valid JSON"):
        LeRobotDataset(tiny_root)


def test_names_missing_files(tiny_root):
    with pytest.raises(FileNotFoundError, match="info.json: not found"):
        LeRobotDataset(tiny_root / "nowhere")
    dataset = LeRobotDataset(tiny_root)
    (tiny_root / "data/chunk-000/file-001.parquet").unlink()
    dataset.action(0)
    with pytest.raises(FileNotFoundError, match="file-001.parquet"):
        dataset.action(2)
    shutil.rmtree(tiny_root / "videos")
    with pytest.raises(FileNotFoundError, match="file-000.mp4"):
        dataset.frames(0)
    shutil.rmtree(tiny_root / "meta/episodes")
    with pytest.raises(FileNotFoundError, match="meta/episodes"):
        LeRobotDataset(tiny_root)


def test_refuses_broken_files(tiny_root):
    dataset = LeRobotDataset(tiny_root)
    (tiny_root / "data/chunk-000/file-000.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="file-000.parquet: cannot be read"):
        dataset.action(0)
    (tiny_root / f"videos/{tiny.KEY}/chunk-000/file-000.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="file-000.mp4: cannot be decoded"):
        dataset.frames(0)


def test_refuses_unknown_episodes(shared_tiny_root):
    dataset = LeRobotDataset(shared_tiny_root)
    with pytest.raises(IndexError, match="episode 4 does not exist"):
        dataset.action(4)
    with pytest.raises(ValueError, match="every is 0"):
        dataset.frames(0, every=0)
