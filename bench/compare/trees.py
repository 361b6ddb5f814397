"""``wam bench --base REF``: the micro suite of another commit and of this working tree, measured in one run.

Both trees run their own ``bench/micro`` in a process each; cases are matched by name. For CPU time the two processes
take turns, a round each, so a busy moment hits both; a case's time is the least of its rounds, and its spread says how
far such minima of a part of the rounds differ from each other. Where valgrind and a C compiler are installed,
callgrind counts the instructions of a call too (of code without AVX), which no other process disturbs: they decide
about small changes.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener
from pathlib import Path

from tqdm import tqdm

from bench.rows import RESULTS, ROOT, Row

SLOWER = 1.02  # ratio above which a case counts as slower, in instructions, or in time if beyond the spread as well
ROUNDS, QUICK_ROUNDS = 24, 8
ROUND_SECONDS = 0.02  # a round repeats short calls until it lasts so long
PARTS = 4  # of the rounds, whose minima give the spread

# Instrumentation, which imports do without, starts at the first case and stays: each switch translates all code anew.
_SHIM = """
#include <valgrind/callgrind.h>
void instrument(void) { CALLGRIND_START_INSTRUMENTATION; }
void start(void) { CALLGRIND_TOGGLE_COLLECT; CALLGRIND_ZERO_STATS; }
void stop(void) { CALLGRIND_DUMP_STATS; CALLGRIND_TOGGLE_COLLECT; }
"""

# valgrind emulates fused multiply-adds in software, thousands of times slower: counts are of code without them
_WITHOUT_FMA = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}


def is_yardstick(case: str) -> bool:
    """It runs nothing of the project: what its ratio is off by, another case's may be too."""
    return case.startswith("test_yardstick")


@dataclass(frozen=True)
class Case:
    """One case of the micro suite on both trees; pairs are (base, this)."""

    name: str
    seconds: tuple[Sequence[float], Sequence[float]]  # CPU seconds a call, of each round
    instructions: tuple[float, float] | None  # a call; None where they could not be counted

    @property
    def time_ratio(self) -> float:
        base, this = map(min, self.seconds)
        return this / base

    @property
    def spread(self) -> float:
        """How far minima over a part of the rounds lie apart, relative to the least; the worse of both trees."""
        parts = [[min(s[i::PARTS]) for i in range(PARTS)] for s in self.seconds]
        return max(max(p) / min(p) for p in parts) - 1

    @property
    def instruction_ratio(self) -> float | None:
        return self.instructions and self.instructions[1] / self.instructions[0]

    def slower(self, noise: float) -> bool:
        """In instructions; where these were not counted, in time by more than the spread and the run's ``noise``."""
        if self.instruction_ratio is not None:
            return self.instruction_ratio > SLOWER
        return self.time_ratio > max(SLOWER, 1 + self.spread, 1 + noise)


@dataclass(frozen=True)
class Comparison:
    cases: list[Case]
    unmatched: list[str]  # sentences: cases that one tree lacks, or that failed
    no_instructions: str | None  # why they were not counted

    @property
    def slower(self) -> list[Case]:
        noise = max((abs(case.time_ratio - 1) for case in self.cases if is_yardstick(case.name)), default=0.0)
        return [case for case in self.cases if not is_yardstick(case.name) and case.slower(noise)]

    def rows(self, base: str) -> list[Row]:
        """One row a case, as ``--record`` keeps it."""
        return [
            {
                "base": base,
                "case": case.name,
                "provider": "wam",
                "base_instructions": case.instructions and case.instructions[0],
                "instructions": case.instructions and case.instructions[1],
                "instruction_ratio": case.instruction_ratio,
                "base_ms_min": 1e3 * min(case.seconds[0]),
                "ms_min": 1e3 * min(case.seconds[1]),
                "time_ratio": case.time_ratio,
                "spread": case.spread,
            }
            for case in self.cases
        ]

    def __str__(self) -> str:
        head = ("case", "Minstr base", "this", "ratio", "ms base", "this", "ratio", "spread", "")
        rows, slower = [], self.slower
        for case in self.cases:
            counts = [f"{n / 1e6:.3f}" for n in case.instructions] if case.instructions else ["-", "-"]
            ratio = f"{case.instruction_ratio:.3f}" if case.instructions else "-"
            times = [f"{1e3 * min(s):.3f}" for s in case.seconds]
            rows.append(
                (
                    case.name,
                    *counts,
                    ratio,
                    *times,
                    f"{case.time_ratio:.3f}",
                    f"{case.spread:.3f}",
                    "slower" if case in slower else "",
                )
            )
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(
                text.ljust(w) if i in (0, 8) else text.rjust(w)
                for i, (text, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in (head, *rows)
        ]
        if self.no_instructions:
            lines.append(f"instructions were not counted: {self.no_instructions}")
        return "\n".join([*(line.rstrip() for line in lines), *self.unmatched])


class Side:
    """The process that runs the micro suite of one tree; ``side`` is the other end of its connection."""

    def __init__(self, tree: Path, process: subprocess.Popen, connection: Connection, output: Path) -> None:
        self.tree, self._process, self._connection, self._output = tree, process, connection, output
        self.names: list[str] = self._receive()

    def select(self, names: Sequence[str]) -> None:
        self._connection.send(list(names))

    def reach(self, name: str) -> str | None:
        """Wait until case ``name`` can be measured; None, or why it cannot."""
        kind, reached, *why = self._receive()
        assert reached == name, f"expected case {name}, got {reached}"
        return None if kind == "ready" else f"{name} fails in {self.tree}: {why[0]}"

    def measure(self, calls: int) -> float:
        """CPU seconds a call, or instructions where it runs under callgrind."""
        self._connection.send(calls)
        return self._receive()

    def next(self) -> None:
        """Go on to the next case."""
        self._connection.send(None)

    def _receive(self):
        try:
            return self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.wait()
            output = self._output.read_text().strip().splitlines()[-5:]
            raise ValueError(f"--base: the micro suite of {self.tree} ended early: {' | '.join(output)}") from error


@contextmanager
def running(tree: Path, scratch: Path, *, shim: Path | None = None) -> Iterator[Side]:
    """The micro suite of ``tree`` in a process, under callgrind if there is a ``shim``."""
    scratch.mkdir()
    (counts := scratch / "counts").mkdir()
    plugin = scratch / "wam_compare_side.py"  # under a name and in a folder of its own: the tree has a ``bench`` too
    shutil.copyfile(Path(__file__).with_name("side.py"), plugin)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tree), str(scratch)]),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "WAM_COMPARE_ADDRESS": str(scratch / "socket"),
        "WAM_COMPARE_COUNTS": str(counts),
        "WAM_COMPARE_SHIM": str(shim or ""),
    }
    if shim:
        environment |= _WITHOUT_FMA
    options = ["--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no", f"--callgrind-out-file={counts}/out"]
    under = ["valgrind", *options] if shim else []
    command = [*under, sys.executable, "-m", "pytest", "bench/micro", "-q", "-p", plugin.stem, "-p", "no:cacheprovider"]
    output = scratch / "output"
    with Listener(environment["WAM_COMPARE_ADDRESS"]) as listener, output.open("w") as log:
        process = subprocess.Popen(command, cwd=tree, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield Side(tree, process, _accept(listener, process, tree, output), output)
            process.wait()
        finally:
            process.kill()
            process.wait()


def _accept(listener: Listener, process: subprocess.Popen, tree: Path, output: Path) -> Connection:
    listener._listener._socket.settimeout(1.0)  # type: ignore[attr-defined]  # what the standard library gives
    while True:
        try:
            return listener.accept()
        except TimeoutError:
            if process.poll() is not None:
                last = output.read_text().strip().splitlines()[-5:]
                raise ValueError(f"--base: the micro suite of {tree} does not start: {' | '.join(last)}") from None


def compare(base: Path, this: Path, *, rounds: int = ROUNDS, count: bool = True, progress: bool = True) -> Comparison:
    """Measure the cases that both trees have.

    Args:
        base: Folder of the tree that is compared with.
        this: Folder of the tree in question.
        rounds: Of each case; at least ``PARTS``.
        count: Count instructions too, where that is possible.
        progress: Show a bar over the cases.

    Raises:
        ValueError: the micro suite of a tree does not start, or dies.
    """
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        shim, missing = _shim(scratch) if count else (None, "not asked for")
        seconds, unmatched = _timed((base, this), scratch, rounds, progress)
        counted = (
            _counted((base, this), scratch, shim, [name for name in seconds if not is_yardstick(name)], progress)
            if shim
            else {}
        )
    return Comparison([Case(name, s, counted.get(name)) for name, s in seconds.items()], unmatched, missing)


def _timed(trees: tuple[Path, Path], scratch: Path, rounds: int, progress: bool) -> tuple[dict, list[str]]:
    found: dict = {}
    unmatched: list[str] = []
    with ExitStack() as stack:
        sides = [stack.enter_context(running(t, scratch / f"time{i}")) for i, t in enumerate(trees)]
        names = _common(sides, unmatched)
        for name in tqdm(names, desc="CPU time", unit="case", disable=not progress):
            faults = [side.reach(name) for side in sides]
            unmatched += filter(None, faults)
            if not any(faults):
                once = max(side.measure(1) for side in sides)
                calls = max(1, round(ROUND_SECONDS / max(once, 1e-9)))
                seconds: tuple[list, list] = ([], [])
                for i in range(rounds):
                    for j in (0, 1) if i % 2 else (1, 0):
                        seconds[j].append(sides[j].measure(calls))
                found[name] = seconds
            for side, fault in zip(sides, faults, strict=True):
                if fault is None:
                    side.next()
    return found, unmatched


def _counted(trees: tuple[Path, Path], scratch: Path, shim: Path, names: list[str], progress: bool) -> dict:
    found = {}
    with ExitStack() as stack:
        sides = [stack.enter_context(running(t, scratch / f"count{i}", shim=shim)) for i, t in enumerate(trees)]
        for side in sides:
            side.select(names)
        for name in tqdm(names, desc="instructions", unit="case", disable=not progress):
            for side in sides:
                assert side.reach(name) is None
            found[name] = tuple(side.measure(1) for side in sides)
            for side in sides:
                side.next()
    return found


def _common(sides: Sequence[Side], unmatched: list[str]) -> list[str]:
    """Select the cases that both trees have, in the order of this one; those of one alone become sentences."""
    base, this = sides
    names = [name for name in this.names if name in base.names]
    for side, other in ((base, this), (this, base)):
        only = [name for name in side.names if name not in other.names]
        unmatched += [f"{name} is only in {side.tree}" for name in only]
        side.select(names)
    return names


def _shim(scratch: Path) -> tuple[Path | None, str | None]:
    """A library that switches callgrind's counting on and off, or why there is none."""
    for tool in ("valgrind", "cc"):
        if shutil.which(tool) is None:
            return None, f"{tool} is not on PATH"
    source, library = scratch / "shim.c", scratch / "shim.so"
    source.write_text(_SHIM)
    done = subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", library, source], capture_output=True, text=True, check=False
    )
    return (library, None) if done.returncode == 0 else (None, f"valgrind's headers: {done.stderr.splitlines()[0]}")


def checkout(ref: str, folder: Path) -> Path:
    """The files of commit ``ref`` of this repository, in ``folder``.

    Raises:
        ValueError: no such commit, or no clone.
    """
    done = subprocess.run(["git", "archive", ref], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        why = " ".join(done.stderr.decode(errors="replace").split())
        raise ValueError(f"--base must be a commit, branch or tag of this clone, got {ref!r}: {why}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder


def run(args: argparse.Namespace) -> int:
    """``wam bench --base``; exit code 1 where a case is slower."""
    with tempfile.TemporaryDirectory() as folder:
        base = checkout(args.base, Path(folder))
        found = compare(base, ROOT, rounds=QUICK_ROUNDS if args.quick else ROUNDS, count=not args.quick)
        print(str(found).replace(folder, args.base).replace(str(ROOT), "this tree"))
    if args.record:
        from bench.harness.recording import record  # loads torch, of which the measuring process has no need

        print(f"recorded in {record('compare', found.rows(args.base), 'cpu', RESULTS)}")
    return int(bool(found.slower or found.unmatched))
