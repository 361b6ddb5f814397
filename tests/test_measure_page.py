"""docs/measure.md names every file of rows and every picture that the pages show, and commands that there are."""

import re
from pathlib import Path

from bench.registry import SUITES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/measure.md").read_text()


def test_every_file_of_rows_is_on_the_page():
    shown = "".join(page.read_text() for page in [*ROOT.glob("docs/*.md"), *ROOT.glob("wam_kernels/*/README.md")])
    files = {name for name in re.findall(r"(\w+\.jsonl)\)", shown) if (ROOT / "bench/results" / name).is_file()}
    files |= {path.name for path in (ROOT / "docs/results").glob("*.jsonl")}
    assert len(files) > 8 and sorted(name for name in files if name not in PAGE) == []


def test_every_picture_is_on_the_page():
    pictures = [path.stem for path in [*ROOT.glob("docs/*.png"), *ROOT.glob("docs/figures/*.svg")]]
    assert len(pictures) > 5 and [name for name in pictures if name not in PAGE] == []


def test_the_suites_that_it_names_are_there():
    named = re.findall(r"`python -m bench\.suites (\w+)`", PAGE)
    groups = {suite.group for suite in SUITES.values()}
    assert len(named) > 5 and set(named) <= set(SUITES)
    assert set(re.findall(r"wam bench --suite (\w+)", PAGE)) <= groups | set(SUITES)
