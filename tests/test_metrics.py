"""``tools/metrics.py``: the shape of a small repository, and that the page has what was recorded."""

import json
import subprocess

from tools import lint, metrics


def test_the_shape_of_a_package():
    graph = {
        "wam_models.a": {"wam_models.b", "wam_models.c", "wam_kernels.x", "bench"},
        "wam_models.b": {"wam_models.c"},
        "wam_models.c": {"wam_models.d"},
        "wam_models.d": {"wam_models.c"},
        "wam_models": {"wam_models.a"},
    }
    assert metrics.shape(graph, "wam_models") == {"rooms": 4, "arrows": 5, "levels": 3, "arrows in circles": 2}
    assert metrics.upward(graph) == ["wam_models -> bench"]


def test_a_tree_is_measured(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    files = {
        "wam_kernels/__init__.py": "from .masks import x",
        "wam_kernels/masks.py": "x = 1",
        "wam_models/a.py": "from . import b\nfrom wam_kernels.masks import _y",
        "wam_models/b.py": "def f():\n" + "    x = 1\n" * 90,
        "csrc/k.cuh": "void k(int a) {\n  f();\n}\n",
        "tests/test_k.py": "import qk_norm_rope  # a door",
    }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    rows = metrics.measure(tmp_path, (lint.ROOT / lint.VOCABULARY).read_text(), types=False)
    assert rows["wam_models: rooms"] == "2" and rows["wam_models: arrows"] == "1"
    assert rows["imports between packages that run upward"] == "0"
    assert rows["private names used across folders"] == "1" and rows["retired words"] == "1"
    assert rows["longest function, Python"] == "90 lines (`f`)" and rows["longest function, C++"] == "1 lines (`k`)"
    assert rows["functions of more than 80 lines"] == "1"
    assert rows["files that name an op (`qk_norm_rope`)"] == "0 of code, 1 tests and pages"


def test_the_last_recorded_comparison(tmp_path):
    row = {"date": "2026-01-01T00:00:00Z", "commit": "abc", "base": "main", "device": "a CPU", "case": "test_op"}
    row |= {"instruction_ratio": 0.9876, "time_ratio": 1.0, "spread": 0.01}
    later = row | {"date": "2026-01-02T00:00:00Z", "instruction_ratio": None}
    path = tmp_path / "compare.jsonl"
    assert metrics.ratios(path) == "Not recorded yet."
    path.write_text("".join(json.dumps(r) + "\n" for r in (row, later)))
    assert metrics.ratios(path).splitlines()[-1] == "| `test_op` | - | 1.000 | 0.010 |"
    assert "0.988" not in metrics.ratios(path) and "2026-01-02" in metrics.ratios(path)


def test_the_page_has_what_was_recorded():
    page = (lint.ROOT / "docs/architecture.md").read_text()
    shown = page.partition("<!-- ratios -->\n")[2].partition("\n<!-- end of ratios -->")[0]
    assert shown == metrics.ratios()
