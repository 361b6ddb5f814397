"""Two processes and micro-batches: the steps of one process, whatever is sharded, split or computed again."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.train.conftest import TINY, TINY_MODEL
from wam_models.data import ClipDataset, LeRobotDataset
from wam_models.evaluate import evaluate
from wam_models.rollout.policy import Policy
from wam_models.train import TrainConfig, train
from wam_models.train.engine import EngineConfig
from wam_models.train.periodic import PeriodicEvaluation
from wam_models.train.trainer import Trainer

CPU = torch.device("cpu")
CONFIG = TrainConfig.from_dict(TINY | {"batch": 4, "steps": 3, "model": TINY_MODEL | {"layers": 2}})
FIELDS = ("loss", "video_loss", "action_loss", "gradient", "rate", "tokens")


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


@pytest.mark.parametrize(
    "changes",
    [
        {"recompute": "block"},
        {"recompute": "selective"},
        pytest.param({"compile": "aot_eager"}, marks=pytest.mark.slow),
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_what_saves_memory_or_time_changes_no_step(changes, one, root):
    config = with_engine(**changes)
    trainer = Trainer(config, ClipDataset(root), seed=3, device=CPU)
    assert {p.dtype for p in trainer.learner.parameters()} == {torch.float32}
    stack = trainer.model.packed_block_stack
    assert (stack.checkpoint_activations, stack.selective) == (
        config.engine.recompute != "none",
        config.engine.recompute == "selective",
    )
    done = trainer.run(stop=lambda: False, progress=False)
    found = [[row[f] for f in FIELDS] for row in done.log], dict(done.policy.model.state_dict())
    if config.engine.precision == "bf16":
        assert found[0] != one[0]
        torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(one[0]), rtol=0.05, atol=0)
    else:
        check(found, one)


def saved_and_resumed(root, folder, steps, resume):
    """A run up to a step, alone or on all ranks, from a checkpoint where there is one."""
    policy, found = Policy.load(folder / "checkpoint") if resume else (None, None)
    data = ClipDataset(root, None if policy is None else policy.codec)
    done = train(replace(CONFIG, steps=steps, save_every=2), data, seed=3, out=folder, resume=found, progress=False)
    return [[row[f] for f in FIELDS] for row in done.log], dict(done.policy.model.state_dict())


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_processes(two, one, root, tmp_path):
    """Two, one, two: each adds a step, and all are those of one process; on as many, bit for bit."""
    first = two(saved_and_resumed, root, tmp_path, 1, False)[0]
    second = saved_and_resumed(root, tmp_path, 2, True)
    third, other = two(saved_and_resumed, root, tmp_path, 3, True)
    check((first[0] + second[0] + third[0], third[1]), one)
    shutil.rmtree(tmp_path / "checkpoint")
    (tmp_path / "log.jsonl").unlink()
    two(saved_and_resumed, root, tmp_path, 2, False)
    again = two(saved_and_resumed, root, tmp_path, 3, True)[0]
    whole = two(trained, root, CONFIG)[0]
    assert again[0] == whole[0][2:] and all(torch.equal(again[1][k], v) for k, v in whole[1].items())


def test_processes_that_do_not_divide_are_refused(two, root):
    for changes, message in (
        ({"replicas": 3}, "engine.replicas must divide the 2 processes of this run, got 3"),
        ({"accumulation": 4}, "batch must be a multiple of 8, 4 micro-batches of 2 processes"),
    ):
        assert all(message in found for found in two(refused, root, with_engine(**changes)))
    with pytest.raises(ValueError, match="compile must name a backend of torch.compile, of .*, got 'fast'"):
        EngineConfig(compile="fast")


def refused(root, config):
    with pytest.raises(ValueError) as error:
        Trainer(config, ClipDataset(root), seed=0, device=CPU)
    return str(error.value)


def test_micro_batches_take_the_steps_of_one_batch(one, root):
    check(trained(root, with_engine(accumulation=4)), one)


def evaluated(root, config):
    """What a rollout on a recorded episode is off by, of a model that is sharded over the ranks."""
    dataset = LeRobotDataset(root)

    def measure(policy, step):
        policy = replace(policy, rollout=replace(policy.rollout, chunk_size=1))
        clips = [policy.clip(dataset, 0)]
        row = evaluate(policy, clips, chunks=2, cases=[("joint", "joint")], timed=1, progress=False).rows[0]
        return {"action_rmse": row.action_rmse, "frame_rmse": row.frame_rmse}

    trainer = Trainer(config, ClipDataset(root), seed=3, device=CPU, evaluation=PeriodicEvaluation(3, measure))
    found = trainer.run(stop=lambda: False, progress=False).log[-1]["evaluation"]
    return {name: found[name] for name in ("action_rmse", "frame_rmse")}


def test_a_sharded_model_rolls_out(two, root):
    first, second = two(evaluated, root, CONFIG)
    assert first == second == pytest.approx(evaluated(root, CONFIG), rel=1e-4)
