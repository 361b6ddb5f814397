"""What the tables of mutations are made of: ways to damage a file, the commands that read it, what must come of it.

A table maps a name to (damage, words...): each must be in the one line on stderr. Or to (damage, Accepted(reason)):
the command runs as if nothing had happened, and why that is right.
"""

import json
import math
import re
import shutil
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from tests.data import tiny
from tests.train.conftest import TINY
from wam_models import cli
from wam_models.training_state import VALUES, SavedState, TrainingState, write_values

CONFIG = TINY | {"chunk_sizes": [1, 1], "batch": 1, "initialisation": "by_hand"}
EPISODE = 3  # the one that is rolled out
INFO, EPISODES = "data/meta/info.json", "data/meta/episodes/chunk-000/file-000.parquet"
ROWS = "data/data/chunk-000/file-001.parquet"  # episodes 2 and 3
VIDEO = f"data/videos/{tiny.KEY}/chunk-000/file-000.mp4"
CHECKPOINT = "run/checkpoint/"
MODEL, EXTRA, SAVED = (CHECKPOINT + name for name in ("model.safetensors", "extra.safetensors", "config.json"))
STATE = CHECKPOINT + "training"
ROLLOUT = f"rollout --checkpoint {{0}}/run/checkpoint --data {{0}}/data --episode {EPISODE} --chunks 1 --out {{0}}/out"
ROLLOUT += " --objective inverse_dynamics"
RESUME = "train --data {0}/data --out {0}/more --resume {0}/run/checkpoint --steps 2"
RESUME_HERE = "train --data {0}/data --out {0}/run --resume {0}/run/checkpoint --steps 2"
TRAIN = "train --data {0}/data --out {0}/more {0}/config.json --steps 1"
GONE = object()  # in place of a value: take the entry away


@dataclass(frozen=True)
class Accepted:
    reason: str


def put(path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # it is a hard link to the sound file
    path.write_bytes(data)


# ---- damages: functions of the folder ----


def raw(name, data):
    """The file holds other bytes; ``data`` may be a function of those it held. GONE takes it away."""

    def damage(folder):
        path = folder / name
        held = path.read_bytes() if path.exists() else b""
        if data is GONE:
            path.unlink()
        else:
            put(path, data(held) if callable(data) else data)

    return damage


def directory(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def change(tree, where, new):
    """Put ``new(old)`` in the place of what is at ``where``, keys or indices; GONE takes it out."""
    *path, last = where
    for key in path:
        tree = tree[key]
    value = new(tree.get(last) if isinstance(tree, dict) else tree[last])
    if value is GONE:
        del tree[last]
    else:
        tree[last] = value


def entry(name, where, value):
    """A JSON file with another value at ``where``, dots between keys."""

    def damage(folder):
        tree = json.loads((folder / name).read_text())
        change(tree, where.split(".") if isinstance(where, str) else where, lambda _: value)
        put(folder / name, json.dumps(tree).encode())

    return damage


def saved(where, value):
    return entry(SAVED, where, value)


def rollout(field, value):
    return entry(SAVED, f"metadata.rollout.{field}", value)


def info(where, value):
    return entry(INFO, where, value)


def trains(where, value):
    return entry("config.json", where, value)


def tensor(name, key, change):
    """A safetensors file with another tensor: of ``change(old)``, a new one, or none."""

    def damage(folder):
        tensors = safetensors.torch.load_file(folder / name)
        if change is GONE:
            del tensors[key]
        else:
            tensors[key] = change(tensors[key]).contiguous() if callable(change) else change
        put(folder / name, safetensors.torch.save(tensors))

    return damage


def every_tensor(name, change):
    def damage(folder):
        tensors = {k: change(v).contiguous() for k, v in safetensors.torch.load_file(folder / name).items()}
        put(folder / name, safetensors.torch.save(tensors))

    return damage


def with_value(index, value):
    """For :func:`tensor`: one number of it replaced."""

    def change(tensor):
        tensor.view(-1)[index] = value
        return tensor

    return change


def column(name, key, change):
    """A parquet file with another column: ``change`` of the list of values, or none."""

    def damage(folder):
        columns = pq.read_table(folder / name).to_pydict()
        if change is GONE:
            del columns[key]
        else:
            columns[key] = change(columns[key])
        (folder / name).unlink()
        pq.write_table(pa.table(columns), folder / name)

    return damage


def episodes(key, value, episode=EPISODE):
    """``meta/episodes`` with another value in the row of an episode."""
    return column(EPISODES, key, lambda values: [value if i == episode else v for i, v in enumerate(values)])


def action(value, row=tiny.LENGTHS[2] + 5):
    """Another action in the data file; the row is of the episode that is rolled out."""
    return column(ROWS, "action", lambda values: [*values[:row], value, *values[row + 1 :]])


def state(name, value):
    """The training state with another tensor; a function changes the old one."""

    def damage(folder):
        saved = SavedState(folder / STATE)
        tensors = {n: torch.empty(size, dtype=saved.dtypes[n]) for n, size in saved.sizes.items()}
        saved.read(tensors)
        change(tensors, [name], value if callable(value) else lambda _: value)
        shutil.rmtree(folder / STATE)
        TrainingState(tensors, {}).write(folder / STATE).result()
        write_values(folder / STATE, saved.values)

    return damage


def value(name, new):
    """The training state with another value."""
    return entry(f"{STATE}/{VALUES}", name, new)


def nothing(folder):
    pass


def removed(name):
    return lambda folder: shutil.rmtree(folder / name)


# ---- what must come of it ----


def check(folder, capsys, command, damage, words) -> None:
    damage(folder)
    code = cli.main(command.format(folder).split())
    out, err = capsys.readouterr()
    errors = [line for line in re.split(r"[\r\n]+", err) if "error" in line]  # progress bars go to stderr too
    if isinstance(words[0], Accepted):
        assert (code, errors) == (0, [])
        found = re.search(r"action error +(\S+)", out)
        assert command != ROLLOUT or (found[1] == "none:" or math.isfinite(float(found[1])))
        return
    assert code == 2 and len(errors) == 1, (code, err)
    assert err.endswith(errors[0] + "\n") and errors[0].startswith(f"wam {command.split()[0]}: error: ")
    assert [w for w in words if w not in errors[0]] == [], errors[0]
    assert len(errors[0]) < 1000
