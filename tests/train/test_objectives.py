"""Objectives of other systems: noise for one stream, videos without actions, counterfactual samples, text dropout."""

from dataclasses import replace

import pytest
import torch

from wam_models import GJD, StepConfig, WorldActionModel, golden_config, training_step
from wam_models.model.dual_expert import plain_tensor
from wam_models.objectives import GJD_COUNTERFACTUAL, GJD_DEMONSTRATIONS
from wam_models.train import step as step_module

SMALL = replace(golden_config(), text_dim=8, freq_dim=16)
JOINT = StepConfig(program="joint", chunk_sizes=(2, 2), windows=(8, 8))


@pytest.fixture(scope="module")
def model() -> WorldActionModel:
    torch.manual_seed(0)
    made = WorldActionModel(SMALL)
    for side in (made.core.proj_out, made.action_expert.action_proj_out):
        torch.nn.init.normal_(side.weight, std=0.3)
    return made


def batch(samples=4, frames=4, **more):
    g = torch.Generator().manual_seed(0)
    shapes = {"video": (48, frames, 2, 4), "action": (frames, 2, 7), "text": (3, 8)}
    return {name: torch.randn(samples, *shape, generator=g) for name, shape in shapes.items()} | more


def stepped(model, given, config, seed=0):
    """Loss, metrics, and what the model was given."""
    inputs = {}

    def note(module, args, kwargs):
        names = ("noisy_video", "clean_video", "noisy_action", "clean_action", "video_t", "action_t", "text", "plan")
        inputs.update(zip(names, map(plain_tensor, args), strict=True))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        loss, metrics = training_step(model, given, torch.Generator().manual_seed(seed), config)
    finally:
        hook.remove()
    return loss, metrics, inputs


def test_a_marginal_is_noise_at_the_last_timestep_without_loss(model):
    loss, metrics, inputs = stepped(model, batch(), replace(JOINT, video_marginal=1.0))
    assert (inputs["video_t"] == 1000).all() and not (inputs["action_t"] == 1000).all()
    assert metrics["video_loss"].isnan()
    torch.testing.assert_close(loss.detach(), metrics["action_loss"])
    # the noisy copy holds nothing of the video
    other = batch() | {"video": batch()["video"] + 5}
    again = stepped(model, other, replace(JOINT, video_marginal=1.0))[2]
    assert torch.equal(again["noisy_video"], inputs["noisy_video"])
    loss, metrics, inputs = stepped(model, batch(), replace(JOINT, action_marginal=1.0))
    assert (inputs["action_t"] == 1000).all() and metrics["action_loss"].isnan() and metrics["video_loss"].isfinite()


def test_marginals_come_in_their_shares_and_not_to_conditional_samples(model):
    config = replace(JOINT, video_marginal=0.3, action_marginal=0.5)
    generator = torch.Generator().manual_seed(0)
    joint, forward = (step_module.OBJECTIVES[name] for name in ("joint", "forward_dynamics"))
    video, action = step_module.draw_marginals(config, generator, [joint] * 5000 + [forward] * 100, [False] * 5100)
    assert abs(sum(video) / 5000 - 0.3) < 0.02 and abs(sum(action) / 5000 - 0.5) < 0.02
    assert not any(v and a for v, a in zip(video, action, strict=True)) and not any(video[5000:] + action[5000:])


def test_the_actions_of_a_video_without_actions_change_nothing(model):
    free = torch.tensor([True, False, True, False])
    loss, metrics, _ = stepped(model, batch(action_free=free), JOINT)
    junk = batch(action_free=free)
    junk["action"] = torch.where(free[:, None, None, None], torch.full_like(junk["action"], 9.0), junk["action"])
    same, same_metrics, _ = stepped(model, junk, JOINT)
    assert loss == same and metrics["action_loss"] == same_metrics["action_loss"]
    loss, metrics, _ = stepped(model, batch(action_free=torch.ones(4, dtype=torch.bool)), JOINT)
    assert metrics["action_loss"].isnan()
    torch.testing.assert_close(loss.detach(), metrics["video_loss"])
    # nor does the noise that stands for them: nothing attends to an action
    model.zero_grad()
    loss.backward()
    assert (
        model.action_expert.action_embedder.weight.grad is None
        or not model.action_expert.action_embedder.weight.grad.any()
    )


def test_counterfactual_samples_train_the_conditional_objectives_alone(model):
    marked = torch.tensor([True, True, True, False])
    config = StepConfig(program=GJD, mixture={"joint": 1.0}, chunk_sizes=(1, 1))
    for seed in range(4):
        _, metrics, inputs = stepped(model, batch(counterfactual=marked), config, seed)
        assert metrics["samples/joint"] == 1
        given = (inputs["video_t"] == 0).all(1) ^ (inputs["action_t"] == 0).all(1)
        assert given.tolist() == marked.tolist() and not inputs["text"][:3].any() and inputs["text"][3].all()


def test_the_routes_of_openwam_weight_by_weight():
    assert sum(GJD_DEMONSTRATIONS.values()) + sum(GJD_COUNTERFACTUAL.values()) == pytest.approx(1.0)
    generator, n = torch.Generator().manual_seed(0), 20_000
    marked = [i % 5 == 0 for i in range(n)]  # 0.2 of the rows, as the sums say
    config = StepConfig(program=GJD, mixture=GJD_DEMONSTRATIONS, counterfactual=GJD_COUNTERFACTUAL)
    drawn = step_module.draw_sample_objectives(config, generator, marked, [False] * n)
    routes = [(o.name, m) for o, m in zip(drawn, marked, strict=True)]
    want = {(name, False): w for name, w in GJD_DEMONSTRATIONS.items()}
    want |= {(name, True): w for name, w in GJD_COUNTERFACTUAL.items()}
    assert set(routes) == set(want)
    for route, weight in want.items():
        assert abs(routes.count(route) / n - weight) < 0.01, route


def test_text_is_dropped_in_its_share_of_samples(model):
    assert not stepped(model, batch(), replace(JOINT, text_dropout=1.0))[2]["text"].any()
    kept = step_module.draw_kept_text(0.25, 5000, torch.Generator().manual_seed(0))
    assert abs(kept.mean() - 0.75) < 0.02
    # without it, nothing is drawn
    before, after = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    step_module.draw_kept_text(0.0, 4, after)
    assert torch.equal(before.get_state(), after.get_state())


def test_refusals_name_the_entry(model):
    for given, config, message in (
        (batch(counterfactual=torch.ones(4)), JOINT, "counterfactual must be bool .4., got torch.float32"),
        (batch(counterfactual=torch.ones(4, dtype=torch.bool)), JOINT, "must come with program 'generalist"),
        (
            batch(counterfactual=torch.ones(4, dtype=torch.bool), action_free=torch.ones(4, dtype=torch.bool)),
            StepConfig(), "both counterfactual and action_free",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            stepped(model, given, config)
    with pytest.raises(ValueError, match="counterfactual must have no weight on joint"):
        StepConfig(counterfactual={"joint": 0.5, "inverse_dynamics": 0.5})
    with pytest.raises(ValueError, match="sum to at most 1"):
        StepConfig(video_marginal=0.7, action_marginal=0.7)
