"""``wam bench report`` on rows that were made for it: the newest of each kind, Markdown, pictures."""

import json

import pytest

from bench import registry
from bench.report import page
from bench.report import rows as report
from bench.rows import RESULTS

CPU = {"device": "Some CPU", "threads": 2, "torch": "2.13.0", "commit": "abc", "date": "2026-11-21T10:00:00Z"}
SHAPE = {"heads": 8, "D": 64, "dtype": "torch.float32", "density": 0.25, "GFLOP/s_visible": 40.0}
SECTIONS = registry.sections()
LIMITS = {"copy_GB/s": 6.0, "bf16_GFLOP/s": 1.0, "float32_GFLOP/s": 60.0}


def attention(provider: str, ms: float, tokens: int = 2448, what: str = "forward", **more) -> dict:
    return CPU | SHAPE | {"arm": provider, "ms": ms, "tokens": tokens, "what": what} | more


@pytest.fixture
def results(tmp_path):
    rows = {
        "block_attention": [
            attention("sdpa_dense_mask", 140.0),  # from before workloads had names
            attention("wam", 90.0),
            *(attention("sdpa_dense_mask", 150.0, n, workload=report.LIBERO, **LIMITS) for n in (2448, 4896)),
            *(attention("wam", 75.0, n, workload=report.LIBERO, **LIMITS) for n in (2448, 4896)),
            CPU | {"arm": "xformers", "error": "not run here: runs on cuda only", "where": ["forward"]},
        ],
        "plan": [CPU | {"workload": report.LIBERO, "tokens": n, "arm": "plan cold", "cpu_ms_min": 0.5, "ms": 2.0,
                        "tiles": 3, "plan_MB": 0.1} for n in (1000, 9000)],
        "adaln": [CPU | {"op": "ada_layer_norm", "tokens": 144, "D": 3072, "tokens_a_frame": 32, "what": "forward",
                         "arm": "wam", "ms": 1.0, "GB/s": 3.0, "%_of_copy": 50.0, "ratio": 2.0}],
        "streaming": [CPU | {"program": "joint", "arm": "wam", "chunk": c, "ms": 30.0 + c} for c in range(3)],
    }  # fmt: skip
    folder = tmp_path / "results"
    folder.mkdir()
    for name, of_file in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_file))
    return folder


def test_the_newest_row_stands(results):
    rows = report.select(report.load(results), file="block_attention", tokens=2448)
    assert {(r["provider"], r["ms"]) for r in rows} == {("sdpa_dense_mask", 150.0), ("wam", 75.0)}


def test_tables(results):
    text = page.tables(report.load(results), SECTIONS)
    assert "### Attention: Some CPU, 2 threads" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| libero joint c4 w64 | 2,448 | 0.25 |"))
    assert line.endswith("| 150 | 75 | 2.00x |")
    assert "| joint | 2 | 32 |" in text and "| libero joint c4 w64 | 9,000 | 0.5 | 0.1 |" in text
    for title in ("Plans", "adaLN ops", "Latency over an episode"):
        assert f"### {title}: Some CPU, 2 threads" in text
    assert "xformers" not in text


def test_every_option_and_number_of_candidates_has_a_line():
    options = [
        {"what": "option", "provider": "wam", "option": name, "ms": ms}
        for name, ms in (("full", 60.0), ("half the steps", 30.0))
    ]
    options += [
        {"what": "candidates", "provider": provider, "option": f"k = {k}", "ms": k, "held_MB": 2}
        for k in (1, 4)
        for provider in ("candidates", "on end", "episodes")
    ]
    text = SECTIONS["rollout_options"].render(options)
    for line in ("| full | 60 |", "| half the steps | 30 |", "| k = 1 | 1 | 2 |", "| k = 4 | 4 | 2 | 4 | 2 | 4 | 2 |"):
        assert line in text, text


def test_figures(results, tmp_path):
    pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib, which is not installed")
    written = page.draw(report.load(results), SECTIONS, tmp_path / "figures")
    assert {path.name.partition("-")[0] for path in written} == {
        name for section in SECTIONS.values() for name in section.figures
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_predicted_rows_are_in_no_figure_of_measurements():
    predicted = {"file": "static", "op": "adaln", "what": "forward", "provider": "cuda", "%_of_copy": 80.0}
    assert all(figure([predicted], "here") is None for figure in SECTIONS["norm_peers"].figures.values())


def test_the_committed_rows_render(tmp_path):
    rows = report.load(RESULTS)
    text = page.tables(rows, SECTIONS)
    assert "### Attention" in text
    assert "| half the steps, UniPC | 4 |" in text and "| k = 16 |" in text
    assert "| e80e228 | test_frame_index_cold |" in text and "| e80e228 | test_cached_attention |" in text


def test_nothing_to_report(tmp_path):
    pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib, which is not installed")
    with pytest.raises(ValueError, match="has no rows; make some with `wam bench`"):
        page.run(SECTIONS, tmp_path, tmp_path)
