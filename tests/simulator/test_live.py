"""States as pictures, what was imagined beside what happened, and the window that shows it."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from wam_models.cli import live
from wam_models.draw import window as window_module
from wam_models.draw.scene import HEIGHT, WIDTH, Scene
from wam_models.draw.style import BLUE, GREEN, RED
from wam_models.simulator.closed_loop import imagined_of_frames
from wam_models.simulator.metaworld import STATE_NAMES

WATCH = """
import numpy as np
from wam_models.draw.scene import Scene
from wam_models.cli.live import window

states = np.linspace(0, 1, 5)[:, None] * np.array([1.0, 0.5])
scene = Scene.of(("x", "y"))
draw = lambda real, imagined, first: scene.film({"real": real, "imagined": imagined}, first)
with window(draw, "test", 0.01) as watch:
    watch(states[:3], states[:3])
    watch(states, states)
"""


def pixels(picture, colour, column, row):
    """The middle of what has this colour in a panel, in pixels from its lower left corner."""
    panel = np.asarray(picture)[row * HEIGHT : (row + 1) * HEIGHT, column * WIDTH : (column + 1) * WIDTH]
    y, x = np.nonzero((np.abs(panel.astype(int) - colour) < 12).all(-1))
    return x.mean(), HEIGHT - y.mean()


def test_places_are_where_the_state_has_them():
    """A hand that moves right and up over a resting object; imagined, it goes left. Both panels have one scale."""
    scene = Scene.of(STATE_NAMES)
    assert scene.places == {"hand": (0, 1, 2), "object": (4, 5, 6), "second": (11, 12, 13), "target": (14, 15, 16)}
    assert scene.gripper == 3
    real = np.zeros((3, 17), np.float32)
    real[:, 0], real[:, 2] = [0, 0.1, 0.2], [0.1, 0.2, 0.3]
    real[:, 5], real[:, 15] = 0.1, 0.3  # object and target behind it
    imagined = real.copy()
    imagined[:, 0] *= -1
    first, _, last = scene.film({"what happened": real, "what was imagined": imagined})
    assert first.size == last.size == (2 * WIDTH, 2 * HEIGHT)
    start, right, left = (pixels(p, BLUE, c, 0)[0] for p, c in ((first, 0), (last, 0), (last, 1)))
    assert right - start == pytest.approx(start - left, abs=3) and right > start + 20
    assert pixels(last, BLUE, 0, 1)[1] > pixels(first, BLUE, 0, 1)[1] + 20  # upwards, from the side
    (x, y), (tx, ty) = pixels(last, RED, 0, 0), pixels(last, GREEN, 0, 0)
    assert x == pytest.approx(start, abs=3) and tx == pytest.approx(start, abs=3) and ty > y + 20
    assert len(scene.film({"real": real}, 2)) == 1


@pytest.mark.parametrize("names, places", [(("x", "y"), {"": (0, 1)}), (("box", "boy", "a_x"), None)])
def test_names_of_places(names, places):
    scene = Scene.of(names)
    assert (scene and scene.places) == places


def test_what_was_expected_of_each_frame():
    """The second chunk was cut short after frame 3: the third predicts frame 4 again."""
    frames = [1, 2, 3, 4, 4, 5]
    imagined = np.array([0, 10, 20, 30, 40, 41, 50])
    np.testing.assert_array_equal(imagined_of_frames(imagined, frames, 5), [0, 10, 20, 30, 41])


def test_states_without_places_have_no_film(capsys):
    policy = SimpleNamespace(frames_are_states=True)
    assert live.drawing(policy, SimpleNamespace(state_names=("angle", "speed"))) is None
    with live.window(None, "test", 0.1) as watch:
        watch(np.zeros((1, 2)), np.zeros((1, 2)))
    assert capsys.readouterr().out == "window         none: its states hold no places to draw\n"


def test_why_there_is_no_window(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    if (first := window_module.no_window_because()) != "there is no screen (DISPLAY is not set)":
        assert "no tkinter" in first
    monkeypatch.setitem(sys.modules, "tkinter", None)
    assert "this Python has no tkinter" in window_module.no_window_because()


@pytest.mark.skipif(shutil.which("xvfb-run") is None, reason="no Xvfb")
def test_a_window_on_a_screen():
    pytest.importorskip("tkinter")
    command = ["xvfb-run", "-a", sys.executable, "-c", WATCH]
    done = subprocess.run(command, text=True, capture_output=True, timeout=120)
    assert done.stdout == "window         5 frames shown\n", done.stderr
