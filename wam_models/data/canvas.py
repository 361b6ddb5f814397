"""Pictures of several cameras tiled on one, the same way in data sets and simulators."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Cell(NamedTuple):
    """Where the picture of a camera lies."""

    camera: str
    top: int
    left: int
    height: int
    width: int


def camera_names(layout: str) -> list[str]:
    """The cameras of a layout, in the order of their cells."""
    return [name.strip() for name in re.split("[,/]", layout)]


class Canvas:
    """One picture of several.

    Args:
        cells: They cover it without a gap.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = tuple(cells)
        self.size = max(c.top + c.height for c in cells), max(c.left + c.width for c in cells)

    @classmethod
    def of(cls, layout: str, sizes: Mapping[str, tuple[int, int]]) -> Canvas:
        """Rows of cameras, ``"front,wrist"`` side by side and ``"front/left,right"`` in two rows.

        The pictures of a row have one height, the first row's that of its first camera; every row is as wide as the
        first. Aspect ratios stay, up to rounding.

        Args:
            layout: The names; ``,`` between those of a row, ``/`` between rows.
            sizes: Height and width of the pictures of each.
        """
        cells, top, width = list[Cell](), 0, 0
        for row in layout.split("/"):
            names = camera_names(row)
            aspects = np.array([sizes[name][1] / sizes[name][0] for name in names])
            height = sizes[names[0]][0] if not cells else max(1, round(width / aspects.sum()))
            width = width or round(height * aspects.sum())
            edges = np.round(np.append(0, aspects.cumsum()) / aspects.sum() * width).astype(int).tolist()
            cells += [
                Cell(name, top, left, height, right - left)
                for name, left, right in zip(names, edges, edges[1:], strict=False)
            ]
            top += height
        return cls(cells)

    def compose(self, pictures: Mapping[str, np.ndarray]) -> np.ndarray:
        """uint8 ``[H, W, 3]`` of the cameras' pictures ``[h, w, 3]``, each scaled to its cell where it has another
        size.

        Raises:
            ValueError: a camera without a picture.
        """
        out = np.empty((*self.size, 3), np.uint8)
        for camera, top, left, height, width in self.cells:
            if camera not in pictures:
                raise ValueError(f"the picture of camera {camera!r} is missing, got {sorted(pictures)}")
            out[top : top + height, left : left + width] = _scaled(pictures[camera], height, width)
        return out


def _scaled(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    if picture.shape[:2] == (height, width):
        return picture
    from PIL import Image  # here: whatever scales no picture runs without Pillow

    return np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize((width, height), Image.Resampling.BOX))
