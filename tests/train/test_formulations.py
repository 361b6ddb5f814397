"""From a config to a policy that acts: states, a bridge, one expert for all, video alone, further samples."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.data import tiny
from tests.train.conftest import TINY, TINY_MODEL
from wam_models import GJD
from wam_models.cli.train import unused_splits
from wam_models.data import ClipDataset
from wam_models.evaluate import evaluate
from wam_models.rollout.policy import Policy
from wam_models.simulator import play
from wam_models.simulator.protocol import Observation, Outcome
from wam_models.train import TrainConfig, train

REGISTERS = {"name": "registers", "width": 32, "ffn": 32, "tokens": 2, "expert": "video"}
KINDS = {
    "states": {"state_dim": 8},
    "bridge": {"bridge_dim": 32, "bridge_layer": 0},
    "late bridge": {"bridge_dim": 32, "bridge_layer": 0, "bridge_sigma": 0.5},
    "state tokens": {"state_dim": 8, "state_tokens": True},
    "one expert": {"topology": "parallel_stream", "state_dim": 8, "context": [REGISTERS], "mode_token": True},
    "video alone": {"topology": "video_only"},
    "full attention": {
        "full_attention": True,
        "state_dim": 8,
        "context": [{"name": "c", "width": 16, "ffn": 16, "tokens": 2}],
    },
}
ONE_CHUNK = {"programs": ["joint"], "frames": 3, "chunk_sizes": [2, 2]}
LATE = {"programs": ["decoupled_same_step", "video_then_action"], "history": "video_queries_video_only"}


class Room:
    """A simulator whose state is the last action's first number, eight times."""

    instruction, horizon, control_freq = "lift", 100, 20.0
    action_names, state_names = tuple("abcdefg"), tuple("abcdefgh")

    def initial_state(self, seed):
        return {"seed": seed}

    def reset(self, initial_state):
        self.state = np.full(8, 50.0, np.float32)

    def observe(self):
        return Observation(self.state, {"tiled": np.full((32, 64, 3), 90, np.uint8)})

    def act(self, action):
        self.state = np.full(8, action[0], np.float32)
        return Outcome(False)


def made(kind: str, **more) -> TrainConfig:
    return TrainConfig.from_dict(TINY | {"model": TINY_MODEL | KINDS[kind], "steps": 2} | more)


def of_tiny(root, config: TrainConfig) -> ClipDataset:
    return ClipDataset(root, states=bool(config.model.state_dim))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_a_policy_that_acts(kind, root, tmp_path):
    config = made(kind, **{"late bridge": LATE, "full attention": ONE_CHUNK}.get(kind, {}))
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    data = of_tiny(root, config)
    done = train(config, data, out=tmp_path, progress=False)
    policy, checkpoint = Policy.load(tmp_path / "checkpoint")
    policy.model.requires_grad_(False)
    rest = train(replace(config, steps=3), data, out=tmp_path, resume=checkpoint, progress=False)
    assert (done.step, rest.step) == (2, 3)
    clip = policy.clip(policy.dataset(root), 3)
    found = evaluate(policy, [clip], chunks=1, timed=1, progress=False)
    acts = policy.model.config.has_actions
    assert {row.action_rmse is not None for row in found.rows if row.objective != "forward_dynamics"} == {acts}
    config = replace(policy.rollout, chunk_size=2)
    generator = torch.Generator().manual_seed(0)
    if not acts:
        with pytest.raises(ValueError, match="video-only"):
            play(policy, config, Room(), chunks=2, generator=generator, progress=False)
        return
    room, told = Room(), []
    if policy.state_units is not None:
        model = policy.model
        encoder = model.core.proprio_hidden_context_encoder if model.config.adds_state else model.context.proprioception
        (encoder if model.config.adds_state else encoder.embedder).register_forward_pre_hook(
            lambda module, args: told.append(args[0].clone())
        )
    played = play(policy, config, room, chunks=2, generator=generator, progress=False)
    assert played.actions.shape == (4, 4, 7) and np.isfinite(played.actions).all()
    if policy.state_units is not None:  # told first of frame 0, to which no action leads; it is in no history here
        first = {"full attention": 0, "state tokens": -2}.get(kind, 1)
        mean, std = policy.state_units
        now = [(torch.full((8,), float(value)) - mean) / std for value in (50.0, played.actions[1, -1, 0])]
        assert torch.equal(told[first][0, 0], now[0]) and torch.equal(told[-1][0, 0], now[1])
        with pytest.raises(ValueError, match="an adapter of two methods does not give"):
            play(policy, config, Blind(), chunks=1, generator=generator, progress=False)


class Blind:
    def reset(self):
        return np.full((32, 64, 3), 90, np.uint8), "lift"

    def step(self, actions):
        raise AssertionError


def with_splits(root, **splits):
    root = tiny.write(root)
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"splits": splits}))
    return root


def test_counterfactual_and_action_free_episodes_come_in_their_shares(tmp_path):
    root = with_splits(tmp_path / "tiny", train="0:1", counterfactual="1:2", action_free="2:3", held_out="3:4")
    data = ClipDataset(root)
    assert (data.train, data.held_out) == ([0], [3]) and data.episodes_of("counterfactual") == [1]
    weights = {"joint": 0.6, "forward_dynamics": 0.1, "inverse_dynamics": 0.1}
    others = {"forward_dynamics": 0.1, "inverse_dynamics": 0.1}
    config = TrainConfig.from_dict(TINY | {"mixture": weights, "counterfactual": others, "action_free": 0.25})
    kinds, found = config.draws(), {}
    for kind in kinds:
        drawn = data.sample(4000, 3, torch.Generator().manual_seed(0), kind.splits)
        marks = zip(
            drawn["episode"].tolist(), drawn["counterfactual"].tolist(), drawn["action_free"].tolist(), strict=True
        )
        for mark in marks:
            found[mark, kind.config.program == GJD] = (
                found.get((mark, kind.config.program == GJD), 0) + kind.share / 4000
            )
    want = {
        ((0, False, False), False): 0.45, ((2, False, True), False): 0.15,
        ((0, False, False), True): 0.2, ((1, True, False), True): 0.2,
    }  # fmt: skip
    assert found.keys() == want.keys() and all(abs(found[k] - want[k]) < 0.02 for k in want)
    # within the conditional steps: of each kind of clip as its weights say
    of_rows = next(kind.config for kind in kinds if kind.config.program == GJD)
    assert (
        of_rows.counterfactual == others and of_rows.mixture["forward_dynamics"] == of_rows.mixture["inverse_dynamics"]
    )
    train(replace(config, steps=3), data, progress=False)
    assert unused_splits(config, data) == []
    assert unused_splits(TrainConfig.from_dict(TINY), data) == ["counterfactual", "action_free"]
    only = TrainConfig.from_dict(TINY | {"mixture": {"joint": 1.0}, "counterfactual": others}).draws()[-1]
    assert only.splits == {"train": 0.0, "counterfactual": 1.0} and only.share == pytest.approx(1 / 6)


def test_a_policy_rolls_out_a_program_that_it_was_trained_on():
    def program(**more):
        return TrainConfig.from_dict(TINY | more).default_rollout().program

    assert program() == program(programs=["joint"]) == program(mixture={"inverse_dynamics": 1}) == GJD
    assert program(programs=["video_then_action", "decoupled_same_step"]) == "video_then_action"


def test_refusals_name_the_field(data, root):
    for model, more, message in (
        ({"bridge_dim": 16, "bridge_layer": 0}, {}, "bridge_dim must be hidden, 32"),
        ({"bridge_dim": 32, "bridge_layer": 1}, {}, "bridge_layer must be a whole number from 0 to 0"),
        ({"bridge_dim": 32}, {}, "without bridge_layer; call training_step"),
        ({"topology": "video_only"}, {"mixture": {"joint": 1, "inverse_dynamics": 1}}, "joint alone"),
        ({"topology": "video_only"}, {"video_marginal": 0.5}, "must be 0 for a model without actions"),
        (
            KINDS["late bridge"],
            LATE | {"history": "full"},
            "must not let the video attend .* history 'full'",
        ),
        (KINDS["late bridge"], LATE | {"programs": ["joint"]}, "must not let the video attend .* got .'joint'."),
        (KINDS["bridge"], {"counterfactual": {"inverse_dynamics": 1}}, "joint alone for .* bridge_layer=0"),
        (KINDS["bridge"] | KINDS["full attention"], {}, "bridge_layer must be None with full_attention"),
        (KINDS["state tokens"], {"tokens": 100}, "tokens must be 0 with model.state_tokens"),
        (KINDS["bridge"] | KINDS["state tokens"], {}, "bridge_layer must be None with state_tokens"),
        ({"state_tokens": True}, {}, "state_dim must be at least 1 with state_tokens"),
        (KINDS["full attention"], {}, r"chunk_sizes must be \[frames - 1, frames - 1\]"),
        (KINDS["full attention"], ONE_CHUNK | {"tokens": 100}, "tokens must be 0 with model.full_attention"),
        (KINDS["full attention"], ONE_CHUNK | {"imagined_history": 0.5}, "imagined_history must be 0 with model.full"),
        (
            KINDS["full attention"],
            ONE_CHUNK | {"programs": ["joint", "video_then_action"]},
            "got .'video_then_action'.",
        ),
        (KINDS["full attention"], ONE_CHUNK | {"rollout": {"cache": "persistent"}}, "cache must be 'last_frame' for"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig.from_dict(TINY | {"model": TINY_MODEL | model} | more)
    for config, message in (
        (made("states"), "model.state_dim must be 0 for this data set, got 8"),
        (TrainConfig.from_dict(TINY | {"action_free": 0.5}), "action_free must be 0 for .* split 'action_free'"),
        (TrainConfig.from_dict(TINY | {"counterfactual": {"inverse_dynamics": 1}}), "counterfactual must be empty"),
    ):
        with pytest.raises(ValueError, match=message):
            train(config, data, progress=False)
    late = made("late bridge", steps=1, **LATE)
    policy = train(late, data, progress=False).policy
    with pytest.raises(ValueError, match="must resolve the video before the actions .* got 'joint'"):
        evaluate(policy, [policy.clip(policy.dataset(root), 3)], cases=[("joint", "joint")], progress=False)
