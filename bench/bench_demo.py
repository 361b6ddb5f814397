"""The demo's result as rows: one for the training, one for each objective and program.   python -m bench.bench_demo

Runs ``wam demo`` into a folder that is thrown away, for each seed, on the whole machine: nothing else should run,
because the training is limited by time. Rows of one run share ``seed`` and ``date``. About five minutes a seed on two
CPU cores.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from bench import harness
from wam_models.cli.demo import make_demo


def rows_of(report: dict) -> list[dict]:
    """Rows from what ``make_demo`` returns: ``what`` is ``"training"`` or ``"evaluation"``."""
    config = report["config"]
    training = {
        "what": "training", "arm": "wam", "data": report["data"], "seed": report["seed"],
        "precision": report["precision"], "parameters": report["parameters"], "steps": report["steps"],
        "batch": config["batch"], "frames": config["frames"],
        "training_seconds": round(report["training_seconds"], 1), "total_seconds": round(report["total_seconds"], 1),
        **{f"{s}_loss_{when}": v for s, both in report["losses"].items() for when, v in both.items()},
        **report["beaten"],
    }  # fmt: skip
    shared = {"what": "evaluation", "arm": "wam", "seed": report["seed"], "episodes": report["episodes"]}
    return [training, *(shared | row for row in report["evaluation"]["rows"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/libero_demo"))
    parser.add_argument("--seconds", type=float, default=180.0, help="time to train for")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run each")
    parser.add_argument("--quick", action="store_true", help="train for 10 seconds, and record nothing")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as out:
            report = make_demo(Path(out), args.data, seconds=10.0 if args.quick else args.seconds, seed=seed)
        if not args.quick:
            print("recorded", harness.record("demo", rows_of(report), device))


if __name__ == "__main__":
    main()
