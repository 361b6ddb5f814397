"""Reader of LeRobot v3 data sets with pyarrow and PyAV only."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["Episode", "LeRobotDataset"]


@dataclass(frozen=True)
class Episode:
    """One episode: its number, its length in frames, the instruction, and the split that info.json puts it in."""

    index: int
    length: int
    task: str
    split: str


@dataclass(frozen=True)
class _Place:
    """Where one episode lies: the data file and its first row, the video file and its time span in seconds."""

    data: Path
    row: int
    video: Path
    start: float
    stop: float


class LeRobotDataset:
    """A LeRobot v3 data set (`codebase_version` "v3.0") with one video stream.

    `episodes` (list of Episode), `fps` (frames and actions per second), `features` (the dict of info.json), `root`.
    An episode is named by its Episode or by its number.

    Args:
        root: the folder that holds `meta/`, `data/` and `videos/`.
        video_key: the feature to read pictures from; needed only where info.json lists several video features.

    Raises:
        FileNotFoundError: a file of the layout is missing.
        ValueError: a file is malformed; the message names the file and the field.
    """

    def __init__(self, root, video_key=None):
        self.root = Path(root)
        info_path = self.root / "meta/info.json"
        info = _read_json(info_path)
        version = _field(info, "codebase_version", str, info_path)
        if not version.startswith("v3"):
            raise ValueError(
                f"{info_path}: codebase_version is {version!r}, expected v3.x; convert the data set with lerobot first"
            )
        self.fps = _field(info, "fps", (int, float), info_path)
        if not self.fps > 0:
            raise ValueError(f"{info_path}: fps is {self.fps}, expected a positive number")
        self.features = _field(info, "features", dict, info_path)
        self._data_path = _field(info, "data_path", str, info_path)
        self._video_path = _field(info, "video_path", str, info_path)
        splits = _ranges(_field(info, "splits", dict, info_path), info_path)

        videos = sorted(k for k, v in self.features.items() if isinstance(v, dict) and v.get("dtype") == "video")
        if video_key is None and len(videos) == 1:
            video_key = videos[0]
        if video_key not in videos:
            raise ValueError(f"{info_path}: video_key is {video_key!r}, expected one of {videos}; pass video_key=...")
        self.video_key = video_key

        files = sorted((self.root / "meta/episodes").glob("chunk-*/file-*.parquet"))
        if not files:
            raise FileNotFoundError(f"{self.root}/meta/episodes/chunk-*/file-*.parquet: none; is the copy complete?")
        video = f"videos/{video_key}/"
        columns = ["episode_index", "tasks", "length", "data/chunk_index", "data/file_index", "dataset_from_index"]
        columns += [video + name for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]
        rows = [row for file in files for row in _read_table(file, columns).to_pylist()]
        rows.sort(key=lambda row: row["episode_index"])
        total = _field(info, "total_episodes", int, info_path)
        if [row["episode_index"] for row in rows] != list(range(total)):
            raise ValueError(
                f"{info_path}: total_episodes is {total}, but meta/episodes lists {len(rows)}; fetch both again"
            )

        # rows of a data file count from its own first episode, dataset_from_index from the first of all
        first = {}
        for row in rows:
            key = row["data/chunk_index"], row["data/file_index"]
            first[key] = min(first.get(key, row["dataset_from_index"]), row["dataset_from_index"])
        self.episodes = []
        self._places = []
        for row in rows:
            index = row["episode_index"]
            if not row["tasks"]:
                raise ValueError(f"{files[0]}: tasks of episode {index} is empty, expected one instruction")
            split = next((name for name, span in splits.items() if index in span), "")
            self.episodes.append(Episode(index, row["length"], row["tasks"][0], split))
            chunk, file = row["data/chunk_index"], row["data/file_index"]
            self._places.append(
                _Place(
                    data=self.root / self._data_path.format(chunk_index=chunk, file_index=file),
                    row=row["dataset_from_index"] - first[chunk, file],
                    video=self.root
                    / self._video_path.format(
                        video_key=video_key,
                        chunk_index=row[video + "chunk_index"],
                        file_index=row[video + "file_index"],
                    ),
                    start=row[video + "from_timestamp"],
                    stop=row[video + "to_timestamp"],
                )
            )
        self._tables = {}

    @cached_property
    def stats(self):
        """meta/stats.json: {feature: {"min" | "max" | "mean" | "std" | "count": nested lists}}, over all splits."""
        return _read_json(self.root / "meta/stats.json")

    def action(self, episode):
        """float32 [T, A]: the action that is executed at each frame, in the units of the data set.

        Raises IndexError for an unknown episode, FileNotFoundError or ValueError as the class does.
        """
        return self._column(episode, "action")

    def state(self, episode):
        """float32 [T, S]: `observation.state` before each action. Raises as `action` does."""
        return self._column(episode, "observation.state")

    def frames(self, episode, every=1):
        """uint8 [ceil(T / every), H, W, 3]: the RGB picture before each `every`-th action, decoded from the video.

        Raises ValueError for `every` below 1, else as `action` does.
        """
        import av  # here: whatever reads no video, the GPU benchmarks among it, runs without PyAV

        if every < 1:
            raise ValueError(f"LeRobotDataset.frames: every is {every}, expected 1 or more")
        number = self._number(episode)
        place, length = self._places[number], self.episodes[number].length
        if not place.video.exists():
            raise FileNotFoundError(f"{place.video}: not found; is the copy of the data set complete?")
        height, width = self.features[self.video_key]["shape"][:2]
        out = np.empty((-(-length // every), height, width, 3), dtype=np.uint8)
        count = 0
        # half a frame of slack: timestamps are rounded to the stream's time base
        start, stop = place.start - 0.5 / self.fps, place.stop - 0.5 / self.fps
        try:
            with av.open(str(place.video)) as container:
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                container.seek(int(place.start / stream.time_base), stream=stream)  # to the key frame at or before it
                for frame in container.decode(stream):
                    if frame.time < start:
                        continue
                    if frame.time >= stop or count == length:
                        break
                    if (frame.height, frame.width) != (height, width):
                        raise ValueError(
                            f"{place.video}: frames are {frame.height} x {frame.width}, info.json: {height} x {width}"
                        )
                    if count % every == 0:
                        out[count // every] = frame.to_ndarray(format="rgb24")
                    count += 1
        except av.FFmpegError as error:
            raise ValueError(f"{place.video}: cannot be decoded ({error}); fetch the file again") from error
        if count != length:
            raise ValueError(f"{place.video}: episode {number} has {count} frames, meta/episodes says {length}")
        return out

    def _number(self, episode):
        number = episode.index if isinstance(episode, Episode) else int(episode)
        if not 0 <= number < len(self.episodes):
            raise IndexError(f"episode {number} does not exist; the data set has {len(self.episodes)}")
        return number

    def _column(self, episode, name):
        number = self._number(episode)
        place, length = self._places[number], self.episodes[number].length
        if place.data not in self._tables:
            self._tables[place.data] = _read_table(place.data, ["episode_index", "action", "observation.state"])
        table = self._tables[place.data].slice(place.row, length)
        if table["episode_index"].to_pylist() != [number] * length:
            raise ValueError(
                f"{place.data}: episode_index of episode {number} does not match meta/episodes; fetch both again"
            )
        values = np.array(table[name].to_pylist(), dtype=np.float32)
        return values.reshape(length, -1)


def _read_json(path):
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; pass the folder that holds meta/, data/ and videos/")
    try:
        value = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def _field(info, name, kind, path):
    if name not in info:
        raise ValueError(f"{path}: field {name!r} is missing; is this a LeRobot v3 data set?")
    # bool is an int to Python
    if not isinstance(info[name], kind) or isinstance(info[name], bool):
        raise ValueError(f"{path}: field {name!r} is {info[name]!r}, of type {type(info[name]).__name__}")
    return info[name]


def _ranges(splits, path):
    out = {}
    for name, text in splits.items():
        start, colon, stop = str(text).partition(":")
        if not (colon and start.isdigit() and stop.isdigit()):
            raise ValueError(f'{path}: splits[{name!r}] is {text!r}, expected episode numbers "start:stop"')
        out[name] = range(int(start), int(stop))
    return out


def _read_table(path, columns):
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; is the copy of the data set complete?")
    try:
        names = pq.read_schema(path).names
        missing = [c for c in columns if c not in names]
        if missing:
            raise ValueError(f"{path}: column {missing[0]!r} is missing; is this a LeRobot v3 data set?")
        return pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path}: cannot be read ({error}); fetch the file again") from error
