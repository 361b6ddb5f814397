"""What every recorded number rests on: percentiles, turns, the refusal of wrong answers, rows that stay readable."""

import json

import pytest
import torch

from bench import harness, rows


def test_percentiles_order_and_least():
    p = harness.percentiles([float(n) for n in range(1, 102)])
    assert p == {"ms_p20": 21.0, "ms": 51.0, "ms_p80": 81.0, "ms_p95": 96.0, "ms_min": 1.0}
    assert set(harness.percentiles([7.0]).values()) == {7.0}


def test_calls_take_turns_after_one_warm_up_each():
    calls = []
    times = harness.measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, "cpu", 3)
    assert calls == ["a", "b"] * 4 and set(times) == {"a", "b"}


def test_rotated_inputs():
    inputs = []
    call = harness.rotated(lambda x, y: inputs.append((x, y)), [(1, 2), (3, 4)])
    for _ in range(3):
        call()
    assert inputs == [(1, 2), (3, 4), (1, 2)]


@pytest.mark.parametrize("wrong", [1.001, float("nan"), float("inf")])
def test_a_wrong_answer_has_no_speed(wrong):
    truth = torch.ones(4)
    harness.require_equal("out", truth * (1 + 1e-7), truth, 1e-5)
    with pytest.raises(RuntimeError, match="bench: out is wrong"):
        harness.require_equal("out", torch.tensor([1.0, 1.0, 1.0, wrong]), truth, 1e-5)


def test_record_appends_with_the_environment(tmp_path):
    for ms in (1.0, 2.0):
        harness.record("some", [{"provider": "wam", "ms": ms, "seed": 3}], "cpu", tmp_path)
    written = [json.loads(line) for line in (tmp_path / "some.jsonl").read_text().splitlines()]
    assert [row["ms"] for row in written] == [1.0, 2.0]
    for key in ("date", "commit", "device", "driver", "threads", "load", "torch", "python", "numpy", "peers", "seed"):
        assert key in written[0], key
    assert written[0]["torch"] == torch.__version__ and written[0]["device"]
    assert written[0]["arm"] == "wam" and rows.read(tmp_path / "some.jsonl")[0]["provider"] == "wam"


def test_table_keeps_blocks_and_lists_failures():
    shown = [
        {"provider": "wam", "ms": 1234.5678, "seed": 0, "copy_GB/s": 3.0},
        {"provider": "sdpa", "ms": 0.5, "seed": 0, "copy_GB/s": 3.0},
        {"provider": "xformers", "error": "not run here: runs on cuda only", "where": ["forward a", "forward b"]},
    ]
    lines = harness.table(shown).splitlines()
    assert lines[0].split() == ["provider", "ms"] and lines[1].split() == ["wam", "1,235"]
    assert lines[-1] == "no speed: xformers: not run here: runs on cuda only (2 cases, first: forward a)"


def test_committed_rows_are_readable():
    for path in rows.RESULTS.glob("*.jsonl"):
        for row in rows.read(path):
            assert {"date", "device", "provider"} <= row.keys() and not {*rows.RECORDED_AS.values()} & row.keys(), path
            names = "ms", "ms_min", "s_total", "seconds", "training_seconds", "tokens/s"
            times = [row[name] for name in names if name in row]
            not_timed = row.get("predicted") or row.get("counted") or {"published", "gap"} & row.keys()
            assert "error" in row or (not_timed and not times) or min(times) > 0, path


def test_ceilings_of_a_cpu():
    limits = harness.ceilings("cpu")
    assert set(limits) == {"copy_GB/s", "bf16_GFLOP/s", "float32_GFLOP/s"} and min(limits.values()) > 0
