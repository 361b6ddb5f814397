"""The README is short, and the blocks of Python on the pages for users run as they stand."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NEEDS_TRAINING = "runs/libero/checkpoint"  # tests/demo/test_demo.py runs the block that names it

# every block alone, as a reader would; all in one process, since importing torch takes longer than they do
RUN = """
import sys
for number, block in enumerate(sys.stdin.read().split("\\0"), 1):
    print("block", number)
    exec(compile(block, f"block {number}", "exec"), {"__name__": "__main__"})
"""


def blocks(page: str) -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [block for block in found if NEEDS_TRAINING not in block]


def run(found: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", RUN], input="\0".join(found), cwd=folder, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_blocks_run_as_they_stand(tmp_path):
    readme, usage = blocks("README.md"), blocks("docs/usage.md")
    assert (len(readme), len(usage)) == (3, 1)
    found = readme + usage
    if find_spec("open_wam") is None:  # there up to Python 3.12
        found = [block for block in found if "openwam" not in block]
    assert run(found, tmp_path).count("block ") == len(found)


def test_the_check_notices(tmp_path):
    with pytest.raises(AssertionError, match="NameError"):
        run(["first = 1", "print(first)"], tmp_path)


def test_the_readme_is_short_and_begins_with_the_two_commands():
    assert len(README.splitlines()) <= 100
    first = README.split("```")[1].split("\n")
    assert [line.partition("#")[0].strip() for line in first if line] == ["make demo", "make test"]
    assert README.count("](docs/demo.png)") == 1 and README.count("![") == 1


@pytest.mark.parametrize(
    "page", [str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))]
)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (heading and heading not in anchors(target)):
            broken.append(link)
    assert not broken


def anchors(page: Path) -> list[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
