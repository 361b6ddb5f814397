"""Two processes and micro-batches: the steps of one process, whatever is sharded, split or computed again."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.train.conftest import TINY, TINY_MODEL
from wam_models.data import ClipDataset
from wam_models.train import TrainConfig
from wam_models.train.engine import EngineConfig
from wam_models.train.trainer import Trainer

CPU = torch.device("cpu")
CONFIG = TrainConfig.from_dict(TINY | {"batch": 4, "steps": 3, "model": TINY_MODEL | {"layers": 2}})
FIELDS = ("loss", "video_loss", "action_loss", "gradient", "rate")


def with_engine(**changes):
    return replace(CONFIG, engine=EngineConfig(**changes))


def trained(root, config, seed=3):
    """Log and averaged weights of a run, and what the trainer shards."""
    trainer = Trainer(config, ClipDataset(root), seed=seed, device=CPU)
    done = trainer.run(stop=lambda: False, progress=False)
    kinds = {type(p) for p in trainer.learner.parameters()}
    assert kinds == ({DTensor} if dist.is_initialized() else {torch.nn.Parameter}), kinds
    return [[row[f] for f in FIELDS] for row in done.log], dict(done.policy.model.state_dict())


@pytest.fixture(scope="module")
def one(root):
    return trained(root, CONFIG)


def check(found, expected, tolerance=1e-6):
    log, weights = found
    assert len(log) == len(expected[0])
    torch.testing.assert_close(
        torch.tensor(log, dtype=torch.float64),
        torch.tensor(expected[0], dtype=torch.float64),
        rtol=tolerance,
        atol=tolerance,
    )
    for name, value in expected[1].items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=20 * tolerance, msg=name)


@pytest.mark.parametrize("changes", [{}, {"accumulation": 2}, {"replicas": 2}, {"context_parallel": 2}], ids=str)
def test_two_processes_take_the_steps_of_one(changes, two, one, root):
    first, second = two(trained, root, with_engine(**changes))
    assert first[0] == second[0]
    check(first, one)


def test_micro_batches_take_the_steps_of_one_batch(one, root):
    check(trained(root, with_engine(accumulation=4)), one)
