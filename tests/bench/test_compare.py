"""``wam bench --base``: two small trees without torch, one of which does twice the work in one case."""

import shutil
import subprocess

import pytest

from bench import cli
from bench.compare import trees

SUITE = """
import pytest


def work(benchmark, n):
    benchmark(lambda: sum(i * i for i in range(n)))


def test_yardstick(benchmark):
    work(benchmark, 20_000)


@pytest.mark.parametrize("op", ["same", "changed"])
def test_op(benchmark, op):
    work(benchmark, {SIZES}[op])


def test_fails_in_one(benchmark):
    assert not {FAILS}
    work(benchmark, 10)


def {ONLY}(benchmark):
    work(benchmark, 10)
"""


def tree(folder, changed: int, fails: bool, only: str):
    (folder / "bench" / "micro").mkdir(parents=True)
    suite = SUITE.replace("{SIZES}", str({"same": 20_000, "changed": changed}))
    suite = suite.replace("{FAILS}", str(fails)).replace("{ONLY}", only)
    (folder / "bench" / "micro" / "test_micro.py").write_text(suite)
    return folder


# counting takes a minute: Python starts slowly under valgrind
@pytest.mark.parametrize("count", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["time", "instructions"])
def test_twice_the_work_is_seen(count, tmp_path):
    base = tree(tmp_path / "base", 20_000, fails=True, only="test_old")
    this = tree(tmp_path / "this", 40_000, fails=False, only="test_new")
    if count and not all(map(shutil.which, ("valgrind", "cc"))):
        pytest.skip("valgrind or a C compiler is missing")
    found = trees.compare(base, this, rounds=8, count=count, progress=False)
    yardstick, same, changed = found.cases
    assert (same.name, changed.name) == ("test_op[same]", "test_op[changed]")
    assert 1.5 < changed.time_ratio < 2.7 and changed in found.slower
    assert yardstick.instructions is None and yardstick not in found.slower
    if count:
        assert abs(same.instruction_ratio - 1) < 0.001 and 1.9 < changed.instruction_ratio < 2.1
        assert found.slower == [changed] and "test_op[same]" in str(found)
    unmatched = [line.split(" in ")[0] for line in found.unmatched]
    assert unmatched == ["test_old is only", "test_new is only", "test_fails_in_one fails"]


def case(name: str, base: float, this: float, instructions=None) -> trees.Case:
    return trees.Case(name, ([base] * 8, [this] * 8), instructions)


def test_a_case_is_slower_beyond_the_noise_alone():
    cases = [case("test_yardstick", 1, 1.05), case("a", 1, 1.04), case("b", 1, 1.06), case("c", 1, 1.5, (100, 101))]
    cases.append(case("d", 1, 0.9, (100, 103)))
    row = trees.Comparison([case("a", 2, 3, (100, 90))], [], None).rows("main")[0]
    assert (row["case"], row["base"], row["instruction_ratio"], row["time_ratio"]) == ("a", "main", 0.9, 1.5)
    assert (row["base_ms_min"], row["ms_min"], row["spread"]) == (2000, 3000, 0)
    assert [c.name for c in trees.Comparison(cases, [], None).slower] == ["b", "d"]


def test_trees_that_cannot_be_measured(tmp_path, capsys):
    broken = tree(tmp_path / "broken", 1, fails=False, only="test_old")
    (broken / "bench" / "micro" / "conftest.py").write_text("import no_such_package")
    with pytest.raises(ValueError, match=r"broken (does not start|ended early).*no_such_package"):
        trees.compare(broken, broken, count=False, progress=False)
    assert cli.main(["--base", "no-such-ref"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("wam bench: error: --base must be a commit, branch or tag") and err.count("\n") == 1
    assert cli.main(["report", "--base", "HEAD"]) == 2


def test_a_commit_is_checked_out(tmp_path):
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=trees.ROOT, capture_output=True).returncode:
        pytest.skip("not a clone")
    assert (trees.checkout("HEAD", tmp_path) / "bench" / "micro" / "test_micro.py").is_file()
