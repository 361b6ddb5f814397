"""`wam bench tune` as far as a CPU can tell: who wins, who is refused, and that without a GPU it says so."""

import time
from dataclasses import dataclass

import pytest
import torch

from bench import cli, tune
from wam_kernels.runtime import tuning


@dataclass(frozen=True)
class Options:
    num_warps: int


@pytest.fixture
def case(monkeypatch):
    monkeypatch.setattr(tuning, "TUNABLE", {})
    options = tuning.tuned("some_op")(lambda: Options(num_warps=4))

    def call():
        warps = options().num_warps
        if warps > 8:
            raise RuntimeError("out of resource: shared memory")
        time.sleep({1: 0.002, 2: 0.006, 4: 0.012, 8: 0.012}[warps])
        return (torch.full((4,), 2.0 if warps == 1 else 1.0),)

    return tune.Case("D=64", call)


def candidates(*warps: int) -> list[dict]:
    return [{"num_warps": w} for w in warps]


def test_the_fastest_right_one_wins(case):
    entry = tune.tune_case("some_op", candidates(1, 2, 4, 16), case, "cpu", 3)
    assert entry["choice"] == {"num_warps": 2} and entry["ms"] < entry["default_ms"]
    wrong, failed = entry["refused"]['{"num_warps": 1}'], entry["refused"]['{"num_warps": 16}']
    assert "is wrong" in wrong and "out of resource" in failed


def test_the_default_stays_where_nothing_is_clearly_faster(case):
    entry = tune.tune_case("some_op", candidates(16), case, "cpu", 3)
    assert entry["choice"] is None and entry["ms"] == entry["default_ms"]


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 2
    assert "wam bench tune needs a CUDA device" in capsys.readouterr().err


def test_every_target_is_tunable_and_takes_its_candidates():
    assert set(tune.TARGETS) == set(tuning.TUNABLE)
    arguments = {"D": 64, "itemsize": 2, "rows": 64, "heads": 24, "head_dim": 128, "long_window": True}
    for op, (candidates, _) in tune.TARGETS.items():
        function = tuning.TUNABLE[op]
        names = function.__wrapped__.__code__.co_varnames[: function.__wrapped__.__code__.co_argcount]
        for choice in candidates:
            with tuning.trying(op, choice):
                got = function(**{name: arguments[name] for name in names})
            fields = choice if isinstance(choice, dict) else {}
            assert all(getattr(got, name) == value for name, value in fields.items()) and (fields or got == choice)
