"""The page ``demo.html`` of ``wam demo``: one file, with all its pictures and data inside."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1e1e24; max-width: 920px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; }
table { border-collapse: collapse; } td, th { padding: 3px 12px; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
img { max-width: 100%; } img.film { border: 1px solid #ddd; width: 100%; box-sizing: border-box; }
.no { color: #b03020; font-weight: 600; } figcaption { color: #666; font-size: .9em; }
"""
SCRIPT = """
FILMS.forEach((film, n) => {
  const image = document.getElementById("film" + n), last = film.length - 1, slider = image.nextElementSibling;
  const draw = () => { image.src = "data:image/png;base64," + film[t]; };
  slider.max = last; slider.value = last;
  let t = last, pause = 40, held = false;
  slider.oninput = () => { held = true; t = +slider.value; draw(); };
  image.onclick = () => { held = !held; };
  draw();
  setInterval(() => {
    if (held || (t === last && pause-- > 0)) return;
    t = t === last ? 0 : t + 1; pause = 20; slider.value = t; draw();
  }, 100);
});
"""


def page(report: dict[str, Any], films: Sequence[dict[str, Any]], pictures: Path) -> str:
    """The whole page.

    Args:
        report: What ``report.json`` holds.
        films: Of some episodes, see :func:`~.closed_loop_demo.films`.
        pictures: The folder of ``loss.png`` and ``masks.png``.
    """
    rate, seed = report["all"], report["seed"]
    low, high = (round(100 * rate[end]) for end in ("low", "high"))
    shown = "".join(
        f"<h3>{html.escape(film['title'])}: {html.escape(film['end'])}</h3>"
        f'<img class="film" id="film{n}" alt=""><input type="range" min="0" style="width:100%">'
        for n, film in enumerate(films)
    )
    kept = "".join(
        f"<li>{'Yes' if ok else '<span class=no>NO</span>'}: {html.escape(what)}.</li>"
        for what, ok in report["bounds"].items()
    )
    weak = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in weaknesses(report))
    data = json.dumps([[base64.b64encode(png).decode() for png in film["frames"]] for film in films])
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>wam demo</title><style>{STYLE}</style>
<h1>A world-action model that acts and imagines: {rate["successes"]} of {rate["episodes"]} new episodes succeed</h1>
<p>A generalist joint-denoising model of {report["parameters"] / 1e6:.2f} M parameters, trained for
{report["training_seconds"]:.0f} s ({report["steps"]} steps, seed {seed}) on scripted demonstrations of Meta-World.
Frames are states (hand, gripper, objects, target), 20 a second; a chunk is 2 frames and 8 actions, denoised together in
one step, executed, and replaced by what was observed. 95 % interval [{low}, {high}] %, over episodes alone. The whole
demo took {report["total_seconds"]:.0f} s.</p>
<ul>{kept}</ul>
<h2>What happened, and what was imagined</h2>
<p>Blue: hand and gripper; red: object; green cross: target, as the simulator states it. On the right each
frame as it was imagined before its actions were executed. Click to stop; drag the slider.</p>
{shown}
<h2>How good</h2>
{rates_of(report)}
<p>Mean distance of what was imagined from what happened, in mm; standing still repeats the last observed frame.</p>
{_imagined(report["imagined"])}
<p>On {len(report["recorded_episodes"])} held-out demonstrations, frame by frame from the real history: root mean square
errors, in standard deviations.</p>
{_dynamics(report["dynamics"]["rows"])}
<h2>What is not good</h2>
<ul>{weak}</ul>
<h2>Training</h2>
{picture_of(pictures / "loss.png", "Loss curves")}
<h2>Which token attends to which</h2>
{picture_of(pictures / "masks.png", "The masks of the interaction programs")}
<script>const FILMS = {data};{SCRIPT}</script>
</html>
"""


def weaknesses(report: dict[str, Any]) -> list[str]:
    """What this run does badly, and what no run of the demo shows."""
    found = []
    for row in report["episodes"]:
        if not row["success"]:
            found.append(f"{row['simulator']}, episode {row['episode']} fails: {row['failure']}.")
    for row in report["imagined"]:
        for what in ("hand", "object"):
            own, still = row[f"{what}_imagined"], row[f"{what}_still"]
            if own >= still:
                found.append(
                    f"The {what} alone, {row['frame']} ahead, is imagined worse ({own:.0f} mm) than standing still "
                    f"({still:.0f} mm): it is at rest most of the time, and the model does not keep it exactly there."
                )
    found += [f"Not kept: {what}." for what, ok in report["bounds"].items() if not ok]
    furthest = report["imagined"][-1]
    found += [
        f"Imagined places are {furthest['path_imagined']:.0f} mm off after {furthest['frame']} frames, a tenth of a "
        "second: enough to act by while every chunk is corrected by what is observed, not to plan far ahead.",
        "Everything is observed, the target too, so success says that the policy has learnt the tasks, not that "
        "imagining helps it.",
        f"One training seed and {report['all']['episodes']} episodes: another seed moves the rate by more than its "
        "interval says.",
    ]
    return found


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts."""
    cells = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{lines}</table>"


def rates_of(report: dict[str, Any]) -> str:
    """Success of each task and of all."""
    rates = [*report["simulators"].items(), ("all", report["all"])]
    rows = [
        (name, f"{r['successes']} of {r['episodes']}", f"[{100 * r['low']:.0f}, {100 * r['high']:.0f}] %")
        for name, r in rates
    ]
    return table_of(("task", "succeed", "95 % interval"), rows)


def _imagined(rows: Sequence[dict[str, float]]) -> str:
    head = ["frames ahead"]
    for what in ("hand", "object", "both, mean"):
        head += [f"{what}: imagined", "standing still"]
    keys = [f"{what}_{who}" for what in ("hand", "object", "path") for who in ("imagined", "still")]
    return table_of(head, [(str(row["frame"]), *(f"{row[key]:.1f}" for key in keys)) for row in rows])


def _dynamics(rows: Sequence[dict[str, Any]]) -> str:
    forward, inverse = rows
    lines = [
        ("forward dynamics (the next frame, given the actions)", forward, "frame", "the last frame"),
        ("inverse dynamics (the actions, given the next frame)", inverse, "action", "the last action"),
    ]
    cells = [
        (name, f"{row[f'{kind}_rmse']:.3f}", f"{row[f'repeat_{kind}_rmse']:.3f} ({what})")
        for name, row, kind, what in lines
    ]
    return table_of(("prediction", "error", "repeating"), cells)


def picture_of(file: Path, caption: str) -> str:
    """A PNG file inside the page."""
    data = base64.b64encode(file.read_bytes()).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )
