"""The planted bugs fit today's sources and README.md has a row of each; ``make mutation`` plants them all."""

import shutil

import pytest

from tests.mutation.mutants import MUTANTS
from tests.mutation.planting import Workshop
from tests.mutation.table import HERE, page, read

LEAST = {"forward": 12, "dq": 8, "dkdv": 8, "cached": 8, "streamed": 8, "plan": 6, "stop": 4}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.kernel}: {mutant.bug}")
def test_what_a_bug_replaces_is_there(mutant):
    assert mutant.planted() != mutant.path.read_text()


def test_the_bugs_are_spread_over_the_kernels():
    assert len({mutant.key for mutant in MUTANTS}) == len(MUTANTS) >= 40
    for kernel, least in LEAST.items():
        assert sum(mutant.kernel == kernel for mutant in MUTANTS) >= least


def test_every_bug_has_been_found_or_cannot_be():
    rows = read()
    assert list(rows) == [mutant.key for mutant in MUTANTS], "run `make mutation`"
    assert {key for key, row in rows.items() if not row.report} == {m.key for m in MUTANTS if m.equivalent}


def test_the_page_has_the_rows():
    assert (HERE / "README.md").read_text() == page(list(read().values())), "run `make mutation`"


@pytest.mark.slow
def test_planted_bugs_are_found(tmp_path):
    """The one of each of these kernels that takes the least time, and none in the kernels as they are."""
    if shutil.which("g++") is None:
        pytest.skip("bugs are compiled with g++")
    rows, workshop = read(), Workshop(tmp_path)
    fastest = [
        min((m for m in MUTANTS if m.kernel == kernel and not m.equivalent), key=lambda m: rows[m.key].seconds)
        for kernel in ("forward", "cached", "plan")
    ]
    workshop.check_without_bugs(fastest)
    for mutant in fastest:
        assert workshop.plant(mutant).report
