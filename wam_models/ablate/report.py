"""The report of an ablation, from its rows: at any time, of what is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..draw.charts import intervals
from ..runtime.files import new_file
from .protocol import BASELINE, Protocol, Track
from .run import collect
from .statistics import Row, difference, permuted_differences, rates, relative_video_error
from .units import AGAIN, EXPERT, SHUFFLED, UNTRAINED

REFERENCE = {
    "video_then_action": 99.0, "joint": 97.8, "action_noisy_to_video": 92.6, "video_noisy_to_action": 92.4,
    "decoupled_same_step": 90.2, "action_then_video": 84.0,
}  # fmt: skip
NOT_COMPARABLE = (
    "Ours is trained from scratch, small, on another robot and other tasks: not comparable with the reference's "
    "pretrained models of 5B parameters on LIBERO-Long, whose row stands here so that nobody has to look for it."
)

EXPLAINED = {  # by the arm that it is about, "" of all
    "gjd_equal_steps": "`gjd_equal_steps` has as many steps as the others, of which 60 % of the samples are joint; "
    "`gjd_equal_joint_steps` has 1 / 0.6 as many, so as many joint samples.",
    "behaviour_cloning": "`behaviour_cloning` is the model of `decoupled_same_step` with video weight 0, whose "
    "rollouts denoise actions alone: it imagines nothing.",
    "": "Video error: mean square error of imagined frames over that of the last observed one repeated, along each "
    "arm's own episodes. CPU ms: a chunk of one episode on one thread, prediction and the pass over what was observed.",
}


def write_report(out: Path) -> str:
    """Write ``report.md`` and a figure for each track, from what a folder holds; returns the text.

    Raises:
        ValueError: no ablation in the folder.
    """
    file = out / "protocol.json"
    if not file.exists():
        raise ValueError(f"wam ablate report: {out} has no protocol.json; name the folder that wam ablate wrote")
    protocol = Protocol.from_json(file)
    rows, trainings = collect(out)
    parts = [f"# Ablation of the interaction programs: {protocol.suite}", ""]
    for track in protocol.tracks:
        mine = [row for row in rows if row["track"] == track.name]
        parts += _track(out, protocol, track, mine, [t for t in trainings if t["track"] == track.name])
    text = "\n".join(parts) + "\n"
    with new_file(out / "report.md") as part:
        part.write_text(text)
    return text


def _track(out: Path, protocol: Protocol, track: Track, rows: Sequence[Row], trainings: Sequence[Row]) -> Iterable[str]:
    names = [arm.name for arm in protocol.arms]
    yield from (f"## {_heading(track)}", "")
    yield from _missing(protocol, track, rows, trainings)
    if not any(row["arm"] in names for row in rows):
        return
    yield from _made(trainings)
    for setting in track.settings:
        chosen = [row for row in rows if (row["chunk"], row["steps"]) == setting and row["arm"] in names]
        if chosen:
            yield from _setting(protocol, track, setting, chosen, trainings)
    yield (
        "Success is pooled over simulators and seeds, with Wilson's 95 % interval over episodes. **Intervals over "
        "episodes alone overstate the certainty**: they leave out what another training seed changes. The "
        f"difference to `{BASELINE}` is paired, in the same initial states with the same seeds; its interval is of a "
        "bootstrap clustered by training seed, which with three seeds is still rather too narrow, and with one is none."
    )
    yield ""
    yield " ".join(text for name, text in EXPLAINED.items() if not name or name in names)
    yield ""
    yield from _by_task(track, names, rows)
    yield from _sanity(track, names, rows, trainings)
    yield from _reference(track, rows)
    figure = f"{track.name}.png"
    draw(track, names, rows, out / figure)
    yield f"![Success of each arm under each setting, with the value of each training seed]({figure})"
    yield ""


def _heading(track: Track) -> str:
    return "States as frames" if track.name == "state" else track.name


def _missing(protocol: Protocol, track: Track, rows: Sequence[Row], trainings: Sequence[Row]) -> Iterable[str]:
    episodes = Counter((row["arm"], row["seed"], row["chunk"], row["steps"]) for row in rows)
    failed = {(t["arm"], t["seed"]): t["failure"] for t in trainings if t["failure"] is not None}
    each, lacks = track.episodes * len(track.simulators), []
    for settings in filter(None, (track.settings[: track.early], track.settings[track.early :])):
        done = {
            seed: sum(
                (arm.name, seed) in failed or all(episodes[arm.name, seed, *setting] == each for setting in settings)
                for arm in protocol.arms
            )
            for seed in track.seeds
        }
        if min(done.values()) < len(protocol.arms):
            under = " and ".join(f"chunk {c} with {n} step{'s' * (n > 1)}" for c, n in settings)
            counts = ", ".join(f"seed {seed}: {found}" for seed, found in done.items())
            lacks.append(f"{under}, arms of {len(protocol.arms)}: {counts}")
    yield f"**Not complete. {'; '.join(lacks)}.**" if lacks else "All arms with all seeds are here."
    yield ""
    for (arm, seed), failure in failed.items():
        yield f"`{arm}`, seed {seed}, failed: {failure}"
        yield ""


def _made(trainings: Sequence[Row]) -> Iterable[str]:
    trained = [t for t in trainings if t["steps"]]
    if not trained:
        return
    dates = sorted(t["date"] for t in trained)
    of = {key: ", ".join(sorted({str(t[key]) for t in trained})) for key in ("commit", "cpu", "torch")}
    parameters = max(t["parameters"] for t in trained)
    cpu = sum(t["cpu_seconds"] for t in trained)
    yield (
        f"{dates[0]} to {dates[-1]} UTC, commit {of['commit']}, {of['cpu']}, torch {of['torch']}; "
        f"{parameters / 1e6:.2f} M parameters, {len(trained)} trainings of {cpu / 60:.0f} CPU minutes in all."
    )
    yield ""


def _setting(
    protocol: Protocol, track: Track, setting: tuple[int, int], rows: Sequence[Row], trainings: Sequence[Row]
) -> Iterable[str]:
    chunk, steps = setting
    yield f"### Chunk {chunk}, {steps} denoising step{'s' * (steps > 1)}"
    yield ""
    yield f"| arm | success | of each seed, % | difference to `{BASELINE}`, points | video error | CPU ms |"
    yield "| --- | --- | --- | --- | --: | --: |"
    for arm in protocol.arms:
        own = [row for row in rows if row["arm"] == arm.name]
        if not own:
            continue
        found, apart = rates(own), difference(rows, arm.name)
        each = " / ".join(f"{100 * a / n:.1f}" for a, n in found.seeds.values())
        between = "-"
        if apart is not None and arm.name != BASELINE:
            between = f"{100 * apart.value:+.1f}"
            between += (
                " (one seed)"
                if apart.low is None or apart.high is None
                else f" [{100 * apart.low:+.1f}, {100 * apart.high:+.1f}]"
            )
            if len(apart.seeds) < len(found.seeds):
                between += f" (seeds {', '.join(map(str, apart.seeds))})"
        error = relative_video_error(own)
        cpu = [
            e["chunk_cpu_seconds"]
            for t in trainings
            for e in t["evaluations"]
            if t["arm"] == arm.name and (e["chunk"], e["steps"]) == setting
        ]
        yield (
            f"| `{arm.name}` | {_rate(own)} | {each} | {between} | {'-' if error is None else f'{error:.2f}'} | "
            f"{1000 * float(np.median(cpu)):.0f} |"
        )
    yield ""
    here = [arm.name for arm in protocol.arms if any(row["arm"] == arm.name for row in rows)]
    permuted = permuted_differences(rows, here) if BASELINE in here and len(here) > 1 else ()
    if len(permuted):
        yield (
            "With arm labels permuted within each initial state and seed (no difference by construction), the largest "
            f"difference to `{BASELINE}` is {100 * np.median(permuted):.1f} points in the median of {len(permuted)} "
            f"permutations and below {100 * np.percentile(permuted, 95):.1f} in 95 %."
        )
        yield ""


def _rate(rows: Sequence[Row]) -> str:
    found = rates(rows)
    percent = 100 * found.successes / found.episodes
    return f"{found.successes}/{found.episodes} = {percent:.1f} % [{100 * found.low:.0f}, {100 * found.high:.0f}]"


def _by_task(track: Track, names: Sequence[str], rows: Sequence[Row]) -> Iterable[str]:
    setting = hardest(track)
    chosen = [row for row in rows if (row["chunk"], row["steps"]) == setting]
    short = [name.rpartition("/")[2].rpartition("-v")[0] or name for name in track.simulators]
    yield f"### Of each task, %, chunk {setting[0]}, {setting[1]} denoising step{'s' * (setting[1] > 1)}"
    yield ""
    yield f"| arm | {' | '.join(short)} |"
    yield f"| --- |{' --: |' * len(short)}"
    for name in names:
        cells = []
        for simulator in track.simulators:
            own = [row["success"] for row in chosen if row["arm"] == name and row["simulator"] == simulator]
            cells.append(f"{100 * sum(own) / len(own):.0f}" if own else "-")
        if set(cells) != {"-"}:
            yield f"| `{name}` | {' | '.join(cells)} |"
    yield ""


def hardest(track: Track) -> tuple[int, int]:
    """The setting of the longest chunks and fewest steps: the one whose tasks are shown, named before any run."""
    return max(track.settings, key=lambda setting: (setting[0], -setting[1]))


def _sanity(track: Track, names: Sequence[str], rows: Sequence[Row], trainings: Sequence[Row]) -> Iterable[str]:
    setting, seed = track.settings[0], track.seeds[0]
    under = [row for row in rows if (row["chunk"], row["steps"]) == setting]
    by = {
        name: [row for row in under if row["arm"] == name and row["seed"] == seed]
        for name in (BASELINE, UNTRAINED, SHUFFLED, AGAIN)
    }
    expert = [row for row in rows if row["arm"] == EXPERT]
    yield f"### Sanity, seed {seed}, chunk {setting[0]}, {setting[1]} denoising step{'s' * (setting[1] > 1)}"
    yield ""
    yield "| what | expected | found |"
    yield "| --- | --- | --- |"
    if expert:
        same = sum(row["success"] == row.get("expert") for row in expert)
        yield f"| the scripted expert's actions, replayed | succeed | {_rate(expert)} |"
        yield f"| the replay ends as the expert did | always | {same} of {len(expert)} |"
    for name, what, expected in (
        (BASELINE, f"`{BASELINE}`", "far above the next rows"),
        (UNTRAINED, f"`{BASELINE}` with its initial weights", "fails"),
        (SHUFFLED, f"`{BASELINE}`, each task under the words of the next", "drops"),
    ):
        if by[name]:
            yield f"| {what} | {expected} | {_rate(by[name])} |"
    if by[AGAIN] and by[BASELINE]:
        ends = [(row["success"], row["actions"]) for row in by[BASELINE]]
        same = sum(a == (row["success"], row["actions"]) for a, row in zip(ends, by[AGAIN], strict=True))
        losses = [t.get("losses") for t in trainings if t["arm"] in (BASELINE, AGAIN) and t["seed"] == seed]
        equal = "equal" if losses[0] == losses[1] else "NOT equal"
        yield (
            f"| `{BASELINE}` trained again with the same seed | the same | losses {equal}; {same} of "
            f"{len(by[AGAIN])} episodes end after the same number of actions in the same way |"
        )
    yield ""


def _reference(track: Track, rows: Sequence[Row]) -> Iterable[str]:
    yield "### The reference"
    yield ""
    yield f"| | {' | '.join(f'`{name}`' for name in REFERENCE)} |"
    yield f"| --- |{' --: |' * len(REFERENCE)}"
    yield f"| OpenWAM, 5B pretrained, LIBERO-Long | {' | '.join(f'{value:.1f}' for value in REFERENCE.values())} |"
    for chunk, steps in track.settings:
        cells = []
        for name in REFERENCE:
            own = [r["success"] for r in rows if r["arm"] == name and (r["chunk"], r["steps"]) == (chunk, steps)]
            cells.append(f"{100 * sum(own) / len(own):.1f}" if own else "-")
        yield f"| here, chunk {chunk}, {steps} step{'s' * (steps > 1)} | {' | '.join(cells)} |"
    yield ""
    yield NOT_COMPARABLE
    yield ""


def draw(track: Track, names: Sequence[str], rows: Sequence[Row], path: Path) -> None:
    """The figure: a panel for each setting, a line for each arm."""
    panels = {}
    for chunk, steps in track.settings:
        lines = {}
        for name in names:
            own = [r for r in rows if r["arm"] == name and (r["chunk"], r["steps"]) == (chunk, steps)]
            if own:
                found = rates(own)
                each = [100 * a / n for a, n in found.seeds.values()]
                value = 100 * found.successes / found.episodes
                lines[name.replace("_", " ")] = (value, 100 * found.low, 100 * found.high, each)
        if lines:
            panels[f"chunk {chunk}, {steps} denoising step{'s' * (steps > 1)}"] = lines
    note = "line: Wilson's 95 % interval over episodes alone; circles: the training seeds"
    intervals(panels, path, title=f"Success, %: {_heading(track)}", note=note)
