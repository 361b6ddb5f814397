"""The rows of ``rows.jsonl``, one a planted bug, and README.md's table of them."""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

from tests.mutation.mutants import MUTANTS, PLANS, ROOT, SECTIONS, Mutant

HERE = Path(__file__).parent
ROWS = HERE / "rows.jsonl"
RESULT = "\n## Result\n\n"


class Row(NamedTuple):
    kernel: str
    bug: str
    case: str  # that failed; empty where none did
    report: str
    seconds: float  # of CPU time: compilation and cases
    fingerprint: str  # of the sources

    def line(self) -> str:
        return json.dumps(self._asdict()) + "\n"


def fingerprint(mutant: Mutant) -> str:
    """Of all that is compiled with the bug, and the bug."""
    digest = hashlib.sha256(mutant.planted().encode())
    folders = [] if mutant.kernel in PLANS else [mutant.path.parent, ROOT / "csrc/common"]
    for path in sorted(path for folder in folders for path in folder.iterdir()):
        if path != mutant.path and path.suffix != ".md":
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read() -> dict[tuple[str, str], Row]:
    """The last row of every bug, in their order."""
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    last = {(row.kernel, row.bug): row for row in rows}
    return {mutant.key: last[mutant.key] for mutant in MUTANTS if mutant.key in last}


def append(row: Row) -> None:
    with ROWS.open("a") as file:
        file.write(row.line())


def write(path: Path, text: str) -> None:
    """In one go: what was there stays until the new text is complete."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def summary(rows: list[Row]) -> str:
    """How many bugs of every kernel were found."""
    equivalent = {m.key for m in MUTANTS if m.equivalent}
    lines = ["| kernel | planted | found | equivalent | missed |", "| --- | --: | --: | --: | --: |"]
    for kernel in (*SECTIONS, "all"):
        of = [row for row in rows if kernel in (row.kernel, "all")]
        found = sum(bool(row.report) for row in of)
        proven = sum(not row.report and (row.kernel, row.bug) in equivalent for row in of)
        lines.append(f"| {kernel} | {len(of)} | {found} | {proven} | {len(of) - found - proven} |")
    return "\n".join(lines)


def page(rows: list[Row]) -> str:
    """README.md: its text as it is, and the table of ``rows``."""
    text = (HERE / "README.md").read_text().partition(RESULT)[0]
    equivalent = {m.key: m.equivalent for m in MUTANTS}
    lines = ["| kernel | planted bug | found by the case | which reports | CPU s |", "| --- | --- | --- | --- | --: |"]
    for row in rows:
        case, report = row.case, row.report.replace("|", "\\|")
        if not report:
            proof = equivalent.get((row.kernel, row.bug))
            case, report = ("none: equivalent", proof) if proof else ("**none**", "")
        lines.append(f"| {row.kernel} | {row.bug} | {case} | {report} | {row.seconds:.1f} |")
    not_run = len(MUTANTS) - len(rows)
    note = f"{not_run} bugs have not been planted yet.\n\n" if not_run else ""
    return f"{text}{RESULT}{note}{summary(rows)}\n\n" + "\n".join(lines) + "\n"
