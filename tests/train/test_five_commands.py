"""The page "from a LeRobot data set to a rollout in five commands", run as it stands on the data that ships."""

import re
import shlex
from pathlib import Path

import pytest

from wam_models import cli

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_five_commands_run(tmp_path, monkeypatch, capsys):
    commands = re.search(r"```sh\n(wam .*?)```", (ROOT / "docs/five_commands.md").read_text(), re.S)[1].splitlines()
    assert len(commands) == 5
    for name in ("recipes", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    printed = []
    for command in commands:
        program, *args = shlex.split(command)
        assert program == "wam" and cli.main(args) == 0, command
        printed.append(capsys.readouterr().out)
    assert "313 episodes" in printed[0] and "tokens a second" in printed[1]
    assert "step 40 of 40" in printed[2] and "step 200 of 200" in printed[3]
    assert len((tmp_path / "runs/tiny/log.jsonl").read_text().splitlines()) == 200
    assert "action error" in printed[4]
