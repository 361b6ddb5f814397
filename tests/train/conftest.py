"""A tiny data set and a config that trains on it in seconds."""

from pathlib import Path

import pytest
import torch

from tests.data import tiny
from tests.processes import Processes
from wam_models.data import ClipDataset
from wam_models.rollout.policy import Policy
from wam_models.train import TrainConfig, train

TINY_MODEL = {
    "hidden": 32,
    "heads": 2,
    "head_dim": 16,
    "layers": 1,
    "ffn": 32,
    "action_hidden": 32,
    "action_ffn": 32,
    "text_dim": 8,
    "freq_dim": 16,
}
# the tiny episodes have 5 or 6 latent frames: one observed, one chunk of 2 to observe, one to predict
TINY = {"model": TINY_MODEL, "frames": 5, "batch": 2, "chunk_sizes": [1, 2], "windows": [3, 6], "steps": 8, "warmup": 2}


def trained(data: ClipDataset, out: Path, **fields) -> Path:
    """The checkpoint of a tiny training."""
    train(TrainConfig.from_dict(TINY | fields), data, out=out, progress=False)
    return out / "checkpoint"


def frozen(checkpoint: Path) -> Policy:
    """The policy of a checkpoint, whose weights need no gradient."""
    policy, _ = Policy.load(checkpoint, training=False)
    policy.model.requires_grad_(False)
    return policy


@pytest.fixture(autouse=True)
def no_trial_of_threads(monkeypatch):
    """Commands leave the number of threads to who has set it; tests/test_threads.py has the trial."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("train") / "tiny")


@pytest.fixture(scope="session")
def data(root):
    return ClipDataset(root)


@pytest.fixture(scope="session")
def config():
    return TrainConfig.from_dict(TINY)


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    """Runs a function in two processes."""
    processes = Processes(tmp_path_factory.mktemp("processes") / "store")
    yield processes
    processes.close()
