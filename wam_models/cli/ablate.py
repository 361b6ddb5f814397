"""``wam ablate``: the interaction programs compared in simulators, one recipe for all; ``wam ablate report DIR``."""

from __future__ import annotations

import argparse
from dataclasses import replace

from ..ablate.protocol import Protocol, metaworld, quick
from ..ablate.report import write_report
from ..ablate.run import run_all
from ..runtime.checks import check_device, writable_folder
from ..runtime.threads import restores_threads
from ..simulator.process import SimulatorFailure
from .parser import UserError


@restores_threads
def run(args: argparse.Namespace) -> int:
    """``wam ablate``."""
    if args.what == "report":
        folder = args.folder or args.out
        if folder is None:
            raise UserError("report: name the folder, as in wam ablate report DIR")
        print(write_report(folder))
        return 0
    if args.folder is not None or args.out is None:
        raise UserError("--out is needed, the folder of the ablation; wam ablate report DIR reports what one holds")
    writable_folder("--out", args.out)

    def report_so_far() -> None:
        write_report(args.out)

    try:
        run_all(
            args.out, _protocol(args), processes=args.processes, ray=args.ray,
            device=args.device if args.ray else str(check_device(args.device)),  # that of other machines with Ray
            after=report_so_far,
            say=lambda line: print(line, flush=True),
        )  # fmt: skip
    except SimulatorFailure as failure:
        raise UserError(str(failure)) from failure
    write_report(args.out)
    print(f"written {args.out}: report.md, rows.jsonl, arms.jsonl, protocol.json and a figure for each track")
    return 0


def _protocol(args: argparse.Namespace) -> Protocol:
    found = metaworld(full=args.full) if args.protocol is None else Protocol.from_json(args.protocol)
    if args.track != "both":
        tracks = tuple(track for track in found.tracks if track.name == args.track)
        if not tracks:
            has = ", ".join(track.name for track in found.tracks)
            raise UserError(f"--track {args.track}: the protocol has {has}; name one of them, or both")
        found = replace(found, tracks=tracks)
    return quick(found) if args.quick else found
