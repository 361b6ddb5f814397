"""The example simulator, and others that go wrong."""

from pathlib import Path

import pytest

from tests.train.conftest import no_trial_of_threads

__all__ = ["no_trial_of_threads"]  # two runs that are compared bit for bit have the same number of threads

EXAMPLES = Path(__file__).parents[2] / "examples"

# simulators that go wrong, each in its own way, in the episode whose seed is 1
BROKEN = """
import os, time
import numpy as np
from point_simulator import Point
from wam_models.simulator import Outcome


class Broken(Point):
    def reset(self, initial_state):
        super().reset(initial_state)
        self.broken = initial_state["seed"] == 1

    def initial_state(self, seed):
        return super().initial_state(seed) | {"seed": seed}

    def act(self, action):
        if self.broken:
            return self.go_wrong()
        return super().act(action)


class Raises(Broken):
    def go_wrong(self):
        raise RuntimeError("the motor is stuck")


class Hangs(Broken):
    def go_wrong(self):
        time.sleep(1000)


class Dies(Broken):
    def go_wrong(self):
        os._exit(3)


class NotFinite(Broken):
    def go_wrong(self):
        self.point = self.point + np.nan
        return Outcome(True)


class Chatty(Broken):
    def go_wrong(self):
        return True


class NoExpert(Point):
    expert = None
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with the example and the broken simulators."""
    (tmp_path / "point_simulator.py").write_text((EXAMPLES / "point_simulator.py").read_text())
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.chdir(tmp_path)
    return tmp_path
