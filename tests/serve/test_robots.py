"""Robots in one batch: what one gets follows from what it sent alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from wam_models import RolloutEngine
from wam_models.rollout.robots import Request, RobotBatch

from .policies import CONFIG, made, of_pictures, of_states


def request(rng, observations=1, executed=None, **changes):
    found = {"prompt": "lift", "states": rng.normal(size=(observations, 3)).astype(np.float32)}
    return Request(executed=executed, **found | changes)


def turns(robots, place, others=()):
    """Three requests of one robot, while robots in other places do what they like."""
    rng, noise, found = np.random.default_rng(1), np.random.default_rng(2), []
    last = None
    for turn, observations in enumerate((1, 2, 1)):
        executed = None if last is None else last[: 2 * observations]
        own = {place: request(rng, observations, executed, seed=7)}
        rest = {b: request(noise, prompt="push it") for b in others if turn != 1}
        found.append(robots.act(own | rest)[place])
        last = found[-1]
    return np.stack(found)


def test_an_answer_is_that_of_an_episode_alone():
    """As engine.start, observe and propose give it."""
    policy = of_states()
    alone = turns(RobotBatch(policy, CONFIG), 0)
    assert alone.shape == (3, 4, 2) and alone.dtype == np.float32
    rng, generator = np.random.default_rng(1), torch.Generator().manual_seed(7)
    states = [rng.normal(size=(k, 3)).astype(np.float32) for k in (1, 2, 1)]
    latents = [policy.codec.encode(s)[None] for s in states]
    episode = RolloutEngine(policy.model, CONFIG).start(latents[0], policy.text(["lift"]).detach())
    for turn in range(3):
        if turn:
            count = latents[turn].shape[2]
            given = (torch.from_numpy(alone[turn - 1][: 2 * count]) - policy.action_mean) / policy.action_std
            episode.observe(latents[turn], given.reshape(1, count, 1, 4))
        action = episode.propose(want="action", generator=generator).action
        np.testing.assert_array_equal(policy.denormalize_action(action[0]).reshape(4, 2).numpy(), alone[turn])
    robots = RobotBatch(policy, CONFIG, places=3)
    among = turns(robots, 1, others=(0, 2))
    np.testing.assert_array_equal(turns(robots, 1), among)  # to the bit, whoever asks beside it
    np.testing.assert_allclose(among, alone, rtol=1e-4, atol=1e-5)  # products of other sizes round otherwise


def test_a_robot_that_is_wrong_costs_itself_alone():
    robots, rng = RobotBatch(of_states(), CONFIG, places=4), np.random.default_rng(0)
    good = request(rng, seed=3)
    expected = robots.act({0: good})[0]
    wrong = {
        1: (replace(good, prompt="fly"), "no word of 'fly'"),
        2: (replace(good, states=np.full((1, 3), np.nan)), "states must be finite"),
        3: (replace(good, executed=np.zeros((2, 2))), "executed must be None where no observation was sent"),
    }
    found = robots.act({0: good} | {place: sent for place, (sent, _) in wrong.items()})
    np.testing.assert_array_equal(found[0], expected)
    for place, (_, message) in wrong.items():
        assert isinstance(found[place], ValueError) and message in str(found[place])
    twice = robots.act({0: replace(good, states=np.zeros((2, 3)))})[0]
    assert "an episode begins with 1 observation, got 2; give executed to go on" in str(twice)
    with pytest.raises(ValueError, match="place must be a whole number from 0 to 3, got 4"):
        robots.act({4: good})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"states": None}, r"states must be floats \[K, 3\], got NoneType"),
        ({"states": np.zeros((1, 4))}, r"states must be floats \[K, 3\], got float64 \[1, 4\]"),
        ({"states": np.zeros((0, 3))}, "equally many observations"),
        ({"states": np.full((1, 3), 1e9)}, "within 10000 standard deviations"),
        ({"states": np.zeros((2, 3))}, "equally many observations"),
        ({"pictures": {}}, r"pictures must have \['top'\], got none of \['top'\]"),
        ({"pictures": {"top": np.zeros((1, 8, 16, 3), np.uint8)}}, r"must be uint8 \[K, 16, 16, 3\]"),
        ({"pictures": {"top": np.zeros((1, 16, 16, 3))}}, "got float64"),
        ({"pictures": {"top": np.zeros((2, 16, 16, 3), np.uint8)}}, "equally many observations"),
        ({"executed": np.zeros((3, 2))}, r"executed must be floats \[2, 2\]"),
        ({"executed": np.full((2, 2), 1e30)}, "executed must be within"),
        ({"committed": np.zeros((1, 2))}, "a multiple of 2 actions, at most 4, got 1"),
        ({"committed": np.zeros((6, 2))}, "a multiple of 2 actions, at most 4, got 6"),
        ({"committed": np.zeros((2, 3))}, r"committed must be floats \[K, 2\]"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": "0"}, "seed must be a whole number"),
    ],
    ids=str,
)
def test_what_is_refused(pictures, changes, message):
    robots, sent = pictures
    assert not isinstance(robots.act({0: sent})[0], ValueError)
    found = robots.act({0: replace(sent, **changes)})[0]
    assert isinstance(found, ValueError)
    with pytest.raises(ValueError, match=message):
        raise found


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    return RobotBatch(of_pictures(), CONFIG), request(rng, pictures={"top": picture, "another": picture[:, :2]})


def test_nothing_is_new_in_an_episode():
    """Buffers, CUDA graphs where there are any, and kernels of a new shape are those of the warm-up."""
    robots = RobotBatch(of_states(), CONFIG, places=2)
    before = dict(robots.episode.solver.chunks), dict(robots.episode.forward.buffers)
    turns(robots, 1, others=(0,))
    assert (robots.episode.solver.chunks, robots.episode.forward.buffers) == before
    assert before[0] and before[1]


def test_committed_actions_come_out_as_they_are():
    """For the robot that has any; the other's answer stays what it was."""
    robots, rng = RobotBatch(of_states(), CONFIG, places=2), np.random.default_rng(0)
    sent, committed = request(rng, seed=3), rng.normal(size=(2, 2)).astype(np.float32)
    free = robots.act({0: sent, 1: sent})
    found = robots.act({0: sent, 1: replace(sent, committed=committed)})
    np.testing.assert_allclose(found[0], free[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1][:2], committed, rtol=1e-5, atol=1e-6)
    assert np.abs(found[1][2:] - free[1][2:]).max() > 1e-4


def test_actions_that_are_no_numbers_are_no_answer():
    policy = of_states()
    robots, sent = RobotBatch(policy, CONFIG), request(np.random.default_rng(0))
    with torch.no_grad():
        next(policy.model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="must be finite"):
        robots.act({0: sent})


def test_policies_that_cannot_act():
    policy = of_states()
    with pytest.raises(ValueError, match="policy must have actions"):
        RobotBatch(made(policy.codec, patch=(1, 1, 1), topology="video_only"), CONFIG)
    with pytest.raises(ValueError, match="policy.camera must be known"):
        RobotBatch(replace(of_pictures(), camera=None), CONFIG)
    with pytest.raises(ValueError, match="places must be a whole number of at least 1, got 0"):
        RobotBatch(policy, CONFIG, places=0)
