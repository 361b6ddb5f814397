"""Checks commands without running them: ``bench/gpu.sh --dry-run`` pipes its own through this.

Each line of standard input is ``part<TAB>command``. What a command names must exist: files, tests (collected by
pytest), modules and, for our own command lines, every flag. A program that only a GPU machine has is listed.
"""

from __future__ import annotations

import io
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest

from wam_models import cli

ROOT = Path(__file__).resolve().parent.parent
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
        if re.fullmatch(r"(bench|tests|wam_kernels|wam_models)/\S+", word) and not (ROOT / word).exists():
            raise Wrong(f"no file {word}")
    if "-m" in command:
        at = command.index("-m")
        check_module(command[at + 1], command[at + 2 :])
    return absent


def check_module(module: str, arguments: list[str]) -> None:
    if find_spec(module) is None:
        raise Wrong(f"no module {module}")
    if module in ("bench", "wam_models.cli"):
        words = (["bench"] if module == "bench" else []) + arguments
        try:
            args = cli.make_parser().parse_args(words)
        except SystemExit as stopped:
            raise Wrong(f"wam {' '.join(words)} is refused, exit code {stopped.code}") from None
        if args.command == "bench":
            check_suites(args)
    elif module.startswith("bench.bench_"):
        check_flags(module.removeprefix("bench."), arguments)
    elif module == "pytest":
        files = [word for word in arguments if word.endswith(".py")]
        with redirect_stdout(io.StringIO()) as out:
            code = pytest.main(["--collect-only", "-q", *arguments])
        if code or not files:
            raise Wrong(f"pytest collects nothing for {' '.join(arguments)}: {out.getvalue()[-300:]}")


def check_suites(args) -> None:
    from bench import run

    try:
        for name in run.suites(args.suite):
            for part in run.SUITES[name]:
                check_flags(part, run.arguments(part, args))
    except ValueError as error:
        raise Wrong(str(error)) from None


def check_flags(part: str, flags: list[str]) -> None:
    """A bench module and the flags that ``wam bench`` gives it: they stand in its --help."""
    if find_spec(f"bench.{part}") is None:
        raise Wrong(f"no module bench.{part}")
    with redirect_stdout(io.StringIO()) as out, patch.object(sys, "argv", [part, "--help"]):
        try:
            runpy.run_module(f"bench.{part}", run_name="__main__")
        except SystemExit as stopped:
            if stopped.code:
                raise Wrong(f"bench.{part} --help ends with {stopped.code}") from None
    for flag in flags:
        if flag.startswith("--") and flag not in out.getvalue():
            raise Wrong(f"bench.{part} knows no {flag}")


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
