"""The rows of ``bench/registry.py``: every suite is one row, one module and one file of rows."""

from importlib import import_module

import pytest

from bench.registry import GROUPS, SUITES
from bench.rows import RESULTS, ROOT


def test_every_module_is_one_row():
    modules = {path.stem for path in (ROOT / "bench" / "suites").glob("*.py")} - {"__init__", "__main__"}
    assert modules == set(SUITES)
    assert {path.stem for path in RESULTS.glob("*.jsonl")} <= set(SUITES)


@pytest.mark.parametrize("name", SUITES)
def test_every_module_has_rows(name):
    module = import_module(f"bench.suites.{name}")
    assert callable(module.rows) and f"python -m bench.suites {name}" in module.__doc__


def test_what_a_gpu_machine_runs_is_in_a_group():
    for suite in SUITES.values():
        if suite.gpu_seconds is not None:
            assert suite.group in GROUPS and "cuda" in suite.devices
