"""Every block of code on every page: Python runs, commands parse, JSON is a config; links lead somewhere.

A block says what it is: ``python`` runs as it stands, in a namespace of its page after what ``BEFORE`` prepares there;
``sh`` is read by bash, and every command in it by the parser of its program; ``json`` is a training config, ``toml`` a
recipe; ``text`` is a drawing or a formula. All Python runs in one process: importing torch takes longer than they do.
"""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LISTED = subprocess.run(
    ["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True
).stdout
PAGES = LISTED.split()

TRAINED = """
import json
from pathlib import Path
from tests.data import tiny
from tests.train.conftest import TINY
from wam_models.cli import main
tiny.write(Path("{data}"))
Path("tiny.json").write_text(json.dumps(TINY))
assert main("train --data {data} tiny.json --steps 1 --out {out}".split()) == 0
"""
# what a reader has before the blocks of a page; the names that it leaves are those of the page
BEFORE = {
    "docs/usage.md": TRAINED.format(data="data/libero_demo", out="runs/libero"),
    "docs/your_robot.md": TRAINED.format(data="my_data", out="runs/mine"),
    "docs/weights.md": """
from tests.train.conftest import TINY
from wam_models import ModelConfig, WorldActionModel, weights_to
from wam_models.weights.folders import write_folder
config = ModelConfig(**TINY["model"], action_dim=7, actions_per_frame=4, topology="video_only")
write_folder("Wan2.2-TI2V-5B-Diffusers/transformer", "diffusers",
             weights_to("diffusers", WorldActionModel(config).state_dict(), config), config)
""",
    "wam_kernels/integrations/README.md": """
from types import SimpleNamespace
from tests.integrations.test_fast_wam import model as small_model
model, trainer = small_model(), SimpleNamespace(model=small_model())
""",
}
RUN = """
import json, os, sys, traceback
pages, failed = json.load(sys.stdin), {}
for page, blocks in pages.items():
    os.makedirs(folder := os.path.join(sys.argv[1], page))
    os.chdir(folder)
    names = {"__name__": "__main__"}
    for number, block in enumerate(blocks):
        try:
            exec(compile(block, f"{page}, block {number}", "exec"), names)
        except BaseException:
            failed[page] = traceback.format_exc()
            break
    if "openwam" in names:  # it was installed for the process
        names["openwam"].uninstall()
sys.__stdout__.write("\\0" + json.dumps(failed))
"""


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str


def blocks_of(page: str, text: str) -> list[Block]:
    found = re.finditer(r"^ *```([^\n]*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page, text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in found]


BLOCKS = [block for page in PAGES for block in blocks_of(page, (ROOT / page).read_text())]


def python_pages() -> dict[str, list[str]]:
    chosen: dict[str, list[str]] = {}
    for block in BLOCKS:
        # openwam is there up to Python 3.12
        if block.language == "python" and (find_spec("open_wam") or "openwam" not in block.text):
            chosen.setdefault(block.page, [BEFORE.get(block.page, "")]).append(block.text)
    return chosen


def run(pages: dict[str, list[str]], folder: Path) -> dict[str, str]:
    """The traceback of each page that failed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder)],
        input=json.dumps(pages),
        env=environment,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("\0")[2])


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    return run(python_pages(), tmp_path_factory.mktemp("pages"))


@pytest.mark.parametrize("page", python_pages())
def test_python_runs_as_it_stands(page, failed):
    assert page not in failed, failed[page]


def test_the_blocks_that_come_first_are_among_them():
    count = {page: len(blocks) - 1 for page, blocks in python_pages().items()}
    assert count["README.md"] + (find_spec("open_wam") is None) == 3
    assert count["docs/usage.md"] == 3 and count["docs/weights.md"] == 1


def test_the_check_notices(tmp_path):
    pages = {"a": ["first = 1", "assert first == 1"], "b": ["print(first)"], "c": ["raise SystemExit(2)"]}
    found = run(pages, tmp_path)
    assert "NameError" in found["b"] and "SystemExit" in found["c"] and "a" not in found


def test_every_block_says_what_it_is():
    assert {block.language for block in BLOCKS} <= {"python", "sh", "json", "toml", "text"}, BLOCKS
    for page in PAGES:
        rest = re.sub(r"^ *```.*?^ *```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
        assert "```" not in rest, page
        assert not re.search(r"\n\n    \S", rest), f"{page}: an indented block says nothing; fence it"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "toml"], ids=lambda b: f"{b.page}:{b.line}")
def test_recipes_in_pages_are_recipes(block):
    from wam_models.train.recipe import Recipe

    assert Recipe.from_dict(tomllib.loads(block.text)).data


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "json"], ids=lambda b: f"{b.page}:{b.line}")
def test_json_is_a_training_config(block):
    from tests.train.conftest import TINY
    from wam_models.train import TrainConfig

    TrainConfig.from_dict(TINY | json.loads(block.text))


# ---- Commands. Bash reads the block, with functions in the place of programs, each of which prints its arguments.

PROGRAMS = ("wam", "make", "pip", "python", "torchrun", "openwam-train")
SHELL = "PATH=\n" + "\n".join(f"{p}() {{ printf '%s\\0' {p} \"$@\"; printf '\\n\\0'; }}" for p in PROGRAMS)


def commands(text: str) -> list[list[str]]:
    text = re.sub(r"(?<![^\s=])[\w./-]*/bin/(?=(?:wam|pip|python)\b)", "", text).replace("python3 ", "python ")
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run([bash, "-e", "-u", "-c", f"{SHELL}\n{text}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [part.split("\0") for part in done.stdout.split("\n\0")[:-1]]
    return [[word for word in words if word] for words in found]


def module_is_there(name: str) -> bool:
    return name in ("venv", "pytest") or (ROOT / name.replace(".", "/")).with_suffix(".py").is_file() or any(
        (ROOT / name.replace(".", "/") / f"{main}.py").is_file() for main in ("__main__", "__init__")
    )  # fmt: skip


def what_is_wrong(words: list[str]) -> str:
    """With a command, or nothing. What it names in this repository must be there, too."""
    program, arguments = words[0], words[1:]
    stale = [a for a in arguments if re.match(r"(examples|requirements|tests|bench)/", a) and not (ROOT / a).exists()]
    if stale:
        return f"{stale} is not there"
    if program == "make":
        targets = re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return "" if set(a for a in arguments if "=" not in a) <= set(targets) else "no such target"
    if program == "python":
        return "" if arguments[0] != "-m" or module_is_there(arguments[1]) else "no such module"
    if program == "pip":
        extras = {extra for a in arguments for found in re.findall(r"\[(.*?)\]", a) for extra in found.split(",")}
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        return "" if extras <= set(known) else f"the extras are {sorted(known)}"
    if program == "torchrun":
        module = arguments.index("-m") + 1
        return wam_error(arguments[module + 1 :]) if arguments[module] == "wam_models" else "no such module"
    return wam_error(arguments) if program == "wam" else ""


def wam_error(arguments: list[str]) -> str:
    from bench.cli import make_parser as bench_parser
    from wam_models.cli import make_parser

    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        try:
            if arguments[0] == "bench":
                bench_parser().parse_args(arguments[1:])
            else:
                make_parser().parse_args(arguments)
        except SystemExit:
            return printed.getvalue()
    return ""


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "sh"], ids=lambda b: f"{b.page}:{b.line}")
def test_commands_are_what_their_programs_take(block):
    found = commands(block.text)
    assert found and {" ".join(words): wrong for words in found if (wrong := what_is_wrong(words))} == {}


def test_flags_in_the_text_are_flags_of_their_commands():
    from wam_models.cli import make_parser

    parsers = make_parser().commands
    for page in PAGES:
        for span in re.findall(r"`(wam [a-z][^`]*)`", (ROOT / page).read_text()):
            _, command, *words = span.split()
            known = parsers[command]._option_string_actions if command in parsers else {}
            unknown = [w for w in words if w.startswith("--") and w.partition("=")[0] not in known]
            assert command in parsers and (command == "bench" or not unknown), f"{page}: {span}"


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("wam mask --program", "expected one argument"),
        ("wam ablate --fast", "--fast"),
        ("wam bench --suites", "--suites"),
        ("make tea", "target"),
        (".venv/bin/python -m tests.none", "module"),
        ("pip install '.[model]'", "extras"),
        ("libero-venv/bin/wam train --data x --out y examples/none.json", "none.json"),
    ],
)
def test_the_check_of_commands_notices(text, wrong):
    (words,) = commands(f"\n{text}  # a comment\n")
    assert wrong in what_is_wrong(words)


def test_an_unknown_command_is_noticed():
    with pytest.raises(AssertionError, match="frobnicate"):
        commands("frobnicate --now\n")


# ---- The README, and links.


def test_the_readme_is_short_and_begins_with_the_two_commands():
    assert len(README.splitlines()) <= 100
    first = blocks_of("README.md", README)[0].text.split("\n")
    assert [line.partition("#")[0].strip() for line in first if line] == ["make demo", "make test"]
    pictures = ["docs/demo.png", "docs/results/ablation/state.png"]
    assert re.findall(r"!\[[^]]*\]\(([^)]*)\)", README) == pictures and README.count("![") == len(pictures)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^ *```.*?^ *```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if "://" not in link and (not target.exists() or (heading and heading not in anchors(target))):
            broken.append(link)
    assert not broken


def anchors(page: Path) -> list[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


# ---- The README on a package index, where no file of the repository is.


@pytest.mark.parametrize("home", ["", "https://example.org/wam-kernels/blob/v0.1.0"])
def test_the_page_of_a_package_index_has_no_relative_link(home, tmp_path):
    environment = {**os.environ, "WAM_CUDA": "0", "WAM_HOME_URL": home}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
    )
    text = next(tmp_path.glob("*/PKG-INFO")).read_text().partition("\n\n")[2]
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert "\nmake demo " in text and "Attention under an interaction program" in text
    if home:
        assert len(links) == len(re.findall(r"\]\(", README)) and all(link.startswith(home) for link in links)
    else:
        assert links == [] and "Architecture" in text and "An episode as it happened" in text
