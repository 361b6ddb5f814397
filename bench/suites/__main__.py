"""Runs one suite: ``python -m bench.suites NAME``, in a process of its own.

Every suite is a module of this folder with a function ``rows(options)``, whose rows are recorded as they come and
printed as a table, and a row of ``bench/registry.py``. All take the same flags.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from bench.registry import SUITES, Suite
from bench.rows import RESULTS, collected


def make_parser(suite: Suite, description: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.suites {suite.name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats; record nothing")
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument("--record", action="store_true", help="record even with --quick")
    keep.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--device", choices=suite.devices, help="default: cuda where there is one")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0] not in SUITES:
        sys.exit(f"python -m bench.suites: the first argument must be one of {', '.join(SUITES)}, got {argv[:1]}")
    suite, module = SUITES[argv[0]], import_module(f"bench.suites.{argv[0]}")
    parser = make_parser(suite, module.__doc__)
    run(suite, module.rows, parser, parser.parse_args(argv[1:]))


def run(suite: Suite, rows_of, parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    import torch

    from bench import harness

    if suite.threads is not None:
        torch.set_num_threads(suite.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() and "cuda" in suite.devices else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, found none; use --device cpu")
    folder = collected()
    recorded = folder is not None or args.record or not (args.quick or args.no_record)
    limits = harness.ceilings(device) if suite.ceilings else {}
    rows, path = [], None
    for row in rows_of(harness.Options(device, args.quick, args.seed)):
        rows.append({"seed": args.seed, **row} | ({} if "error" in row else limits))
        if recorded:  # at once: a run that is cut off keeps what it has
            path = harness.record(suite.name, rows[-1:], device, folder or RESULTS)
    if folder is not None:  # `wam bench` prints
        return
    print(harness.table(rows))
    if limits:
        print("ceilings of this machine, same run: " + ", ".join(f"{k} {v:,.1f}" for k, v in limits.items()))
    if path:
        print("recorded", path)


if __name__ == "__main__":
    main(sys.argv[1:])
