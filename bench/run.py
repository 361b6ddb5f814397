"""``wam bench run``: the suites of ``bench/registry.py``, each in a process of its own.

Each has a clean memory and a clean compiler, and a crash takes no other's rows with it. Its rows come back through a
folder; they are printed as one table at the end, and appended to ``bench/results``; with ``--quick`` only if
``--record`` says so, and never with ``--no-record``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.registry import GROUPS
from bench.rows import RESULTS, ROOT, Row, append, read


@dataclass(frozen=True)
class Outcome:
    suite: str
    seconds: float
    code: int
    rows: list[Row]


def suites_of(groups: Sequence[str] | None) -> list[str]:
    """Names of the suites of ``groups``, of all where there are none.

    Raises:
        ValueError: a name that is no group of suites.
    """
    for name in groups or []:
        if name not in GROUPS:
            raise ValueError(f"--suite must be one of {', '.join(GROUPS)}, got {name!r}")
    return [suite for name in groups or GROUPS for suite in GROUPS[name]]


def arguments(suite: str, args: argparse.Namespace) -> list[str]:
    """What the interpreter is given for one suite; all of them take the same flags."""
    flags = ["--seed", str(args.seed)] + (["--quick"] if args.quick else [])
    return ["-m", "bench.suites", suite, *flags, *(["--device", args.device] if args.device else [])]


def run_suite(suite: str, command: Sequence[str]) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        environment = os.environ | {"WAM_BENCH_RESULTS": folder}
        code = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=False).returncode
        seconds = time.monotonic() - begin
        rows = [row for path in sorted(Path(folder).glob("*.jsonl")) for row in read(path)]
        return Outcome(suite, seconds, code, rows)


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    commands = {suite: arguments(suite, args) for suite in suites_of(args.suite)}
    outcomes, recorded = [], args.record or not (args.quick or args.no_record)
    with tqdm(total=len(commands), desc="wam bench", unit="suite") as bar:
        for suite, command in commands.items():
            bar.set_postfix_str(suite)
            outcomes.append(run_suite(suite, command))
            if recorded and outcomes[-1].rows:
                append(RESULTS / f"{suite}.jsonl", outcomes[-1].rows)
            bar.update()
    print(summary(outcomes))
    if recorded:
        print(f"recorded in {RESULTS}; `wam bench report` draws and prints what the README shows")
    return int(any(outcome.code for outcome in outcomes))


def summary(outcomes: Sequence[Outcome]) -> str:
    """The table of every suite, under a line with its time; a suite that failed says so."""
    from bench.harness.table import table

    lines = []
    for outcome in outcomes:
        ok = "ok" if outcome.code == 0 else f"FAILED with exit code {outcome.code}, see above"
        lines.append(f"{outcome.suite}: {ok}, {outcome.seconds:.0f} s, {len(outcome.rows)} rows")
        if outcome.rows:
            lines += ["", table(outcome.rows), ""]
    lines.append(f"{len(outcomes)} suites, {sum(o.seconds for o in outcomes):.0f} s")
    return "\n".join(lines)
