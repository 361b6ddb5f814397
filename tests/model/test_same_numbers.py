"""A rollout gives the same actions alone, in a batch of others, and as one of several candidates.

Where the others are does not change its bits; how many there are may, because products of other sizes add in another
order. bench/suites/rollout_options.py records by how much (rows ``same``).
"""

import pytest
import torch

from wam_models import RolloutConfig, RolloutEngine

from .test_rollout import ACTION_TOKENS, GRID, A, C, randn, small_model

MANY = 12
ROUNDING = 1e-6  # of the largest action


def alike(a, b):
    return (a - b).abs().max() <= ROUNDING * b.abs().max()


@pytest.mark.parametrize("program", ["joint", "video_then_action", "generalist_joint_denoising"])
def test_alone_among_others_and_as_a_candidate(program):
    first, text = randn(MANY, C, 1, *GRID, dtype=torch.float32), randn(MANY, 3, 8, seed=1, dtype=torch.float32)
    frames, video = (randn(MANY, C, 2, *GRID, seed=s, dtype=torch.float32) for s in (2, 3))
    acted, action = (randn(MANY, 2, ACTION_TOKENS, A, seed=s, dtype=torch.float32) for s in (4, 5))
    model = small_model(torch.float32)

    def begun(rollouts, **options):
        config = RolloutConfig(program=program, chunk_size=2, window=4, steps=2, **options)
        episode = RolloutEngine(model, config).start(first[rollouts], text[rollouts])
        episode.observe(frames[rollouts], acted[rollouts])
        return episode

    def actions(rollouts):
        found = begun(rollouts).propose(video_noise=video[rollouts], action_noise=action[rollouts])
        return found.action

    together = actions(list(range(MANY)))
    for b in (0, 5, MANY - 1):
        assert alike(actions([b])[0], together[b])
    # in a batch of one size: to the bit, whoever else is there
    others = [3, 9, 0, 7]
    for b, company in ((2, [4, 6, 0, 8]), (0, [3, 1, 2, 11])):
        assert torch.equal(actions(company)[b], actions(others)[b])
    many = begun([4], candidates=3)
    found = many.propose_many(video_noise=[video[[4]]] * 3, action_noise=[action[[i]] for i in (1, 4, 2)])
    assert alike(found[1].action[0], together[4])
    assert not alike(found[0].action[0], together[4])
