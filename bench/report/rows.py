"""The rows of a folder, and those of them that are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.rows import Row, read

# What tells two measurements apart; a row has those of them that its benchmark knows.
IDENTITY = (
    "file", "where", "op", "base", "case", "what", "workload", "objective", "program", "provider", "tokens", "S", "D",
    "heads", "option", "tokens_a_frame", "samples", "frames", "chunk", "architecture", "fill", "cached", "rows",
    "dtype",
)  # fmt: skip
LIBERO = "libero joint c4 w64"


def load(folder: Path) -> list[Row]:
    """The newest row of every measurement, failures apart; rows of before a field existed get what it was then."""
    newest: dict[tuple[str, ...], Row] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in read(path):
            row = {"file": path.stem, **row}
            if path.stem == "block_attention":
                row.setdefault("workload", LIBERO)
            # a GPU is one machine; of a CPU as many threads as were used
            threads = f"{row['threads']} thread{'s' * (row['threads'] != 1)}"
            row["where"] = row["device"] if row.get("driver") else f"{row['device']}, {threads}"
            if "error" not in row:
                newest[tuple(str(row.get(key)) for key in IDENTITY)] = row
    return list(newest.values())


def select(rows: Sequence[Row], **fields: Any) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in fields.items())]


def values(rows: Sequence[Row], key: str) -> list[Any]:
    """Distinct values in the order of their first row."""
    return list(dict.fromkeys(row[key] for row in rows if row.get(key) is not None))


def machine_of(row: Row) -> str:
    versions = f"torch {row['torch']}" + (f", triton {row['triton']}" if row.get("triton") else "")
    driver = f", driver {row['driver']}" if row.get("driver") else ""
    return f"{row['where']}{driver}, {versions}, commit {row['commit']}, {row['date'][:10]}"
