"""``wam bench``: every suite exists and takes the flags it is given; rows are kept when they should be."""

import argparse
import json

import pytest

from bench import cli, run
from bench.registry import GROUPS, SUITES
from bench.suites.__main__ import main as run_one
from bench.suites.__main__ import make_parser
from wam_models import cli as wam
from wam_models.cli import bench as bench_command


def parsed(*flags: str) -> argparse.Namespace:
    return cli.make_parser().parse_args(flags)


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_takes_its_flags(suite):
    _, package, name, *flags = run.arguments(suite, parsed("--quick", "--device", "cpu", "--seed", "7"))
    args = make_parser(SUITES[name]).parse_args(flags)
    assert (package, name) == ("bench.suites", suite) and (args.quick, args.device, args.seed) == (True, "cpu", 7)


@pytest.mark.parametrize("argv", [[], ["speed"], ["openwam", "--device", "cuda"]])
def test_what_a_suite_does_not_take_is_refused(argv, capsys):
    with pytest.raises(SystemExit):
        run_one(argv)


def test_an_unknown_group_is_one_line(capsys):
    assert cli.main(["--suite", "speed"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"wam bench: error: --suite must be one of {', '.join(GROUPS)}") and "'speed'" in err


def test_wam_bench_is_a_process_of_its_own(capfd):
    """With its flags, its messages and its exit code."""
    assert wam.main(["bench", "run", "--quick", "--suite", "speed"]) == 2
    assert capfd.readouterr().err.startswith("wam bench: error: --suite must be one of ")
    assert wam.main(["bench", "--fast"]) == 2
    assert capfd.readouterr().err == ("wam bench: error: unrecognized arguments: --fast; see wam bench --help\n")
    assert wam.main(["bench", "--help"]) == 0
    assert "--base REF" in capfd.readouterr().out


def test_outside_a_clone_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_command, "__file__", str(tmp_path / "site-packages/wam_models/cli/bench.py"))
    assert wam.main(["bench"]) == 2
    assert "clone of the repository" in capsys.readouterr().err


@pytest.mark.parametrize("flags, kept", [((), True), (("--quick",), False), (("--no-record",), False)])
def test_rows_are_kept_or_not(flags, kept, tmp_path, monkeypatch, capsys):
    def run_suite(suite, command):
        return run.Outcome(suite, 1.0, 0, [{"provider": "plan cold", "ms": 2.0}])

    monkeypatch.setattr(run, "run_suite", run_suite)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    assert run.run(parsed("--suite", "plan", *flags)) == 0
    path = tmp_path / "results" / "plan.jsonl"
    assert path.is_file() == kept
    if kept:
        assert json.loads(path.read_text()) == {"arm": "plan cold", "ms": 2.0}
    assert "plan cold" in capsys.readouterr().out


def test_a_suite_that_fails_is_named_and_sets_the_exit_code(monkeypatch, capsys):
    monkeypatch.setitem(run.GROUPS, "plan", ["plan", "no_such_suite"])
    monkeypatch.setattr(run, "arguments", lambda suite, args: ["-m", "bench.suites", suite, "--help"])
    assert run.run(parsed("--suite", "plan", "--quick")) == 1
    out = capsys.readouterr().out
    assert "plan: ok" in out and "no_such_suite: FAILED with exit code 1" in out
