"""``wam bench [run | report | tune | --base REF]``: the suites, lists of ``bench_*`` modules that also run alone.

Every module runs in a process of its own: it meets a clean memory and a clean compiler, and a crash takes no other's
rows with it. Its rows come back through a folder that ``bench.harness.record`` writes to; they are printed as one
table at the end, and appended to ``bench/results``; with ``--quick`` only if ``--record`` says so, and never with
``--no-record``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

# Suite -> modules of this folder.
SUITES = {
    "plan": ("bench_plan",),
    "attention": ("bench_block_attention",),
    "norms": ("bench_adaln", "bench_qk_norm_rope", "bench_norm_peers"),
    "streaming": ("bench_cached_attention", "bench_streaming"),
    "block": ("bench_block",),
    "train_step": ("bench_train_step",),
    "rollout": ("bench_rollout",),
}


@dataclass(frozen=True)
class Outcome:
    module: str
    seconds: float
    code: int
    rows: list[dict]


def suites(names: list[str] | None) -> list[str]:
    """
    Raises:
        ValueError: a name that is no suite.
    """
    for name in names or []:
        if name not in SUITES:
            raise ValueError(f"--suite must be one of {', '.join(SUITES)}, got {name!r}")
    return names or list(SUITES)


def arguments(module: str, args: argparse.Namespace) -> list[str]:
    """What the interpreter is given for one module; all of them are made with ``harness.main``."""
    flags = ["--seed", str(args.seed)] + (["--quick"] if args.quick else [])
    return ["-m", f"bench.{module}", *flags, *(["--device", args.device] if args.device else [])]


def run_module(module: str, command: list[str]) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        environment = os.environ | {"WAM_BENCH_RESULTS": folder}
        code = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=False).returncode
        rows = [
            {"file": path.name, **json.loads(line)}
            for path in sorted(Path(folder).glob("*.jsonl"))
            for line in path.read_text().splitlines()
        ]
        return Outcome(module, time.monotonic() - begin, code, rows)


def run(args: argparse.Namespace) -> int:
    if args.base is not None:
        if args.action != "run" or args.suite or args.record or args.device == "cuda":
            raise ValueError(
                "--base compares the micro suite on a CPU and prints it; of the others it takes --quick alone"
            )
        from bench import compare

        return compare.run(args)
    if args.action == "report":
        from bench import report

        return report.run(args)
    if args.action == "tune":
        from bench import tune

        return tune.run(args)
    modules = [module for name in suites(args.suite) for module in SUITES[name]]
    commands = {module: arguments(module, args) for module in modules}
    outcomes, keep = [], args.record or not (args.quick or args.no_record)
    with tqdm(total=len(commands), desc="wam bench", unit="part") as bar:
        for module, command in commands.items():
            bar.set_postfix_str(module)
            outcomes.append(run_module(module, command))
            if keep:
                store(outcomes[-1].rows)
            bar.update()
    print(summary(outcomes))
    if keep:
        print(f"recorded in {RESULTS}; `wam bench report` draws and prints what the README shows")
    return int(any(outcome.code for outcome in outcomes))


def store(rows: list[dict]) -> None:
    RESULTS.mkdir(exist_ok=True)
    for row in rows:
        with (RESULTS / row["file"]).open("a") as f:
            f.write(json.dumps({key: value for key, value in row.items() if key != "file"}) + "\n")


def summary(outcomes: list[Outcome]) -> str:
    """One line for each arm, and one for each part with its time; a part that failed says so."""
    from bench.harness import table

    lines = []
    for outcome in outcomes:
        ok = "ok" if outcome.code == 0 else f"FAILED with exit code {outcome.code}, see above"
        lines.append(f"{outcome.module}: {ok}, {outcome.seconds:.0f} s, {len(outcome.rows)} rows")
        if outcome.rows:
            rows = [{key: value for key, value in row.items() if key != "file"} for row in outcome.rows]
            lines += ["", table(rows), ""]
    lines.append(f"{len(outcomes)} parts, {sum(o.seconds for o in outcomes):.0f} s")
    return "\n".join(lines)
