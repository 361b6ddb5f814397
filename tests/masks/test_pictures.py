"""Pictures of other systems' programs, and ``wam mask --program`` for them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wam_kernels import RULE_PROGRAMS
from wam_models import cli
from wam_models.draw.masks import EXAMPLE_SIZES, MASKED, draw_systems, program_image
from wam_models.draw.style import save_small

STORED = Path(__file__).parents[2] / "docs/programs.png"


@pytest.mark.parametrize("name", RULE_PROGRAMS)
def test_a_pixel_is_a_pair(name):
    """A colour exactly where a pair is visible, at the centres of the pixel blocks."""
    program = RULE_PROGRAMS[name](**EXAMPLE_SIZES[name])
    image = np.asarray(program_image(program, 5 * program.key_length)).astype(int)
    assert image.shape[:2] == (5 * program.length, 5 * program.key_length)
    seen = (np.abs(image[2::5, 2::5] - MASKED) > 12).any(-1)
    np.testing.assert_array_equal(seen, program.dense_mask())


def test_the_stored_picture_is_the_one_drawn(tmp_path):
    save_small(draw_systems(), tmp_path / "programs.png")
    assert STORED.stat().st_size < 60_000
    stored, drawn = (np.asarray(Image.open(p).convert("RGB"), int) for p in (STORED, tmp_path / "programs.png"))
    assert stored.shape == drawn.shape
    assert np.abs(stored - drawn).mean() < 1  # fonts may be drawn a little differently elsewhere


@pytest.mark.parametrize("name", RULE_PROGRAMS)
def test_wam_mask(name, tmp_path, capsys):
    path = tmp_path / "mask.png"
    assert cli.main(["mask", "--program", name, "--out", str(path)]) == 0
    mask = RULE_PROGRAMS[name](**EXAMPLE_SIZES[name]).dense_mask()
    printed = capsys.readouterr().out
    assert f"density        {mask.mean():.4f}" in printed and f"visible pairs  {mask.sum()} of {mask.size}" in printed
    assert Image.open(path).width == 860


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--program tri_tower --window 3", "--window must be left out with --program tri_tower"),
        ("--program tri_tower --out mask.gif", "--out must be a file name that ends in .png, got mask.gif"),
        ("--program tri_tawer", "--program must be one of ('video_then_action', .* 'being_h'), got 'tri_tawer'"),
    ],
)
def test_mistakes_are_one_line(flags, message, capsys):
    assert cli.main(["mask", *flags.split()]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    first, *rest = message.split(" .* ")
    assert first in err and all(part in err for part in rest)
