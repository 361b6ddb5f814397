"""What the pictures share: colours, the font, the file format."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageFont

from ..runtime.files import new_file

INK, FAINT, PAPER = (30, 30, 36), (120, 120, 130), (255, 255, 255)


def font(size: int):
    return ImageFont.load_default(size)


def save_small(image: Image.Image, path: str | Path) -> None:
    """As a PNG of at most 128 colours: flat colours need no more, and it is a quarter of the size."""
    with new_file(Path(path)) as part:
        image.quantize(128, dither=Image.Dither.NONE).save(part, optimize=True)
