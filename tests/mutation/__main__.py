"""Plants every bug of ``mutants.py``, one at a time, and says which case finds it.

    python -m tests.mutation [--only TEXT] [--fresh]

A bug is compiled with g++ into the one kernel that it is of, and run under the emulation in a process of its own, case
after case, until one fails. Every result is kept in ``rows.jsonl`` as it comes, so a run that was interrupted goes on
where it was; a bug is planted again where the sources that it is compiled with have changed, or with ``--fresh``.
README.md of this folder has the table of all rows.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.mutation.mutants import MUTANTS
from tests.mutation.planting import Workshop
from tests.mutation.table import ROWS, append, fingerprint, page, read, summary, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="bugs whose kernel and name hold this")
    parser.add_argument("--fresh", action="store_true", help="plant them again, whatever rows there are")
    args = parser.parse_args()
    os.nice(max(0, 10 - os.nice(0)))
    rows = read()
    due = [
        mutant
        for mutant in MUTANTS
        if args.only in f"{mutant.kernel}: {mutant.bug}"
        and (args.fresh or rows.get(mutant.key) is None or rows[mutant.key].fingerprint != fingerprint(mutant))
    ]
    print(f"{len(due)} of {len(MUTANTS)} bugs to plant", flush=True)
    if due:
        with tempfile.TemporaryDirectory() as name:
            workshop = Workshop(Path(name))
            workshop.check_without_bugs(due)
            for mutant in due:
                row = workshop.plant(mutant)
                append(row)
                found = f"found by {row.case}: {row.report}" if row.report else "NOT FOUND"
                print(f"{mutant.kernel}: {mutant.bug}: {found} ({row.seconds} s)", flush=True)
    rows = read()
    write(ROWS, "".join(row.line() for row in rows.values()))
    write(ROWS.parent / "README.md", page(list(rows.values())))
    print(summary(list(rows.values())))
    sys.exit(any(not rows[m.key].report and not m.equivalent for m in MUTANTS if m.key in rows))


if __name__ == "__main__":
    main()
