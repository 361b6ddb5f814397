"""The reader of LeRobot data sets, on the data set that ships and on tiny ones with known contents."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
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


EPISODES, DATA = "meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"


def _edit(root, change):
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def _put(path, column, values):
    """``values``: the whole column, or a function that changes the list of its values."""
    table = pq.read_table(path)
    if callable(values):
        changed = table[column].to_pylist()
        values(changed)
        values = pa.array(changed, table.schema.field(column).type)
    elif not isinstance(values, pa.Array):
        values = pa.array(values)
    pq.write_table(table.set_column(table.schema.names.index(column), column, values), path)


def _camera(**values):
    return lambda info: info["features"][tiny.KEY].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.pop("fps"), "field 'fps' is missing"),
        (lambda i: i.update(fps="20"), "field 'fps' is '20'"),
        (lambda i: i.update(fps=True), "field 'fps' is True"),
        (lambda i: i.update(fps=0), "expected a positive number"),
        (lambda i: i.update(fps=float("inf")), "expected a positive number"),
        (lambda i: i.update(codebase_version="v1.6"), "expected v2.x or v3"),
        (lambda i: i.pop("splits"), 'add "splits": {"train": "0:4"}'),
        (lambda i: i.update(splits={"train": "first"}), 'expected episode numbers "start:stop"'),
        (lambda i: i.update(splits={"train": "0:\u00b2"}), 'expected episode numbers "start:stop"'),
        (lambda i: i.update(splits={"train": "0:3", "val": "2:4"}), "'train' and 'val' both hold episode 2"),
        (lambda i: i.update(total_episodes=5), "total_episodes is 5"),
        (lambda i: i.update(total_episodes=10**15), "total_episodes is 1000000000000000"),
        (lambda i: i.update(total_episodes=0), "total_episodes is 0, expected 1 or more"),
        (lambda i: i.update(features={}), "features has no camera"),
        (lambda i: i.update(features=[]), "field 'features' is"),
        (
            lambda i: i["features"].update(wrist={"dtype": "video"}),
            f"2 cameras, {tiny.KEY}, wrist; choose one: .*--camera",
        ),
        (lambda i: i["features"][tiny.KEY].pop("shape"), "shape None, expected .height, width, 3."),
        (_camera(shape="32 x 64"), "shape '32 x 64', expected"),
        (_camera(shape=[32, 64]), "shape .32, 64., expected"),
        (_camera(shape=[32.0, 64, 3]), "shape .32.0, 64, 3., expected"),
        (_camera(shape=[32, 64, 1]), "shape .32, 64, 1., expected"),
        (_camera(shape=[0, 64, 3]), "shape .0, 64, 3., expected"),
        (
            lambda i: i.update(data_path="{foo}"),
            "data_path is '{foo}', expected a path with {chunk_index}, {file_index}",
        ),
        (lambda i: i.update(data_path="{}"), "data_path is"),
        (lambda i: i.update(data_path="{chunk_index:s}"), "data_path is"),
        (lambda i: i.update(data_path="{chunk_index.real.x}"), "data_path is"),
        (lambda i: i.update(data_path=None), "field 'data_path' is None"),
        (lambda i: i.update(video_path="{episode_chunk:03d}/{video_key}"), "video_path .*episode_chunk"),
        (lambda i: i.update(video_path="{video_key:03d}"), "video_path is"),
    ],
)
def test_refuses_malformed_info(tiny_root, change, message):
    _edit(tiny_root, change)
    with pytest.raises(ValueError, match=message) as error:
        LeRobotDataset(tiny_root)
    assert "info.json" in str(error.value)
    assert "\n" not in str(error.value)


CHUNK, START = f"videos/{tiny.KEY}/chunk_index", f"videos/{tiny.KEY}/from_timestamp"


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("episode_index", [0, 1, 3, 4], "episode_index is 3 where 2 comes next"),
        ("episode_index", [0, 1, 1, 2], "episode_index is 1 where 2 comes next"),
        ("episode_index", ["0", "1", "2", "3"], "'episode_index' is of type string, expected whole numbers"),
        ("length", [None] * 4, "'length' is of type null, expected whole numbers"),
        ("length", ["23"] * 4, "'length' is of type string, expected whole numbers"),
        ("length", [23, None, 20, 18], "'length' is null in row 1, expected whole numbers"),
        ("length", [23, 0, 20, 18], "length of episode 1 is 0, expected 1 or more"),
        ("length", [23, 16, 20, 18], "length of episode 1 is 16, but from_timestamp 1.15 and to_timestamp 2 span 17.0"),
        ("data/chunk_index", [0.0] * 4, "'data/chunk_index' is of type double, expected whole numbers"),
        (CHUNK, [None, 0, 0, 0], "chunk_index' is null in row 0, expected whole numbers"),
        (START, [None] * 4, "from_timestamp' is of type null, expected finite numbers"),
        (START, [0, 1.15, float("nan"), 3], "from_timestamp' is nan in row 2, expected finite numbers"),
        (START, [0, 1.15, float("inf"), 3], "from_timestamp' is inf in row 2, expected finite numbers"),
        (START, [-1.15, 1.15, 2, 3], "length of episode 0 is 23, but from_timestamp -1.15"),
        ("tasks", [1, 2, 3, 4], "'tasks' is of type int64, expected lists of strings"),
        ("tasks", [["lift"], None, ["lift"], ["push"]], "tasks of episode 1 is None, expected an instruction"),
        ("tasks", [["lift"], [], ["lift"], ["push"]], r"tasks of episode 1 is \[\], expected an instruction"),
        ("tasks", [["lift"], [None], ["lift"], ["push"]], r"tasks of episode 1 is \[None\]"),
        ("tasks", pa.array([b"\xff"] * 4).view(pa.string()), "'tasks' is not UTF-8"),
    ],
)
def test_refuses_malformed_episodes(tiny_root, column, values, message):
    _put(tiny_root / EPISODES, column, values)
    with pytest.raises(ValueError, match=message) as error:
        LeRobotDataset(tiny_root)
    assert f"{tiny_root / EPISODES}: " in str(error.value) and "\n" not in str(error.value)


def _null_row(values):
    values[3] = None


def _one(number):
    def change(values):
        values[3][2] = number

    return change


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("action", lambda v: v[3].pop(), "action of episode 0 has 6 numbers in row 3, expected 7"),
        ("action", lambda v: [row.pop() for row in v], "action of episode 0 has 6 numbers in row 0, expected 7"),
        ("action", _null_row, "action of episode 0 is null in row 3, expected 7 numbers"),
        ("action", _one(None), r"action of episode 0 is null in row 3 \(its frame 3\), dimension 2"),
        ("action", _one(float("nan")), r"action of episode 0 is nan in row 3 \(its frame 3\), dimension 2"),
        ("action", _one(float("-inf")), "action of episode 0 is -inf in row 3"),
        ("action", [[1e39] * 7] * 40, "action of episode 0 is 1e.39 in row 0"),
        ("action", [["1"] * 7] * 40, "'action' is of type list<.*string>, expected lists of numbers"),
        ("action", [None] * 40, "'action' is of type null"),
        ("action", [True] * 40, "'action' is of type bool"),
        ("episode_index", [0] * 22 + [1] * 18, "episode_index is 0 in 22 rows, but length in meta/episodes says 23"),
        ("episode_index", [0] * 40, "episode_index is 0 in 40 rows, but length in meta/episodes says 23"),
        ("episode_index", [0.0] * 40, "'episode_index' is of type double, expected whole numbers"),
    ],
)
def test_refuses_malformed_rows(tiny_root, column, values, message):
    _put(tiny_root / DATA, column, values)
    with pytest.raises(ValueError, match=message) as error:
        LeRobotDataset(tiny_root).action(0)
    assert f"{tiny_root / DATA}: " in str(error.value) and "\n" not in str(error.value)


def test_refuses_a_malformed_width(tiny_root):
    _edit(tiny_root, lambda info: info["features"]["action"].update(shape="7"))
    with pytest.raises(ValueError, match=r"info.json: features\['action'\] has shape '7'"):
        LeRobotDataset(tiny_root).action(0)


def test_state_is_not_needed(tiny_root):
    for file in (tiny_root / "data").rglob("*.parquet"):
        pq.write_table(pq.read_table(file).drop_columns("observation.state"), file)
    dataset = LeRobotDataset(tiny_root)
    np.testing.assert_array_equal(dataset.action(2), tiny.actions(2))
    with pytest.raises(ValueError, match="column 'observation.state' is missing"):
        dataset.state(2)


def test_rows_are_found_by_their_episode(tiny_root):
    """Neither a wrong dataset_from_index nor an order of one's own misleads the reader; one instruction may be text."""
    _put(tiny_root / EPISODES, "tasks", list(tiny.TASKS))
    table = pq.read_table(tiny_root / EPISODES).drop_columns("dataset_from_index")
    pq.write_table(table.take([2, 0, 3, 1]), tiny_root / EPISODES)
    table = pq.read_table(tiny_root / DATA)
    pq.write_table(pa.concat_tables([table.slice(tiny.LENGTHS[0]), table.slice(0, tiny.LENGTHS[0])]), tiny_root / DATA)
    dataset = LeRobotDataset(tiny_root)
    assert [e.task for e in dataset.episodes] == list(tiny.TASKS)
    for episode in range(4):
        np.testing.assert_array_equal(dataset.action(episode), tiny.actions(episode))


@pytest.fixture(params=[0, 2], ids=["PNG", "JPEG, channels first"])
def images_root(tiny_root, request):
    """The tiny data set with its pictures in the data files; ``request.param`` is the error that JPEG may make."""
    tiny.move_pictures_into_rows(tiny_root, "JPEG" if request.param else "PNG")
    return tiny_root, request.param


def test_pictures_in_the_data_files(images_root):
    root, error = images_root
    dataset = LeRobotDataset(root)
    for episode in (0, 3):
        frames = dataset.frames(episode)
        assert abs(frames.astype(int) - tiny.frames(episode)).mean() <= error
        np.testing.assert_array_equal(dataset.frames(episode, every=4), frames[::4])
    if error:
        return
    deep = io.BytesIO()
    Image.fromarray(np.full((32, 64), 4000, np.uint16)).save(deep, "PNG")
    for cell, message in (
        ({"bytes": deep.getvalue(), "path": None}, "frame 3, has pixels of I;16, such as depth, expected 8 bits"),
        ({"bytes": b"\x89PNG\r\n\x1a\nno more", "path": None}, "frame 3, cannot be decoded"),
        ({"bytes": None, "path": None}, "frame 3, holds no picture"),
    ):
        _put(root / DATA, tiny.KEY, lambda cells: cells.__setitem__(3, cell))  # noqa: B023
        with pytest.raises(ValueError, match=message) as error:
            dataset.frames(0)
        assert str(root / DATA) in str(error.value) and f"{tiny.KEY} of episode 0" in str(error.value)
    for height in (16, 2**40):
        _edit(root, _camera(shape=[height, 64, 3]))
        with pytest.raises(ValueError, match=f"frame 0 of episode 0 is 32 x 64, the shape in info.json {height} x 64"):
            LeRobotDataset(root).frames(0)


def test_cameras(tiny_root):
    """A second camera must be chosen between; the chosen one's file is read."""
    _edit(tiny_root, lambda info: info["features"].update(wrist=info["features"][tiny.KEY]))
    table = pq.read_table(tiny_root / EPISODES)
    for name in [c for c in table.column_names if c.startswith("videos/")]:
        table = table.append_column(name.replace(tiny.KEY, "wrist"), table[name])
    pq.write_table(table, tiny_root / EPISODES)
    assert LeRobotDataset(tiny_root, usual_camera="wrist").camera == "wrist"
    assert LeRobotDataset(tiny_root, tiny.KEY, usual_camera="wrist").frames(1).shape == (17, 32, 64, 3)
    with pytest.raises(FileNotFoundError, match="videos/wrist/chunk-000/file-000.mp4"):
        LeRobotDataset(tiny_root, "wrist").frames(1)
    with pytest.raises(ValueError, match=f"no camera 'left'; .*must be one of {tiny.KEY}, wrist"):
        LeRobotDataset(tiny_root, "left")
    with pytest.raises(ValueError, match="2 cameras"):
        LeRobotDataset(tiny_root, usual_camera="left")


def test_refuses_json_that_is_none(tiny_root):
    (tiny_root / "meta/info.json").write_text("{")
    with pytest.raises(ValueError, match="info.json: not valid JSON"):
        LeRobotDataset(tiny_root)
    for text, message in ((b"\xff\xfe", "not valid JSON"), (b"[]", "holds a list")):
        (tiny_root / "meta/info.json").write_bytes(text)
        with pytest.raises(ValueError, match=f"info.json: {message}"):
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
    whole = (tiny_root / DATA).read_bytes()
    for torn in (b"no parquet", b"", whole[:-100], whole[: len(whole) // 2]):
        (tiny_root / DATA).write_bytes(torn)
        with pytest.raises(ValueError, match="file-000.parquet: cannot be read"):
            LeRobotDataset(tiny_root).action(0)
    (tiny_root / EPISODES).write_bytes(whole[:200])
    with pytest.raises(ValueError, match="meta/episodes/chunk-000/file-000.parquet: cannot be read"):
        LeRobotDataset(tiny_root)


def test_refuses_broken_videos(tiny_root):
    for late, count in ((1 / tiny.FPS, 17), (9, 0)):
        for column in (START, START.replace("from", "to")):
            _put(tiny_root / EPISODES, column, lambda values: values.__setitem__(3, values[3] + late))  # noqa: B023
        with pytest.raises(ValueError, match=f"file-000.mp4: episode 3 has {count} frames, length .* says 18"):
            LeRobotDataset(tiny_root).frames(3)
    dataset = LeRobotDataset(tiny_root)
    video = tiny_root / f"videos/{tiny.KEY}/chunk-000/file-000.mp4"
    video.write_bytes(b"no video")
    with pytest.raises(ValueError, match="file-000.mp4: cannot be decoded"):
        dataset.frames(0)


def test_refuses_unknown_episodes(shared_tiny_root):
    dataset = LeRobotDataset(shared_tiny_root)
    with pytest.raises(IndexError, match="episode 4 does not exist"):
        dataset.action(4)
    for none in (-1, 1.7, "1", True, None):
        with pytest.raises(ValueError, match=f"episode must be a whole number of at least 0, got {none!r}"):
            dataset.action(none)
    for every in (0, 1.5, None):
        with pytest.raises(ValueError, match=f"every must be a whole number of at least 1, got {every}"):
            dataset.frames(0, every=every)
