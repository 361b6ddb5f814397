"""Objectives and the training step."""

import dataclasses

import pytest
import torch

from wam_kernels import PROGRAMS
from wam_models import (
    GJD,
    OBJECTIVES,
    RolloutConfig,
    RolloutEngine,
    StepConfig,
    TimestepDraw,
    WorldActionModel,
    golden_config,
    training_step,
)
from wam_models.model.blocks import Uncast
from wam_models.objectives import draw_objectives, geometry_for
from wam_models.train import step as step_module

SMALL = dataclasses.replace(golden_config(), text_dim=8, freq_dim=16)
ONLY = {name: {name: 1.0} for name in OBJECTIVES}


def small_model(**sizes) -> WorldActionModel:
    torch.manual_seed(0)
    model = WorldActionModel(dataclasses.replace(SMALL, **sizes))
    for side in (model.core.proj_out, model.action_expert.action_proj_out):
        torch.nn.init.normal_(side.weight, std=0.3)
    return model


def batch(samples=2, frames=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "video": torch.randn(samples, 48, frames, 2, 4, generator=g),
        "action": torch.randn(samples, frames, 2, 7, generator=g),
        "text": torch.randn(samples, 3, 8, generator=g),
    }


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_mixture_frequencies():
    drawn = [o.name for o in draw_objectives(GJD, 10_000, generator())]
    for name, share in {"joint": 0.6, "forward_dynamics": 0.2, "inverse_dynamics": 0.2}.items():
        assert abs(drawn.count(name) / 10_000 - share) < 0.02
    assert {o.name for o in draw_objectives("joint", 100, generator())} == {"joint"}
    assert {o.name for o in draw_objectives(GJD, 100, generator(), ONLY["inverse_dynamics"])} == {"inverse_dynamics"}
    for bad in ({"dream": 1.0}, {}, {"joint": 0.0}, {"joint": -1.0, "inverse_dynamics": 2.0}):
        with pytest.raises(ValueError, match="draw_objectives: mixture"):
            draw_objectives(GJD, 1, generator(), bad)
    with pytest.raises(ValueError, match="program must be one of"):
        draw_objectives("dream", 1, generator())


def test_actions_that_are_given_carry_no_loss():
    """Half of the samples of the asynchronous coupling, whose text and video loss they keep."""
    settings = StepConfig(program="joint", timesteps=TimestepDraw(coupling="asynchronous", per="clip"))
    model, data = small_model(), batch(16, 3)
    _, metrics = training_step(model, data, generator(1), settings)
    given = settings.timesteps.sigmas(16, 3, _after_chunk_and_window(generator(1), settings))[1].eq(0).all(1)
    assert metrics["action_samples"] == (~given).sum() and metrics["video_samples"] == 16 and 2 < given.sum() < 14


def _after_chunk_and_window(drawn: torch.Generator, settings: StepConfig) -> torch.Generator:
    """A generator that has given what a step of one joint program draws before its noise levels."""
    for low, high in (settings.chunk_sizes, settings.windows):
        torch.randint(low, high + 1, (), generator=drawn)
    return drawn


def test_geometries_of_the_objectives():
    sizes = {"frames": 5, "video_tokens": 2, "action_tokens": 2, "chunk_size": 2, "window": 8, "history": "full"}
    joint = geometry_for(GJD, OBJECTIVES["joint"], **sizes)
    assert (joint.program, joint.chunk_origin, joint.startup_action_frames) == ("joint", 1, 1)
    assert joint.singleton_frame is None and joint.conditional_history is None
    for name in ("forward_dynamics", "inverse_dynamics"):
        g = geometry_for(GJD, OBJECTIVES[name], **sizes)
        assert (g.singleton_frame, g.chunk_origin, g.conditional_history) == (0, 1, "previous_boundary_video_only")
    later = geometry_for(GJD, OBJECTIVES["joint"], start=3, chunk_origin=5, **sizes)
    assert (later.chunk_origin, later.startup_action_frames) == (2, 0)


def recorded_call(config, monkeypatch, data=None):
    """The packed inputs that a step gives the model."""
    model, given = small_model(), {}
    forward = model.forward

    def record(*args, **named):
        names = ("noisy_video", "clean_video", "noisy_action", "clean_action", "video_t", "action_t", "text", "plan")
        given.update(zip(names, args, strict=True))
        given.update(named)
        given.update({k: v.tensors[0] for k, v in given.items() if isinstance(v, Uncast)})
        return forward(*args, **named)

    monkeypatch.setattr(model, "forward", record)
    loss, metrics = training_step(model, data or batch(), generator(), config)
    return given, loss, metrics


def test_what_the_slots_hold(monkeypatch):
    data = batch()
    for name, objective in OBJECTIVES.items():
        given, loss, metrics = recorded_call(StepConfig(mixture=ONLY[name], noised_history=0.0), monkeypatch)
        assert torch.equal(given["clean_video"], data["video"])
        assert (
            torch.equal(given["clean_action"][:, 1:], data["action"][:, 1:]) and not given["clean_action"][:, 0].any()
        )
        for stream, noisy in (("video", objective.video), ("action", objective.action)):
            assert torch.equal(given[f"noisy_{stream}"], given[f"clean_{stream}"]) == (not noisy)
            assert bool(given[f"{stream}_t"].any()) == noisy
            assert bool(metrics[f"{stream}_loss"].isnan()) == (not noisy)
        assert bool(given["text"].any()) == (not objective.conditional)
        assert metrics[f"samples/{name}"] == 2
        counted = [metrics[f"{s}_loss"] for s in ("video", "action") if getattr(objective, s)]
        torch.testing.assert_close(loss.detach(), sum(counted))


def test_noised_history_modulates_itself(monkeypatch):
    data = batch()
    given, _, _ = recorded_call(StepConfig(noised_history=1.0), monkeypatch)
    assert (given["clean_video_timesteps"] > 0).all() and given["clean_video_timesteps"].shape == (2, 5)
    assert not torch.equal(given["clean_video"], data["video"])
    assert torch.equal(given["clean_action"][:, 1:], data["action"][:, 1:])


def test_an_imagined_history_is_what_a_rollout_would_imagine(monkeypatch):
    """The clean copy of every chunk: one step from noise after the recorded frames before it, as the engine does it."""
    config = StepConfig(
        program="video_then_action", mixture=ONLY["joint"], history="video_only", chunk_sizes=(2, 2), windows=(8, 8),
        noised_history=0.0, imagined_history=1.0,
    )  # fmt: skip
    data, calls = batch(), []
    model = small_model()
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *args, **named: (calls.append((args, named)), forward(*args, **named))[1]
    )
    loss, _ = training_step(model, data, generator(), config)
    (asked, _), ((_, history, *_), named) = calls
    video_noise, action_noise = asked[0], asked[2]  # noise alone
    assert (asked[4].tensors[0] == 1000).all() and not named["clean_video_timesteps"].tensors[0].any()
    assert torch.equal(history[:, :, 0], data["video"][:, :, 0]) and loss.requires_grad

    engine = RolloutEngine(
        small_model().eval(),
        RolloutConfig(program="video_then_action", chunk_size=2, window=8, history="video_only", steps=1),
    )
    with torch.no_grad():
        episode = engine.start(data["video"][:, :, :1], data["text"])
        for first in (1, 3):
            chunk = slice(first, first + 2)
            candidate = episode.propose(video_noise=video_noise[:, :, chunk], action_noise=action_noise[:, chunk])
            torch.testing.assert_close(candidate.video, history[:, :, chunk], rtol=1e-4, atol=1e-4)
            episode.observe(data["video"][:, :, chunk], data["action"][:, chunk])


def test_a_part_of_the_samples_imagines(monkeypatch):
    """The others, and video that is given, stay as recorded; what else is drawn does not change."""
    data = batch(8)
    recorded = {
        k: v.clone()
        for k, v in recorded_call(StepConfig(noised_history=0.0), monkeypatch, data)[0].items()
        if k == "noisy_video"
    }
    given, _, metrics = recorded_call(StepConfig(noised_history=0.0, imagined_history=0.5), monkeypatch, data)
    assert torch.equal(given["noisy_video"], recorded["noisy_video"])
    same = [torch.equal(a, b) for a, b in zip(given["clean_video"], data["video"], strict=True)]
    assert 0 < sum(same) < 8
    given, _, _ = recorded_call(
        StepConfig(mixture=ONLY["inverse_dynamics"], imagined_history=1.0, noised_history=0.0), monkeypatch
    )
    assert torch.equal(given["clean_video"], batch()["video"])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_carries_no_loss_may_hold_anything(objective):
    """No action leads to the start-up frame, and a conditional sample has no text."""
    data = batch()
    other = {k: v.clone() for k, v in data.items()}
    other["action"][:, 0] = float("nan")
    if OBJECTIVES[objective].conditional:
        other["text"][:] = float("inf")
    losses, grads = [], []
    for b in (data, other):
        model = small_model()
        loss, _ = training_step(model, b, generator(), StepConfig(mixture=ONLY[objective]))
        loss.backward()
        losses.append(loss.detach())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*losses) and torch.equal(*grads)


@pytest.mark.parametrize("program", [GJD, *PROGRAMS])
def test_a_step_is_a_function_of_the_generator(program):
    config = StepConfig(program=program)
    state = generator(3).get_state()
    runs = []
    for _ in range(2):
        g = torch.Generator()
        g.set_state(state)
        losses = [training_step(small_model(), batch(), g, config)[0] for _ in range(2)]
        runs.append((losses, g.get_state()))
    assert torch.equal(torch.stack(runs[0][0]), torch.stack(runs[1][0])) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(*runs[0][0])


def test_chunk_and_window_are_drawn_from_their_ranges():
    model, g, data = small_model().requires_grad_(False), generator(), batch(1, 2)
    drawn = [training_step(model, data, g, StepConfig())[1] for _ in range(60)]
    assert {m["chunk_size"] for m in drawn} == {1, 2, 3, 4}
    windows = {m["window"] for m in drawn}
    assert min(windows) >= 4 and max(windows) <= 64 and len(windows) > 25


def test_a_sample_weighs_the_same_in_any_company(monkeypatch):
    # the batch's loss is the mean over samples, also when objectives differ
    data = batch(3)
    monkeypatch.setattr(
        step_module, "draw_objectives", lambda *_: [OBJECTIVES[n] for n in ("joint", "forward_dynamics", "joint")]
    )
    loss, metrics = training_step(small_model(), data, generator())
    expected = (3 * metrics["video_loss"] + 2 * metrics["action_loss"]) / 3
    torch.testing.assert_close(loss.detach(), expected)
    assert metrics["samples/forward_dynamics"] == 1 and metrics["samples/joint"] == 2


@pytest.mark.parametrize("program", [GJD, "video_then_action"])
def test_a_gradient_step_reduces_the_loss(program):
    model, data, config = small_model(), batch(), StepConfig(program=program)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(4):  # the same draws each time
        loss, _ = training_step(model, data, generator(), config)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_every_parameter_and_the_text_get_gradients():
    model, data = small_model(), batch()
    data["text"].requires_grad_()
    training_step(model, data, generator(), StepConfig(mixture=ONLY["joint"]))[0].backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == [] and data["text"].grad.abs().sum() > 0


def test_bad_batches_are_refused_by_name():
    model = small_model()
    for change, message in (
        ({"video": torch.zeros(2, 48, 1, 2, 4)}, "video must be"),
        ({"action": torch.zeros(2, 5, 3, 7)}, "action must be"),
        ({"text": torch.zeros(1, 3, 8)}, "text must be"),
    ):
        with pytest.raises(ValueError, match=message):
            training_step(model, batch() | change, generator())
    with pytest.raises(ValueError, match=r"lacks \['text'\]"):
        training_step(model, {k: v for k, v in batch().items() if k != "text"}, generator())
    with pytest.raises(ValueError, match="chunk_sizes must be"):
        StepConfig(chunk_sizes=(4, 1))
    with pytest.raises(ValueError, match="noised_history must be"):
        StepConfig(noised_history=2)


def test_autocast_stays_close_and_keeps_float32_gradients():
    losses = []
    for on in (False, True):
        model = small_model()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss, _ = training_step(model, batch(), generator(), StepConfig(mixture=ONLY["joint"]))
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=0.02, atol=0)
