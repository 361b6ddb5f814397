"""The command line: one line and exit code 2 for whatever a user gets wrong, and what `wam doctor` says."""

import dataclasses
import io
import json
import subprocess
import sys
import types

import pytest

import wam_kernels
from wam_kernels.ops import OPS
from wam_models import cli, doctor


def wam(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "wam_models.cli", *args], capture_output=True, text=True)


@pytest.mark.parametrize("command", [(), *((name,) for name in cli.COMMANDS)], ids=lambda c: " ".join(c) or "none")
def test_help(command, capfd):
    try:
        code = cli.main([*command, "--help"])
    except SystemExit as stopped:
        code = stopped.code
    out = capfd.readouterr().out
    assert code == 0
    assert out.startswith("usage: wam") and (command or all(name in out for name in cli.COMMANDS))


def test_help_loads_no_torch():
    loaded = "import sys; from wam_models import cli; cli.make_parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    "args, message",
    [
        ("", "wam: error: the following arguments are required: COMMAND; see wam --help"),
        ("dance", "wam: error: argument COMMAND: invalid choice: 'dance'"),
        ("doctor --fast", "wam doctor: error: unrecognized arguments: --fast; see wam doctor --help"),
        ("mask --frames many", "wam mask: error: argument --frames: must be a whole number, got 'many'; see wam mask"),
        ("mask --chunk-size 0", "wam mask: error: argument --chunk-size: must be at least 1, got 0"),
        ("demo --seed 99999999999999999999", "wam demo: error: argument --seed: must be at most 9223372036854775807"),
        ("mask --chunk 4", "wam mask: error: unrecognized arguments: --chunk 4; see wam mask --help"),
        ("demo --seconds -1", "wam demo: error: argument --seconds: must be a positive number of seconds, got -1"),
        ("demo --seconds nan", "wam demo: error: argument --seconds: must be a positive number of seconds, got nan"),
        ("rollout --data x", "wam rollout: error: the following arguments are required: --checkpoint"),
    ],
)
def test_a_bad_flag_is_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(args.split())
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(message) and err.count("\n") == 1


def test_version_and_python_m():
    done = subprocess.run([sys.executable, "-m", "wam_models", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"wam-kernels {wam_kernels.__version__}\n", "")


def raise_from_open():
    open("no/such/file")


def raise_from_json():
    json.loads("{steps: 3}")


def raise_from_import():
    import no_such_package  # noqa: F401


def raise_user_error():
    raise cli.UserError("config field 'steps' must be at least 1,\n got 0")


def raise_from_a_diverged_training():
    raise FloatingPointError("the loss of step 1 is nan")


@pytest.mark.parametrize(
    "fault, message",
    [
        (raise_from_a_diverged_training, "the loss of step 1 is nan"),
        (raise_from_open, "no/such/file: No such file or directory"),
        (raise_from_json, "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (
            raise_from_import,
            "the Python package 'no_such_package' is not installed; pip install it, or 'wam-kernels[models]'",
        ),
        (raise_user_error, "config field 'steps' must be at least 1, got 0"),
    ],
)
def test_a_user_error_in_a_command_is_one_line(fault, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, doctor.__name__, types.SimpleNamespace(run=lambda args: fault()))
    assert cli.main(["doctor"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"wam doctor: error: {message}") and err.count("\n") == 1
    monkeypatch.setenv("WAM_TRACEBACK", "1")
    with pytest.raises((cli.UserError, ValueError, OSError, ImportError, FloatingPointError)):
        cli.main(["doctor"])


def test_characters_that_the_terminal_does_not_have(monkeypatch):
    """Of an instruction, or of a path that is not UTF-8: the work was done, and what it says comes through."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setitem(
        sys.modules, doctor.__name__, types.SimpleNamespace(run=lambda args: print("\u673a \ud83e \udcff"))
    )
    assert cli.main(["doctor"]) == 0
    out.flush()
    assert out.buffer.getvalue() == b"\\u673a \\ud83e \\udcff\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(sys.modules, doctor.__name__, types.SimpleNamespace(run=lambda args: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_doctor_runs():
    done = wam("doctor")
    assert done.returncode == 0 and done.stderr == ""
    for word in ("python", "torch", "triton", "nvcc", "driver", "wam_kernels._C", "threads"):
        assert word in done.stdout


BARE = doctor.Machine(
    versions={"wam-kernels": "0.1.0", "torch": "2.13.0", "triton": None, "numpy": "2.4.6"},
    gpus=(),
    driver=None,
    nvcc=None,
    extension_error="not built",
    architectures=("80", "90a"),
    interpreted=False,
    cpu="a CPU",
    cpu_cores=2,
    cpu_threads=2,
    vector_isa="AVX2",
    load=0.1,
    results=None,
)
H100 = doctor.GPU("NVIDIA H100", (9, 0), 79.6)
A100 = doctor.GPU("NVIDIA A100", (8, 0), 79.6)
T4 = doctor.GPU("Tesla T4", (7, 5), 15.6)
WITH_TRITON = BARE.versions | {"triton": "3.7.1"}


@pytest.mark.parametrize(
    "change, op, impl, missing",
    [
        ({}, "block_attention", "reference", None),
        ({}, "block_attention", "cpu", None),
        ({}, "block_attention", "triton", "triton is not installed"),
        ({"versions": WITH_TRITON}, "block_attention", "triton", "no CUDA device"),
        ({"versions": WITH_TRITON, "interpreted": True}, "block_attention", "triton", None),
        ({"versions": WITH_TRITON, "gpus": (A100,)}, "block_attention", "triton", None),
        ({}, "ada_layer_norm", "cuda", "wam_kernels._C does not load, see above"),
        (
            {"extension_error": None},
            "ada_layer_norm",
            "cuda",
            "capability 8.x, 9.0, 10.x or 12.x, found no CUDA device",
        ),
        ({"extension_error": None, "gpus": (A100,)}, "ada_layer_norm", "cuda", None),
        ({"extension_error": None, "gpus": (T4,)}, "ada_layer_norm", "cuda", "sm_80, sm_90a; Tesla T4 is sm_75; use"),
        ({"extension_error": None}, "block_attention", "cuda", "capability 9.0, found no CUDA device"),
        ({"extension_error": None, "gpus": (A100,)}, "block_attention", "cuda", "sm_90; NVIDIA A100 is sm_80; use"),
        ({"extension_error": None, "gpus": (A100, H100)}, "block_attention", "cuda", None),
        ({"extension_error": None, "gpus": (H100,)}, "ada_layer_norm", "cuda", None),
    ],
)
def test_doctor_says_why_a_backend_is_missing(change, op, impl, missing):
    machine = dataclasses.replace(BARE, **change)
    found = doctor.missing(OPS[op].backends[impl], machine)
    assert found is None if missing is None else missing in found
    (row,) = (line for line in doctor.report(machine).splitlines() if line.split()[:2] == [op, impl])
    assert "no bench/results here" in doctor.report(machine)
    assert row.split()[2] == ("yes" if missing is None else "no")


@pytest.mark.parametrize(
    "gpus, row",
    [
        ((), "h100, 989 TFLOP/s"),
        ((doctor.GPU("NVIDIA H200", (9, 0), 139.8),), "h200, 989 TFLOP/s in bf16, 4.80 TB/s"),
        ((doctor.GPU("NVIDIA B300", (10, 3), 270.0),), "none is of this GPU; give --device-model, one of h100, h200"),
    ],
)
def test_doctor_names_the_device_model_of_estimates(gpus, row):
    (line,) = (row for row in doctor.report(dataclasses.replace(BARE, gpus=gpus)).splitlines() if "device model" in row)
    assert row in line and ("there is no GPU here" in line) == (not gpus)


def test_doctor_counts_the_rows_of_this_device(tmp_path):
    """Of every op and device: what was measured there, what was predicted, and how to get more."""
    rows = [{"device": "a CPU", "date": "2026-11-20T08:00:00Z"}, {"device": "a CPU", "date": "2026-11-21T08:00:00Z"}]
    lines = map(json.dumps, [*rows, {"device": "another", "date": "2026-11-25T08:00:00Z"}])
    (tmp_path / "adaln.jsonl").write_text("\n".join(lines) + "\n")
    predicted = {"device": "another", "date": "2026-11-26T08:00:00Z", "predicted": True, "op": "block_attention"}
    (tmp_path / "static.jsonl").write_text(json.dumps(predicted) + "\n")
    machine = dataclasses.replace(BARE, results=tmp_path, gpus=(H100,))
    found = {row[:2]: row[2:] for row in doctor.recorded(machine, tmp_path)[1:]}
    assert len(found) == 2 * len(OPS)
    newest, command = "2, newest 2026-11-21", "python -m bench.suites adaln --device cpu"
    assert found["ada_layer_norm", "a CPU"] == (newest, "none", command)
    assert found["block_attention", "NVIDIA H100"][:2] == ("none", "1, newest 2026-11-26")
    assert found["block_attention", "a CPU"][:2] == ("none", "none")
    assert newest in doctor.report(machine) and "tools/gpu/gpu.sh" in doctor.report(machine)


def test_doctor_warns_of_a_crowded_machine():
    assert "warning" not in doctor.report(BARE)
    assert "warning" not in doctor.report(dataclasses.replace(BARE, cpu_threads=1, load=1.0))
    assert "OMP_NUM_THREADS=1" in doctor.report(dataclasses.replace(BARE, load=1.0))


def test_demo_without_its_data(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)  # an installed package has none
    assert cli.main(["demo"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "--data" in err and "clone" in err
