"""The rows of ``bench/results``: one JSON object a line, written and read here alone.

Files keep the keys under which rows were recorded first; :data:`RECORDED_AS` is the one place that knows them. In
memory a row has the names on the left.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

Row = dict[str, Any]

# Name in memory -> key in the files.
RECORDED_AS = {
    "provider": "arm",
    "roofline_MB": "floor_MB",
    "x_roofline": "x_floor",
    "weights_roofline_ms": "weights_floor_ms",
    "products_roofline_ms": "products_floor_ms",
}
_NAMES = {key: name for name, key in RECORDED_AS.items()}


def collected() -> Path | None:
    """The folder in which ``wam bench`` collects the rows of a suite's process before it decides what to keep."""
    folder = os.environ.get("WAM_BENCH_RESULTS")
    return Path(folder) if folder else None


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Older rows stay, so a file is the history of its suite."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.writelines(json.dumps({RECORDED_AS.get(k, k): v for k, v in row.items()}) + "\n" for row in rows)


def read(path: Path) -> list[Row]:
    lines = path.read_text().splitlines()
    return [{_NAMES.get(k, k): v for k, v in json.loads(line).items()} for line in lines]
