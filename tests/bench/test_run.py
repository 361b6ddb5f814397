"""``wam bench``: every part that it names exists and takes the flags it is given; rows are kept when they should be."""

import argparse
import json
import runpy
import sys

import pytest

from bench import run
from wam_models import cli
from wam_models.cli import bench as bench_command

MODULES = sorted({module for modules in run.SUITES.values() for module in modules})


def parsed(*flags: str) -> argparse.Namespace:
    return cli.make_parser().parse_args(["bench", *flags])


@pytest.mark.parametrize("module", MODULES)
def test_every_part_takes_its_flags(module, monkeypatch, capsys):
    _, name, *flags = run.arguments(module, parsed("--quick", "--device", "cpu"))
    monkeypatch.setattr(sys, "argv", [module, *flags, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(name, run_name="__main__")
    assert stopped.value.code == 0
    usage = capsys.readouterr().out
    assert all(flag in usage for flag in flags if flag.startswith("--"))


def test_every_module_is_of_a_suite():
    # OpenWAM is no requirement, and the demo's training takes its minutes
    alone = {"bench_openwam", "bench_rollout_openwam", "bench_demo"}
    assert {path.stem for path in run.ROOT.glob("bench/bench_*.py")} == {*MODULES, *alone}


def test_an_unknown_suite_is_one_line(capsys):
    assert cli.main(["bench", "--suite", "speed"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("wam bench: error: --suite must be one of plan, attention") and "'speed'" in err


def test_outside_a_clone_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_command, "__file__", str(tmp_path / "site-packages/wam_models/cli/bench.py"))
    assert cli.main(["bench"]) == 2
    assert "clone of the repository" in capsys.readouterr().err


@pytest.mark.parametrize("flags, kept", [((), True), (("--quick",), False), (("--no-record",), False)])
def test_rows_are_kept_or_not(flags, kept, tmp_path, monkeypatch, capsys):
    def run_module(module, command):
        return run.Outcome(module, 1.0, 0, [{"file": "plan.jsonl", "arm": "plan cold", "ms": 2.0}])

    monkeypatch.setattr(run, "run_module", run_module)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    assert run.run(parsed("--suite", "plan", *flags)) == 0
    path = tmp_path / "results" / "plan.jsonl"
    assert path.is_file() == kept
    if kept:
        assert json.loads(path.read_text()) == {"arm": "plan cold", "ms": 2.0}
    assert "plan cold" in capsys.readouterr().out


def test_a_part_that_fails_is_said_and_sets_the_exit_code(monkeypatch, capsys):
    monkeypatch.setitem(run.SUITES, "plan", ("bench_plan", "no_such_part"))
    monkeypatch.setattr(run, "arguments", lambda module, args: ["-m", f"bench.{module}", "--help"])
    assert run.run(parsed("--suite", "plan", "--quick")) == 1
    out = capsys.readouterr().out
    assert "bench_plan: ok" in out and "no_such_part: FAILED with exit code 1" in out
