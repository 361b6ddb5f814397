"""Writer of LeRobot v3 data sets: numbers in Parquet, pictures as PNG beside them, which loses nothing."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .lerobot import STATE

PICTURES = "observation.images."  # how the features of cameras begin
PNG_STATS_EVERY = 10  # pictures that statistics are made from
PICTURE_ROWS = 1000  # of a row group: whoever reads the pictures of an episode reads whole row groups


@dataclass(frozen=True, eq=False)
class Recorded:
    """One recorded episode; row t is what was observed before action t.

    Args:
        task: The instruction.
        state: Float32 ``[T, S]``.
        action: Float32 ``[T, A]``.
        pictures: Camera to uint8 ``[T, H, W, 3]``; the same cameras and sizes in all episodes.
        origin: Where it comes from, of what JSON holds: a column ``wam/KEY`` each.
    """

    task: str
    state: np.ndarray
    action: np.ndarray
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)


def write_lerobot(
    out: Path,
    episodes: Sequence[Recorded],
    *,
    fps: float,
    splits: Mapping[str, tuple[int, int]],
    state_names: Sequence[str],
    action_names: Sequence[str],
    robot: str,
    picture_every: int = 1,
    texts: Mapping[Path, str] | None = None,
) -> None:
    """Write a data set that :class:`~.lerobot.LeRobotDataset` and lerobot read; ``out`` is all there or not at all.

    Args:
        out: Its folder, which must not exist.
        episodes: At least one.
        fps: Rows, and so actions, a second.
        splits: Name to (first episode, one past the last).
        state_names: Of the numbers of the state.
        action_names: Of the numbers of an action.
        robot: ``robot_type`` of info.json.
        picture_every: Rows from one picture to the next; the rows between repeat it. ``picture_every`` of the cameras'
            features in info.json, where it is not 1.
        texts: Further files, by their path in the folder.

    Raises:
        OSError: no room, or no right to write.
    """
    partial = out.with_name(out.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    tasks = list(dict.fromkeys(e.task for e in episodes))
    lengths = np.array([len(e.action) for e in episodes])
    ends = lengths.cumsum()
    rows = {
        STATE: np.concatenate([e.state for e in episodes]),
        "action": np.concatenate([e.action for e in episodes]),
        "timestamp": np.concatenate([np.arange(n) / fps for n in lengths]).astype(np.float32),
        "frame_index": np.concatenate([np.arange(n) for n in lengths]),
        "episode_index": np.repeat(np.arange(len(episodes)), lengths),
        "index": np.arange(ends[-1]),
        "task_index": np.repeat([tasks.index(e.task) for e in episodes], lengths),
    }
    cameras = {PICTURES + name: size.shape[1:3] for name, size in episodes[0].pictures.items()}
    columns = {name: _column(values) for name, values in rows.items()}
    columns |= {name: _pngs([e.pictures[name.removeprefix(PICTURES)] for e in episodes]) for name in cameras}
    _write(columns, partial / "data/chunk-000/file-000.parquet", rows=PICTURE_ROWS if cameras else None)
    _write(
        {"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks)},
        partial / "meta/tasks.parquet",
        index="task",
    )
    _write(_episode_table(episodes, rows, ends), partial / "meta/episodes/chunk-000/file-000.parquet")
    stats = {name: _stats(values) for name, values in rows.items()}
    stats |= {name: _picture_stats([e.pictures[name.removeprefix(PICTURES)] for e in episodes]) for name in cameras}
    (partial / "meta/stats.json").write_text(json.dumps(stats, indent=1) + "\n")
    names = {STATE: list(state_names), "action": list(action_names)}
    features: dict[str, dict[str, Any]] = {
        name: {"dtype": str(v.dtype), "shape": list(v.shape[1:]) or [1], "names": names.get(name)}
        for name, v in rows.items()
    }
    for name, (height, width) in cameras.items():
        features[name] = {"dtype": "image", "shape": [height, width, 3], "names": ["height", "width", "channels"]}
        if picture_every > 1:
            features[name]["picture_every"] = picture_every
    info = {
        "codebase_version": "v3.0",
        "robot_type": robot,
        "total_episodes": len(episodes),
        "total_frames": int(ends[-1]),
        "total_tasks": len(tasks),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": int(fps) if fps == int(fps) else fps,
        "splits": {name: f"{first}:{end}" for name, (first, end) in splits.items()},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": features,
    }
    (partial / "meta/info.json").write_text(json.dumps(info, indent=1) + "\n")
    for path, text in (texts or {}).items():
        (partial / path).write_text(text)
    partial.rename(out)


def _episode_table(episodes: Sequence[Recorded], rows: Mapping[str, np.ndarray], ends: np.ndarray) -> dict:
    zeros = pa.array([0] * len(episodes), pa.int64())
    starts = np.concatenate([[0], ends[:-1]])
    table = {
        "episode_index": pa.array(range(len(episodes)), pa.int64()),
        "tasks": pa.array([[e.task] for e in episodes]),
        "length": pa.array(ends - starts),
        "data/chunk_index": zeros,
        "data/file_index": zeros,
        "dataset_from_index": pa.array(starts),
        "dataset_to_index": pa.array(ends),
        "meta/episodes/chunk_index": zeros,
        "meta/episodes/file_index": zeros,
    }
    for key in dict.fromkeys(key for e in episodes for key in e.origin):
        origins = [e.origin.get(key) for e in episodes]
        simple = all(isinstance(v, int | float | str | bool) for v in origins)
        table[f"wam/{key}"] = pa.array(origins if simple else [json.dumps(v) for v in origins])
    for name, values in rows.items():
        own = [_stats(values[a:b]) for a, b in zip(starts, ends, strict=True)]
        table |= {f"stats/{name}/{kind}": pa.array([s[kind] for s in own]) for kind in own[0]}
    return table


def _column(values: np.ndarray) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _pngs(videos: Sequence[np.ndarray]) -> pa.Array:
    from PIL import Image  # here: whatever has no pictures runs without Pillow

    found: list[dict] = []
    last = None
    for picture in (picture for video in videos for picture in video):
        if last is None or not np.array_equal(picture, last):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "png")
            last = picture
        found.append({"bytes": buffer.getvalue(), "path": None})
    return pa.array(found, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def _stats(values: np.ndarray) -> dict[str, list]:
    values = np.asarray(values, np.float64).reshape(len(values), -1)
    found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    return {name: value.tolist() for name, value in found.items()} | {"count": [len(values)]}


def _picture_stats(videos: Sequence[np.ndarray]) -> dict[str, list]:
    """Of colours from 0 to 1, nested ``[3][1][1]`` as the format asks."""
    pixels = np.concatenate([video[::PNG_STATS_EVERY].reshape(-1, 3) for video in videos]) / 255
    found = _stats(pixels)
    count = sum(len(video[::PNG_STATS_EVERY]) for video in videos)
    return {name: [[[x]] for x in value] for name, value in found.items() if name != "count"} | {"count": [count]}


def _write(columns: Mapping[str, pa.Array], path: Path, index: str | None = None, rows: int | None = None) -> None:
    """``index`` names the column that pandas, and so lerobot, takes as index; ``rows`` are those of a row group."""
    table = pa.table(dict(columns))
    if index is not None:
        described = [
            {
                "name": name,
                "field_name": name,
                "pandas_type": "unicode" if name == index else "int64",
                "numpy_type": "object" if name == index else "int64",
                "metadata": None,
            }
            for name in columns
        ]
        pandas = {"index_columns": [index], "column_indexes": [], "columns": described, "pandas_version": "2.2"}
        table = table.replace_schema_metadata({"pandas": json.dumps(pandas)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows, compression="zstd")
