"""The rows of ``bench/registry.py``: no part of a suite is missing, and answers are checked before they are timed."""

import re
from importlib import import_module

import pytest

from bench import harness
from bench.registry import GROUPS, SUITES, sections
from bench.report import page
from bench.rows import RESULTS, ROOT
from tests.bench.examples import EXAMPLES, run

each_suite = pytest.mark.parametrize("name", SUITES)


def test_every_module_is_one_row():
    modules = {path.stem for path in (ROOT / "bench" / "suites").glob("*.py")} - {"__init__", "__main__"}
    assert modules == set(SUITES) == set(EXAMPLES)
    assert {path.stem for path in RESULTS.glob("*.jsonl")} <= set(sections())


@each_suite
def test_every_module_has_rows(name):
    module = import_module(f"bench.suites.{name}")
    assert callable(module.rows) and f"python -m bench.suites {name}" in module.__doc__


def test_what_a_gpu_machine_runs_is_in_a_group():
    for suite in SUITES.values():
        if suite.gpu_seconds is not None:
            assert suite.group in GROUPS and "cuda" in suite.devices


def predictions() -> dict[str, str]:
    """Of the table of suites in ``bench/NOTES.md``."""
    (table,) = re.findall(r"^## Suites\n\n.*\n\n((?:\|.*\n)+)", (ROOT / "bench" / "NOTES.md").read_text(), re.MULTILINE)
    rows = [line.strip("| \n").split(" | ") for line in table.splitlines()[2:]]
    return {name.strip("`"): prediction for name, prediction in rows}


@each_suite
def test_every_suite_has_a_prediction(name):
    assert re.search(r"\d|none was written before", predictions()[name])


def shrunk(name: str, patch: pytest.MonkeyPatch) -> None:
    if EXAMPLES[name].needs:
        pytest.importorskip(EXAMPLES[name].needs, reason="openwam is in requirements/test.txt")
    EXAMPLES[name].shrink(patch)
    limits = {"copy_GB/s": 1.0, "bf16_GFLOP/s": 1.0, "float32_GFLOP/s": 1.0}  # measuring them takes seconds
    patch.setattr(harness, "ceilings", lambda device: limits)
    patch.setattr(import_module("bench.harness.ceilings"), "ceilings", lambda device: limits)


def later_chunks(rows: list[dict]) -> set[str]:
    """Columns of chunks that an example does not reach."""
    last = max((row["chunks"] for row in rows if "chunks" in row), default=0)
    return {f"s_chunk_{n}" for n in range(last + 1, 100)}


@each_suite
def test_rows_have_the_columns_of_the_report(name, monkeypatch):
    shrunk(name, monkeypatch)
    rows = [{"seed": 0, **row} for row in run(name)]
    timed = [row for row in rows if "error" not in row]
    assert all({"provider", "error", "where"} <= row.keys() for row in rows if "error" in row)
    found = {key for row in timed for key, value in row.items() if value is not None}
    assert set(SUITES[name].report.columns) - found - later_chunks(timed) == set()
    machine = {**harness.environment("cpu"), "file": name, "where": "some machine"}
    text = page.tables([machine | row for row in timed], sections())
    assert SUITES[name].report.title in text and text.count("\n| ") > 2


@each_suite
def test_a_wrong_answer_has_no_speed(name, monkeypatch):
    if EXAMPLES[name].spoil is None:
        pytest.skip("it times nothing: what it records are errors")
    shrunk(name, monkeypatch)
    EXAMPLES[name].spoil(monkeypatch)
    with pytest.raises(RuntimeError, match=r"bench: .* is wrong"):
        run(name)
