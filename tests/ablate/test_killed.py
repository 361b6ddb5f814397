"""kill -9 of a running command, in one phase after another: what was being made is lost, and nothing lives on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ablate.test_ablate import EXAMPLES, ROOT, tiny
from wam_models.ablate.run import collect, run_all
from wam_models.ablate.units import is_done, units
from wam_models.simulator.record import RecordConfig, record

pytestmark = pytest.mark.slow
POINT = "point_simulator:Point"
PATIENCE = 300  # seconds, of a hang alone


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "point_simulator.py").write_text((EXAMPLES / "point_simulator.py").read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*arguments):
    """``wam`` in a session of its own, whose number is that of its process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "wam_models", *map(str, arguments)]
    return subprocess.Popen(command, start_new_session=True, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(what, process=None):
    began = time.monotonic()
    while not (found := what()):
        assert time.monotonic() < began + PATIENCE
        assert process is None or process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    return found


def in_session(number):
    """Processes of a session that have not ended."""
    states = (path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat"))
    return [state for state in states if state[3] == str(number) and state[0] != "Z"]


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    began = time.monotonic()
    wait_for(lambda: not in_session(process.pid))
    assert time.monotonic() < began + 10  # none of its workers went on with an arm


def test_ablate(folder, capsys):
    """Two processes, killed while they record, train, evaluate and after an arm; then killed workers alone."""
    (folder / "protocol.json").write_text(json.dumps(tiny().to_dict()))
    out = folder / "run"
    command = "ablate", "--protocol", "protocol.json", "--track", "both", "--processes", 2, "--out", "run"
    arm = [unit for unit in units(tiny()) if not unit.arm.startswith("sanity")]

    def half_done():
        """An arm that is trained and not evaluated, or not as a whole."""
        return any((unit.folder(out) / "train.json").exists() and not is_done(out, unit) for unit in arm)

    phases = {
        "recording": lambda: any(out.glob("state/data.attempts/*/*.npz")) and not (out / "state/data").exists(),
        "training": lambda: any(unit.folder(out).exists() and not is_done(out, unit) for unit in arm),
        "evaluating": half_done,
        "between": lambda: (out / "rows.jsonl").exists() and any(is_done(out, unit) for unit in arm),
    }
    done = set()
    for phase, reached in phases.items():
        process = start(*command)
        wait_for(reached, process)
        kill(process)
        now = {unit for unit in units(tiny()) if (out / "protocol.json").exists() and is_done(out, unit)}
        assert done <= now, phase
        done = now
    assert done and len(done) < len(units(tiny()))
    held = {path: path.read_bytes() for unit in done for path in unit.folder(out).glob("*.json*")}

    process = start(*command)  # a worker that is killed, as the system does where memory runs out
    wait_for(lambda: len(done) < sum(is_done(out, unit) for unit in units(tiny())), process)
    workers = [pid for pid in children(process.pid) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(workers[0], signal.SIGKILL)
    error = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 2 and "--processes 2: a process with an arm was killed" in error, error

    run_all(out, tiny(), say=lambda line: None)
    assert all(path.read_bytes() == content for path, content in held.items())
    run_all(folder / "whole", tiny(), say=lambda line: None)
    assert collect(out)[0] == collect(folder / "whole")[0]
    assert not list(out.rglob("*.attempts")) and not list(out.rglob("*.part"))


def children(pid):
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def test_record(folder):
    config = RecordConfig(episodes=40)
    command = "record", "--simulator", POINT, "--episodes", 40, "--jobs", 2, "--out", "again"
    attempts = folder / "again.attempts"
    for count in (1, 20):
        process = start(*command)
        wait_for(lambda count=count: len(list(attempts.glob("*/[0-9]*.npz"))) >= count, process)
        kill(process)
        assert not (folder / "again").exists()
    process = start(*command)
    assert process.wait(PATIENCE) == 0, process.communicate()[1]
    record(folder / "whole", [POINT], config, jobs=1)
    assert contents(folder / "again") == contents(folder / "whole")
    assert not attempts.exists()


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
