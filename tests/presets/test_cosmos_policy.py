"""Numbers as latent frames, and a video model that denoises actions, futures and values (Cosmos Policy)."""

import numpy as np
import pytest
import torch

from wam_kernels import RULE_PROGRAMS
from wam_models import ModelConfig, RolloutConfig, RolloutEngine, StepConfig, WorldActionModel, training_step
from wam_models.data.latent_frames import ACTIONS, VALUE, from_frame, policy_frames, to_frame
from wam_models.objectives import OBJECTIVES, sample_for
from wam_models.rollout import best

from .dense import Densely

SHAPE = (3, 2, 2)  # channels, rows, columns
STEP = StepConfig(program="joint", mixture={"joint": 1}, chunk_sizes=(3, 3), windows=(4, 4), noised_history=0.0)
BY_HAND = np.ones((4, 4), bool)  # observed, actions, future, value: all attend to all


def made(dtype=torch.float32) -> WorldActionModel:
    torch.manual_seed(0)
    sizes = {"hidden": 32, "heads": 2, "head_dim": 16, "layers": 2, "ffn": 64, "text_dim": 8, "patch": (1, 2, 2)}
    unused = dict.fromkeys(("action_hidden", "action_ffn", "action_dim", "actions_per_frame"), 1)
    config = ModelConfig(topology="video_only", full_attention=True, latent_channels=3, **sizes, **unused)
    return WorldActionModel(config).to(dtype)


def batch(samples: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    video, action, value, text = (
        torch.randn(samples, *shape, generator=draw, dtype=dtype) for shape in ((3, 3, 2, 2), (3, 2, 3), (), (3, 8))
    )
    return {"video": policy_frames(video, action, value), "text": text}


@pytest.mark.parametrize("count", [1, 4, 5, 12])
def test_numbers_come_back_as_the_mean_of_their_copies(count):
    numbers = torch.randn(2, count, generator=torch.Generator().manual_seed(0))
    frame = to_frame(numbers, SHAPE)
    assert frame.shape == (2, 3, 1, 2, 2) and frame[1, 0, 0, 0, 0] == numbers[1, 0]
    torch.testing.assert_close(from_frame(frame, count), numbers)
    frame[0].flatten()[::count] += 1  # all copies of the first
    torch.testing.assert_close(from_frame(frame, count)[0], numbers[0] + torch.eye(count)[0])


def test_a_clip_is_four_frames():
    video, action = torch.randn(2, 3, 3, 2, 2), torch.randn(2, 3, 2, 3)
    found = policy_frames(video, action, torch.tensor([0.5, 2.0]))
    assert found.shape == (2, 3, 4, 2, 2)
    assert torch.equal(found[:, :, 0], video[:, :, 0]) and torch.equal(found[:, :, 2], video[:, :, 2])
    torch.testing.assert_close(from_frame(found[:, :, [1 + ACTIONS]], 12), action[:, 1:].flatten(1))
    assert (found[1, :, 1 + VALUE] == 2).all()


def test_refusals():
    with pytest.raises(ValueError, match=r"numbers must be \[B, 1 to 12\].*got \[2, 13\]; take shorter chunks"):
        to_frame(torch.zeros(2, 13), SHAPE)
    with pytest.raises(ValueError, match=r"frame must be \[B, C, 1, y, x\], got \[2, 3, 2, 2, 2\]"):
        from_frame(torch.zeros(2, 3, 2, 2, 2), 4)
    with pytest.raises(ValueError, match="count must be a whole number from 1 to 12, got 13"):
        from_frame(torch.zeros(2, 3, 1, 2, 2), 13)


def test_the_mask_is_that_of_the_system():
    sample = sample_for(
        "joint", OBJECTIVES["joint"], frames=4, video_tokens=1, action_tokens=0, chunk_size=3, window=4,
        full_attention=True,
    )  # fmt: skip
    np.testing.assert_array_equal(sample.dense_mask(), BY_HAND)
    np.testing.assert_array_equal(RULE_PROGRAMS["cosmos_policy"](frames=4, tokens=1).dense_mask(), BY_HAND)


def test_a_training_step_is_that_of_a_dense_attention():
    model, found = made(torch.float64), []
    torch.nn.init.normal_(model.core.proj_out.weight, std=0.3)
    for run in (model, Densely(model, BY_HAND, ["v"] * 4, False)):
        model.zero_grad()
        loss, _ = training_step(run, batch(2, torch.float64), torch.Generator().manual_seed(2), STEP)
        loss.backward()
        found.append((loss.detach(), model.core.patch_embedding_mlp.weight.grad.clone()))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_twenty_steps_halve_the_loss_and_the_best_of_the_candidates_acts():
    model, data, losses = made(), batch(4), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(21):
        optimizer.zero_grad()
        loss, _ = training_step(model, data, torch.Generator().manual_seed(3), STEP)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[20] < losses[0] / 2
    config = RolloutConfig(program="joint", chunk_size=3, steps=5, cache="last_frame", candidates=4)
    episode = RolloutEngine(model.eval().requires_grad_(False), config).start(data["video"][:, :, :1], data["text"])
    for _ in range(2):
        candidates = episode.propose_many(generator=torch.Generator().manual_seed(4))
        values = torch.stack([from_frame(c.video[:, :, [VALUE]], 1)[:, 0] for c in candidates])
        chosen = best(candidates, lambda c: from_frame(c.video[:, :, [VALUE]], 1)[:, 0])
        assert torch.equal(from_frame(chosen.video[:, :, [VALUE]], 1)[:, 0], values.max(0).values)
        assert len(set(values[:, 0].tolist())) == 4 and chosen.forwards == (5,) * 4
        episode.observe(data["video"][:, :, :1], None)
