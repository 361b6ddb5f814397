"""Damaged data sets, through ``wam rollout`` and ``wam train``."""

import pytest

from tests.data import tiny

from . import cases
from .cases import EPISODES, GONE, INFO, ROLLOUT, ROWS, TRAIN, VIDEO, Accepted, action, column, episodes, info, raw

SHAPE = ("features", tiny.KEY, "shape")
NAN, INF = float("nan"), float("inf")
INFO_JSON = {
    "empty": (raw(INFO, b""), "info.json: not valid JSON"),
    "truncated": (raw(INFO, lambda old: old[:40]), "info.json: not valid JSON"),
    "not UTF-8": (raw(INFO, b'{"fps": "\xe9"}'), "info.json: not valid JSON", "utf-8"),
    "nested too deep": (raw(INFO, b'{"a":' * 100_000), "info.json: not valid JSON"),
    "a key twice": (raw(INFO, lambda old: b'{"fps": 5,' + old[1:]), "info.json", "key 'fps' twice"),
    "a list": (raw(INFO, b"[]"), "info.json: holds a list, expected an object"),
    "missing": (raw(INFO, GONE), "info.json: not found"),
    "a folder": (cases.directory(INFO), "info.json"),
    "codebase_version old": (info("codebase_version", "v1.6"), "info.json: codebase_version is 'v1.6', expected v2"),
    "codebase_version a number": (info("codebase_version", 3), "info.json: field 'codebase_version' is 3"),
    "codebase_version missing": (info("codebase_version", GONE), "info.json: field 'codebase_version' is missing"),
    "fps missing": (info("fps", GONE), "info.json: field 'fps' is missing"),
    "fps a string": (info("fps", "20"), "info.json: field 'fps' is '20'"),
    "fps true": (info("fps", True), "info.json: field 'fps' is True"),
    "fps null": (info("fps", None), "info.json: field 'fps' is None"),
    "fps 0": (info("fps", 0), "info.json: fps is 0, expected a positive number"),
    "fps NaN": (info("fps", NAN), "info.json: fps is nan, expected a positive number"),
    "fps Infinity": (info("fps", INF), "info.json: fps is inf, expected a positive number"),
    "fps beyond floats": (info("fps", 10**400), "info.json: fps is 1000", "expected a positive number"),
    "fps denormal": (info("fps", 5e-324), "info.json: fps is 5e-324, expected a positive number"),
    "fps another": (info("fps", 30), "file-000.parquet", "length of episode 0", "30 fps"),
    "features missing": (info("features", GONE), "info.json: field 'features' is missing"),
    "features a list": (info("features", []), "info.json: field 'features' is []"),
    "features without a camera": (info("features", {}), "info.json", "no camera"),
    "camera null": (info(("features", tiny.KEY), None), "info.json", "no camera"),
    "camera of another type": (info(("features", tiny.KEY, "dtype"), "float32"), "info.json", "no camera"),
    "shape missing": (info(SHAPE, GONE), "info.json", "has shape None, expected [height, width, 3]"),
    "shape a string": (info(SHAPE, "32x64"), "info.json", "has shape '32x64'"),
    "shape of two": (info(SHAPE, [32, 64]), "info.json", "has shape [32, 64]"),
    "shape of floats": (info(SHAPE, [32.0, 64.0, 3]), "info.json", "has shape [32.0, 64.0, 3]"),
    "shape of nothing": (info(SHAPE, [0, 64, 3]), "info.json", "has shape [0, 64, 3]"),
    "shape turned": (info(SHAPE, [64, 32, 3]), "64 x 32"),
    "shape beyond memory": (info(SHAPE, [10**7, 10**7, 3]), "10000000 x 10000000"),
    "data_path unknown part": (info("data_path", "data/{foo}.parquet"), "info.json: data_path", "{chunk_index}"),
    "data_path without name": (info("data_path", "{}"), "info.json: data_path", "{chunk_index}"),
    "data_path open": (info("data_path", "data/{chunk_index"), "info.json: data_path", "{chunk_index}"),
    "data_path of attributes": (info("data_path", "{chunk_index.real.x}"), "info.json: data_path"),
    "data_path a number": (info("data_path", 3), "info.json: field 'data_path' is 3"),
    "data_path missing": (info("data_path", GONE), "info.json: field 'data_path' is missing"),
    "data_path elsewhere": (info("data_path", "rows/{chunk_index}.parquet"), "rows/0.parquet: not found"),
    "data_path too long": (info("data_path", "a" * 300), "aaa: File name too long"),
    "data_path with a NUL": (info("data_path", "a\0b"), "not found"),
    "data_path too wide": (info("data_path", "{chunk_index:99999999999d}"), "not enough memory"),
    "video_path unknown part": (info("video_path", "{episode}.mp4"), "info.json: video_path", "{video_key}"),
    "video_path null": (info("video_path", None), "info.json: field 'video_path' is None"),
    "splits missing": (info("splits", GONE), "info.json: field 'splits' is missing"),
    "splits a list": (info("splits", ["0:3"]), "info.json: field 'splits' is ['0:3']"),
    "splits a word": (info("splits.train", "first"), "info.json: splits['train'] is 'first'"),
    "splits a number": (info("splits.train", 3), "info.json: splits['train'] is 3"),
    "splits negative": (info("splits.train", "-1:3"), "info.json: splits['train'] is '-1:3'"),
    "splits overlap": (info("splits.held_out", "2:4"), "info.json: splits", "both hold episode 2"),
    "total_episodes more": (info("total_episodes", 5), "info.json: total_episodes is 5", "lists 4"),
    "total_episodes 0": (info("total_episodes", 0), "info.json: total_episodes is 0"),
    "total_episodes a string": (info("total_episodes", "4"), "info.json: field 'total_episodes' is '4'"),
    "action shape a string": (info("features.action.shape", "7"), "info.json: features['action'] has shape '7'"),
    "action shape another": (info("features.action.shape", [6]), "file-001.parquet: action of episode 3", "7 numbers"),
}
FROM, TO = (f"videos/{tiny.KEY}/{name}_timestamp" for name in ("from", "to"))
CHUNK = f"videos/{tiny.KEY}/chunk_index"
FILE = "episodes/chunk-000/file-000.parquet"
EPISODES_PARQUET = {
    "empty": (raw(EPISODES, b""), FILE, "cannot be read"),
    "truncated": (raw(EPISODES, lambda old: old[:-30]), FILE, "cannot be read"),
    "garbage": (raw(EPISODES, b"no parquet at all"), FILE, "cannot be read"),
    "missing": (raw(EPISODES, GONE), "meta/episodes", "none"),
    "folder missing": (cases.removed("data/meta/episodes"), "meta/episodes", "none"),
    "length missing": (column(EPISODES, "length", GONE), FILE, "column 'length' is missing"),
    "length a string": (column(EPISODES, "length", lambda v: [str(x) for x in v]), FILE, "'length' is of type string"),
    "length a float": (column(EPISODES, "length", lambda v: [x + 0.5 for x in v]), FILE, "'length' is of type double"),
    "length null": (episodes("length", None), FILE, "'length' is null in row 3"),
    "length 0": (episodes("length", 0), FILE, "length of episode 3 is 0"),
    "length negative": (episodes("length", -18), FILE, "length of episode 3 is -18"),
    "length less": (episodes("length", 10), FILE, "length of episode 3 is 10"),
    "length more": (episodes("length", 19), FILE, "length of episode 3 is 19"),
    "episode_index null": (episodes("episode_index", None), FILE, "'episode_index' is null in row 3"),
    "episode_index with a gap": (episodes("episode_index", 5), FILE, "episode_index is 5 where 3 comes next"),
    "episode_index repeated": (episodes("episode_index", 2), FILE, "episode_index is 2 where 3 comes next"),
    "episode_index as text": (column(EPISODES, "episode_index", lambda v: ["0"] * 4), FILE, "of type string"),
    "tasks missing": (column(EPISODES, "tasks", GONE), FILE, "column 'tasks' is missing"),
    "tasks null": (episodes("tasks", None), FILE, "tasks of episode 3 is None"),
    "tasks empty": (episodes("tasks", []), FILE, "tasks of episode 3 is []"),
    "tasks of null": (episodes("tasks", [None]), FILE, "tasks of episode 3 is [None]"),
    "tasks of numbers": (column(EPISODES, "tasks", lambda v: [[1]] * 4), FILE, "column 'tasks' is of type list<"),
    "tasks too long": (episodes("tasks", ["lift it " * 20]), "words"),
    "chunk_index null": (episodes(CHUNK, None), FILE, f"'{CHUNK}' is null in row 3"),
    "chunk_index elsewhere": (episodes(CHUNK, 7), "chunk-007/file-000.mp4: not found"),
    "chunk_index negative": (episodes(CHUNK, -1), "chunk--01/file-000.mp4: not found"),
    "data/file_index a float": (column(EPISODES, "data/file_index", lambda v: [1.0] * 4), FILE, "'data/file_index'"),
    "data/file_index elsewhere": (episodes("data/file_index", 7), "file-007.parquet: not found"),
    "data/file_index another": (episodes("data/file_index", 0), "file-000.parquet: episode_index is 3 in 0 rows"),
    "from_timestamp null": (episodes(FROM, None), FILE, f"'{FROM}' is null in row 3"),
    "from_timestamp NaN": (episodes(FROM, NAN), FILE, f"'{FROM}' is nan in row 3"),
    "from_timestamp negative": (episodes(FROM, -1.0), FILE, "length of episode 3", "from_timestamp -1"),
    "from_timestamp as text": (column(EPISODES, FROM, lambda v: ["0"] * 4), FILE, f"'{FROM}' is of type string"),
    "to_timestamp Infinity": (episodes(TO, INF), FILE, f"'{TO}' is inf in row 3"),
    "to_timestamp before": (episodes(TO, 0.0), FILE, "length of episode 3", "to_timestamp 0"),
    "beyond the video": (
        lambda folder: (episodes(FROM, 1000.0)(folder), episodes(TO, 1000.9)(folder)),
        "file-000.mp4: episode 3 has 0 frames",
    ),
    "start unused": (episodes("dataset_from_index", None), Accepted("rows are found by their episode_index")),
}
DATA = "chunk-000/file-001.parquet"
VALUES = tiny.actions(cases.EPISODE)[5].tolist()
DATA_PARQUET = {
    "empty": (raw(ROWS, b""), DATA, "cannot be read"),
    "truncated": (raw(ROWS, lambda old: old[: len(old) // 2]), DATA, "cannot be read"),
    "garbage": (raw(ROWS, b"PAR1 garbage PAR1"), DATA, "cannot be read"),
    "missing": (raw(ROWS, GONE), DATA, "not found"),
    "no rows": (raw(ROWS, GONE), DATA),
    "action missing": (column(ROWS, "action", GONE), DATA, "column 'action' is missing"),
    "action NaN": (
        action([*VALUES[:2], NAN, *VALUES[3:]]),
        DATA,
        "action of episode 3 is nan in row 25",
        "dimension 2",
    ),
    "action Inf": (action([INF, *VALUES[1:]]), DATA, "action of episode 3 is inf in row 25", "dimension 0"),
    "action beyond float32": (action([1e300, *VALUES[1:]]), DATA, "action of episode 3 is 1e+300 in row 25"),
    "action null": (action(None), DATA, "action of episode 3 is null in row 25"),
    "action with a null": (action([None, *VALUES[1:]]), DATA, "action of episode 3 is null in row 25", "dimension 0"),
    "action short": (action(VALUES[:5]), DATA, "action of episode 3 has 5 numbers in row 25, expected 7"),
    "action empty": (action([]), DATA, "action of episode 3 has 0 numbers in row 25, expected 7"),
    "action as text": (column(ROWS, "action", lambda v: ["0.5"] * len(v)), DATA, "'action' is of type string"),
    "action of bools": (column(ROWS, "action", lambda v: [[True] * 7] * len(v)), DATA, "'action' is of type list"),
    "action one number": (column(ROWS, "action", lambda v: [0.5] * len(v)), DATA, "has 1 numbers"),
    "episode_index missing": (column(ROWS, "episode_index", GONE), DATA, "column 'episode_index' is missing"),
    "episode_index shifted": (column(ROWS, "episode_index", lambda v: [x - 1 for x in v]), DATA, "is 3 in 0 rows"),
    "episode_index null": (column(ROWS, "episode_index", lambda v: [None, *v[1:]]), DATA, "'episode_index' is null"),
    "episode_index as text": (column(ROWS, "episode_index", lambda v: [str(x) for x in v]), DATA, "of type string"),
    "a row too many": (column(ROWS, "episode_index", lambda v: [3, *v[1:]]), DATA, "episode_index is 3 in 19 rows"),
    "state missing": (column(ROWS, "observation.state", GONE), Accepted("a rollout reads pictures and actions")),
}
MP4 = "file-000.mp4"
VIDEO_MP4 = {
    "empty": (raw(VIDEO, b""), MP4, "cannot be decoded"),
    "truncated": (raw(VIDEO, lambda old: old[: len(old) // 2]), MP4, "cannot be decoded"),
    "garbage": (raw(VIDEO, b"no video at all" * 100), MP4, "cannot be decoded"),
    "a picture": (raw(VIDEO, b"P6 2 2 255 " + bytes(12)), MP4),
    "missing": (raw(VIDEO, GONE), MP4, "not found"),
    "frames zeroed": (raw(VIDEO, lambda old: old[:2000] + bytes(len(old) - 4000) + old[-2000:]), MP4),
}
OTHERS = {
    "stats.json missing": (raw("data/meta/stats.json", GONE), Accepted("nothing of a rollout reads it")),
    "stats.json garbage": (raw("data/meta/stats.json", b"{"), Accepted("nothing of a rollout reads it")),
    "no folder": (cases.removed("data"), "meta/info.json: not found"),
}
TABLE = {
    f"{part}: {name}": row
    for part, rows in (
        ("info.json", INFO_JSON),
        ("episodes", EPISODES_PARQUET),
        ("data", DATA_PARQUET),
        ("mp4", VIDEO_MP4),
        ("others", OTHERS),
    )
    for name, row in rows.items()
}
# what concerns the training split, or all episodes
TRAINING = {
    "no training episode": (info("splits", {"held_out": "0:4"}), "info.json", 'splits has no episode in "train"'),
    "splits beyond the end": (info("splits.train", "9:12"), "info.json", 'splits has no episode in "train"'),
    "NaN in an action": (
        action([NAN, *VALUES[1:]], row=5), DATA, "action of episode 2 is nan in row 5", "dimension 0",
    ),
    "video missing": (raw(VIDEO, GONE), MP4, "not found"),
    "pictures no multiple": (info(SHAPE, [30, 64, 3]), "info.json", "30 x 64, expected multiples of 16"),
}  # fmt: skip


@pytest.mark.parametrize("damage, words", [(row[0], row[1:]) for row in TABLE.values()], ids=TABLE)
def test_rollout_on_a_damaged_data_set(damage, words, folder, capsys):
    cases.check(folder, capsys, ROLLOUT, damage, words)


@pytest.mark.parametrize("damage, words", [(row[0], row[1:]) for row in TRAINING.values()], ids=TRAINING)
def test_training_on_a_damaged_data_set(damage, words, folder, capsys):
    cases.check(folder, capsys, TRAIN, damage, words)
