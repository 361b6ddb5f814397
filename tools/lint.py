"""The rules of this repository that ruff and mypy do not know.   python -m tools.lint [--report] [PATH ...]

``make lint`` runs it; ``tests/test_lint.py`` plants one violation of each rule. It prints ``path:line: rule: what is
wrong and what to do`` and exits with 1 where it finds something; ``--report`` counts findings by area instead.

- upward: a module imports its own room or rooms of lower levels of ``LEVELS``, nothing else of this repository.
  ``import`` and ``from`` anywhere in a file count, and ``import_module`` of a literal name. So there are no circles of
  rooms; the modules inside a room must have none either.
- private: what starts with one underscore belongs to the folder that holds it, a module ``_m`` to the package it lies
  in, a name or an attribute ``_x`` to the folder of the file that defines it, and is used there and in folders below.
  Tests may load private modules, their subject, but read no private names.
- length: the body of a function, its docstring left out, has at most ``LONGEST`` lines; ``EXEMPT`` names the others.
- word: the words that ``docs/concepts.md`` has retired (its table says what to write), in names, comments, docstrings,
  messages and pages.
- path: no path of one machine, and nothing outside the repository.
- link: what a Markdown page links to in this repository is there.
- docstring: every module says in its first line what it is.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# Rooms from the lowest level up; those of one level do not import each other. A room is a module, or a package with all
# below it; the longest name that fits counts. `wam_kernels` and `wam_models` are their __init__.py and __main__.py.
LEVELS = (
    ("wam_kernels.ops",),
    ("wam_kernels.runtime",),
    ("wam_kernels.frame_index", "wam_kernels.masks"),
    ("wam_kernels.plan", "wam_kernels.streaming_cache"),
    ("wam_kernels.adaln", "wam_kernels.qk_norm_rope", "wam_kernels.block_attention", "wam_kernels.cached_attention"),
    ("wam_kernels.roofline",),
    ("wam_kernels",),
    ("wam_kernels.integrations",),
    ("wam_models.runtime", "wam_models.doctor"),
    (
        "wam_models.config",
        "wam_models.flow",
        "wam_models.objectives",
        "wam_models.data",
        "wam_models.draw",
        "wam_models.state_dicts",
        "wam_models.training_state",
    ),
    ("wam_models.text", "wam_models.costs"),
    ("wam_models.model",),
    ("wam_models.weight_files", "wam_models.bridge"),
    ("wam_models.checkpoint",),
    ("wam_models.rollout", "wam_models.weights"),
    ("wam_models.train", "wam_models.evaluate", "wam_models.simulator", "wam_models.serve", "wam_models.control"),
    ("wam_models.estimate", "wam_models.ablate", "wam_models.eight_bit"),
    ("wam_models.cli",),
    ("wam_models",),
    ("bench.rows",),
    ("bench.harness", "bench.report"),
    ("bench.workloads",),
    ("bench.peers", "bench.micro", "bench.static"),
    ("bench.registry",),
    ("bench.suites", "bench.compare", "bench.tune"),
    ("bench",),
    ("tools", "examples"),
    ("tests",),
    ("tools.gpu.sanitize",),
)

LONGEST = 80  # lines of a function's body
NAMEDTUPLE = ("_asdict", "_field_defaults", "_fields", "_make", "_replace")  # public in spite of their names
# "path:function" -> why its body may be longer
EXEMPT: dict[str, str] = {}

VOCABULARY = "docs/concepts.md"
TEXT = (".py", ".md", ".sh", ".cu", ".cuh", ".cpp", ".h", ".toml", ".txt", ".yml", ".yaml", "Makefile")
# C++ as clang-format leaves it: a function's head starts at the left margin, and its closing brace is there alone
CPP_FUNCTION = re.compile(
    r"^(?!struct|class|enum|union|namespace|extern)(\w[^;{}#]*\([^;{}#]*\)[^;{}#]*)\{\n(.*?)^\}$",
    re.DOTALL | re.MULTILINE,
)
PLANTED = ("tests/test_lint.py", "tests/test_metrics.py")  # break the rules of words and paths to test them
RECORDED = ("bench/results/", "bench/micro/baseline/", "tests/golden/", "data/")  # files that programs wrote
OUTSIDE = re.compile(r"(?<![\w.])/(?:work|home|root|Users)/\w+|\.\./shared\b|/\.library/")


class Finding(NamedTuple):
    path: str
    line: int
    rule: str
    message: str


class Import(NamedTuple):
    line: int
    module: str  # the module of this repository that is loaded
    name: str  # what is taken from it; "" for the module itself


@dataclass
class Module:
    """A Python file of the repository, parsed."""

    path: str
    text: str

    @property
    def name(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def folder(self) -> str:
        return self.path.rpartition("/")[0]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    def absolute(self, name: str) -> str:
        """``..plan`` as this module means it."""
        dots = len(name) - len(name.lstrip("."))
        if not dots:
            return name
        package = self.folder.split("/")
        return ".".join([*package[: len(package) - dots + 1], *filter(None, [name[dots:]])])


def tracked(root: Path) -> list[str]:
    """Files of git's index and new ones that it does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.split("\n")
    return sorted(path for path in set(listed) if path and (root / path).is_file())


class Repository:
    def __init__(self, root: Path = ROOT, vocabulary: str | None = None):
        """``vocabulary``: the page with the table of retired words; default: the tree's own."""
        self.root = root
        self.files = [path for path in tracked(root) if not path.startswith(RECORDED)]
        self.modules = {m.name: m for m in (Module(p, self.read(p)) for p in self.files if p.endswith(".py"))}

        self.vocabulary = vocabulary or self.read(VOCABULARY)

    def read(self, path: str) -> str:
        return (self.root / path).read_text(encoding="utf-8")

    @cached_property
    def imports(self) -> dict[str, list[Import]]:
        """Of each module, what it loads of this repository, from anywhere in its file."""
        return {name: list(self._imports(module)) for name, module in self.modules.items()}

    def _imports(self, module: Module) -> Iterator[Import]:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                wanted = [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = module.absolute("." * node.level + (node.module or ""))
                wanted = [(base, alias.name) for alias in node.names]
            elif isinstance(node, ast.Call) and _called(node) == "import_module" and _literal(node, 0):
                wanted = [(module.absolute(_literal(node, 0)), "")]
            else:
                continue
            for loaded, name in wanted:
                if f"{loaded}.{name}" in self.modules:
                    yield Import(node.lineno, f"{loaded}.{name}", "")
                elif loaded in self.modules:
                    yield Import(node.lineno, loaded, name)

    @cached_property
    def private(self) -> dict[str, set[str]]:
        """Of each private name, the folders in which a module, a class or a function defines it."""
        found = defaultdict(set)
        for module in self.modules.values():
            for node in ast.walk(module.tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    name = node.name
                elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                    name = node.id if isinstance(node, ast.Name) else node.attr
                else:
                    continue
                if _is_private(name):
                    found[name].add(module.folder)
        return found


def _called(node: ast.Call) -> str:
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def _literal(node: ast.Call, which: int) -> str:
    """A literal string among the arguments, else ""."""
    argument = node.args[which] if len(node.args) > which else None
    value = argument.value if isinstance(argument, ast.Constant) else None
    return value if isinstance(value, str) else ""


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in NAMEDTUPLE


def room(name: str, levels: Iterable[Iterable[str]]) -> str | None:
    """The declared room of a module; None where there is none."""
    if name.removesuffix(".__main__") in ("wam_kernels", "wam_models"):
        return name.removesuffix(".__main__")
    fits = [r for level in levels for r in level if f"{name}.".startswith(f"{r}.")]
    best = max(fits, key=len, default=None)
    return None if best in ("wam_kernels", "wam_models") else best


def upward(repository: Repository, levels: tuple[tuple[str, ...], ...] = LEVELS) -> Iterator[Finding]:
    height = {r: number for number, level in enumerate(levels) for r in level}
    for name, module in repository.modules.items():
        here = room(name, levels)
        if here is None:
            if "." in name:
                yield Finding(module.path, 1, "upward", f"{name} is in no room: give it one in LEVELS of tools/lint.py")
            continue
        for found in repository.imports[name]:
            there = room(found.module, levels)
            if there not in (None, here) and height[there] >= height[here]:
                yield Finding(
                    module.path,
                    found.line,
                    "upward",
                    f"{here} imports {there}, which is not on a lower level: move what is needed down, or pass it in",
                )
    yield from _circles(repository)


def _circles(repository: Repository) -> Iterator[Finding]:
    """Imports of modules that, by the imports of others, load the importing module again."""
    arrows = {name: {found.module for found in repository.imports[name]} - {name} for name in repository.modules}
    reached: dict[str, set[str]] = {}
    for start in arrows:
        todo, found_so_far = list(arrows[start]), set()
        while todo:
            name = todo.pop()
            if name not in found_so_far:
                found_so_far.add(name)
                todo += arrows[name]
        reached[start] = found_so_far
    for name in arrows:
        for found in repository.imports[name]:
            if found.module != name and name in reached[found.module]:
                message = f"{name} and {found.module} import each other, perhaps through others: cut one of the imports"
                yield Finding(repository.modules[name].path, found.line, "upward", message)


def private(repository: Repository) -> Iterator[Finding]:
    for module in repository.modules.values():
        for line, used, owners in _uses(repository, module):
            if not any(_inside(module.folder, owner) for owner in owners):
                owned = ", ".join(sorted(owners))
                message = f"{used} belongs to {owned}: give it a public name, or do there what it is needed for"
                yield Finding(module.path, line, "private", message)


def _inside(folder: str, owner: str) -> bool:
    return f"{folder}/".startswith(f"{owner}/") or not owner


def _uses(repository: Repository, module: Module) -> Iterator[tuple[int, str, set[str]]]:
    """Line, private name and the folders that it belongs to."""
    for found in repository.imports[module.name]:
        parts = found.module.split(".")
        for depth, part in enumerate(parts):
            if _is_private(part) and not module.path.startswith("tests/"):
                yield found.line, ".".join(parts[: depth + 1]), {"/".join(parts[:depth])}
        if _is_private(found.name):
            yield found.line, f"{found.module}.{found.name}", {repository.modules[found.module].folder}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            name = "" if own else node.attr
        elif isinstance(node, ast.Call) and _called(node) in ("getattr", "setattr", "hasattr", "delattr"):
            name = _literal(node, 1)
        else:
            continue
        if _is_private(name):
            owners = repository.private[name]
            if not module.path.startswith("tests/"):  # stand-ins there define what other packages have
                owners = {owner for owner in owners if not owner.startswith("tests")}
            if owners:
                yield node.lineno, name, owners


def length(repository: Repository) -> Iterator[Finding]:
    for path, line, name, lines in functions(repository):
        if lines > LONGEST and f"{path}:{name}" not in EXEMPT:
            yield Finding(path, line, "length", f"the body of {name} has {lines} lines, more than {LONGEST}: split it")


def functions(repository: Repository) -> Iterator[tuple[str, int, str, int]]:
    """Path, line, name and lines of the body of each function: of Python, and of C++ those at the left margin."""
    for module in repository.modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield module.path, node.lineno, node.name, body_lines(node)
    for path in (path for path in repository.files if path.endswith((".cu", ".cuh", ".cpp", ".h"))):
        text = repository.read(path)
        for match in CPP_FUNCTION.finditer(text):
            head = re.sub(r"template <.*?>\n|__launch_bounds__\(.*?\)\s+(?=\w+\()", "", match[1])
            name = re.findall(r"(\w+)(?:<\w+>)?\(", head)[0]
            yield path, text.count("\n", 0, match.start(2)), name, match[2].count("\n")


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement after the docstring to the last."""
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1 if body else 0


class Retired(NamedTuple):
    """A row of the table of retired words."""

    words: tuple[str, ...]
    instead: str
    right: tuple[str, ...]  # phrases with the word that are right, and places where it means something else


def retired(page: str) -> list[Retired]:
    """The rows of the table under the heading "Retired words": spans of code in the first and the third column."""
    section = page.partition("\n## Retired words\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    code = re.compile(r"`([^`]+)`")
    return [Retired(tuple(code.findall(w)), instead.strip(), tuple(code.findall(r))) for w, instead, r in rows]


def _pattern(phrases: Iterable[str]) -> re.Pattern[str]:
    """Phrases as whole words of prose, of a name or over the end of a line of a comment."""
    gap = r"(?:[ _]|\n[ \t]*(?://|#|\*)?[ \t]*)"
    joined = (gap.join(map(re.escape, phrase.split(" "))) for phrase in phrases)
    whole = (f"(?:{p}){'(?![A-Za-z])' if p[-1].isalpha() else ''}" for p in joined)
    return re.compile("(?<![A-Za-z])(?:" + "|".join(whole) + ")", re.IGNORECASE)


def words(repository: Repository) -> Iterator[Finding]:
    table = [(row, _pattern(row.words)) for row in retired(repository.vocabulary)]
    for path in (path for path in repository.files if path.endswith(TEXT) and path not in PLANTED):
        text = repository.read(path)
        if path == VOCABULARY:
            text = text.partition("\n## Retired words\n")[0]
        text = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", text)
        for row, pattern in table:
            places = tuple(right for right in row.right if "/" in right)
            if path.startswith(places):
                continue
            rest = text
            for phrase in (right for right in row.right if "/" not in right):
                rest = rest.replace(phrase, re.sub(r"\S", "-", phrase))
            for match in pattern.finditer(rest):
                line = rest.count("\n", 0, match.start()) + 1
                yield Finding(path, line, "word", f"{' '.join(match[0].split())!r} is retired: write {row.instead}")


def paths(repository: Repository) -> Iterator[Finding]:
    for path in repository.files:
        if path.endswith(TEXT) and path not in ("tools/lint.py", *PLANTED):
            for number, line in enumerate(repository.read(path).splitlines(), 1):
                if match := OUTSIDE.search(line):
                    yield Finding(path, number, "path", f"{match[0]!r} is outside the repository: leave it out")


def links(repository: Repository) -> Iterator[Finding]:
    for path in repository.files:
        if path.endswith(".md"):
            for number, line in enumerate(repository.read(path).splitlines(), 1):
                for target in re.findall(r"\]\(([^)\s]+)\)", line):
                    local = target.partition("#")[0]
                    if "://" not in target and local and not (repository.root / path).parent.joinpath(local).exists():
                        yield Finding(path, number, "link", f"{target} is not there: name what is")


def docstrings(repository: Repository) -> Iterator[Finding]:
    for module in repository.modules.values():
        if module.tree.body and not module.path.endswith("__init__.py") and ast.get_docstring(module.tree) is None:
            yield Finding(module.path, 1, "docstring", "the module has no docstring: say what it is in a line")


RULES = (upward, private, length, words, paths, links, docstrings)


def area(path: str) -> str:
    """Where a finding is counted: a room, or the first folder."""
    parts = path.split("/")
    return "/".join(parts[: 2 if parts[0] in ("wam_kernels", "wam_models", "tests", "bench") else 1])


def report(findings: list[Finding]) -> str:
    by_rule = Counter(finding.rule for finding in findings)
    counts = Counter((area(finding.path), finding.rule) for finding in findings)
    lines = [f"{'area':40}" + "".join(f"{rule:>11}" for rule in by_rule)]
    for name in sorted({name for name, _ in counts}):
        lines.append(f"{name:40}" + "".join(f"{counts[name, rule] or '-':>11}" for rule in by_rule))
    return "\n".join([*lines, f"{'all':40}" + "".join(f"{count:>11}" for count in by_rule.values())])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.lint", description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="*", metavar="PATH", help="show findings in these files and folders only")
    parser.add_argument("--report", action="store_true", help="count findings by area; exit with 0")
    args = parser.parse_args(argv)
    repository = Repository()
    findings = sorted({finding for rule in RULES for finding in rule(repository)})
    wanted = tuple(str(Path(path).resolve().relative_to(ROOT)) for path in args.paths)
    findings = [f for f in findings if not wanted or f.path.startswith(wanted) or "." in wanted]
    if args.report:
        print(report(findings))
        return 0
    for finding in findings:
        print(f"{finding.path}:{finding.line}: {finding.rule}: {finding.message}")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
