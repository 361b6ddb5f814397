"""Saves that stay, the last ones and the best; a disk without room, in one process and in two."""

import errno
import os
import resource
import signal
import time
from dataclasses import replace

import pytest
import torch

from tests.train.conftest import TINY
from wam_models import load_checkpoint
from wam_models.data import ClipDataset
from wam_models.rollout.policy import Policy
from wam_models.train import TrainConfig, kept, train
from wam_models.train.periodic import PeriodicEvaluation

CONFIG = TrainConfig.from_dict(TINY | {"batch": 4, "save_every": 1, "keep": 2, "steps": 6})
SCORES = {2: 1.0, 3: 5.0, 4: 2.0, 6: 5.0}


def evaluation(scores=SCORES):
    return PeriodicEvaluation(1, lambda policy, step: {"score": scores.get(step)}, lambda found: found["score"])


def steps_of(out):
    return {p.name: load_checkpoint(p).metadata["training"]["step"] for p in sorted((out / kept.KEPT).iterdir())}


def test_the_last_saves_and_the_best_stay(data, tmp_path):
    whole = train(CONFIG, data, out=tmp_path, evaluation=evaluation(), progress=False)
    assert steps_of(tmp_path) == {f"step-{s:08d}": s for s in (3, 5, 6)}  # a score that is only as good is no better
    assert (tmp_path / kept.BEST).resolve().name == "step-00000003"
    newest, last = tmp_path / kept.KEPT / "step-00000006", tmp_path / "checkpoint"
    assert os.path.samefile(newest / "model.safetensors", last / "model.safetensors")
    # the best is a checkpoint like any: it goes on, into another folder, with the losses of the whole run
    policy, found = Policy.load(tmp_path / kept.BEST)
    rest = train(CONFIG, data, out=tmp_path / "other", resume=found, progress=False)
    assert [row["loss"] for row in rest.log] == [row["loss"] for row in whole.log[3:]]
    assert policy.model.config == CONFIG.model


def test_a_resumed_run_knows_the_best(data, tmp_path):
    short = replace(CONFIG, steps=3)
    train(short, data, out=tmp_path, evaluation=evaluation(), progress=False)
    _, found = Policy.load(tmp_path / "checkpoint")
    train(CONFIG, data, out=tmp_path, resume=found, evaluation=evaluation({5: 4.0}), progress=False)
    assert (tmp_path / kept.BEST).resolve().name == "step-00000003"
    train(short, data, out=tmp_path, overwrite=True, progress=False)
    assert not (tmp_path / kept.BEST).exists() and steps_of(tmp_path) == {f"step-{s:08d}": s for s in (2, 3)}


@pytest.mark.parametrize("where", ["link", "symlink", "rename", "replace", "copytree"])
def test_a_stop_while_it_is_kept_leaves_whole_saves(where, data, tmp_path, monkeypatch):
    """Whatever file operation is the last, what has a step's name in ``checkpoints/`` is whole, and so is the best."""
    config = replace(CONFIG, steps=2)
    train(config, data, out=tmp_path, evaluation=evaluation({1: 1.0, 2: 2.0}), progress=False)

    def stops(*args, **kwargs):
        raise KeyboardInterrupt

    owner = {"link": os, "symlink": os, "rename": os, "replace": os, "copytree": kept.shutil}[where]
    with monkeypatch.context() as patched:
        patched.setattr(owner, where, stops)
        with pytest.raises(KeyboardInterrupt):
            kept.keep_save(tmp_path, 3, last=1, best=True)
    for path in (tmp_path / kept.KEPT).glob("step-????????"):
        load_checkpoint(path)
    load_checkpoint(tmp_path / kept.BEST)
    kept.keep_save(tmp_path, 3, last=1, best=True)
    assert [p.name for p in (tmp_path / kept.KEPT).iterdir()] == ["step-00000003"]


def test_without_links_files_are_copied(data, tmp_path, monkeypatch):
    def refuses(*args):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuses)
    train(replace(CONFIG, steps=2), data, out=tmp_path, progress=False)
    newest = tmp_path / kept.KEPT / "step-00000002"
    assert load_checkpoint(newest).training_state is not None
    assert not os.path.samefile(newest / "config.json", tmp_path / "checkpoint/config.json")


def out_of_room(root, folder, rank):
    """A run whose disk is full for one rank, or the log's, after its third step; what it raises, and in which class."""
    data, steps = ClipDataset(root), []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    here = int(torch.distributed.get_rank()) if torch.distributed.is_initialized() else 0
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def stop():
        steps.append(0)
        if len(steps) == 3 and here == rank:
            while not (folder / "checkpoint/config.json").exists():  # the save of step 2 is written beside the third
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        return False

    config = replace(CONFIG, steps=10, save_every=2, keep=0)
    try:
        with pytest.raises(OSError) as error:
            train(config, data, seed=3, out=folder, stop=stop, progress=False)
        return len(steps), str(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_stops_every_process_and_loses_nothing(rank, two, root, tmp_path):
    found = two(out_of_room, root, tmp_path, rank)
    assert found[0] == found[1]
    done, message = found[0]
    assert done < 10 and ("save_checkpoint: cannot write" in message or "train: cannot write" in message), message
    assert str(tmp_path) in message
    state = load_checkpoint(tmp_path / "checkpoint").training_state
    assert state.values["step"] == 2 and not list((tmp_path / "checkpoint").glob("*.part"))
