"""The table of planted bugs fits the kernels; ``make mutation`` runs them."""

import pytest

from tests.mutation.__main__ import HERE, ROOT, planted
from tests.mutation.mutants import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.kernel}: {m.name}")
def test_what_a_mutant_replaces_is_there(mutant):
    text = (ROOT / "csrc/block_attention" / mutant.file).read_text()
    assert planted(text, mutant) != text


def test_the_table_has_every_mutant_and_none_is_missed():
    assert len(MUTANTS) >= 40 and len({(m.kernel, m.name) for m in MUTANTS}) == len(MUTANTS)
    rows = [line.split(" | ") for line in (HERE / "README.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert [(kernel.removeprefix("| "), name) for kernel, name, _ in rows] == [(m.kernel, m.name) for m in MUTANTS]
    missed = {name for _, name, reported in rows if reported.startswith("**nothing**")}
    assert missed <= {m.name for m in MUTANTS if m.equivalent}
