"""What ``wam rollout --simulator`` shows: the robot beside its imagined future, as a film and, where there is a screen,
in a window while it acts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from ..draw.charts import labelled
from ..draw.scene import Scene
from ..draw.window import Window, no_window_because
from ..rollout.policy import Policy

# of what was observed, what was imagined and a first frame to the pictures of that frame and those after it
Draw = Callable[[np.ndarray, np.ndarray, int], list[Image.Image]]


def drawing(policy: Policy, simulator: Any) -> Draw | None:
    """How the frames of a policy are drawn: pictures as they are, states as the places that they hold; None for states
    without places."""
    if not policy.frames_are_states:
        return _pictures
    scene = Scene.of(tuple(getattr(simulator, "state_names", ())))
    if scene is None:
        return None
    return lambda real, imagined, first: scene.film({"what happened": real, "what was imagined": imagined}, first)


def _pictures(real: np.ndarray, imagined: np.ndarray, first: int) -> list[Image.Image]:
    return [labelled({"real": real[f], "imagined": imagined[f]}, f) for f in range(first, len(real))]


@contextmanager
def window(draw: Draw | None, title: str, seconds: float) -> Iterator[Callable[[np.ndarray, np.ndarray], None]]:
    """Gives what :func:`~wam_models.simulator.play` calls after every chunk, and prints why there is no window.

    Args:
        draw: From :func:`drawing`.
        title: Of the window.
        seconds: From one frame to the next, as the robot acts.
    """
    because = no_window_because() if draw is not None else "its states hold no places to draw"
    if draw is None or because is not None:
        print(f"window         none: {because}")
        yield lambda observed, imagined: None
        return
    shown = Window(title, seconds)

    following = 0  # frame to be shown

    def watch(observed: np.ndarray, imagined: np.ndarray) -> None:
        nonlocal following
        for picture in draw(observed, imagined, following):
            shown.show(picture)
        following = len(observed)

    try:
        yield watch
    finally:
        shown.close()
    print(f"window         {shown.shown} frames shown")
