"""States of a robot as pictures: the places that they hold, projected from above and from the side. No renderer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .style import BLUE, FAINT, GREEN, PAPER, RED, RULE, font

WIDTH, HEIGHT = 440, 200  # pixels of a panel
PAD, LABEL = 16, 14  # pixels around the places, and above them
MARGIN = 0.03  # around them, in the unit of the states, as a rule metres
SMOOTH = 2  # drawn so many times as large, then scaled down
TRAIL = 0.55  # how far a trail's colour is on its way to white
VIEWS = (("from above", 0, 1), ("from the side", 1, 2))  # name, axis to the right, axis upwards


@dataclass(frozen=True)
class Scene:
    """Which numbers of a state are places.

    Args:
        places: Name to the numbers of x, y and, where there is one, z.
        gripper: The number of its opening, 0 to 1; None for a robot without.
    """

    places: Mapping[str, tuple[int, ...]]
    gripper: int | None = None

    @classmethod
    def of(cls, state_names: Sequence[str]) -> Scene | None:
        """From names such as ``hand_x``, ``hand_y``, ``hand_z``, ``gripper``, ``target_x``: the first place is the
        robot's hand, ``target`` is where something is to be, as the first frame has it. None where nothing is a place.
        """
        numbers = {name: i for i, name in enumerate(state_names)}
        places = {}
        for name in state_names:
            start = name.removesuffix("x")
            if start != name and (not start or start.endswith("_")) and f"{start}y" in numbers:
                axes = (f"{start}{axis}" for axis in "xyz")
                places[start.rstrip("_")] = tuple(numbers[axis] for axis in axes if axis in numbers)
        return cls(places, numbers.get("gripper")) if places else None

    def film(self, films: Mapping[str, np.ndarray], first_frame: int = 0) -> list[Image.Image]:
        """A picture for each frame: a column for each film, with its label, and a row for each view.

        Args:
            films: Label to states ``[F, S]``, the same F; the first is what happened. A place of which it has zeros
                alone, as Meta-World has for an object that a task lacks, is not drawn.
        first_frame: Pictures of the frames before it are left out.
        """
        first = next(iter(films.values()))
        shown = {name: axes for name, axes in self.places.items() if first[:, axes].any()} or dict(self.places)
        views = [view for view in VIEWS if all(len(axes) > max(view[1:]) for axes in shown.values())]
        limits = {}
        for axis in {axis for _, *both in views for axis in both}:
            values = np.concatenate([states[:, [axes[axis] for axes in shown.values()]] for states in films.values()])
            low, high = float(values.min()), float(values.max())
            limits[axis] = (low + high) / 2, (high - low) / 2 + MARGIN
        return [self._picture(films, shown, views, limits, frame) for frame in range(first_frame, len(first))]

    def _picture(self, films: Mapping[str, np.ndarray], shown, views, limits, frame: int) -> Image.Image:
        width, height = WIDTH * len(films), HEIGHT * len(views)
        image = Image.new("RGB", (width * SMOOTH, height * SMOOTH), PAPER)
        labels = []
        for column, (label, states) in enumerate(films.items()):
            for row, (name, *axes) in enumerate(views):
                panel = Image.new("RGB", (WIDTH * SMOOTH, HEIGHT * SMOOTH), PAPER)
                (x, rx), (y, ry) = (limits[axis] for axis in axes)
                scale = min((WIDTH - 2 * PAD) / 2 / rx, (HEIGHT - 2 * PAD - LABEL) / 2 / ry)
                middle = np.array([WIDTH / 2, LABEL + (HEIGHT - LABEL) / 2])
                tracks = {
                    place: SMOOTH
                    * (middle + (states[: frame + 1, [numbers[a] for a in axes]] - (x, y)) * (scale, -scale))
                    for place, numbers in shown.items()
                }
                opening = 1.0 if self.gripper is None else float(np.clip(states[frame, self.gripper], 0, 1))
                _draw_panel(ImageDraw.Draw(panel), tracks, opening)
                image.paste(panel, (column * WIDTH * SMOOTH, row * HEIGHT * SMOOTH))
                labels.append((column * WIDTH + 6, row * HEIGHT + 2, f"{label}, {name}"))
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        draw = ImageDraw.Draw(image)
        for place in range(1, len(films)):
            draw.line([(place * WIDTH, 0), (place * WIDTH, height)], fill=RULE)
        for place in range(1, len(views)):
            draw.line([(0, place * HEIGHT), (width, place * HEIGHT)], fill=RULE)
        for left, top, text in labels:
            draw.text((left, top), text, font=font(12), fill=FAINT)
        last = len(next(iter(films.values()))) - 1
        draw.text((width - 8, height - 6), f"frame {frame} of {last}", font=font(12), fill=FAINT, anchor="rb")
        return image


def _draw_panel(draw: ImageDraw.ImageDraw, tracks: Mapping[str, np.ndarray], opening: float) -> None:
    """Trails up to this frame and what is at their ends; the hand, which is the first, comes last and so on top."""
    for place, (name, track) in reversed(list(enumerate(tracks.items()))):
        x, y = track[0 if name == "target" else -1]
        if name == "target":
            size = 7 * SMOOTH
            for ends in (((x - size, y), (x + size, y)), ((x, y - size), (x, y + size))):
                draw.line(ends, fill=GREEN, width=2 * SMOOTH)
            continue
        colour = RED if place else BLUE
        faint = tuple(round(c + (255 - c) * TRAIL) for c in colour)
        if len(track) > 1:
            draw.line([tuple(point) for point in track], fill=faint, width=round(1.5 * SMOOTH), joint="curve")
        if place:
            draw.rectangle([x - 6 * SMOOTH, y - 6 * SMOOTH, x + 6 * SMOOTH, y + 6 * SMOOTH], fill=colour)
        else:
            half, length, round_ = (4 + 8 * opening) * SMOOTH, 9 * SMOOTH, 4 * SMOOTH
            fingers = [(x - half, y + length), (x - half, y), (x + half, y), (x + half, y + length)]
            draw.line(fingers, fill=colour, width=3 * SMOOTH)
            draw.ellipse([x - round_, y - round_, x + round_, y + round_], fill=colour)
