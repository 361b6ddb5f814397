"""The flags of ``wam bench``, and what they start."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench.rows import RESULTS
from wam_models.cli import run_command
from wam_models.cli.parser import CommandParser, at_least
from wam_models.runtime.threads import limit_spinning


def make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="wam bench",
        description="Measure this machine: kernels, peers, training step, rollout.",
        allow_abbrev=False,
    )
    what = "run the suites, draw and print the rows that exist, or tune launch choices on this GPU; default: run"
    parser.add_argument("action", nargs="?", choices=("run", "report", "tune"), default="run", help=what)
    # names are checked by bench.run, against the registry; its error lists the choices
    parser.add_argument("--suite", action="append", metavar="S", help="run only this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="small sizes (on a GPU few repeats); records nothing")
    base = (
        "compare the micro suite of this commit with that of this tree, in one run; with --quick without instructions"
    )
    parser.add_argument("--base", metavar="REF", help=base)
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--record", action="store_true", help="append to bench/results even with --quick")
    keep.add_argument("--no-record", action="store_true", help="print only; bench/results stays as it is")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--seed", type=at_least(0), default=0)
    return parser


def start(args: argparse.Namespace) -> int:
    """Every action loads its own modules: a report needs no torch, a run no matplotlib."""
    if args.base is not None:
        if args.action != "run" or args.suite or args.device == "cuda":
            raise ValueError(
                "--base compares the micro suite on a CPU and prints it; of the others it takes --quick and --record"
            )
        from bench.compare import trees

        return trees.run(args)
    if args.action == "report":
        from bench import registry
        from bench.report import page

        return page.run(registry.sections(), RESULTS)
    if args.action == "tune":
        from bench import tune

        return tune.run(args)
    from bench import run

    return run.run(args)


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if "torch" not in sys.modules:  # else it has no effect on this process any more
        limit_spinning()
    return run_command("bench", lambda: start(args))
