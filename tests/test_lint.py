"""The rules of ``tools/lint.py``: each finds its planted violation, and what is right beside it passes."""

import subprocess

import pytest

from tools import lint

PAGE = """# Concepts

A word.

## Retired words

| word | write instead | right all the same |
| --- | --- | --- |
| `arm`, `arms` | provider | `"arm"`, `robot arm`, `docs/robots/` |
| `seen by` | attended to by | |
| `def at(` | a noun | |
"""


@pytest.fixture
def repository(tmp_path):
    """Makes a repository of the given files, with the page of retired words."""

    def make(**files: str) -> lint.Repository:
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
        for path, text in {"docs/concepts.md": PAGE, **files}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return lint.Repository(tmp_path)

    return make


def found(findings) -> list[tuple[str, int]]:
    return sorted((finding.path, finding.line) for finding in findings)


LEVELS = (("low",), ("left", "right"), ("wam_kernels.adaln",), ("wam_kernels",), ("high",))


@pytest.mark.parametrize(
    "path, line",
    [
        ("low.py", "import high"),
        ("low.py", "from high.tools import name"),
        ("low.py", "from left import name"),
        ("left/a.py", "from right import name"),  # of the same level
        ("left/a.py", "def f():\n    import high.tools"),
        ("left/a.py", "from importlib import import_module\nimport_module('high')"),
        ("wam_kernels/adaln/op.py", "from .. import name"),
        ("wam_kernels/adaln/op.py", "import wam_kernels"),
    ],
)
def test_an_import_that_runs_upward(repository, path, line):
    packages = {f"{name}/__init__.py": "" for name in ("left", "right", "high", "wam_kernels", "wam_kernels/adaln")}
    repo = repository(**packages, **{"high/tools.py": "", path: line})
    assert found(lint.upward(repo, LEVELS)) == [(path, 1 + line.count("\n"))]


def test_imports_that_run_downward(repository):
    repo = repository(
        **{
            "low.py": "import os, torch",
            "wam_kernels/adaln/__init__.py": "from . import op",
            "wam_kernels/adaln/op.py": "import low",
            "wam_kernels/__init__.py": "from .adaln import op",
            "high/__init__.py": "",
            "high/a.py": "import low, wam_kernels.adaln.op\nfrom . import b",
            "high/b.py": "",
        }
    )
    assert found(lint.upward(repo, LEVELS)) == []


def test_a_room_that_is_not_declared(repository):
    repo = repository(**{"wam_kernels/__init__.py": "", "wam_kernels/new/op.py": ""})
    assert found(lint.upward(repo, LEVELS)) == [("wam_kernels/new/op.py", 1)]


def test_a_circle_inside_a_room(repository):
    repo = repository(
        **{"high/a.py": "from . import b", "high/b.py": "\nfrom .c import x", "high/c.py": "import high.a"}
    )
    assert found(lint.upward(repo, LEVELS)) == [("high/a.py", 1), ("high/b.py", 2), ("high/c.py", 1)]


@pytest.mark.parametrize(
    "path, line",
    [
        ("high/a.py", "from low._inner import x"),
        ("high/a.py", "from low.mod import _name"),
        ("high/a.py", "import low.mod\nlow.mod._name()"),
        ("high/a.py", "import low.mod\nlow.mod.Thing()._held"),
        ("high/a.py", "import low.mod\ngetattr(low.mod, '_name')"),
        ("tests/a.py", "from low.mod import _name"),
        ("tests/a.py", "def test(monkeypatch):\n    monkeypatch.setattr('low.mod', '_name', 0)"),
        ("low/other/a.py", "from high._sibling import x"),
    ],
)
def test_a_private_name_of_another_package(repository, path, line):
    thing = "def _name(): pass\nclass Thing:\n    def __init__(self):\n        self._held = 1\n"
    repo = repository(**{"low/_inner.py": "x = 1", "low/mod.py": thing, "high/_sibling.py": "x = 1", path: line})
    assert found(lint.private(repo)) == [(path, 1 + line.count("\n"))]


def test_private_names_at_home(repository):
    repo = repository(
        **{
            "low/_inner.py": "_x = 1",
            "low/mod.py": "from ._inner import _x\nclass T:\n    def f(self):\n        self._held = _x\nT()._held",
            "low/sub/deep.py": "from .._inner import _x",
            "high/a.py": "import torch\ntorch._dynamo.reset()\nprint((1)._replace(), __file__)",
            "tests/a.py": "import low._inner",
        }
    )
    assert found(lint.private(repo)) == []


def test_a_long_function(repository):
    body = "\n".join(["    x = 1"] * 81)
    cpp = (
        "template <int N>\n__global__ void __launch_bounds__(8) kernel(int a,\n    int b) {\n" + "  f();\n" * 81 + "}\n"
    )
    right = 'def f():\n    """Some\n\n    lines.\n    """\n' + "\n".join(["    x = 1"] * 80)
    repo = repository(
        **{"a.py": f"\ndef f():\n{body}", "b.py": right, "c.cuh": "\n" + cpp, "d.py": f"def ok():\n{body}"}
    )
    lines = {finding.path: finding.message for finding in lint.length(repo)}
    assert set(lines) == {"a.py", "c.cuh", "d.py"} and "kernel has 81 lines" in lines["c.cuh"]


def test_a_long_function_with_a_reason(repository, monkeypatch):
    monkeypatch.setitem(lint.EXEMPT, "d.py:ok", "one kernel")
    assert found(lint.length(repository(**{"d.py": "def ok():\n" + "    x = 1\n" * 81}))) == []


@pytest.mark.parametrize(
    "path, text",
    [
        ("a.py", "right_arms = 1"),
        ("a.py", "class RightArm: pass"),
        ("a.py", "# an arm of it"),
        ("a.py", '"""Arms."""'),
        ("a.py", "raise ValueError('no arm')"),
        ("a.py", "\n# keys are seen\n# by queries"),
        ("a.py", "def at(x): pass"),
        ("a.md", "\n\n`arm`"),
        ("docs/concepts.md", "An arm.\n" + PAGE),
        ("a.cuh", "// an arm"),
        ("a.sh", "echo arm"),
    ],
)
def test_a_retired_word(repository, path, text):
    (finding,) = lint.words(repository(**{path: text}))
    line = next(n for n, line in enumerate(text.splitlines(), 1) if line.strip())
    assert (finding.path, finding.line) == (path, line) and "is retired: write" in finding.message


def test_words_that_are_right(repository):
    text = 'row["arm"]\nwarm = army = charm = "a robot arm"\nx.at(1)\n'
    repo = repository(**{"a.py": text, "docs/robots/a.md": "an arm", "bench/results/a.md": "an arm", "a.png": "arm"})
    assert list(lint.words(repo)) == []


def test_the_table_of_the_page_is_read():
    rows = lint.retired((lint.ROOT / lint.VOCABULARY).read_text())
    table = (lint.ROOT / lint.VOCABULARY).read_text().partition("## Retired words")[2]
    assert len(rows) == table.count("\n|") - 2 > 10 and all(row.words and row.instead for row in rows)


@pytest.mark.parametrize("line", ["open('/home/me/x')", "# see /work/notes", "path = '../shared/x'"])
def test_a_path_outside_the_repository(repository, line):
    assert found(lint.paths(repository(**{"a.py": f"\n{line}", "b.py": "x = '/usr/bin/env', 'a/work/b'"}))) == [
        ("a.py", 2)
    ]


def test_a_link_that_leads_nowhere(repository):
    page = "[a](docs/concepts.md#x) [b](https://b) [c](#c)\n[gone](docs/gone.md)"
    assert found(lint.links(repository(**{"a.md": page}))) == [("a.md", 2)]


def test_a_module_without_a_docstring(repository):
    repo = repository(**{"a.py": "x = 1", "b.py": '"""It."""\nx = 1', "c/__init__.py": "", "d.py": ""})
    assert found(lint.docstrings(repo)) == [("a.py", 1)]


def test_what_is_printed(monkeypatch, capsys, repository):
    repo = repository(**{"bench/a.py": "x = 1", "wam_models/data/b.py": '"""An arm."""'})
    monkeypatch.setattr(lint, "ROOT", repo.root)
    monkeypatch.setattr(lint, "Repository", lambda: repo)
    monkeypatch.setattr(lint, "RULES", (lint.words, lint.docstrings))
    assert lint.main([]) == 1
    assert capsys.readouterr().out == (
        "bench/a.py:1: docstring: the module has no docstring: say what it is in a line\n"
        "wam_models/data/b.py:1: word: 'arm' is retired: write provider\n"
    )
    assert lint.main([str(repo.root / "docs")]) == 0 and capsys.readouterr().out == ""
    assert lint.main(["--report"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["area", "docstring", "word"],
        ["bench/a.py", "1", "-"],
        ["wam_models/data", "-", "1"],
        ["all", "1", "1"],
    ]


def test_the_page_draws_the_rooms_as_they_are():
    block = (lint.ROOT / "docs/architecture.md").read_text().split("```")[1].removeprefix("text\n")
    drawn = [line[2:].split()[0] for line in block.strip("\n").splitlines()]
    assert drawn == [room for level in reversed(lint.LEVELS) for room in level]
    starts = [line[2:].split()[0] for line in block.strip("\n").splitlines() if line[0] == "-"]
    assert starts == [level[0] for level in reversed(lint.LEVELS)]


def test_every_room_is_there():
    rooms = [room.replace(".", "/") for level in lint.LEVELS for room in level]
    assert len(set(rooms)) == len(rooms)
    assert [r for r in rooms if not (lint.ROOT / r).is_dir() and not (lint.ROOT / f"{r}.py").is_file()] == []
