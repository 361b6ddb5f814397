"""Pictures of a run: loss curves, and imagined frames beside real ones. Pillow only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..runtime.files import new_file
from .style import BLUE, FAINT, GREEN, INK, PAPER, RED, font, save_small

COLOURS = (BLUE, RED, GREEN)
LEAST_WIDTH = 160  # pixels of a film's picture, as wide as its label
LABEL_HEIGHT = 22


def enlarged(frame: np.ndarray, scale: float) -> Image.Image:
    """A uint8 frame ``[H, W, 3]`` as an image, ``scale`` times as large."""
    height, width = frame.shape[:2]
    return Image.fromarray(frame).resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)


def film_strip(rows: Mapping[str, np.ndarray], path: Path, *, title: str, columns: int = 4, scale: float = 1.5) -> None:
    """A PNG with a labelled row for each video, at the same evenly spread frames.

    Args:
        rows: Label to uint8 ``[F, H, W, 3]``, the same shape in every row.
        path: The file.
        title: One line above.
        columns: Frames to show.
        scale: Enlargement.
    """
    videos = list(rows.values())
    shown = np.linspace(0, len(videos[0]) - 1, columns).round().astype(int)
    height, width = (round(n * scale) for n in videos[0].shape[1:3])
    gap, top, left = 6, 58, 8
    image = Image.new(
        "RGB", (left * 2 + columns * (width + gap) - gap, top + len(rows) * (LABEL_HEIGHT + height + gap)), PAPER
    )
    draw = ImageDraw.Draw(image)
    draw.text((left, 8), title, font=font(18), fill=INK)
    for c, f in enumerate(shown):
        draw.text((left + c * (width + gap), 36), f"frame {f}", font=font(13), fill=FAINT)
    for r, (label, video) in enumerate(rows.items()):
        y = top + r * (LABEL_HEIGHT + height + gap)
        draw.text((left, y + 3), label, font=font(15), fill=INK)
        for c, f in enumerate(shown):
            image.paste(enlarged(video[f], scale), (left + c * (width + gap), y + LABEL_HEIGHT))
    with new_file(path) as part:
        image.save(part, optimize=True)


def film(rows: Mapping[str, np.ndarray], path: Path, *, milliseconds: int, scale: float = 1.5) -> None:
    """A GIF that plays the videos; arguments as :func:`film_strip` and :func:`save_film`."""
    count = len(next(iter(rows.values())))
    save_film([labelled({k: v[f] for k, v in rows.items()}, f, scale) for f in range(count)], path, milliseconds)


def labelled(rows: Mapping[str, np.ndarray], frame: int, scale: float = 1.5) -> Image.Image:
    """Pictures of one frame, each with its label: one above the other, or side by side where they are not wider than
    high.

    Args:
        rows: Label to uint8 ``[H, W, 3]``, the same shape in every row.
        frame: Its number, for the labels.
        scale: Enlargement; pictures of a few pixels are enlarged more, to fit their label.
    """
    height, width = next(iter(rows.values())).shape[:2]
    scale = max(scale, LEAST_WIDTH / width)
    height, width = round(height * scale), round(width * scale)
    step_x, step_y = (0, LABEL_HEIGHT + height) if width > height else (width + 4, 0)
    size = width + step_x * (len(rows) - 1), LABEL_HEIGHT + height + step_y * (len(rows) - 1)
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    for r, (label, picture) in enumerate(rows.items()):
        x, y = r * step_x, r * step_y
        draw.text((x + 4, y + 3), f"{label}, frame {frame}", font=font(14), fill=INK)
        image.paste(enlarged(picture, scale), (x, y + LABEL_HEIGHT))
    return image


def save_film(pictures: Sequence[Image.Image], path: Path, milliseconds: int) -> None:
    """A GIF that shows each picture for ``milliseconds``, or as near to it as a GIF can say: 10 to 655,350."""
    first, *others = [picture.quantize(128) for picture in pictures]
    shown = min(max(milliseconds, 10), 655_350)
    with new_file(path) as part:
        first.save(part, save_all=True, append_images=others, duration=shown, loop=0)


def curves(
    series: Mapping[str, Sequence[float | None]], path: Path, *, title: str, x_label: str, smooth: int = 30
) -> None:
    """A PNG of several series over steps 1, 2, ..: each a faint line, and its running mean over ``smooth`` steps.

    None marks steps without a value.
    """
    width, height, left, right, top, bottom = 900, 460, 64, 24, 60, 52
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    points = {name: [(i + 1, v) for i, v in enumerate(values) if v is not None] for name, values in series.items()}
    last = max((p[-1][0] for p in points.values() if p), default=1)
    high = max((v for p in points.values() for _, v in p), default=1.0) or 1.0
    tick = _tick(high / 5)
    high = tick * int(np.ceil(high / tick))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - 1) / max(1, last - 1) * (width - left - right),
            height - bottom - y / high * (height - top - bottom),
        )

    draw.text((left, 16), title, font=font(18), fill=INK)
    for k in range(round(high / tick) + 1):
        _, y = place(1, k * tick)
        draw.line([(left, y), (width - right, y)], fill=(228, 228, 232))
        draw.text((left - 8, y), f"{k * tick:g}", font=font(13), fill=FAINT, anchor="rm")
    step = max(1, round(_tick(last / 5)))
    for x in sorted({1, *range(step, last, step), last}):
        if x in (1, last) or x < last * 0.93:
            draw.text((place(x, 0)[0], height - bottom + 8), str(x), font=font(13), fill=FAINT, anchor="mt")
    draw.text((width - right, height - 8), x_label, font=font(13), fill=FAINT, anchor="rb")
    at = float(left)
    for p, colour in zip(points.values(), COLOURS, strict=False):
        if len(p) > 1:
            faint = tuple(round(c + (255 - c) * 0.7) for c in colour)
            draw.line([place(*xy) for xy in p], fill=faint, width=1)
    for (name, p), colour in zip(points.items(), COLOURS, strict=False):
        values = np.array([v for _, v in p])
        if len(p) > 1:
            total = np.concatenate([[0], values.cumsum()])
            first = np.maximum(np.arange(len(p)) + 1 - smooth, 0)
            mean = (total[1:] - total[first]) / (np.arange(len(p)) + 1 - first)
            draw.line([place(x, m) for (x, _), m in zip(p, mean, strict=True)], fill=colour, width=3)
        draw.line([(at, 48), (at + 24, 48)], fill=colour, width=3)
        draw.text((at + 30, 48), name, font=font(14), fill=INK, anchor="lm")
        at += 60 + draw.textlength(name, font=font(14))
    save_small(image, path)


def _tick(rough: float) -> float:
    """A round number (1, 2 or 5 times a power of ten) of at least ``rough``."""
    power = 10.0 ** np.floor(np.log10(max(rough, 1e-9)))
    return float(next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9)))


def intervals(
    panels: Mapping[str, Mapping[str, tuple[float, float, float, Sequence[float]]]],
    path: Path,
    *,
    title: str,
    note: str,
) -> None:
    """A PNG of percentages: in each panel a line for each label.

    Args:
        panels: Title of a panel to label to (value, low, high, single values), all from 0 to 100.
        path: The file.
        title: One line above.
        note: One line below it.
    """
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    left, top, line, panel_width, gap = 210, 92, 30, 250, 40
    width = left + len(panels) * (panel_width + gap) + 8
    height = top + len(labels) * line + 40
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((12, 10), title, font=font(18), fill=INK)
    draw.text((12, 38), note, font=font(13), fill=FAINT)
    for r, label in enumerate(labels):
        draw.text((left - 12, top + r * line + line / 2), label, font=font(14), fill=INK, anchor="rm")
    for p, (name, lines) in enumerate(panels.items()):
        x0 = left + p * (panel_width + gap)
        scale = panel_width / 100
        draw.text((x0 + panel_width / 2, top - 14), name, font=font(14), fill=INK, anchor="mm")
        for tick in range(0, 101, 25):
            x = x0 + tick * scale
            draw.line([(x, top), (x, height - 36)], fill=(228, 228, 232))
            draw.text((x, height - 30), str(tick), font=font(12), fill=FAINT, anchor="mt")
        for label, (value, low, high, each) in lines.items():
            y = top + labels.index(label) * line + line / 2
            draw.line([(x0 + low * scale, y), (x0 + high * scale, y)], fill=COLOURS[0], width=3)
            x = x0 + value * scale
            draw.rectangle([x - 4, y - 4, x + 4, y + 4], fill=COLOURS[0])
            for single in each:
                x = x0 + single * scale
                draw.ellipse([x - 3, y - 13, x + 3, y - 7], outline=COLOURS[1], width=2)
    save_small(image, path)
