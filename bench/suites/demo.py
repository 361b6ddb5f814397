"""The demo's result as rows: one for the training, one for each objective and program.

    python -m bench.suites demo

Runs ``wam demo`` into a folder that is thrown away, on the whole machine: nothing else should run, because the training
is limited by time. About five minutes on two CPU cores; with --quick 10 seconds of training.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.harness import Options
from bench.rows import ROOT, Row
from wam_models.cli.demo import make_demo

DATA = Path("data/libero_demo")
SECONDS, QUICK_SECONDS = 180.0, 10.0  # of training


def rows_of(report: Mapping[str, Any]) -> list[Row]:
    """Rows from what ``make_demo`` returns: ``what`` is ``"training"`` or ``"evaluation"``."""
    config = report["config"]
    training = {
        "what": "training", "provider": "wam", "data": str(DATA), "seed": report["seed"],
        "precision": report["precision"], "parameters": report["parameters"], "steps": report["steps"],
        "batch": config["batch"], "frames": config["frames"],
        "training_seconds": round(report["training_seconds"], 1), "total_seconds": round(report["total_seconds"], 1),
        **{f"{s}_loss_{when}": v for s, both in report["losses"].items() for when, v in both.items()},
        **report["beaten"],
    }  # fmt: skip
    shared = {"what": "evaluation", "provider": "wam", "seed": report["seed"], "episodes": report["episodes"]}
    return [training, *(shared | row for row in report["evaluation"]["rows"])]


def rows(options: Options) -> Iterable[Row]:
    seconds = QUICK_SECONDS if options.quick else SECONDS
    with tempfile.TemporaryDirectory() as out:
        yield from rows_of(make_demo(Path(out), ROOT / DATA, seconds=seconds, seed=options.seed))
