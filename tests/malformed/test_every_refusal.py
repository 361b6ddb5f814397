"""Every way in which the reader refuses a data set has a row here, in ``READER`` or in a table of ``test_data``."""

import ast
import io
import os
import shutil
import traceback
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data import tiny
from wam_models.data import LeRobotDataset, lerobot

from .cases import EPISODE, EPISODES, ROWS, VIDEO, column, info
from .test_data import TABLE, TRAINING

SOURCE = Path(lerobot.__file__)


def refusals() -> dict[int, str]:
    """Line -> what is raised there."""
    found = {}
    for function in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    found[node.lineno] = f"{function.name}: {ast.unparse(node.exc)[:200]}"
    return found


def line_of_refusal(error: BaseException) -> int | None:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(SOURCE)]
    return lines[-1] if lines else None


def not_utf8(folder):
    """Instructions whose bytes are no UTF-8."""
    table = pq.read_table(folder / EPISODES)
    count = len(table)
    offsets, data = np.arange(0, 2 * count + 1, 2, dtype=np.int32), b"\xff\xfe" * count
    strings = pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(data))
    lists = pa.ListArray.from_arrays(pa.array(range(count + 1), pa.int32()), strings)
    (folder / EPISODES).unlink()
    pq.write_table(table.set_column(table.column_names.index("tasks"), "tasks", lists), folder / EPISODES)


def sound_alone(folder):
    """An mp4 file without a picture."""
    (folder / VIDEO).unlink()
    with av.open(str(folder / VIDEO), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)


def second_camera(folder):
    feature = {"dtype": "video", "shape": [32, 64, 3]}
    info(("features", "wrist"), feature)(folder)


def picture(held):
    """What one row holds in place of its picture, in a data set without a video."""

    def damage(folder):
        tiny.move_pictures_into_rows(folder / "data")
        row = tiny.LENGTHS[2] + 3
        column(ROWS, tiny.KEY, lambda cells: [*cells[:row], {"bytes": held, "path": None}, *cells[row + 1 :]])(folder)

    return damage


def deep_png() -> bytes:
    held = io.BytesIO()
    Image.fromarray(np.full((32, 64), 4000, np.uint16)).save(held, "PNG")
    return held.getvalue()


# what no row of test_data can show through ``wam rollout``: damage, words of the message
READER = {
    "tasks not UTF-8": (not_utf8, "column 'tasks' is not UTF-8"),
    "no video stream": (sound_alone, "holds no video stream"),
    "two cameras": (second_camera, "features has 2 cameras"),
    "a picture every 0 rows": (info(("features", tiny.KEY, "picture_every"), 0), "is 0, expected a whole number >= 1"),
    "picture null": (picture(None), "episode 3, frame 3, holds no picture"),
    "picture torn": (picture(b"\x89PNG\r\n\x1a\nno more"), "episode 3, frame 3, cannot be decoded"),
    "picture of depth": (picture(deep_png()), "episode 3, frame 3, has pixels of I;16, such as depth"),
}
# what is refused of the caller, or in another layout of data sets -> the test that has it
ELSEWHERE = {
    "features has no camera ": "tests/data/test_lerobot.py::test_cameras",
    "must name each camera once": "tests/data/test_layouts.py::test_cameras_are_tiled",
    "state must be one of": "tests/data/test_layouts.py::test_states_are_found_by_their_name",
    "_read_lines": "tests/data/test_layouts.py::test_damaged_v2_is_refused",
    "which meta/tasks does not list": "tests/data/test_layouts.py::test_an_instruction_that_is_not_listed_is_refused",
    "episode {number} does not exist": "tests/data/test_lerobot.py::test_refuses_unknown_episodes",
}


def read(folder):
    dataset = LeRobotDataset(folder / "data")
    dataset.action(EPISODE)
    dataset.frames(EPISODE, every=3)


@pytest.mark.parametrize("damage, words", READER.values(), ids=READER)
def test_the_reader_refuses(damage, words, folder):
    damage(folder)
    with pytest.raises(ValueError) as error:
        read(folder)
    assert words in str(error.value)


def test_every_refusal_has_a_row(sound, tmp_path):
    reached = set()
    for number, (damage, *_) in enumerate([*TABLE.values(), *TRAINING.values(), *READER.values()]):
        folder = tmp_path / str(number)
        shutil.copytree(sound / "data", folder / "data", copy_function=os.link)
        damage(folder)
        try:
            read(folder)
        except Exception as error:
            reached.add(line_of_refusal(error))
        shutil.rmtree(folder)
    missing = [what for line, what in refusals().items() if line not in reached]
    missing = [what for what in missing if not any(words in what for words in ELSEWHERE)]
    assert missing == [] and len(refusals()) > 25
