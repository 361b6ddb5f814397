"""Checks commands without running them: ``tools/gpu/gpu.sh --dry-run`` pipes its own through this.

Each line of standard input is ``part<TAB>command``. What a command names must exist: files, tests (collected by
pytest), modules and, for our own command lines, every flag. A program that only a GPU machine has is listed.
"""

from __future__ import annotations

import argparse
import io
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import cli, run
from bench.registry import SUITES
from bench.suites.__main__ import make_parser
from wam_models.cli import make_parser as make_wam_parser

ROOT = Path(__file__).resolve().parents[2]
ONLY_ON_A_GPU_MACHINE = ("nvidia-smi", "compute-sanitizer", "nvcc", "ninja", "ncu")


class Wrong(Exception):
    """What a command names and what is not there."""


def check(command: list[str]) -> list[str]:
    """Programs of ``command`` that are not on this machine but may be on another.

    Raises:
        Wrong: a file, module, test or flag that does not exist.
    """
    absent = [word for word in command if word in ONLY_ON_A_GPU_MACHINE and shutil.which(word) is None]
    if command[0] not in ONLY_ON_A_GPU_MACHINE and shutil.which(command[0]) is None:
        raise Wrong(f"no program {command[0]!r}")
    for word in command:
        if re.fullmatch(r"(bench|tests|tools|wam_kernels|wam_models)/\S+", word) and not (ROOT / word).exists():
            raise Wrong(f"no file {word}")
    if "-m" in command:
        module = command.index("-m") + 1
        check_module(command[module], command[module + 1 :])
    return absent


def check_module(module: str, arguments: list[str]) -> None:
    if find_spec(module) is None:
        raise Wrong(f"no module {module}")
    if module == "bench":
        check_suites(parsed(cli.make_parser(), arguments))
    elif module == "bench.suites":
        check_suite(*arguments)
    elif module == "wam_models.cli":
        parsed(make_wam_parser(), arguments)
    elif module == "pytest":
        files = [word for word in arguments if word.endswith(".py")]
        with redirect_stdout(io.StringIO()) as out:
            code = pytest.main(["--collect-only", "-q", *arguments])
        if code or not files:
            raise Wrong(f"pytest collects nothing for {' '.join(arguments)}: {out.getvalue()[-300:]}")


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    try:
        return parser.parse_args(arguments)
    except SystemExit as stopped:
        raise Wrong(f"{parser.prog} {' '.join(arguments)} is refused, exit code {stopped.code}") from None


def check_suites(args: argparse.Namespace) -> None:
    try:
        for name in run.suites_of(args.suite):
            check_suite(*run.arguments(name, args)[2:])
    except ValueError as error:
        raise Wrong(str(error)) from None


def check_suite(name: str, *flags: str) -> None:
    if name not in SUITES or find_spec(f"bench.suites.{name}") is None:
        raise Wrong(f"no suite {name}")
    import_module(f"bench.suites.{name}").rows  # noqa: B018
    parsed(make_parser(SUITES[name]), flags)


def main(lines: Iterable[str]) -> int:
    wrong = 0
    for line in lines:
        part, _, command = line.partition("\t")
        try:
            absent = check(shlex.split(command))
        except Wrong as error:
            wrong += 1
            print(f"{part}: WRONG: {error}")
        else:
            print(f"{part}: ok{f', not on this machine: {chr(32).join(absent)}' if absent else ''}: {command.strip()}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.stdin))
