"""``torchrun -m wam_models train``: killed, stopped, resumed on other numbers of processes, exported."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.conftest import TINY
from wam_models import cli, load_checkpoint

PATIENCE = 900  # seconds, of a hang alone
pytestmark = pytest.mark.slow


def launched(folder, *flags):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with open(folder / "output", "ab") as output:
        return subprocess.Popen(
            [*run, "-m", "wam_models", "train", *map(str, flags)], env=environment, stdout=output, stderr=output
        )


def workers_of(launcher):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == launcher.pid:
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            pass
    return found


def rows(out):
    log = out / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for(launcher, done, folder):
    end = time.monotonic() + PATIENCE
    while not done():
        assert launcher.poll() is None and time.monotonic() < end, (folder / "output").read_text()[-3000:]
        time.sleep(0.2)


def test_a_run_of_two_processes_is_killed_stopped_and_resumed(root, tmp_path):
    config, out = tmp_path / "config.json", tmp_path / "run"
    config.write_text(json.dumps(TINY | {"steps": 10_000, "save_every": 2}))
    checkpoint = out / "checkpoint"
    launcher = launched(tmp_path, config, "--data", root, "--out", out)
    wait_for(launcher, lambda: rows(out) >= 5 and (checkpoint / "config.json").exists(), tmp_path)
    for process in (launcher.pid, *workers_of(launcher)):
        os.kill(process, signal.SIGKILL)
    launcher.wait(PATIENCE)
    killed = load_checkpoint(checkpoint).training_state.values["step"]
    assert killed >= 2 and killed % 2 == 0

    before = rows(out)  # some are of steps behind the checkpoint, which come again
    launcher = launched(tmp_path, "--data", root, "--out", out, "--resume", checkpoint)
    wait_for(launcher, lambda: rows(out) >= before + 2, tmp_path)
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(PATIENCE)
    stopped = load_checkpoint(checkpoint).training_state.values["step"]
    logged = [json.loads(line)["step"] for line in (out / "log.jsonl").open()]
    assert stopped >= before + 2 and logged == list(range(1, stopped + 1))

    resume = ["train", "--data", str(root), "--out", str(out), "--resume", str(checkpoint)]
    assert cli.main([*resume, "--steps", str(stopped + 1)]) == 0
    assert load_checkpoint(checkpoint).training_state.values["step"] == stopped + 1
    assert (
        cli.main(["export", "--checkpoint", str(checkpoint), "--layout", "openwam", "--out", str(tmp_path / "out")])
        == 0
    )
    assert list((tmp_path / "out").glob("*.safetensors*"))
