"""``wam bench``: ``python -m bench`` of the clone, in a process of its own.

The benchmarks are a folder of the repository, above this package and in no wheel, so nothing here imports them.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from .parser import UserError


def run(args: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parents[2]
    if not (root / "bench" / "__main__.py").is_file():
        raise UserError(
            f"the benchmarks live in a clone of the repository, and {root} is none; clone it, install it with "
            "`pip install --editable '.[models]'`, and run `wam bench` or `python -m bench` there"
        )
    return subprocess.run([sys.executable, "-m", "bench", *args.rest], cwd=root, check=False).returncode
