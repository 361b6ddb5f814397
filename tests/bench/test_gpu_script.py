"""tools/gpu/gpu.sh as far as a machine without a GPU can tell: all that it names exists, and the check would notice."""

import os
import subprocess
import sys
import tarfile

import pytest

from tools.gpu import dry_run

SCRIPT = dry_run.ROOT / "tools" / "gpu" / "gpu.sh"


def script(*args: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(["bash", SCRIPT, *args], capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def parts() -> list[str]:
    return script("--list").stdout.split()


# not on the machine that is lent; whatever is imported there must do without
ABSENT = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {"av", "diffusers", "openwam"}:
            raise ModuleNotFoundError(f"No module named {name!r}, as on a GPU machine", name=name)

sys.meta_path.insert(0, Absent())
"""


def test_dry_run(parts, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(ABSENT)
    done = script("--dry-run", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert [line for line in lines if "WRONG" in line] == []
    assert {line.partition(":")[0] for line in lines if ": ok" in line} == set(parts)


@pytest.mark.parametrize(
    "command, message",
    [
        ("python3 -m pytest -q tests/gpu/test_nothing.py", "no file tests/gpu/test_nothing.py"),
        ("python3 -m pytest -q tests/masks/test_visibility.py -k no_such_test", "pytest collects nothing"),
        ("python3 -m bench.suites no_such_suite", "no suite no_such_suite"),
        ("python3 -m bench --suite speed", "--suite must be one of"),
        ("python3 -m bench --fast", "is refused, exit code 2"),
        ("no-such-program --version", "no program 'no-such-program'"),
    ],
)
def test_the_check_notices(command, message, capsys):
    assert dry_run.main([f"part\t{command}\n"]) == 1
    assert message in capsys.readouterr().out


def test_an_unknown_part_is_refused(parts):
    done = script("everything")
    assert done.returncode == 2 and "everything must be one of: " + " ".join(parts) in done.stderr


def test_it_goes_on_after_what_is_done(parts, tmp_path):
    """A copy of the script with harmless parts: one fails, and the second run repeats that one alone."""
    text = SCRIPT.read_text()
    head, _, rest = text.partition("# ---- parts")
    machinery = rest.partition("# ---- machinery ----")[2]
    head = head[: head.index("# Group, suite")] + "SUITES=()\nPARTS=(one two three)\n"
    fake = "one() { run 5 echo first; }\ntwo() { run 5 test -e here; }\nthree() { run 5 echo last; }\n"
    copy = tmp_path / "tools" / "gpu" / "gpu.sh"
    copy.parent.mkdir(parents=True)
    copy.write_text(head + fake + machinery)

    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (results / "plan.jsonl").write_text("{}\n")

    def run(*args: str) -> subprocess.CompletedProcess:
        env = os.environ | {"WAM_BENCH_COMMIT": "abc", "GPU_SECONDS": "60", "OUT": str(tmp_path / "out")}
        return subprocess.run(["bash", copy, *args], capture_output=True, text=True, env=env)

    first = run()
    assert first.returncode == 1 and "first" in first.stdout and "last" in first.stdout
    assert "one: ok" in first.stdout and "two: FAILED with 1" in first.stdout and "three: ok" in first.stdout
    assert "left: tools/gpu/gpu.sh two\n" in first.stdout
    assert (tmp_path / "out" / "gpu.log").read_text() == first.stdout
    with tarfile.open(tmp_path / "out" / "results.tgz") as kept:
        assert "bench/results/plan.jsonl" in kept.getnames()
    (tmp_path / "here").touch()
    second = run()
    assert second.returncode == 0 and "left:" not in second.stdout
    assert "one: done before" in second.stdout and "two: ok" in second.stdout
    assert "echo last" not in second.stdout
    assert "echo last" in run("three").stdout  # named parts run again
