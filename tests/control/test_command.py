"""``wam rollout --realtime`` in the example simulator."""

import pytest
import torch

from wam_models import cli
from wam_models.data import StateCodec

from ..serve.policies import made
from ..simulator.conftest import folder, no_trial_of_threads  # noqa: F401


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    policy = made(StateCodec(torch.zeros(4), torch.ones(4)), patch=(1, 1, 1))
    policy.text.places.data.mul_(0)
    where = tmp_path_factory.mktemp("policy")
    policy.save(where)
    return where


def rollout(checkpoint, *options):
    return cli.main(["rollout", "--checkpoint", str(checkpoint), *options])


def test_it_acts_and_reports(checkpoint, folder, capsys):  # noqa: F811
    options = ["--simulator", "lifting:Lifting", "--realtime", "--chunks", "6", "--control", "rate=200"]
    (folder / "lifting.py").write_text(
        "from point_simulator import Point\n\n\nclass Lifting(Point):\n    instruction = 'lift'\n"
    )
    assert rollout(checkpoint, *options, "--control", "low=-0.01", "--control", "high=0.01") == 0
    printed = capsys.readouterr().out
    assert "24 actions at 200 Hz" in printed and "0 failed" in printed and "0 limited" not in printed
    assert "task           not done\n" in printed


def test_what_is_refused(checkpoint, folder, capsys):  # noqa: F811
    for options, message in (
        (["--data", "x", "--realtime"], "--realtime must be with --simulator"),
        (["--simulator", "point_simulator:Point", "--control", "rate=1"], "and --control with --realtime"),
        (["--simulator", "point_simulator:Point", "--realtime", "--control", "speed=1"], "--control.*speed"),
        (["--simulator", "point_simulator:Point", "--realtime", "--control", "kind=x"], "kind must be one of"),
    ):
        assert rollout(checkpoint, *options) == 2
        printed = capsys.readouterr().err
        assert all(part in printed for part in message.split(".*")), printed
