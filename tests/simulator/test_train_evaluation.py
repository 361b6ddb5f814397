"""Evaluation while training goes on: it is in the log, and the training is that of a run without."""

import json
import time

import pytest
import torch

from wam_models import Policy, cli
from wam_models.data import ClipDataset
from wam_models.simulator.record import RecordConfig, record
from wam_models.train import TrainConfig, train
from wam_models.train.log import MEASURED
from wam_models.train.periodic import PeriodicEvaluation

from .conftest import EXAMPLES

POINT = "point_simulator:Point"
SIMULATORS = ("short:Short", "short:ShortRaises")
SMALL = {
    **json.loads((EXAMPLES / "point_train.json").read_text()),
    "batch": 4, "steps": 6, "warmup": 1, "schedule": "constant", "programs": ["video_then_action"],
}  # fmt: skip
SHORT = """
from broken import Raises
from point_simulator import Point

class Short(Point):
    horizon = 6

class ShortRaises(Raises):
    horizon = 6
"""


@pytest.fixture
def flags(folder):
    """Of ``wam train`` in a folder with simulators, recorded episodes and a config of six steps."""
    record(folder / "data", [POINT], RecordConfig(episodes=4, held_out=2, interrupted=0.0), jobs=1)
    (folder / "short.py").write_text(SHORT)
    (folder / "config.json").write_text(json.dumps(SMALL))
    return ["train", "--data", "data", "config.json"]


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(log):
    return [{k: v for k, v in row.items() if k not in (*MEASURED, "evaluation")} for row in log]


def weights(out):
    return Policy.load(out / "checkpoint")[0].model.state_dict()


def test_the_training_is_that_of_a_run_without(flags, folder, capsys):
    asked = ["--eval-every", "3", "--simulator", SIMULATORS[0], "--simulator", SIMULATORS[1], "--eval-episodes", "2"]
    assert cli.main([*flags, "--out", "with", *asked, "--eval-chunk", "1"]) == 0
    printed = capsys.readouterr().out
    assert cli.main([*flags, "--out", "without"]) == 0
    log, plain = rows(folder / "with"), rows(folder / "without")
    assert losses(log) == losses(plain) and not any("evaluation" in row for row in plain)
    for a, b in zip(weights(folder / "with").values(), weights(folder / "without").values(), strict=True):
        assert torch.equal(a, b)
    assert [row["step"] for row in log if "evaluation" in row] == [3, 6]
    found = log[5]["evaluation"]
    assert set(found["simulators"]) == set(SIMULATORS) and found["all"]["episodes"] == 4
    assert 0 <= found["all"]["low"] <= found["all"]["successes"] / 4 <= found["all"]["high"] <= 1
    (broken,) = found["broken"]
    assert (broken["simulator"], broken["episode"]) == (SIMULATORS[1], 1) and "motor is stuck" in broken["failure"]
    assert len(found["imagined_mse"]) == 1 and found["imagined_mse"][0] > 0  # one frame a chunk
    assert found["recorded"]["episodes"] == 2 and found["recorded"]["action_rmse"] > 0
    assert found["picture"] == "evaluation/step-000006.png" and (folder / "with" / found["picture"]).stat().st_size
    assert "step 6: " in printed and "of 4 succeed [" in printed and ", 1 broken" in printed
    assert found != log[2]["evaluation"]


def test_a_resumed_run_evaluates_at_the_same_steps(flags, folder):
    asked = ["--eval-every", "2", "--simulator", SIMULATORS[0], "--eval-episodes", "1"]
    assert cli.main([*flags, "--out", "whole", *asked]) == 0
    assert cli.main([*flags, "--out", "cut", *asked, "--steps", "3"]) == 0
    resume = ["--out", "cut", "--resume", "cut/checkpoint", "--steps", "6"]
    assert cli.main([*flags[:3], *resume]) == 0
    whole, cut = rows(folder / "whole"), rows(folder / "cut")
    assert losses(cut) == losses(whole)

    def measured(log):
        return [
            (r["step"], {k: v for k, v in r["evaluation"].items() if k != "seconds"}) for r in log if "evaluation" in r
        ]

    assert [step for step, _ in measured(cut)] == [2, 4, 6] and measured(cut) == measured(whole)


def test_what_an_evaluation_does_is_not_the_trainings(flags, folder, monkeypatch):
    """It draws random numbers, takes a long time, and goes wrong at last."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def evaluate(policy, step):
        torch.rand(3)
        clock[0] += 1000
        if step == 4:
            raise RuntimeError("no simulator today")
        return {"step": step, "enabled": torch.is_grad_enabled()}

    config, data = TrainConfig.from_dict(SMALL), ClipDataset(folder / "data", actions_per_frame=2, actions_per_token=2)
    plain = train(config, data, progress=False)
    after = torch.rand(2)
    found = train(config, data, progress=False, seconds=100, evaluation=PeriodicEvaluation(2, evaluate))
    assert losses(found.log) == losses(plain.log) and torch.equal(torch.rand(2), after)
    assert [row["seconds"] for row in found.log] == [0.0] * 6
    evaluations = [row["evaluation"] for row in found.log if "evaluation" in row]
    assert evaluations[0] == {"step": 2, "enabled": False, "seconds": 1000}
    assert evaluations[1] == {"error": "RuntimeError: no simulator today", "seconds": 1000}
    with pytest.raises(ValueError, match="PeriodicEvaluation: every must be .* got 0"):
        PeriodicEvaluation(0, evaluate)


@pytest.mark.parametrize(
    "given, message",
    [
        (f"--simulator {POINT}", "--simulator needs --eval-every N"),
        ("--eval-episodes 3", "--eval-episodes needs --eval-every N"),
        ("--eval-every 2 --eval-chunk 500", "nothing to measure: no --simulator, and no held-out episode of 1001"),
        ("--eval-every 2 --simulator atari/pong", "there is no suite 'atari'"),
        ("--eval-every 2 --simulator broken:Nothing", "broken:Nothing failed"),
        ("--eval-every 2 --simulator wide:Wide", "wide:Wide: its actions have 3 numbers, those of the policy 2"),
    ],
)
def test_mistakes_are_one_line_before_the_first_step(given, message, flags, folder, capsys):
    (folder / "wide.py").write_text(
        "from point_simulator import Point\nclass Wide(Point):\n    action_names = ('dx', 'dy', 'dz')\n"
    )
    assert cli.main([*flags, "--out", "run", *given.split()]) == 2
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1] and not (folder / "run").exists()


def test_settings_of_a_checkpoint_are_checked(flags, folder, capsys):
    assert cli.main([*flags, "--out", "run", "--steps", "2", "--eval-every", "1"]) == 0
    path = folder / "run/checkpoint/config.json"
    stored = json.loads(path.read_text())
    assert stored["metadata"]["training"]["evaluation"] == {"every": 1, "simulators": [], "episodes": 10, "chunk": 2}
    stored["metadata"]["training"]["evaluation"]["every"] = "often"
    path.write_text(json.dumps(stored))
    assert cli.main([*flags[:3], "--out", "run", "--resume", "run/checkpoint", "--steps", "3"]) == 2
    assert "metadata.training.evaluation of the checkpoint must be" in capsys.readouterr().err
