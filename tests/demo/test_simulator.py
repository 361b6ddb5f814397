"""Adapters of ``wam rollout --simulator``: how fast their robot acts is theirs to say, and the film shows it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from wam_models import rollout_cli, simulator
from wam_models.rollout import RolloutConfig

ADAPTERS = """
class Box:
    def reset(self): ...
    def step(self, actions): ...

class Slow(Box):
    control_freq = 10

class Stopped(Box):
    control_freq = 0

class Spoken(Box):
    control_freq = "20 Hz"

class Endless(Box):
    control_freq = float("nan")
"""


@pytest.fixture
def adapters(tmp_path, monkeypatch) -> Path:
    """A working directory with ``adapters.py``."""
    (tmp_path / "adapters.py").write_text(ADAPTERS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name, milliseconds", [("Box", 200), ("Slow", 400)])
def test_the_film_is_as_fast_as_the_robot(name, milliseconds, adapters, monkeypatch, capsys):
    """Four actions from picture to picture, at 20 actions a second where the adapter does not say."""
    pictures = np.random.default_rng(0).integers(0, 255, (3, 32, 64, 3), np.uint8)
    played = simulator.Played("lift", False, pictures, pictures[::-1], [0.5])
    monkeypatch.setattr(rollout_cli, "play", lambda *_, **__: played)
    model = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(actions_per_frame=4))
    args = SimpleNamespace(simulator=f"adapters:{name}", seed=0, chunks=None, out=adapters)
    config = RolloutConfig(program="joint", chunk_size=2)
    assert rollout_cli._simulated(args, SimpleNamespace(model=model), config, "joint") == 0
    assert f"whose robot takes {4000 // milliseconds}" in capsys.readouterr().out
    with Image.open(adapters / "simulated_joint.gif") as film:
        assert film.n_frames == 3 and film.info["duration"] == milliseconds


@pytest.mark.parametrize("name, got", [("Stopped", "got 0"), ("Spoken", "got '20 Hz'"), ("Endless", "got nan")])
def test_what_is_no_frequency_is_refused(name, got, adapters):
    with pytest.raises(ValueError, match=f"control_freq must be actions a second, a positive number, {got}"):
        simulator.load(f"adapters:{name}")
