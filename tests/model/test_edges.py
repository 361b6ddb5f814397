"""Configs and calls at the edges: what has a meaning works, all else is refused by name before anything runs."""

import json
import math
import sys
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch

from wam_models import RolloutConfig, StepConfig, WorldActionModel, golden_config, training_step
from wam_models.flow import TimestepDraw
from wam_models.rollout import RolloutEngine

from .test_training import batch, generator, small_model

BAD = {
    "int": [2.0, 4.5, "4", True, np.bool_(True), None, math.nan, -1, 0, [2], torch.tensor([2]), torch.tensor(True)],
    "float": [math.nan, math.inf, -math.inf, -1, "1.0", None, True, 1j, 10**400, [1.0]],
    "str": ["none", None, 3, ["joint"], np.array(["joint", "full"])],
    "bool": [1, 0, "no", None, 1.0],
    "tuple[int, int]": [(4, 1), (0, 4), (1,), (1, 2, 3), 4, "14", (1.0, 4), (True, 4), (1, sys.maxsize), None],
    "Mapping[str, float]": [None, {}, {"dream": 1.0}, {"joint": 0.0}, {"joint": math.nan}, {"joint": "1"}, ["joint"]],
    "float | None": [math.nan, math.inf, "1.0", True, 1j, [1.0]],
    "Schedule": [None, 3, "euler", ["euler"], {"steps": -1}, {"solver": "rk4"}, {"start": 0}],
    "TimestepDraw": [None, {}, "independent"],
    "tuple[tuple[str, str], ...]": [None, "video", 3, ["video"], [("video",)], [("action", "words")], [("action", 1)]],
}
GOOD = {
    "int": [np.int64(3), np.uint8(3), torch.tensor(3)],
    "float": [1, np.float32(0.5), np.float64(0.5), np.int16(1)],
    "bool": [np.bool_(False)],
    "tuple[int, int]": [[2, 3], np.array([2, 3]), torch.tensor([2, 3])],
    "tuple[tuple[str, str], ...]": [[], [["action", "video"]], [("action", "video"), ("video", "action")]],
}
FIELDS = [(config, f.name, f.type) for config in (RolloutConfig, StepConfig, TimestepDraw) for f in fields(config)]


@pytest.mark.parametrize("config,name,kind", FIELDS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_fields(config, name, kind):
    for value in BAD[kind]:
        if name == "counterfactual" and value == {}:  # no such samples
            continue
        with pytest.raises(ValueError, match=rf"{config.__name__}: {name}\b.* must "):
            config(**{name: value})
    for value in GOOD.get(kind, ()):
        made = config(**{name: value})
        json.dumps(asdict(made))
        assert made == config(**{name: value.tolist() if hasattr(value, "tolist") else value})


@pytest.mark.parametrize("field", ["window", "chunk_size", "lookahead"])
@pytest.mark.parametrize("everything", [10**9, sys.maxsize])
def test_rings_beyond_the_memory_are_refused_before_they_are_made(field, everything):
    model = WorldActionModel(golden_config())
    engine = RolloutEngine(model, RolloutConfig(**{field: everything}))
    with pytest.raises(ValueError, match=rf"start: .*{field}={everything}.*bytes.*use window"):
        engine.start(torch.zeros(1, 48, 1, 4, 4), torch.zeros(1, 3, 4096))


# ---- calls ----


def test_no_text_is_text_that_says_nothing():
    """Of cross-attention over no tokens the bias of its last map is left, as where all values are 0."""
    silent = small_model()
    for name, p in silent.named_parameters():
        if "attn2.to_v" in name:
            torch.nn.init.zeros_(p)
    config, data = StepConfig(program="joint"), batch()
    want, _ = training_step(silent, data, generator(), config)
    model = small_model()
    loss, _ = training_step(model, data | {"text": torch.zeros(2, 0, 8)}, generator(), config)
    loss.backward()
    assert torch.equal(loss, want) and all(p.grad is not None for p in model.parameters())
    chunks = [
        RolloutEngine(m.eval(), RolloutConfig(program="joint", chunk_size=1, steps=1, guidance=2.0))
        .start(data["video"][:, :, :1], text)
        .propose(generator=generator())
        for m, text in ((silent, data["text"]), (model, torch.zeros(2, 0, 8)))
    ]
    assert torch.equal(chunks[0].action, chunks[1].action)


@pytest.mark.parametrize("sizes", [{"action_dim": 1}, {"actions_per_frame": 1, "heads": 1, "layers": 1}], ids=str)
def test_smallest_sizes(sizes):
    """One number an action, one action and one token a frame, two frames, one sample, one step."""
    model, g = small_model(**sizes), generator()
    video, text = torch.randn(1, 48, 2, 2, 2, generator=g), torch.randn(1, 1, 8, generator=g)
    action = torch.randn(1, 2, model.config.actions_per_frame, model.config.action_dim, generator=g)
    training_step(model, {"video": video, "action": action, "text": text}, g)[0].backward()
    engine = RolloutEngine(model.eval(), RolloutConfig(program="joint", chunk_size=1, window=2, steps=1))
    episode = engine.start(video[:, :, :1], text)
    for _ in range(3):
        episode.observe(video[:, :, 1:], action[:, 1:])
        episode.accept(episode.propose(generator=g))


def test_calls_that_mean_nothing_are_refused_by_name():
    model, data, g = small_model().eval(), batch(), generator()
    video, action, text = data["video"], data["action"], data["text"]
    t = torch.zeros(2, 5)
    forward = {
        "noisy_video": video, "clean_video": video, "noisy_action": action, "clean_action": action,
        "video_timesteps": t, "action_timesteps": t, "text": text, "attend": lambda layer, q, k, v: v,
    }  # fmt: skip
    engine = RolloutEngine(model, RolloutConfig(program="joint", chunk_size=2, window=4, steps=2))
    episode = engine.start(video[:, :, :1], text)
    for error, message, call in (
        (ValueError, r"video must be \[B >= 1", lambda: training_step(model, {k: v[:0] for k, v in data.items()}, g)),
        (ValueError, "positive rows and columns", lambda: training_step(model, data | {"video": video[..., :0, :]}, g)),
        (TypeError, "action must be a Tensor, got ndarray; torch.from_numpy", lambda: training_step(
            model, data | {"action": action.numpy()}, g)),
        (TypeError, "generator must be a Generator, got int", lambda: training_step(model, data, 0)),
        (TypeError, "config must be a StepConfig, got dict", lambda: training_step(model, data, g, {})),
        (ValueError, "noisy_video must be", lambda: model(**forward | {"noisy_video": video[0, 0]})),
        (ValueError, "F >= 1, y, x", lambda: model(**forward | {"noisy_video": video[:, :, :0]})),
        (ValueError, "text must have shape", lambda: model(**forward | {"text": text[:1]})),
        (ValueError, "action_timesteps must have shape", lambda: model(**forward | {"action_timesteps": t[:, 0]})),
        (ValueError, "clean_video_timesteps must", lambda: model(**forward, clean_video_timesteps=t[:, :1])),
        (ValueError, "frame_start must be an int", lambda: model(**forward, frame_start=1.5)),
        (ValueError, "frame_start must be at most", lambda: model(**forward, frame_start=sys.maxsize)),
        (ValueError, r"observation must be \[B >= 1", lambda: engine.start(video[:0, :, :1], text[:0])),
        (ValueError, "positive rows and columns", lambda: engine.start(video[:, :, :1, :0], text)),
        (ValueError, "text must have shape", lambda: engine.start(video[:, :, :1], text[0])),
        (TypeError, "text must be a Tensor, got list", lambda: engine.start(video[:, :, :1], ["push the cup"])),
        (TypeError, "video must be a Tensor, got ndarray", lambda: episode.observe(video.numpy(), action)),
        (TypeError, "generator must be a Generator", lambda: episode.propose(generator=0)),
        (TypeError, "candidate must be a Candidate, got Tensor", lambda: episode.accept(action)),
        (TypeError, "config must be a RolloutConfig, got dict", lambda: RolloutEngine(model, asdict(engine.config))),
        (ValueError, "the meta device", lambda: RolloutEngine(small_model().to("meta"), engine.config)),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
