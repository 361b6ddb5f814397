"""What clips are cut from: the protocol of a data set, whatever it is stored in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from .canvas import Canvas
from .lerobot import Episode


class Source(Protocol):
    """Recorded episodes; row t of an episode is what was observed before its action t.

    :class:`~wam_models.data.LeRobotDataset` is one; ``examples/npz_source.py`` is another, in a page. Whoever has these
    gives them to :class:`~wam_models.data.ClipDataset`, and that to ``train``.

    Attributes:
        root: Names it in messages.
        fps: Rows a second.
        episodes: Number, length, instructions and split of each; ``train`` is trained on, other splits are held out.
        camera: Names the pictures; a policy asks a simulator for this camera.
        picture_size: Height and width; 1, 1 where frames are states.
        canvas: Where several cameras lie on one picture; None otherwise.
        picture_every: Rows from one picture to the next; 1 where every row has its own.
        has_states_as_frames: Whether ``frames`` gives states, float32 ``[T, S]``, in place of pictures.
    """

    @property
    def root(self) -> Path: ...
    @property
    def fps(self) -> float: ...
    @property
    def episodes(self) -> Sequence[Episode]: ...
    @property
    def camera(self) -> str: ...
    @property
    def picture_size(self) -> tuple[int, int]: ...
    @property
    def canvas(self) -> Canvas | None: ...
    @property
    def picture_every(self) -> int: ...
    @property
    def has_states_as_frames(self) -> bool: ...

    def frames(self, episode: Episode | int, every: int = 1, /) -> np.ndarray:
        """uint8 ``[ceil(T / every), H, W, 3]``: the picture of each ``every``-th row."""

    def action(self, episode: Episode | int, /) -> np.ndarray:
        """float32 ``[T, A]``, finite, in units of one's own."""

    def state(self, episode: Episode | int, /) -> np.ndarray:
        """float32 ``[T, S]``; asked for by models with ``state_dim`` alone."""

    def instructions(self, episode: Episode | int, /) -> list[str]:
        """The instruction of each row; asked for of episodes with several."""
