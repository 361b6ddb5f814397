"""Every script of examples runs as it stands, and so do the cells of the notebook, whose outputs are stored."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
TESTED_ELSEWHERE = {
    "point_simulator": "tests/simulator/test_evaluate.py",
    "npz_source": "tests/data/test_source.py",
    "occluded": "tests/simulator/test_simulators.py",
}
LONGER = {"npz_source": 100, "cosmos_policy": 70}  # a second source of data; a training and what acts
RUN = """
import json, runpy, sys, traceback
failed = {}
for path in sys.argv[1:]:
    try:
        if path.endswith(".py"):
            runpy.run_path(path, run_name="__main__")
        else:
            names = {}
            for number, cell in enumerate(json.load(open(path))["cells"]):
                if cell["cell_type"] == "code":
                    exec(compile("".join(cell["source"]), f"{path}, cell {number}", "exec"), names)
    except BaseException:
        failed[path] = traceback.format_exc()
sys.__stdout__.write("\\0" + json.dumps(failed))
"""


def run(paths: list[Path], folder: Path) -> dict[str, str]:
    """The traceback of each that failed; in one process, since importing torch takes longer than they do."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, paths)], cwd=folder, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return {Path(path).name: error for path, error in json.loads(done.stdout.rpartition("\0")[2]).items()}


def test_they_run(tmp_path):
    chosen = [EXAMPLES / f"{name}.py" for name in SCRIPTS if name not in TESTED_ELSEWHERE]
    if find_spec("open_wam") is None:  # there up to Python 3.12
        chosen = [path for path in chosen if "openwam" not in path.name]
    if find_spec("openpi_client") is None:  # requirements/openpi_client.txt
        chosen = [path for path in chosen if path.name != "policy_client.py"]
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('planted')\n")
    failed = run([*chosen, *NOTEBOOKS, broken], tmp_path)
    assert "planted" in failed.pop("broken.py") and failed == {} and len(chosen) >= 3


@pytest.mark.parametrize("name", SCRIPTS)
def test_they_are_short_and_are_named_where_a_reader_looks(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= LONGER.get(name, 60)
    pages = [EXAMPLES.parent / "README.md", *EXAMPLES.parent.glob("docs/*.md")]
    assert any(f"examples/{name}.py" in page.read_text() for page in pages)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stored_as_it_was_executed(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [
        o for cell in cells for o in cell["outputs"] if o["output_type"] == "error" or o.get("name") == "stderr"
    ]
    assert sum(bool(cell["outputs"]) for cell in cells) > len(cells) / 2 and path.stat().st_size < 200_000
