"""How the house stands, as numbers: this tree, and beside it another commit.   python -m tools.metrics [--base REF]

Prints the table of ``docs/architecture.md``. Both trees are measured with the rules of this one. Rooms are the first
level of ``wam_kernels`` and of ``wam_models``, modules and packages alike; an arrow is a pair of rooms of which one
imports the other, anywhere in a file; levels are the rooms of the longest chain of arrows, circles counted as one room.
Types are checked with mypy as ``pyproject.toml`` sets it, on the packages alone (``--no-types`` leaves that out).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools import lint

PACKAGES = ("wam_kernels", "wam_models")
ORDER = (*PACKAGES, "bench", "tests")  # whole packages, the lowest first
# what names a program, an op and a data set, to count the files that one of them is spread over
EXAMPLES = {"a program": "action_noisy_to_video", "an op": "qk_norm_rope", "a data set": "libero_demo"}
CODE = ("wam_kernels/", "wam_models/", "csrc/", "bench/", "tools/", "scripts/", "CMakeLists.txt", "Makefile")
CPP = (".cu", ".cuh", ".cpp", ".h")


def first_level(module: str) -> str:
    """The room of a module; ``wam_kernels.__init__`` is the room ``wam_kernels``."""
    parts = module.removesuffix(".__main__").split(".")
    return ".".join(parts[:2]) if parts[0] in PACKAGES else parts[0]


def arrows(repository: lint.Repository) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for name, imports in repository.imports.items():
        found[first_level(name)] |= {first_level(i.module) for i in imports} - {first_level(name)}
    return found


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    todo = [start]
    reached: set[str] = set()
    while todo:
        for room in graph.get(todo.pop(), set()) - reached:
            reached.add(room)
            todo.append(room)
    return reached


def shape(graph: dict[str, set[str]], package: str) -> dict[str, int]:
    """Rooms, arrows, levels and arrows in circles of one package; its ``__init__`` stands above and is left out."""
    rooms = {r for r in {*graph, *(t for targets in graph.values() for t in targets)} if r.startswith(f"{package}.")}
    inner = {room: graph.get(room, set()) & rooms for room in rooms}
    reached = {room: reachable(inner, room) for room in rooms}

    def level(room: str) -> int:
        below = [r for r in reached[room] if room not in reached[r]]
        return 1 + max(map(level, below), default=0)

    return {
        "rooms": len(rooms),
        "arrows": sum(map(len, inner.values())),
        "levels": max(map(level, rooms), default=0),
        "arrows in circles": sum(a in reached[b] for a in rooms for b in inner[a]),
    }


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Arrows between whole packages that run against ``ORDER``."""
    package = {room: room.split(".")[0] for room in {*graph, *(t for ts in graph.values() for t in ts)}}
    pairs = {(package[a], package[b]) for a in graph for b in graph[a]}
    return sorted(f"{a} -> {b}" for a, b in pairs if a in ORDER and b in ORDER and ORDER.index(a) < ORDER.index(b))


def files_that_name(repository: lint.Repository, word: str) -> tuple[int, int]:
    """Files of code, and tests and pages, that have the word in their text or their path."""
    pattern = re.compile(rf"(?<![A-Za-z0-9]){word}(?![A-Za-z0-9])")
    named = [
        path
        for path in repository.files
        if pattern.search(path) or (path.endswith(lint.TEXT) and pattern.search(repository.read(path)))
    ]
    code = sum(path.startswith(CODE) and not path.endswith(".md") for path in named)
    return code, len(named) - code


def type_findings(root: Path) -> int:
    command = [
        "mypy", "--config-file", str(lint.ROOT / "pyproject.toml"), "--python-executable", sys.executable,
        "--cache-dir", "/dev/null", *PACKAGES,
    ]  # fmt: skip
    out = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout
    return sum(": error: " in line for line in out.splitlines())


def lines(repository: lint.Repository, folder: str, endings: tuple[str, ...]) -> int:
    paths = [p for p in repository.files if p.startswith(folder) and p.endswith(endings)]
    return sum(repository.read(p).count("\n") for p in paths)


def measure(root: Path, vocabulary: str, types: bool) -> dict[str, str]:
    """The rows of one tree; ``vocabulary`` is the page whose retired words are counted."""
    repository = lint.Repository(root, vocabulary)
    graph = arrows(repository)
    rows: dict[str, str] = {}
    for package in PACKAGES:
        for what, count in shape(graph, package).items():
            rows[f"{package}: {what}"] = str(count)
    against = upward(graph)
    rows["imports between packages that run upward"] = f"{len(against)} ({', '.join(against)})" if against else "0"
    rows["private names used across folders"] = str(len(set(lint.private(repository))))
    found = sorted(lint.functions(repository), key=lambda f: -f[3])
    for what, endings in (("Python", (".py",)), ("C++", CPP)):
        path, _, name, count = next(f for f in found if f[0].endswith(endings))
        rows[f"longest function, {what}"] = f"{count} lines (`{name}`)"
    rows[f"functions of more than {lint.LONGEST} lines"] = str(sum(f[3] > lint.LONGEST for f in found))
    rows["retired words"] = str(len(set(lint.words(repository))))
    if types:
        rows["type findings in the packages"] = str(type_findings(root))
    for what, word in EXAMPLES.items():
        code, others = files_that_name(repository, word)
        rows[f"files that name {what} (`{word}`)"] = f"{code} of code, {others} tests and pages"
    for folder, endings in (
        ("wam_kernels/", (".py",)),
        ("wam_models/", (".py",)),
        ("csrc/", CPP),
        ("tests/", (".py",)),
    ):
        rows[f"lines of `{folder}`"] = f"{lines(repository, folder, endings):,}"
    return rows


@contextmanager
def checked_out(ref: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(lint.ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", f"{folder}/tree", ref], check=True)
        try:
            yield Path(folder) / "tree"
        finally:
            subprocess.run([*git, "remove", "--force", f"{folder}/tree"], check=True)


def ratios(results: Path = lint.ROOT / "bench/results/compare.jsonl") -> str:
    """The last run of ``wam bench --base REF --record``, as a table; a sentence where there is none."""
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    if not rows:
        return "Not recorded yet."
    last = [row for row in rows if row["date"] == rows[-1]["date"]]
    head = f"`{last[0]['commit']}` against `{last[0]['base']}`, {last[0]['device']}, {last[0]['date'][:10]}"
    lines = [f"| {head} | instructions | time | spread of the time |", "| --- | --- | --- | --- |"]
    for row in last:
        count = "-" if row["instruction_ratio"] is None else f"{row['instruction_ratio']:.3f}"
        lines.append(f"| `{row['case']}` | {count} | {row['time_ratio']:.3f} | {row['spread']:.3f} |")
    return "\n".join(lines)


def table(columns: dict[str, dict[str, str]]) -> str:
    names = dict.fromkeys(name for rows in columns.values() for name in rows)
    out = [f"| | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    out += [f"| {name} | {' | '.join(rows.get(name, '-') for rows in columns.values())} |" for name in names]
    return "\n".join(out)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.metrics", description=__doc__.partition("\n")[0])
    parser.add_argument("--base", metavar="REF", help="a commit to put beside this tree")
    parser.add_argument("--ratios", action="store_true", help="print the last recorded `wam bench --base` instead")
    parser.add_argument("--no-types", action="store_true", help="leave mypy out")
    args = parser.parse_args(argv)
    if args.ratios:
        print(ratios())
        return
    vocabulary = (lint.ROOT / lint.VOCABULARY).read_text(encoding="utf-8")
    columns = {}
    if args.base:
        with checked_out(args.base) as root:
            columns[args.base] = measure(root, vocabulary, not args.no_types)
    columns["this tree"] = measure(lint.ROOT, vocabulary, not args.no_types)
    print(table(columns))


if __name__ == "__main__":
    main()
