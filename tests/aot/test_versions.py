"""The kernels compiled for other GPUs than Hopper, and the table of `make test-triton`."""

import pytest

from bench.static.launches import EVERY, adaln_forward
from tests.aot.compile import resources
from tests.aot.versions import CAPABILITIES, compile_here, main, table


@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if c != 90])
def test_a_kernel_of_rows_compiles_for_every_gpu(capability):
    found = resources(adaln_forward(576, "bf16"), capability)
    assert found.stack_bytes == 0 and found.registers <= 255


@pytest.mark.slow
@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if c != 90])
def test_every_op_compiles_for_every_gpu(capability):
    names = [name for name in EVERY if not name.startswith("block_attention") or "bf16" in name]
    rows = [row for name in names for row in compile_here("installed", capability, name)]
    assert [row for row in rows if "error" in row] == [] and len(rows) == len(names)


def test_the_table_has_every_kernel_version_and_gpu():
    row = {"kernel": "a", "version": "3.3.1", "capability": 90, "registers": 40, "stack": 0, "shared": 8}
    rows = [row, row | {"capability": 80, "stack": 16}, row | {"version": "3.7.1", "capability": 80, "error": "E: no"}]
    assert table(rows).splitlines()[2:] == ["| a | 3.3.1 | 40 + 16 B | 40 |", "| a | 3.7.1 | - |  |"]


def test_a_failure_is_told_and_ends_in_1(monkeypatch, capsys):
    def broken():
        raise RuntimeError("no such instruction")

    monkeypatch.setitem(EVERY, "broken", broken)
    monkeypatch.setattr("tests.aot.versions.compile_under", lambda v, c, only, folder: list(compile_here(v, c, only)))
    assert main(["--versions", "3.3.1", "--capabilities", "90", "--only", "broken"]) == 1
    out, err = capsys.readouterr()
    assert "| broken | 3.3.1 | - |" in out and "RuntimeError: no such instruction" in err
