"""``wam bench report``: the rows of ``bench/results`` as figures in ``docs/bench`` and as Markdown tables on stdout.

Of rows that measure the same thing on the same device the newest stands; nothing else is chosen or left out. A figure
or table for which there are no rows is not made, and that is said.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "bench"
# What tells two measurements apart; a row has those of them that its benchmark knows.
IDENTITY = (
    "file", "where", "op", "what", "workload", "program", "arm", "tokens", "S", "D", "heads", "tokens_a_frame",
    "samples", "frames", "chunk", "architecture", "fill", "cached", "rows", "dtype",
)  # fmt: skip
LIBERO = "libero joint c4 w64"
EPISODE = ("s_chunk_1", "s_chunk_5", "s_chunk_10", "s_chunk_20", "s_chunk_30", "s_chunk_40", "s_total")
BASELINE = "sdpa_dense_mask"
# One colour for each arm in every figure: ours, then the peers in the order in which they were written.
COLOURS = {
    "wam": "#c1121f", "wam triton": "#c1121f", "wam cuda": "#780000", "sdpa_dense_mask": "#6c757d",
    "sdpa_flash": "#adb5bd", "sdpa_cudnn": "#76b900", "flex": "#003049", "flex_openwam": "#669bbc",
    "flash_attn_4": "#f77f00",
}  # fmt: skip


def load(folder: Path) -> list[dict]:
    """The newest row of every measurement, failures apart; rows of before a field existed get what it was then."""
    newest: dict[tuple, dict] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = {"file": path.stem, **json.loads(line)}
            if path.stem == "block_attention":
                row.setdefault("workload", LIBERO)
            # a GPU is one machine; of a CPU as many threads as were used
            threads = f"{row['threads']} thread{'s' * (row['threads'] != 1)}"
            row["where"] = row["device"] if row.get("driver") else f"{row['device']}, {threads}"
            if "error" not in row:
                newest[tuple(str(row.get(key)) for key in IDENTITY)] = row
    return list(newest.values())


def pick(rows: Sequence[dict], **fields) -> list[dict]:
    return [row for row in rows if all(row.get(key) == value for key, value in fields.items())]


def values(rows: Sequence[dict], key: str) -> list:
    """Distinct values in the order of their first row."""
    return list(dict.fromkeys(row[key] for row in rows if row.get(key) is not None))


def machine(row: dict) -> str:
    versions = f"torch {row['torch']}" + (f", triton {row['triton']}" if row.get("triton") else "")
    driver = f", driver {row['driver']}" if row.get("driver") else ""
    return f"{row['where']}{driver}, {versions}, commit {row['commit']}, {row['date'][:10]}"


# ---- Markdown ----


def markdown(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    aligned = [" | ".join(header), " | ".join("---" if i == 0 else "--:" for i in range(len(header)))]
    return "\n".join(f"| {line} |" for line in [*aligned, *(" | ".join(map(_cell, cells)) for cells in lines)])


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def attention_table(rows: Sequence[dict]) -> str:
    """A line for each workload, a pair of columns for each arm: milliseconds, and the ratio to the dense mask."""
    whats = values(rows, "what")
    ours = [arm for arm in values(rows, "arm") if arm.startswith("wam")]
    arms = [BASELINE, *(arm for arm in values(rows, "arm") if arm not in (BASELINE, *ours)), *ours]
    keys = sorted({(row["workload"], row["tokens"]) for row in rows}, key=lambda k: (k[0] != LIBERO, k))
    header = ["workload", "tokens", "density"]
    header += [f"{what}, {arm}, ms" for what in whats for arm in arms]
    header += [f"{what}, {arm}, ratio" for what in whats for arm in ours]
    lines = []
    for workload, tokens in keys:
        here = pick(rows, workload=workload, tokens=tokens)
        found = {(row["what"], row["arm"]): row for row in here}
        line = [workload, tokens, here[0]["density"]]
        line += [found.get((what, arm), {}).get("ms") for what in whats for arm in arms]
        for what in whats:
            base = found.get((what, BASELINE), {}).get("ms")
            times = (found.get((what, arm), {}).get("ms") for arm in ours)
            line += [f"{base / ms:.2f}x" if base and ms else None for ms in times]
        lines.append(line)
    return _without_empty_columns(header, lines)


def _without_empty_columns(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    keep = [i for i in range(len(header)) if any(line[i] is not None for line in lines)]
    return markdown([header[i] for i in keep], [[line[i] for i in keep] for line in lines])


def plain_table(columns: Sequence[str]) -> Callable[[Sequence[dict]], str]:
    def table(rows: Sequence[dict]) -> str:
        return _without_empty_columns(columns, [[row.get(column) for column in columns] for row in rows])

    return table


def plan_table(rows: Sequence[dict]) -> str:
    """A line for each workload: milliseconds of what a plan costs cold and warm, and of the mask that it replaces."""
    header = ["workload", "tokens", "plan cold", "plan warm", "frame index cold", "dense mask", "plan, MB"]
    lines = []
    for workload, tokens in dict.fromkeys((row["workload"], row["tokens"]) for row in rows):
        found = {row["arm"]: row for row in pick(rows, workload=workload, tokens=tokens)}
        cpu = [found.get(arm, {}).get("cpu_ms_min") for arm in header[2:5]]
        mask = found.get("dense mask", {}).get("ms_min")
        lines.append([workload, tokens, *cpu, mask, found["plan cold"]["plan_MB"]])
    return _without_empty_columns(header, lines)


def episode_table(rows: Sequence[dict]) -> str:
    """Milliseconds of the chunks at which every arm ran."""
    arms = values(rows, "arm")
    lines = []
    for program, chunk in dict.fromkeys((row["program"], row["chunk"]) for row in rows):
        found = {row["arm"]: row["ms"] for row in pick(rows, program=program, chunk=chunk)}
        if len(found) == len(arms):
            lines.append([program, chunk, *(found[arm] for arm in arms)])
    return markdown(["program", "chunk", *(f"{arm}, ms" for arm in arms)], lines)


TABLES = {
    "block_attention": ("Attention", attention_table),
    "plan": ("Plans", plan_table),
    "adaln": (
        "adaLN ops",
        plain_table(("op", "tokens", "D", "tokens_a_frame", "what", "arm", "ms", "GB/s", "%_of_copy", "ratio")),
    ),
    "qk_norm_rope": (
        "q/k norm and rope",
        plain_table(("what", "tokens", "heads", "D", "arm", "ms", "GB/s", "%_of_copy", "ratio")),
    ),
    "norm_peers": (
        "Norms beside other libraries",
        plain_table(("op", "what", "tokens", "D", "arm", "ms", "ms_min", "%_of_copy", "ratio")),
    ),
    "streaming": ("Latency over an episode", episode_table),
    "rollout": (
        "Rollout chunk",
        plain_table(
            ("what", "program", "guidance", "steps", "arm", "ms", "ms_p95", "ms_step", "x_floor", "peak_MB", "ratio")
        ),
    ),
    "train_step": (
        "Training step",
        plain_table(("what", "frames", "tokens", "arm", "ms", "tokens/s", "%_of_matmul", "peak_MB", "ratio", "regime")),
    ),
    "block": (
        "A block",
        plain_table(
            ("workload", "what", "tokens", "arm", "ms", "ms_min", "ratio", "peak_MB", "kernels", "MB", "floor_MB")
        ),
    ),
    "cached_attention": (
        "Attention over a cache",
        plain_table(("fill", "cached", "visible", "rows", "heads", "D", "arm", "ms", "ms_min", "x dense", "x concat")),
    ),
    "openwam": (
        "The OpenWAM package, as it comes and with install()",
        plain_table(("what", "architecture", "program", "tokens", "arm", "ms", "ms_min", "ratio", *EPISODE)),
    ),
    "rollout_openwam": (
        "Seconds of a chunk, beside the OpenWAM package",
        plain_table(("program", "arm", "chunks", *EPISODE, "ratio_last", "ratio_total")),
    ),
}
# Any other file: what every benchmark records.
OTHER = plain_table(("op", "what", "workload", "program", "chunk", "tokens", "arm", "ms", "ms_p95", "peak_MB", "ratio"))


def tables(rows: Sequence[dict]) -> str:
    out = []
    for file in values(rows, "file"):
        title, table = TABLES.get(file, (file, OTHER))
        for where in values(pick(rows, file=file), "where"):
            here = pick(rows, file=file, where=where)
            newest = max(here, key=lambda row: row["date"])
            out += [f"### {title}: {where}", "", table(here), "", f"Newest row: {machine(newest)}.", ""]
    return "\n".join(out)


# ---- figures ----


def slug(where: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", where.lower()).strip("-")


def _axes(title: str, x: str, y: str, columns: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * columns, 4), layout="constrained", dpi=120)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    figure.suptitle(title, fontsize=10)
    for ax in axes:
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        ax.grid(True, which="major", alpha=0.3)
    return figure, axes


def speed_figure(rows: Sequence[dict], where: str):
    """TFLOP/s over visible pairs against packed tokens, LIBERO joint, every arm; dashed: the machine's product."""
    here = pick(rows, file="block_attention", workload=LIBERO)
    whats = values(here, "what")
    if not here:
        return None
    title = f"block attention, {LIBERO}, {where}"
    figure, axes = _axes(title, "packed tokens", "GFLOP/s over visible pairs", len(whats))
    for ax, what in zip(axes, whats, strict=True):
        for arm in values(here, "arm"):
            line = sorted(pick(here, what=what, arm=arm), key=lambda row: row["tokens"])
            if line:
                x, y = [row["tokens"] for row in line], [row["GFLOP/s_visible"] for row in line]
                ax.plot(x, y, "o-", label=arm, color=COLOURS.get(arm))
        ceiling = _ceiling(pick(here, what=what))
        if ceiling:
            ax.axhline(ceiling, linestyle="--", color="black", linewidth=0.8, label="matrix product, same run")
        ax.set(title=what, xscale="log", ylim=(0, None))
        _token_ticks(ax, here)
        ax.legend(fontsize=7)
    return figure


def _token_ticks(ax, rows: Sequence[dict]) -> None:
    tokens = sorted({row["tokens"] for row in rows})
    ax.set_xticks(tokens, [f"{n:,}" for n in tokens], rotation=30, fontsize=7)
    ax.set_xticks([], minor=True)


def _ceiling(rows: Sequence[dict]) -> float | None:
    found = [row.get("float32_GFLOP/s" if "float32" in row["dtype"] else "bf16_GFLOP/s") for row in rows]
    return next((value for value in reversed(found) if value), None)


def roofline_figure(rows: Sequence[dict], where: str):
    """Speed over visible pairs against FLOPs a byte of q, k, v and out; the roof is this machine's copy and product."""
    here = [r for r in pick(rows, file="block_attention", what="forward") if r.get("copy_GB/s")]
    if not here:
        return None
    figure, (ax,) = _axes(f"attention forward under its roof, {where}", "visible FLOP / compulsory byte", "GFLOP/s")
    copy, product = here[-1]["copy_GB/s"], _ceiling(here)
    for arm in values(here, "arm"):
        points = pick(here, arm=arm)
        flops = [4 * r["heads"] * r["D"] * r["density"] * r["tokens"] ** 2 for r in points]
        width = 4 if "float32" in points[0]["dtype"] else 2
        intensity = [f / (4 * r["tokens"] * r["heads"] * r["D"] * width) for f, r in zip(flops, points, strict=True)]
        ax.scatter(intensity, [r["GFLOP/s_visible"] for r in points], s=14, label=arm, color=COLOURS.get(arm))
    low, high = ax.get_xlim()
    edge = product / copy
    xs = [min(low, edge / 10) if low > 0 else edge / 10, edge, max(high, edge * 10)]
    ax.plot(xs, [copy * xs[0], product, product], color="black", linewidth=1)
    ax.annotate(f"copy {copy:,.0f} GB/s, product {product:,.0f} GFLOP/s", (edge, product), fontsize=7, va="bottom")
    ax.set(xscale="log", yscale="log")
    ax.legend(fontsize=7)
    return figure


def norms_figure(rows: Sequence[dict], where: str):
    """Compulsory traffic of the norm ops as a share of the machine's copy, largest size of each op."""
    here = [r for r in rows if r.get("%_of_copy") is not None]
    if not here:
        return None
    bars = {}
    for row in here:
        op = row.get("op", row["file"])
        key = (op, row["what"], row["arm"])
        if key not in bars or row["tokens"] * row["D"] >= bars[key]["tokens"] * bars[key]["D"]:
            bars[key] = row
    figure, (ax,) = _axes(f"norm ops, {where}", "% of this machine's copy bandwidth", "")
    names = [f"{op} {what}: {arm} ({row['tokens']:,} tokens)" for (op, what, arm), row in bars.items()]
    colours = ["#c1121f" if arm.startswith("wam") else "#6c757d" for _, _, arm in bars]
    ax.barh(names, [row["%_of_copy"] for row in bars.values()], color=colours)
    ax.axvline(100, linestyle="--", color="black", linewidth=0.8)
    ax.tick_params(axis="y", labelsize=6)
    ax.invert_yaxis()
    figure.set_figheight(1 + 0.16 * len(bars))
    return figure


def plan_figure(rows: Sequence[dict], where: str):
    here = pick(rows, file="plan")
    if not here:
        return None
    figure, (ax,) = _axes(f"building a plan, one thread, {where}", "packed tokens", "ms of CPU time, least of 20")
    for workload in values(here, "workload"):
        line = sorted(pick(here, workload=workload, arm="plan cold"), key=lambda row: row["tokens"])
        ax.plot([r["tokens"] for r in line], [r["cpu_ms_min"] for r in line], "o-", label=workload)
    ax.set(xscale="log", yscale="log")
    _token_ticks(ax, pick(here, workload=values(here, "workload")[0]))
    ax.legend(fontsize=7)
    return figure


def episode_figure(rows: Sequence[dict], where: str):
    """Seconds a chunk against the chunk's number in its episode: flat is what a fixed-slot cache promises."""
    here = [r for r in rows if r.get("chunk") is not None]
    if not here:
        return None
    programs = values(here, "program") or [None]
    figure, axes = _axes(f"latency over the length of an episode, {where}", "chunk", "ms a chunk", len(programs))
    for ax, program in zip(axes, programs, strict=True):
        of_program = [r for r in here if r.get("program") == program]
        for arm in values(of_program, "arm"):
            line = sorted(pick(of_program, arm=arm), key=lambda row: row["chunk"])
            ax.plot([r["chunk"] for r in line], [r["ms"] for r in line], ".-", label=arm, color=COLOURS.get(arm))
        ax.set(title=program, ylim=(0, None))
        ax.legend(fontsize=7)
    return figure


DRAWINGS = {
    "attention_speed": speed_figure,
    "attention_roofline": roofline_figure,
    "norms": norms_figure,
    "plan": plan_figure,
    "episode": episode_figure,
}


def draw(rows: Sequence[dict], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for where in values(rows, "where"):
        for name, make in DRAWINGS.items():
            figure = make(pick(rows, where=where), where)
            if figure is None:
                print(f"report: no rows for {name} on {where}")
                continue
            path = folder / f"{name}-{slug(where)}.png"
            figure.savefig(path, metadata={"Software": None})
            written.append(path)
    return written


def run(args: argparse.Namespace, results: Path = ROOT / "bench" / "results", figures: Path = FIGURES) -> int:
    import matplotlib  # noqa: F401 - the one requirement of this command, named at once where it is missing

    rows = load(results)
    if not rows:
        raise ValueError(f"{results} has no rows; make some with `wam bench`")
    for path in draw(rows, figures):
        print(f"report: wrote {path}")
    print()
    print(tables(rows))
    return 0
