"""Rows as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.rows import Row

from .rows import LIBERO, select, values

BASELINE = "sdpa_dense_mask"
CANDIDATES = ("candidates", "on end", "episodes")  # k chunks: at once, one after the other, of k episodes in a batch


def markdown(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    aligned = [" | ".join(header), " | ".join("---" if i == 0 else "--:" for i in range(len(header)))]
    return "\n".join(f"| {line} |" for line in [*aligned, *(" | ".join(map(_cell, cells)) for cells in lines)])


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def plain_table(columns: Sequence[str], rows: Sequence[Row]) -> str:
    return without_empty_columns(columns, [[row.get(column) for column in columns] for row in rows])


def without_empty_columns(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    kept = [i for i in range(len(header)) if any(line[i] is not None for line in lines)]
    return markdown([header[i] for i in kept], [[line[i] for i in kept] for line in lines])


def attention_table(rows: Sequence[Row]) -> str:
    """A line for each workload, columns for each provider: milliseconds, and the ratio to the dense mask."""
    whats = values(rows, "what")
    ours = [provider for provider in values(rows, "provider") if provider.startswith("wam")]
    others = [provider for provider in values(rows, "provider") if provider not in (BASELINE, *ours)]
    providers = [BASELINE, *others, *ours]
    keys = sorted({(row["workload"], row["tokens"]) for row in rows}, key=lambda k: (k[0] != LIBERO, k))
    header = ["workload", "tokens", "density"]
    header += [f"{what}, {provider}, ms" for what in whats for provider in providers]
    header += [f"{what}, {provider}, ratio" for what in whats for provider in ours]
    lines = []
    for workload, tokens in keys:
        of_workload = select(rows, workload=workload, tokens=tokens)
        ms = {(row["what"], row["provider"]): row["ms"] for row in of_workload}
        line: list[Any] = [workload, tokens, of_workload[0]["density"]]
        line += [ms.get((what, provider)) for what in whats for provider in providers]
        for what in whats:
            base = ms.get((what, BASELINE))
            times = (ms.get((what, provider)) for provider in ours)
            line += [f"{base / time:.2f}x" if base and time else None for time in times]
        lines.append(line)
    return without_empty_columns(header, lines)


def options_table(rows: Sequence[Row]) -> str:
    """A line for each option of a rollout; then one for each number of candidates; then the rest."""
    shown = ("forwards", "ms", "ratio", "GFLOP", "MB", "action_error", "video_error")
    parts = [plain_table(("option", *shown), select(rows, what="option"))]
    lines = []
    for option in values(select(rows, what="candidates"), "option"):
        found = {row["provider"]: row for row in select(rows, what="candidates", option=option)}
        cells = [(found[provider]["ms"], found[provider]["held_MB"]) for provider in CANDIDATES]
        lines.append([option, *(cell for pair in cells for cell in pair)])
    header = [f"{provider}, {unit}" for provider in CANDIDATES for unit in ("ms", "held MB")]
    parts.append(markdown(["candidates", *header], lines))
    others = [row for row in rows if row["what"] not in ("option", "candidates")]
    return "\n\n".join([*parts, plain_table(("what", "option", "gap", "ms", "cpu_ms"), others)])


def plan_table(rows: Sequence[Row]) -> str:
    """A line for each workload: milliseconds of what a plan costs cold and warm, and of the mask that it replaces."""
    cold = ["plan cold", "plan cold cpu", "plan cold boxes"]
    header = ["workload", "tokens", *cold, "plan warm", "frame index cold", "dense mask", "plan, MB"]
    lines = []
    for workload, tokens in dict.fromkeys((row["workload"], row["tokens"]) for row in rows):
        found = {row["provider"]: row for row in select(rows, workload=workload, tokens=tokens)}
        cpu = [found.get(provider, {}).get("cpu_ms_min") for provider in header[2:7]]
        mask = found.get("dense mask", {}).get("ms_min")
        lines.append([workload, tokens, *cpu, mask, found["plan cold"]["plan_MB"]])
    return without_empty_columns(header, lines)


def episode_table(rows: Sequence[Row]) -> str:
    """Milliseconds of the chunks at which every provider ran."""
    providers = values(rows, "provider")
    lines = []
    for program, chunk in dict.fromkeys((row["program"], row["chunk"]) for row in rows):
        ms = {row["provider"]: row["ms"] for row in select(rows, program=program, chunk=chunk)}
        if len(ms) == len(providers):
            lines.append([program, chunk, *(ms[provider] for provider in providers)])
    return markdown(["program", "chunk", *(f"{provider}, ms" for provider in providers)], lines)
