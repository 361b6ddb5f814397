"""Reader of LeRobot data sets, v3 and v2, with pyarrow, PyAV and Pillow only."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..runtime.checks import whole
from ..runtime.json_fields import read_json
from .canvas import Canvas, camera_names

__all__ = ["Episode", "LeRobotDataset"]

FREQUENCIES = 1e-6, 1e9  # of pictures and actions, in Hz: times of both can be computed with
STATE = "observation.state"
NUMBERS = ("float32", "float64", "int64", "int32")  # dtypes of a list of numbers
PICTURES = ("video", "image")  # dtypes of a camera: an mp4 file, or a PNG or JPEG in each row of the data files


@dataclass(frozen=True)
class Episode:
    """One episode: its number, its length in frames, the instruction, and the split that info.json puts it in.

    Of several instructions `task` is the first, and `LeRobotDataset.instructions` says which holds when.
    """

    index: int
    length: int
    task: str
    split: str
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", self.tasks or (self.task,))


@dataclass(frozen=True)
class _Place:
    """Where one episode lies: its data file, and of each camera's video the file and the time span in seconds."""

    data: Path
    videos: dict[str, tuple[Path, float, float]]


class LeRobotDataset:
    """A LeRobot data set (`codebase_version` "v3.0", or "v2.0" and "v2.1" as it was before), its frames the pictures of
    one camera or of several on one canvas, or states.

    `episodes` (list of Episode), `fps` (frames and actions per second), `features` (the dict of info.json), `root`,
    `camera` (name of its feature, or the layout of several), `picture_size` (height, width; of states 1 x 1),
    `has_states_as_frames`, `state_name` (the feature of states, "" where there is none). An episode is named by its
    Episode or by its number.

    Args:
        root: the folder that holds `meta/`, `data/` and `videos/`.
        camera: the feature to read frames from, of dtype "video" or "image", or that of states; needed only where
            info.json lists several cameras. Several are tiled: "a,b" side by side, "a/b,c" in two rows (see Canvas).
            Where info.json lists no camera, frames are states.
        usual_camera: the one to take where there are several and `camera` is None; ignored if it is none of them.
        state: the feature of states; default "observation.state", or else the only list of numbers that is observed.

    Raises:
        FileNotFoundError: a file of the layout is missing.
        ValueError: a file is malformed, or `camera` is not in it; the message names the file and the field.
    """

    def __init__(
        self,
        root: str | Path,
        camera: str | None = None,
        usual_camera: str | None = None,
        *,
        state: str | None = None,
    ) -> None:
        self.root = Path(root)
        self._info = self.root / "meta/info.json"
        info = _read_json(self._info)
        version = _field(info, "codebase_version", str, self._info)
        if version[:2] not in ("v2", "v3"):
            raise ValueError(
                f"{self._info}: codebase_version is {version!r}, expected v2.x or v3.x; convert the data set with "
                "lerobot first"
            )
        self._is_v2 = version.startswith("v2")
        self.fps = _field(info, "fps", (int, float), self._info)
        if not FREQUENCIES[0] <= self.fps <= FREQUENCIES[1]:
            low, high = FREQUENCIES
            raise ValueError(
                f"{self._info}: fps is {self.fps}, expected a positive number, between {low:g} and {high:g}"
            )
        self.features = _field(info, "features", dict, self._info)
        self.state_name = self._choose_state(state)
        self.camera = self._choose_camera(camera, usual_camera)
        self.has_states_as_frames = self.camera == self.state_name
        self._cameras = [self.camera] if self.has_states_as_frames else camera_names(self.camera)
        self.picture_size, self.canvas = (1, 1), None
        if not self.has_states_as_frames:
            self._sizes = {name: _picture_size(self.features[name], name, self._info) for name in self._cameras}
            self.canvas = Canvas.of(self.camera, self._sizes)
            self.picture_size = self.canvas.size
        self._videos = [name for name in self._cameras if self.features[name].get("dtype") == "video"]
        self.picture_every = max(self._picture_every(name) for name in self._cameras)
        total = _field(info, "total_episodes", int, self._info)
        if total < 1:
            raise ValueError(f"{self._info}: total_episodes is {total}, expected 1 or more")
        if "splits" not in info:
            raise ValueError(f'{self._info}: field \'splits\' is missing; add "splits": {{"train": "0:{total}"}}')
        splits = _ranges(_field(info, "splits", dict, self._info), self._info)
        places = ("episode_chunk", "episode_index") if self._is_v2 else ("chunk_index", "file_index")
        self._data_path = _template(info, "data_path", places, self._info)
        if self._videos:
            self._video_path = _template(info, "video_path", ("video_key", *places), self._info)
        self._chunks_size = _field(info, "chunks_size", int, self._info) if self._is_v2 else 0
        self.episodes: list[Episode] = []
        self._places: list[_Place] = []
        for row in self._checked(self._rows_v2() if self._is_v2 else self._rows(), total):
            index, length, path = row["episode_index"], row["length"], row["path"]
            if length < 1:
                raise ValueError(f"{path}: length of episode {index} is {length}, expected 1 or more; drop the episode")
            split = next((name for name, span in splits.items() if index in span), "")
            tasks = _tasks(row["tasks"], index, path)
            self.episodes.append(Episode(index, length, tasks[0], split, tasks))
            self._places.append(self._place_of(row))
        self._tables: dict[tuple[Path, str], pa.Table] = {}

    @cached_property
    def stats(self) -> dict[str, Any]:
        """meta/stats.json: {feature: {"min" | "max" | "mean" | "std" | "count": nested lists}}, over all splits."""
        return _read_json(self.root / "meta/stats.json")

    def action(self, episode: Episode | int) -> np.ndarray:
        """float32 [T, A]: the action that is executed at each frame, in the units of the data set.

        Raises IndexError for an unknown episode, ValueError for what names none and for a number that is missing or not
        finite, with its place, and else FileNotFoundError or ValueError as the class does.
        """
        return self._numbers(episode, "action")

    def state(self, episode: Episode | int) -> np.ndarray:
        """float32 [T, S]: the state before each action. Raises as `action` does, and ValueError where there is none."""
        return self._numbers(episode, self.state_name or STATE)

    def instructions(self, episode: Episode | int) -> list[str]:
        """The instruction at each frame of an episode. Raises as `action` does."""
        number = self._number(episode)
        known = self.episodes[number]
        if len(known.tasks) == 1:
            return [known.task] * known.length
        names, path = self._task_names, self._places[number].data
        index = self._numbers(number, "task_index")[:, 0].astype(int).tolist()
        if unknown := sorted(set(index) - set(names)):
            raise ValueError(f"{path}: task_index of episode {number} is {unknown[0]}, which meta/tasks does not list")
        return [names[i] for i in index]

    @cached_property
    def _task_names(self) -> dict[int, str]:
        if self._is_v2:
            path = self.root / "meta/tasks.jsonl"
            return {_field(row, "task_index", int, path): _field(row, "task", str, path) for row in _read_lines(path)}
        path = self.root / "meta/tasks.parquet"
        columns = pq.read_schema(path).names if path.exists() else []
        name = "task" if "task" in columns else "__index_level_0__"  # how pandas stores an index without a name
        table = _read_table(path, ["task_index", name])
        index = _metadata(table["task_index"], "task_index", int, path).tolist()
        return dict(zip(index, _text(table[name], name, path), strict=True))

    def frames(self, episode: Episode | int, every: int = 1) -> np.ndarray:
        """uint8 [ceil(T / every), H, W, 3]: the RGB picture before each `every`-th action; of states as frames, float32
        [ceil(T / every), S].

        Raises ValueError for `every` below 1, else as `action` does.
        """
        every = whole("LeRobotDataset.frames: every", every, 1)
        if self.has_states_as_frames:
            return self.state(episode)[::every]
        assert self.canvas is not None  # of pictures there is one
        number = self._number(episode)
        out = np.empty(0, dtype=np.uint8)
        # one camera is not copied to a canvas
        views = {name: self._pictures(number, name, every) for name in self._cameras}
        for place, pictures in enumerate(zip(*views.values(), strict=True)):
            found = pictures[0] if len(pictures) == 1 else self.canvas.compose(dict(zip(views, pictures, strict=True)))
            if not place:  # not before the size is known to be true
                out = np.empty((-(-self.episodes[number].length // every), *found.shape), dtype=np.uint8)
            out[place] = found
        return out

    def _pictures(self, number: int, camera: str, every: int) -> Iterator[np.ndarray]:
        read = self._video if camera in self._videos else self._images
        for place, (path, picture) in enumerate(read(number, camera, every)):
            if picture.shape[:2] != self._sizes[camera]:
                got, expected = (f"{height} x {width}" for height, width in (picture.shape[:2], self._sizes[camera]))
                raise ValueError(
                    f"{path}: frame {place * every} of episode {number} is {got}, the shape in info.json {expected}"
                )
            yield picture

    def _picture_every(self, camera: str) -> int:
        every = self.features[camera].get("picture_every", 1)
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"{self._info}: picture_every of {camera} is {every!r}, expected a whole number >= 1")
        return every

    def _choose_state(self, state: str | None) -> str:
        """The feature of states, or nothing."""
        lists = [
            name for name, f in self.features.items() if name.startswith("observation.") and isinstance(f, dict)
            and f.get("dtype") in NUMBERS and isinstance(f.get("shape"), list) and len(f["shape"]) == 1
        ]  # fmt: skip
        if state is None:
            usual = isinstance(self.features.get(STATE), dict)
            return STATE if usual else lists[0] if len(lists) == 1 else ""
        if not isinstance(self.features.get(state), dict):
            raise ValueError(f"{self._info}: features has no {state!r}; state must be one of {', '.join(lists)}")
        return state

    def _choose_camera(self, camera: str | None, usual_camera: str | None) -> str:
        cameras = sorted(k for k, v in self.features.items() if isinstance(v, dict) and v.get("dtype") in PICTURES)
        state = self.state_name
        if state and (camera == state or (camera is None and (not cameras or usual_camera == state))):
            return state
        if not cameras:
            raise ValueError(f"{self._info}: features has no camera, that is none of dtype {' or '.join(PICTURES)}")
        usual = usual_camera is not None and set(camera_names(usual_camera)) <= set(cameras)
        if camera is None and len(cameras) > 1 and not usual:
            raise ValueError(
                f"{self._info}: features has {len(cameras)} cameras, {', '.join(cameras)}; choose one: "
                "LeRobotDataset(root, camera), or --camera; or tile them: 'A,B' side by side, 'A/B,C' in rows"
            )
        if camera is None:
            return usual_camera if usual and usual_camera is not None else cameras[0]
        names = camera_names(camera)
        unknown = [name for name in names if name not in cameras]
        if unknown:
            raise ValueError(
                f"{self._info}: features has no camera {unknown[0]!r}; camera (--camera) must be one of "
                f"{', '.join(cameras)}, or several of them"
            )
        if len(set(names)) < len(names):
            raise ValueError(f"{self._info}: camera (--camera) must name each camera once, got {camera!r}")
        return camera

    @staticmethod
    def _video_columns(camera: str) -> list[str]:
        return [f"videos/{camera}/{name}" for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]

    def _rows_v2(self) -> list[dict[str, Any]]:
        """The rows of meta/episodes.jsonl, as those of :meth:`_rows`."""
        path = self.root / "meta/episodes.jsonl"
        return [
            {name: _field(row, name, int, path) for name in ("episode_index", "length")}
            | {"tasks": _field(row, "tasks", (list, str), path), "path": path}
            for row in _read_lines(path)
        ]

    def _rows(self) -> list[dict[str, Any]]:
        """The rows of meta/episodes, by episode, as dicts of checked values and `path`, the file of the row."""
        files = sorted((self.root / "meta/episodes").glob("chunk-*/file-*.parquet"))
        if not files:
            raise FileNotFoundError(f"{self.root}/meta/episodes/chunk-*/file-*.parquet: none; is the copy complete?")
        kinds: dict[str, type] = dict.fromkeys(("episode_index", "length", "data/chunk_index", "data/file_index"), int)
        for camera in self._videos:
            kinds |= zip(self._video_columns(camera), (int, int, float, float), strict=True)
        rows = []
        for file in files:
            table = _read_table(file, ["tasks", *kinds])
            columns = {name: _metadata(table[name], name, kind, file).tolist() for name, kind in kinds.items()}
            columns["tasks"] = _text(table["tasks"], "tasks", file)
            rows += [
                dict(zip(columns, values, strict=True), path=file) for values in zip(*columns.values(), strict=True)
            ]
        return rows

    def _checked(self, rows: list[dict[str, Any]], total: int) -> list[dict[str, Any]]:
        """The rows in order, all of them there."""
        rows.sort(key=lambda row: row["episode_index"])
        for expected, row in enumerate(rows):
            if row["episode_index"] != expected:
                raise ValueError(
                    f"{row['path']}: episode_index is {row['episode_index']} where {expected} comes next, but episodes "
                    "are numbered from 0 without gaps or repeats; renumber them"
                )
        if len(rows) != total:
            raise ValueError(
                f"{self._info}: total_episodes is {total}, but meta/episodes lists {len(rows)}; fetch both again"
            )
        return rows

    def _place_of(self, row: dict[str, Any]) -> _Place:
        if self._is_v2:
            number = row["episode_index"]
            place = {"episode_chunk": number // max(self._chunks_size, 1), "episode_index": number}
            files = {name: self.root / self._video_path.format(video_key=name, **place) for name in self._videos}
            whole = 0.0, row["length"] / self.fps
            return _Place(self.root / self._data_path.format(**place), {n: (f, *whole) for n, f in files.items()})
        data = self._data_path.format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
        videos = {}
        for camera in self._videos:
            chunk, file, start, stop = (row[name] for name in self._video_columns(camera))
            frames = (stop - start) * self.fps
            if start < 0 or not abs(frames - row["length"]) < 0.5:
                raise ValueError(
                    f"{row['path']}: length of episode {row['episode_index']} is {row['length']}, but from_timestamp "
                    f"{start:g} and to_timestamp {stop:g} span {frames:.1f} frames at {self.fps:g} fps; "
                    "fetch the file again"
                )
            video = self._video_path.format(video_key=camera, chunk_index=chunk, file_index=file)
            videos[camera] = self.root / video, start, stop
        return _Place(self.root / data, videos)

    def _number(self, episode: Episode | int) -> int:
        number = whole("LeRobotDataset: episode", episode.index if isinstance(episode, Episode) else episode, 0)
        if number >= len(self.episodes):
            raise IndexError(f"episode {number} does not exist; the data set has {len(self.episodes)}")
        return number

    def _column(self, number: int, name: str, table: pa.Table) -> tuple[Any, np.ndarray]:
        """The episode's rows of one column, and their numbers in the data file."""
        path, length = self._places[number].data, self.episodes[number].length
        index = _metadata(table["episode_index"], "episode_index", int, path)
        rows = np.flatnonzero(index == number)
        if len(rows) != length:
            raise ValueError(
                f"{path}: episode_index is {number} in {len(rows)} rows, but length in meta/episodes says {length}; "
                "fetch both again"
            )
        return table[name].take(rows), rows

    def _numbers(self, episode: Episode | int, name: str) -> np.ndarray:
        number = self._number(episode)
        path, width = self._places[number].data, self.width(name)
        if (path, name) not in self._tables:
            self._tables[path, name] = _read_table(path, ["episode_index", name])
        column, rows = self._column(number, name, self._tables[path, name])
        if not (pa.types.is_integer(_inner(column.type)) or pa.types.is_floating(_inner(column.type))):
            raise ValueError(f"{path}: column {name!r} is of type {column.type}, expected lists of numbers")
        # a feature of one number is a plain column
        values = [value if isinstance(value, list) else [value] for value in column.to_pylist()]
        if width is None:
            width = len(values[0])
        for row, value in zip(rows, values, strict=True):
            if len(value) != width:
                got = "is null" if value == [None] else f"has {len(value)} numbers"
                raise ValueError(
                    f"{path}: {name} of episode {number} {got} in row {row}, expected {width} numbers; mend the row or "
                    "drop the episode"
                )
        with np.errstate(over="ignore"):  # beyond float32 is infinity, which is refused
            out = np.array(values, dtype=np.float32)
        for frame, dimension in np.argwhere(~np.isfinite(out)):
            value = values[frame][dimension]
            raise ValueError(
                f"{path}: {name} of episode {number} is {'null' if value is None else value} in row {rows[frame]} (its "
                f"frame {frame}), dimension {dimension}, expected a finite number; mend the row or drop the episode"
            )
        return out

    def width(self, name: str) -> int | None:
        """Numbers of a feature; None where info.json does not say. Raises ValueError for a shape that is none."""
        feature = self.features.get(name)
        if not isinstance(feature, dict) or "shape" not in feature:
            return None
        shape = feature["shape"]
        if not _whole(shape) or len(shape) != 1:
            raise ValueError(f"{self._info}: features[{name!r}] has shape {shape!r}, expected [how many numbers]")
        return shape[0]

    def _video(self, number: int, camera: str, every: int) -> Iterator[tuple[Path, np.ndarray]]:
        """The video file and every `every`-th picture of an episode, one after the other."""
        import av  # here: whatever reads no video, the GPU benchmarks among it, runs without PyAV

        (file, first, last), length = self._places[number].videos[camera], self.episodes[number].length
        if not file.exists():
            raise FileNotFoundError(f"{file}: not found; is the copy of the data set complete?")
        count = 0
        # half a frame of slack: timestamps are rounded to the stream's time base
        start, stop = first - 0.5 / self.fps, last - 0.5 / self.fps
        try:
            with av.open(str(file), metadata_errors="ignore") as container:  # titles and the like
                if not container.streams.video:
                    raise ValueError(f"{file}: holds no video stream; fetch the file again")
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                key_frame = int(first / (stream.time_base or 1))  # the seek goes to the one at or before it
                container.seek(key_frame, stream=stream)
                for frame in container.decode(stream):
                    if frame.time is None or frame.time < start:
                        continue
                    if frame.time >= stop or count == length:
                        break
                    if count % every == 0:
                        yield file, frame.to_ndarray(format="rgb24")
                    count += 1
        except (av.FFmpegError, OverflowError) as error:
            raise ValueError(f"{file}: cannot be decoded ({error}); fetch the file again") from error
        if count != length:
            raise ValueError(f"{file}: episode {number} has {count} frames, length in meta/episodes says {length}")

    def _images(self, number: int, camera: str, every: int) -> Iterator[tuple[Path, np.ndarray]]:
        """The data file and every `every`-th picture of an episode, one after the other."""
        from PIL import Image  # here, as PyAV

        path = self._places[number].data
        mine = pc.field("episode_index") == number
        column, _ = self._column(number, camera, _read_table(path, ["episode_index", camera], mine))
        for frame in range(0, len(column), every):
            where = f"{path}: {camera} of episode {number}, frame {frame},"
            value = column[frame].as_py()
            value = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(value, bytes):
                raise ValueError(f"{where} holds no picture, expected the bytes of a PNG or JPEG file")
            try:
                image = Image.open(io.BytesIO(value))
                deep = image.mode[0] in "IF"  # of which Pillow would make white above 255
                picture = np.asarray(image if deep else image.convert("RGB"))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise ValueError(f"{where} cannot be decoded ({error}); fetch the file again") from error
            if deep:
                raise ValueError(f"{where} has pixels of {image.mode}, such as depth, expected 8 bits a colour")
            yield path, picture


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; pass the folder that holds meta/, data/ and videos/")
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def _field(info: dict[str, Any], name: str, kind: type | tuple[type, ...], path: Path) -> Any:
    if name not in info:
        raise ValueError(f"{path}: field {name!r} is missing; is this a LeRobot v3 data set?")
    # bool is an int to Python
    if not isinstance(info[name], kind) or isinstance(info[name], bool):
        raise ValueError(f"{path}: field {name!r} is {info[name]!r}, of type {type(info[name]).__name__}")
    return info[name]


def _whole(shape: object) -> TypeGuard[list[int]]:
    return isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)


def _picture_size(feature: dict[str, Any], camera: str, path: Path) -> tuple[int, int]:
    """(height, width) of a camera, whose shape has the channels last or, as some writers have it, first."""
    shape = feature.get("shape")
    if _whole(shape) and len(shape) == 3:
        if shape[2] == 3:
            return shape[0], shape[1]
        if shape[0] == 3:
            return shape[1], shape[2]
    raise ValueError(f"{path}: features[{camera!r}] has shape {shape!r}, expected [height, width, 3]")


def _template(info: dict[str, Any], name: str, known: Sequence[str], path: Path) -> str:
    text = _field(info, name, str, path)
    try:
        text.format(**{field: "" if field == "video_key" else 0 for field in known})
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: {name} is {text!r}, expected a path with {', '.join('{' + field + '}' for field in known)} "
            f"({type(error).__name__}: {error})"
        ) from error
    return text


def _ranges(splits: dict[str, Any], path: Path) -> dict[str, range]:
    out = {}
    for name, text in splits.items():
        first, colon, end = str(text).partition(":")
        if not (colon and first.isdecimal() and end.isdecimal()):
            raise ValueError(f'{path}: splits[{name!r}] is {text!r}, expected episode numbers "start:stop"')
        out[name] = range(int(first), int(end))
    spans = sorted((span.start, span.stop, name) for name, span in out.items() if span)
    for (_, stop, name), (start, _, other) in pairwise(spans):
        if start < stop:
            raise ValueError(f"{path}: splits {name!r} and {other!r} both hold episode {start}, expected disjoint ones")
    return out


def _tasks(value: Any, index: int, path: Path) -> tuple[str, ...]:
    tasks = (value,) if isinstance(value, str) else tuple(dict.fromkeys(value or []))
    if not tasks or not all(isinstance(task, str) for task in tasks):
        raise ValueError(f"{path}: tasks of episode {index} is {value!r}, expected an instruction, or a list of them")
    return tasks


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; is the copy of the data set complete?")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON lines: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: holds a line that is no object; fetch the file again")
    return rows


def _inner(kind: Any) -> Any:
    """The type of a column's values, or of the values in its lists."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return kind.value_type if is_list else kind


def _metadata(column: Any, name: str, kind: type, path: Path) -> np.ndarray:
    """A column of whole (`kind` int) or finite numbers, as an array."""
    expected = "whole numbers" if kind is int else "finite numbers"
    if not (pa.types.is_integer(column.type) or (kind is float and pa.types.is_floating(column.type))):
        raise ValueError(f"{path}: column {name!r} is of type {column.type}, expected {expected}; write the file again")
    values = column.to_numpy()  # null becomes NaN
    for row in np.flatnonzero(~np.isfinite(values)):
        value = column[row].as_py()
        raise ValueError(
            f"{path}: column {name!r} is {'null' if value is None else value} in row {row}, expected {expected}; "
            "write the file again"
        )
    return values


def _text(column: Any, name: str, path: Path) -> list[Any]:
    """A column of strings or lists of strings, as a list."""
    if not (pa.types.is_string(_inner(column.type)) or pa.types.is_large_string(_inner(column.type))):
        raise ValueError(f"{path}: column {name!r} is of type {column.type}, expected lists of strings")
    try:
        return column.to_pylist()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: column {name!r} is not UTF-8 ({error}); write the file again") from error


def _read_table(path: Path, columns: list[str], rows: Any = None) -> pa.Table:
    """These columns; of all rows, or of those that the expression `rows` is true for."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; is the copy of the data set complete?")
    try:
        names = pq.read_schema(path).names
        wrong = [c for c in columns if names.count(c) != 1]
        if wrong:
            how = "is there twice" if wrong[0] in names else "is missing"
            raise ValueError(f"{path}: column {wrong[0]!r} {how}; is this a LeRobot v3 data set?")
        return pq.read_table(path, columns=columns, filters=rows)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read ({error}); fetch the file again") from error
