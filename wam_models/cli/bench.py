"""``wam bench``: runs the benchmarks of ``bench/``, a folder of the repository that no installed package has."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from .parser import UserError


def run(args: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parents[2]
    if not (root / "bench" / "run.py").is_file():
        raise UserError(
            f"the benchmarks live in a clone of the repository, and {root} is none; clone it, install it with "
            "`pip install --editable '.[models]'`, and run `wam bench` or `python -m bench` there"
        )
    sys.path.insert(0, str(root))
    return import_module("bench.run").run(args)
