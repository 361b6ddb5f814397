"""Data sets as people have them: the layout before v3, several cameras and tasks, states under other names."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data import tiny
from wam_models import LeRobotDataset
from wam_models.data import ClipDataset
from wam_models.data.canvas import Canvas, Cell

OTHER = "observation.images.wrist"


def write_json(path, value):
    path.write_text(json.dumps(value))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("layouts") / "tiny")


@pytest.fixture(scope="module")
def old(root, tmp_path_factory):
    """The tiny data set as lerobot v2.1 wrote it: a data file and a video for each episode, metadata in JSON lines."""
    import av

    out = tmp_path_factory.mktemp("layouts") / "old"
    info = json.loads((root / "meta/info.json").read_text())
    places = "chunk-{episode_chunk:03d}/{video_key}/", "chunk-{episode_chunk:03d}/", "episode_{episode_index:06d}"
    info |= {
        "codebase_version": "v2.1",
        "chunks_size": 2,
        "data_path": f"data/{places[1]}{places[2]}.parquet",
        "video_path": f"videos/{places[0]}{places[2]}.mp4",
    }
    tasks = sorted(set(tiny.TASKS))
    for number, (length, task) in enumerate(zip(tiny.LENGTHS, tiny.TASKS, strict=True)):
        place = {"episode_chunk": number // 2, "episode_index": number, "video_key": tiny.KEY}
        data, video = (out / info[name].format(**place) for name in ("data_path", "video_path"))
        data.parent.mkdir(parents=True, exist_ok=True)
        video.parent.mkdir(parents=True, exist_ok=True)
        table = {
            "action": pa.array(tiny.actions(number).tolist(), pa.list_(pa.float32())),
            "observation.state": pa.array(tiny.states(number).tolist(), pa.list_(pa.float32())),
            "episode_index": np.full(length, number),
            "task_index": np.full(length, tasks.index(task)),
        }
        pq.write_table(pa.table(table), data)
        with av.open(str(video), "w") as container:
            stream = container.add_stream("libx264", rate=tiny.FPS, options={"crf": "12"})
            stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
            for picture in tiny.frames(number):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    (out / "meta").mkdir()
    write_json(out / "meta/info.json", info)
    episodes = zip(range(4), tiny.TASKS, tiny.LENGTHS, strict=True)
    rows = [{"episode_index": i, "tasks": [task], "length": length} for i, task, length in episodes]
    (out / "meta/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "meta/tasks.jsonl").write_text(
        "".join(json.dumps({"task_index": i, "task": t}) + "\n" for i, t in enumerate(tasks))
    )
    return out


def test_v2_reads_as_v3(root, old):
    new, before = LeRobotDataset(root), LeRobotDataset(old)
    assert before.episodes == new.episodes and before.fps == new.fps
    for number in range(4):
        np.testing.assert_array_equal(before.action(number), new.action(number))
        np.testing.assert_array_equal(before.state(number), new.state(number))
        assert abs(before.frames(number).astype(int) - tiny.frames(number)).mean() < 4
    assert ClipDataset(old).latent_shape == ClipDataset(root).latent_shape


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("episodes.jsonl", None, "episodes.jsonl: not found"),
        ("episodes.jsonl", "{", "episodes.jsonl: not valid JSON lines"),
        ("episodes.jsonl", "3\n", "episodes.jsonl: holds a line that is no object"),
        ("episodes.jsonl", '{"episode_index": 0, "length": 3}\n', "field 'tasks' is missing"),
        ("episodes.jsonl", '{"episode_index": 0, "length": 23, "tasks": ["a"]}\n', "total_episodes is 4, but"),
    ],
)
def test_damaged_v2_is_refused(name, text, message, old, tmp_path):
    damaged = shutil.copytree(old, tmp_path / "damaged")
    path = damaged / "meta" / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        LeRobotDataset(damaged)


@pytest.fixture(scope="module")
def several(root, tmp_path_factory):
    """With a second camera, whose pictures are half as large and lie in the rows, another name of the states, and two
    instructions in the first episode."""
    out = shutil.copytree(root, tmp_path_factory.mktemp("layouts") / "several")
    info = json.loads((out / "meta/info.json").read_text())
    info["features"] |= {
        OTHER: {"dtype": "image", "shape": [3, 16, 32], "names": ["channels", "height", "width"]},
        "observation.joints": {"dtype": "float32", "shape": [8]},
    }
    write_json(out / "meta/info.json", info)
    for file, episodes in ((0, (0, 1)), (1, (2, 3))):
        path = out / f"data/chunk-000/file-{file:03d}.parquet"
        table = pq.read_table(path)
        pictures = np.concatenate([tiny.frames(e)[:, ::2, ::2] for e in episodes])
        index = np.concatenate(
            [np.arange(tiny.LENGTHS[e]) >= 8 if e == 0 else np.full(tiny.LENGTHS[e], e % 2) for e in episodes]
        )
        table = table.rename_columns([n.replace("observation.state", "observation.joints") for n in table.column_names])
        table = table.append_column(OTHER, tiny.pngs(pictures)).append_column("task_index", pa.array(index.astype(int)))
        pq.write_table(table, path)
    path = out / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    at = table.schema.get_field_index("tasks")
    pq.write_table(table.set_column(at, "tasks", pa.array([["lift", "push"], ["push"], ["lift"], ["push"]])), path)
    pq.write_table(pa.table({"task_index": [0, 1], "task": ["lift", "push"]}), out / "meta/tasks.parquet")
    return out


def test_cameras_are_tiled(several):
    single = LeRobotDataset(several, tiny.KEY).frames(0)
    beside = LeRobotDataset(several, f"{tiny.KEY},{OTHER}")
    assert beside.picture_size == (32, 128)
    frames = beside.frames(0, 4)
    np.testing.assert_array_equal(frames[:, :, :64], single[::4])
    np.testing.assert_array_equal(frames[:, ::2, 64::2], tiny.frames(0)[::4, ::2, ::2])
    below = LeRobotDataset(several, f"{tiny.KEY}/{OTHER}")
    assert below.picture_size == (64, 64) and below.canvas.cells[1] == Cell(OTHER, 32, 0, 32, 64)
    np.testing.assert_array_equal(below.frames(0)[:, :32], single)
    assert ClipDataset(below).latent_shape == (48, 4, 4)
    for camera, message in (
        (None, "features has 2 cameras, .* or tile them"),
        (f"{tiny.KEY},x", "has no camera 'x'"),
        (f"{OTHER}/{OTHER}", "must name each camera once"),
    ):
        with pytest.raises(ValueError, match=message):
            LeRobotDataset(several, camera)


def test_a_canvas_keeps_aspect_ratios_and_has_no_gap():
    sizes = {"high": (240, 320), "left": (240, 320), "right": (240, 320), "wide": (100, 301)}
    canvas = Canvas.of("high/left,right", sizes)
    assert canvas.size == (360, 320) and canvas.cells[2] == Cell("right", 240, 160, 120, 160)
    for layout in ("high,wide/left,right,high", "wide/wide,wide,wide"):
        covered = np.zeros(Canvas.of(layout, sizes).size, int)
        for _, top, left, height, width in Canvas.of(layout, sizes).cells:
            covered[top : top + height, left : left + width] += 1
        assert (covered == 1).all()
    picture = np.random.default_rng(0).integers(0, 256, (240, 320, 3)).astype(np.uint8)
    composed = canvas.compose(dict.fromkeys(("high", "left", "right"), picture))
    np.testing.assert_array_equal(composed[:240], picture)
    np.testing.assert_array_equal(composed[240:, :160], composed[240:, 160:])
    with pytest.raises(ValueError, match="picture of camera 'left' is missing"):
        canvas.compose({"high": picture})


def test_states_are_found_by_their_name(several, root):
    dataset = LeRobotDataset(several, tiny.KEY)
    assert dataset.state_name == "observation.joints"
    np.testing.assert_array_equal(dataset.state(2), tiny.states(2))
    assert LeRobotDataset(several, "observation.joints").has_states_as_frames
    with pytest.raises(ValueError, match="features has no 'observation.x'; state must be one of observation.joints"):
        LeRobotDataset(several, tiny.KEY, state="observation.x")


def test_a_clip_has_the_instruction_of_its_first_frame(several):
    dataset = LeRobotDataset(several, tiny.KEY)
    assert dataset.episodes[0].tasks == ("lift", "push") and dataset.episodes[1].tasks == ("push",)
    assert dataset.instructions(0) == ["lift"] * 8 + ["push"] * 15 and dataset.instructions(1) == ["push"] * 17
    data = ClipDataset(dataset)
    assert [data.tasks[data.clip(0, start, 3)["task"]] for start in range(4)] == ["lift", "lift", "push", "push"]
    assert torch.equal(data.episode(1)["task"], torch.tensor([data.tasks.index("push")]))


def test_an_instruction_that_is_not_listed_is_refused(several, tmp_path):
    damaged = shutil.copytree(several, tmp_path / "damaged")
    pq.write_table(pa.table({"task_index": [0, 2], "task": ["lift", "push"]}), damaged / "meta/tasks.parquet")
    with pytest.raises(ValueError, match="task_index of episode 0 is 1, which meta/tasks does not list"):
        LeRobotDataset(damaged, tiny.KEY).instructions(0)
