"""A program of one's own is one row: it trains, and rolls out as its packed forward or is refused by name."""

import pytest
import torch

from tests.programs import HANDED_OVER, JOINT_BOTH_WAYS, JOINT_THEN_ACTION, NEW, RECALL, registered
from wam_kernels import HISTORIES
from wam_models import RolloutConfig, StepConfig, training_step
from wam_models.evaluate import all_cases

from .test_rollout import check_against_one_packed_forward, noises, poisoned, started  # noqa: F401
from .test_training import batch, generator, small_model


@pytest.mark.parametrize("row", NEW, ids=lambda row: row.name)
def test_a_training_step(row):
    with registered(row):
        config, steps = StepConfig(program=row.name, chunk_sizes=(2, 2), windows=(3, 3)), []
        for impl in ("cpu", "reference"):
            model = small_model()
            loss, _ = training_step(model, batch(), generator(), config, impl=impl)
            loss.backward()
            steps.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    for got, expected in zip(*steps, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("history", HISTORIES[:2])
@pytest.mark.parametrize("row", [JOINT_BOTH_WAYS, HANDED_OVER], ids=lambda row: row.name)
def test_a_rollout_equals_one_packed_forward(row, history):
    with registered(row):
        episode = started(row.name, chunk_size=2, window=3, steps=1, history=history)
        check_against_one_packed_forward(episode, 2, 3, 3)


def test_a_request_leaves_out_what_nothing_needs():
    with registered(HANDED_OVER):
        episode = started("handed_over")
        assert episode.propose(want="action", **noises(2, 0)).video is None
        assert episode.propose(want="video", **noises(2, 0)).action is not None


@pytest.mark.parametrize("row, read", [(JOINT_THEN_ACTION, "video"), (RECALL, "action")])
def test_what_has_no_rollout_is_refused_by_name(row, read):
    why = f"{row.name}: noisy action attends to clean {read} of its own chunk, which no earlier stage has made"
    with registered(row, HANDED_OVER):
        with pytest.raises(ValueError, match=rf"program must be one that has a rollout, as .*'{row.name}'; {why}"):
            RolloutConfig(program=row.name)
        cases = all_cases()
        assert ("joint", row.name) not in cases and ("joint", "handed_over") in cases
