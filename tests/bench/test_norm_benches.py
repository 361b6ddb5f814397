"""The benches of the norm ops: rows that the report reads, and no speed for a wrong answer."""

import pytest
import torch

from bench import harness, registry
from bench.report import page
from bench.suites import adaln as adaln_suite
from bench.suites import norm_peers as norm_peers_suite
from bench.suites import qk_norm_rope as qk_norm_rope_suite

OPTIONS = harness.Options(device="cpu", quick=True, seed=0)


def adaln(op: str = "gate_residual_ada_layer_norm", compiles: bool = False) -> list[dict]:
    return list(adaln_suite.bench(op, 40, 64, 32, OPTIONS, 2, compiles))


def qk(compiles: bool = False) -> list[dict]:
    return list(qk_norm_rope_suite.bench(40, 2, 32, OPTIONS, 2, compiles))


def peers() -> list[dict]:
    return list(norm_peers_suite.bench("qk_norm_rope", 40, 24 * 8, OPTIONS, 2))


@pytest.mark.parametrize(
    "make, file, providers",
    [
        (lambda: adaln("ada_layer_norm"), "adaln", {"eager", "wam"}),
        (adaln, "adaln", {"eager", "wam"}),
        (qk, "qk_norm_rope", {"eager", "wam cpu"}),
        (peers, "norm_peers", {"torch", "wam"}),
    ],
)
def test_rows_have_what_the_report_shows(make, file, providers):
    rows = [row for row in make() if "error" not in row]
    assert {row["provider"] for row in rows} == providers and len({row["what"] for row in rows}) == 2
    environment = {**harness.environment("cpu"), "file": file, "where": "here", **harness.ceilings("cpu")}
    shown = page.tables([environment | row for row in rows], registry.sections())
    header = next(line for line in shown.splitlines() if line.startswith("|"))
    for column in ("what", "tokens", "D", "provider", "ms", "%_of_copy", "ratio"):
        assert f" {column} " in header
    # a busy moment can make so small a call slower than a hundredth of a percent of a copy
    assert all(row["%_of_copy"] >= 0 and row["MB"] > 0 and row["ms_min"] <= row["ms"] <= row["ms_p95"] for row in rows)


def slightly_off(fn):
    return lambda *args, **kwargs: tuple(t * 1.001 for t in fn(*args, **kwargs))


def test_a_wrong_op_has_no_speed(monkeypatch):
    for module, op, make in (
        (adaln_suite, "gate_residual_ada_layer_norm", adaln),
        (qk_norm_rope_suite, "qk_norm_rope", qk),
        (norm_peers_suite, "qk_norm_rope", peers),
    ):
        monkeypatch.setattr(module, op, slightly_off(getattr(module, op)))
        with pytest.raises(RuntimeError, match="output or gradient 0 of wam.* is wrong"):
            make()


class OnlyTheGradientIsWrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.001 * gradient


def test_a_wrong_peer_is_listed_with_its_error(monkeypatch):
    """Also one that is wrong in its gradients alone; the others keep their rows."""

    def compiled(fn, **_):
        return lambda *args: tuple(OnlyTheGradientIsWrong.apply(t) for t in fn(*args))

    monkeypatch.setattr(torch, "compile", compiled)
    for rows, name in ((adaln(compiles=True), "compile"), (qk(compiles=True), "torch.compile")):
        (failed,) = (row for row in rows if "error" in row)
        assert failed["provider"] == name and "is wrong: relative error 1.00e-03" in failed["error"] and failed["where"]
        assert len([row for row in rows if "error" not in row]) == 4


def test_compulsory_bytes_are_rows_read_and_written_once():
    def count(op: str, backward: bool) -> int:
        return adaln_suite.compulsory_bytes(op, S=100, D=8, frames=4, itemsize=2, backward=backward)

    row, modulation = 100 * 8 * 2, 4 * 8 * 4
    assert count("ada_layer_norm", False) == 2 * row + 2 * modulation
    assert count("ada_layer_norm", True) == 5 * row + 5 * modulation
    assert count("gate_residual_ada_layer_norm", False) == 4 * row + 3 * modulation
    assert count("gate_residual_ada_layer_norm", True) == 10 * row + 8 * modulation
