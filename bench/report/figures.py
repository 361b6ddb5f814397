"""Rows as figures: functions of the rows and the name of one machine; None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Sequence

from bench.rows import Row

from .rows import LIBERO, select, values

# One colour for each provider in every figure: ours, then the peers in the order in which they were written.
COLOURS = {
    "wam": "#c1121f", "wam triton": "#c1121f", "wam cuda": "#780000", "sdpa_dense_mask": "#6c757d",
    "sdpa_flash": "#adb5bd", "sdpa_cudnn": "#76b900", "flex": "#003049", "flex_openwam": "#669bbc",
    "flex_flash": "#fcbf49", "flash_attn_4": "#f77f00",
}  # fmt: skip


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


def speed_figure(rows: Sequence[Row], where: str):
    """TFLOP/s over visible pairs against packed tokens, LIBERO joint, every provider; dashed: the machine's product."""
    shown = select(rows, file="block_attention", workload=LIBERO)
    whats = values(shown, "what")
    if not shown:
        return None
    title = f"block attention, {LIBERO}, {where}"
    figure, axes = _axes(title, "packed tokens", "GFLOP/s over visible pairs", len(whats))
    for ax, what in zip(axes, whats, strict=True):
        for provider in values(shown, "provider"):
            line = sorted(select(shown, what=what, provider=provider), key=lambda row: row["tokens"])
            if line:
                x, y = [row["tokens"] for row in line], [row["GFLOP/s_visible"] for row in line]
                ax.plot(x, y, "o-", label=provider, color=COLOURS.get(provider))
        ceiling = _ceiling(select(shown, what=what))
        if ceiling:
            ax.axhline(ceiling, linestyle="--", color="black", linewidth=0.8, label="matrix product, same run")
        ax.set(title=what, xscale="log", ylim=(0, None))
        _token_ticks(ax, shown)
        ax.legend(fontsize=7)
    return figure


def _token_ticks(ax, rows: Sequence[Row]) -> None:
    tokens = sorted({row["tokens"] for row in rows})
    ax.set_xticks(tokens, [f"{n:,}" for n in tokens], rotation=30, fontsize=7)
    ax.set_xticks([], minor=True)


def _ceiling(rows: Sequence[Row]) -> float | None:
    found = [row.get("float32_GFLOP/s" if "float32" in row["dtype"] else "bf16_GFLOP/s") for row in rows]
    return next((value for value in reversed(found) if value), None)


def roofline_figure(rows: Sequence[Row], where: str):
    """Speed over visible pairs against FLOPs a byte of q, k, v and out; the roof is this machine's copy and product."""
    shown = [r for r in select(rows, file="block_attention", what="forward") if r.get("copy_GB/s")]
    if not shown:
        return None
    figure, (ax,) = _axes(f"attention forward under its roof, {where}", "visible FLOP / compulsory byte", "GFLOP/s")
    copy, product = shown[-1]["copy_GB/s"], _ceiling(shown)
    for provider in values(shown, "provider"):
        points = select(shown, provider=provider)
        flops = [4 * r["heads"] * r["D"] * r["density"] * r["tokens"] ** 2 for r in points]
        width = 4 if "float32" in points[0]["dtype"] else 2
        intensity = [f / (4 * r["tokens"] * r["heads"] * r["D"] * width) for f, r in zip(flops, points, strict=True)]
        ax.scatter(intensity, [r["GFLOP/s_visible"] for r in points], s=14, label=provider, color=COLOURS.get(provider))
    low, high = ax.get_xlim()
    edge = product / copy
    xs = [min(low, edge / 10) if low > 0 else edge / 10, edge, max(high, edge * 10)]
    ax.plot(xs, [copy * xs[0], product, product], color="black", linewidth=1)
    ax.annotate(f"copy {copy:,.0f} GB/s, product {product:,.0f} GFLOP/s", (edge, product), fontsize=7, va="bottom")
    ax.set(xscale="log", yscale="log")
    ax.legend(fontsize=7)
    return figure


def norms_figure(rows: Sequence[Row], where: str):
    """Compulsory traffic of the norm ops as a share of the machine's copy, largest size of each op, measured."""
    shown = [r for r in rows if r.get("%_of_copy") is not None and r["file"] != "static"]
    if not shown:
        return None
    bars: dict[tuple, Row] = {}
    for row in shown:
        op = row.get("op", row["file"])
        key = (op, row["what"], row["provider"])
        if key not in bars or row["tokens"] * row["D"] >= bars[key]["tokens"] * bars[key]["D"]:
            bars[key] = row
    figure, (ax,) = _axes(f"norm ops, {where}", "% of this machine's copy bandwidth", "")
    names = [f"{op} {what}: {provider} ({row['tokens']:,} tokens)" for (op, what, provider), row in bars.items()]
    colours = ["#c1121f" if provider.startswith("wam") else "#6c757d" for _, _, provider in bars]
    ax.barh(names, [row["%_of_copy"] for row in bars.values()], color=colours)
    ax.axvline(100, linestyle="--", color="black", linewidth=0.8)
    ax.tick_params(axis="y", labelsize=6)
    ax.invert_yaxis()
    figure.set_figheight(1 + 0.16 * len(bars))
    return figure


def plan_figure(rows: Sequence[Row], where: str):
    shown = select(rows, file="plan")
    if not shown:
        return None
    figure, (ax,) = _axes(f"building a plan, one thread, {where}", "packed tokens", "ms of CPU time, least of 20")
    for workload in values(shown, "workload"):
        line = sorted(select(shown, workload=workload, provider="plan cold"), key=lambda row: row["tokens"])
        ax.plot([r["tokens"] for r in line], [r["cpu_ms_min"] for r in line], "o-", label=workload)
    ax.set(xscale="log", yscale="log")
    _token_ticks(ax, select(shown, workload=values(shown, "workload")[0]))
    ax.legend(fontsize=7)
    return figure


def episode_figure(rows: Sequence[Row], where: str):
    """Seconds a chunk against the chunk's number in its episode: flat is what a cache of fixed slots promises."""
    shown = [r for r in rows if r.get("chunk") is not None]
    if not shown:
        return None
    programs = values(shown, "program") or [None]
    figure, axes = _axes(f"latency over the length of an episode, {where}", "chunk", "ms a chunk", len(programs))
    for ax, program in zip(axes, programs, strict=True):
        of_program = [r for r in shown if r.get("program") == program]
        for provider in values(of_program, "provider"):
            line = sorted(select(of_program, provider=provider), key=lambda row: row["chunk"])
            ax.plot(
                [r["chunk"] for r in line], [r["ms"] for r in line], ".-", label=provider, color=COLOURS.get(provider)
            )
        ax.set(title=program, ylim=(0, None))
        ax.legend(fontsize=7)
    return figure
