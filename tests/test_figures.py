"""The figures of docs/concepts.md are those that the code draws today."""

import xml.etree.ElementTree as ET

import pytest

from tools import figures


@pytest.mark.parametrize("name", figures.FIGURES)
def test_the_stored_figure_is_the_one_drawn(name):
    stored = (figures.FOLDER / f"{name}.svg").read_text()
    assert stored == str(figures.FIGURES[name]()), "run: python -m tools.figures"
    root = ET.fromstring(stored)
    assert len(root) > 15 and len(stored) < 60_000


def test_no_figure_is_left_over():
    assert {path.stem for path in figures.FOLDER.iterdir()} == set(figures.FIGURES)
