"""What the pictures share: colours, the font, the file format."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageFont

from ..runtime.files import new_file

INK, FAINT, RULE, PAPER = (30, 30, 36), (120, 120, 130), (221, 221, 221), (255, 255, 255)
BLUE, RED, GREEN = (43, 108, 176), (214, 93, 62), (47, 141, 98)


def font(size: int):
    return ImageFont.load_default(size)


def small(image: Image.Image) -> Image.Image:
    """Of at most 128 colours: flat colours need no more, and a PNG of it is a quarter of the size."""
    return image.quantize(128, dither=Image.Dither.NONE)


def save_small(image: Image.Image, path: str | Path) -> None:
    """As a PNG of few colours, see :func:`small`."""
    with new_file(Path(path)) as part:
        small(image).save(part, optimize=True)
