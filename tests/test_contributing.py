"""What CONTRIBUTING.md and docs/concepts.md name in this repository is there: paths, tests, links."""

import re
from pathlib import Path

import pytest

from wam_kernels import __version__

ROOT = Path(__file__).parent.parent
PAGES = ("CONTRIBUTING.md", "docs/concepts.md", "docs/architecture.md")
FILE = re.compile(r"\.(cpp|cu|cuh|h|jsonl?|md|png|py|sh|toml|txt)$")


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def named(page: str) -> list[str]:
    """What stands in backticks and is a path from the root, perhaps with a test behind ``::``."""
    spans = [span for span in re.findall(r"`([^`\n]+)`", prose(page)) if " " not in span]
    return [span for span in spans if "/" in span or FILE.search(span.partition("::")[0])]


def is_there(name: str) -> bool:
    """``<op>`` and the like stand for something: of these one is enough."""
    path, _, test = name.partition("::")
    found = list(ROOT.glob(re.sub(r"<\w+>", "*", path)))
    return any(not test or re.search(rf"^def {re.escape(test)}\(", f.read_text(), re.MULTILINE) for f in found)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_named_is_there(page):
    names = named(page)
    assert len(names) > 5 and [name for name in names if not is_there(name)] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", prose(page))]
    assert links and [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def test_the_changelog_has_a_section_of_this_version():
    sections = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    assert sections[0].startswith(__version__) and sections[0].count("\n- ") > 1


def test_the_check_notices():
    assert is_there("wam_kernels/<op>/op.py") and is_there("tests/test_ops.py::test_no_part_is_missing")
    assert not any(map(is_there, ("wam_kernels/<op>/oq.py", "tests/test_oops.py", "tests/test_ops.py::test_no_part")))
