"""Rows as they are printed."""

from __future__ import annotations

from collections.abc import Sequence

from bench.rows import Row

# Columns that say how a row was made, and those that only matter to a program, stay out of a printed table.
HIDDEN = (
    "seed", "date", "commit", "device", "driver", "cuda", "threads", "load", "torch", "python", "triton", "numpy",
    "peers", "dtype", "heads", "ms_p20", "ms_p80", "ms_p95", "copy_GB/s", "bf16_GFLOP/s", "float32_GFLOP/s",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Rows in aligned columns, one block for each set of columns; a row with an ``error`` is a line of its own."""
    blocks: dict[tuple[str, ...], list[Row]] = {}
    failed: dict[tuple[str, str], list[str]] = {}  # most reasons hold for every case of a machine
    for row in rows:
        if row.get("error"):
            failed.setdefault((row["provider"], row["error"]), []).extend(row.get("where") or ["all"])
        else:
            blocks.setdefault(tuple(key for key in row if key not in HIDDEN), []).append(row)
    lines: list[str] = []
    for columns, block in blocks.items():
        cells = [list(columns), *([_cell(row[c]) for c in columns] for row in block)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        number = [all(isinstance(row[c], int | float) for row in block) for c in columns]
        for line in cells:
            parts = (t.rjust(w) if right else t.ljust(w) for t, w, right in zip(line, widths, number, strict=True))
            lines.append("  ".join(parts).rstrip())
        lines.append("")
    for (provider, error), where in failed.items():
        lines.append(f"no speed: {provider}: {error} ({len(where)} cases, first: {where[0]})")
    return "\n".join(lines).rstrip()


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
