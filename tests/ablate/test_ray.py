"""``wam ablate --ray`` on a cluster of this machine: rows as without it, and a worker that dies costs its arm."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ablate.test_ablate import EXAMPLES, ROOT, tiny
from wam_models import cli
from wam_models.ablate.run import collect, run_all
from wam_models.ablate.units import is_done, units

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "point_simulator.py").write_text((EXAMPLES / "point_simulator.py").read_text())
    (tmp_path / "protocol.json").write_text(json.dumps(tiny().to_dict()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cluster(folder):
    """Address of a cluster with two CPUs, and no other machine than this one."""
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={port}"]
    command += ["--disable-usage-stats", "--include-dashboard=false", "--object-store-memory=100000000"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True) as head:
        assert head.stdout is not None
        address, printed = None, []
        for line in head.stdout:
            printed.append(line)
            if found := re.search(rf"([\w.]+:{port})", line):
                address = found[1]
            if "--block" in line:
                break
        assert address is not None, "".join(printed)
        try:
            yield address
        finally:
            os.killpg(head.pid, signal.SIGKILL)
            head.communicate()


def workers():
    """Processes of this machine that make an arm for Ray, which names them so."""
    names = ((int(path.parent.name), path.read_bytes()) for path in Path("/proc").glob("[0-9]*/cmdline"))
    return [number for number, name in names if name.startswith(b"ray::_call")]


def test_rows_on_a_cluster_are_the_same(cluster, folder, capfd):
    command = ["ablate", "--protocol", "protocol.json", "--ray", cluster, "--out", "run"]
    killed = []

    def kill_one():
        if not killed and (found := workers()):
            killed.append(found[0])
            os.kill(found[0], signal.SIGKILL)

    with pytest.raises(ChildProcessError, match="arms are missing, which the same command makes: state "):
        run_all(folder / "run", tiny(), ray=cluster, after=kill_one, say=lambda line: None)
    missing = [unit for unit in units(tiny()) if not is_done(folder / "run", unit)]
    assert killed and 0 < len(missing) < len(units(tiny()))
    assert cli.main(command) == 0, capfd.readouterr().err
    run_all(folder / "whole", tiny(), say=lambda line: None)
    assert collect(folder / "run")[0] == collect(folder / "whole")[0]

    assert cli.main([*command[:-1], "gpu", "--device", "cuda"]) == 2
    assert "an arm needs one GPU, and the cluster has 0" in capfd.readouterr().err
    assert cli.main([*command[:-1], "gpu", "--device", "cuda:0"]) == 2
    assert "--device must be cpu or cuda with --ray" in capfd.readouterr().err


def test_no_cluster(folder, capfd):
    pytest.importorskip("ray")
    for address in ("127.0.0.1:1", "127.0.0.1", "auto"):
        assert cli.main(["ablate", "--protocol", "protocol.json", "--ray", address, "--out", "run"]) == 2
        assert f"--ray {address}: no cluster there" in capfd.readouterr().err
