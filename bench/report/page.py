"""``wam bench report``: the rows of ``bench/results`` as figures in ``docs/bench`` and as Markdown tables on stdout.

Of rows that measure the same thing on the same device the newest stands; nothing else is chosen or left out. A figure
or table for which there are no rows is not made, and a line reports it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.rows import ROOT, Row

from .rows import load, machine_of, select, values
from .section import Section

FIGURES = ROOT / "docs" / "bench"

Sections = Mapping[str, Section]  # of a file of rows, by its name


def tables(rows: Sequence[Row], sections: Sections) -> str:
    out = []
    for file in values(rows, "file"):
        if file not in sections:
            raise ValueError(f"report: {file}.jsonl must be of a suite in bench/registry.py; found {tuple(sections)}")
        for where in values(select(rows, file=file), "where"):
            shown = select(rows, file=file, where=where)
            newest = max(shown, key=lambda row: row["date"])
            section = sections[file]
            out += [f"### {section.title}: {where}", "", section.render(shown), ""]
            out += [f"Newest row: {machine_of(newest)}.", ""]
    return "\n".join(out)


def slug(where: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", where.lower()).strip("-")


def draw(rows: Sequence[Row], sections: Sections, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    figures = {name: make for section in sections.values() for name, make in section.figures.items()}
    written = []
    for where in values(rows, "where"):
        for name, make in figures.items():
            figure = make(select(rows, where=where), where)
            if figure is None:
                print(f"report: no rows for {name} on {where}")
                continue
            path = folder / f"{name}-{slug(where)}.png"
            figure.savefig(path, metadata={"Software": None})
            written.append(path)
    return written


def run(sections: Sections, results: Path, figures: Path = FIGURES) -> int:
    import matplotlib  # noqa: F401 - the one requirement of this command, named at once where it is missing

    rows = load(results)
    if not rows:
        raise ValueError(f"{results} has no rows; make some with `wam bench`")
    for path in draw(rows, sections, figures):
        print(f"report: wrote {path}")
    print()
    print(tables(rows, sections))
    return 0
