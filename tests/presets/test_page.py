"""The command of every row of docs/formulations.md, run on the data that ships; a trained preset rolls out too."""

import json
import re
import shlex
from pathlib import Path

import pytest

from wam_models import cli

ROOT = Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in (ROOT / "docs/formulations.md").read_text().splitlines()
    if re.match(r"\| (?!system |---)", line)
]
COMMANDS = sorted({row[-1].strip("`") for row in ROWS if row[-1] != "-"})
MASKS = [command for command in COMMANDS if command.startswith("wam mask ")]


def test_every_row_has_a_command():
    assert len(ROWS) > 20 and {len(row) for row in ROWS} == {6}
    scripts = [shlex.split(command)[1] for command in COMMANDS if command not in MASKS + TRAININGS]
    assert all(re.match(r"examples/\w+\.py", path) and (ROOT / path).is_file() for path in scripts)  # test_examples.py
    assert [row[0] for row in ROWS if row[-1] == "-"] == ["GENIMA, VPP's first version"]  # out of scope
    assert {f"wam train recipes/presets/{path.name}" for path in (ROOT / "recipes/presets").glob("*.toml")} <= set(
        COMMANDS
    )


def test_what_was_compared_with_a_source_is_a_row():
    rows = [json.loads(line) for line in (ROOT / "docs/results/systems.jsonl").read_text().splitlines()]
    assert all(row.get("error", 0) < 1e-6 and not row.get("pairs_that_differ") for row in rows)
    found = {commit for cells in ROWS for commit in re.findall(r"source ([0-9a-f]{7})", cells[3])}
    assert found == {row["of"] for row in rows}
    told = {number for cells in ROWS for number in re.findall(r"error ([0-9.e-]+)", cells[3])}
    assert told == {f"{row['error']:.1e}" for row in rows if "error" in row}


@pytest.mark.parametrize("command", MASKS)
def test_masks(command, capsys):
    assert cli.main(shlex.split(command)[1:]) == 0
    assert "density" in capsys.readouterr().out


QUICK = [f"wam train recipes/presets/{name}.toml" for name in ("fast_wam_uncond", "lingbot_va", "motus", "vpp")]
TRAININGS = [command for command in COMMANDS if command.startswith("wam train ")]
SLOW_BUT = [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in TRAININGS]


@pytest.mark.parametrize("command", SLOW_BUT)
def test_presets_train_and_roll_out(command, tmp_path, monkeypatch, capsys):
    for name in ("recipes", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # leaves the trial of threads out
    recipe = shlex.split(command)[2]
    assert cli.main(["validate", recipe]) == 0
    assert cli.main([*shlex.split(command)[1:], "--steps", "2"]) == 0
    checkpoint = re.search(r"checkpoint: (\S+)", capsys.readouterr().out)[1]
    assert cli.main(["rollout", "--checkpoint", checkpoint, "--data", "data/metaworld_demo", "--chunks", "1"]) == 0
    assert "seconds/chunk" in capsys.readouterr().out
