"""The ablation: a protocol that cannot change under a folder, arms that resume, a report with numbers by hand."""

import gzip
import json
import shutil
import sys
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Timer

import numpy as np
import pytest

from wam_models import cli
from wam_models.ablate.protocol import Arm, Protocol, Track, metaworld, quick
from wam_models.ablate.report import write_report
from wam_models.ablate.run import collect, open_folder, run_all, run_everywhere
from wam_models.ablate.statistics import difference, permuted_differences, rates, relative_video_error
from wam_models.ablate.units import EXPERT, SHUFFLED, is_done, units
from wam_models.objectives import GJD
from wam_models.simulator import load

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def tiny() -> Protocol:
    """Two arms and a cloning baseline in the example simulator, a few steps."""
    training = json.loads((EXAMPLES / "point_train.json").read_text())
    training |= {"steps": 2, "warmup": 1, "batch": 4}
    track = Track(
        name="state", simulators=("point_simulator:Point",), record={"episodes": 3, "interrupted": 0.0},
        training=training, seeds=(0, 1), settings=((1, 1), (2, 1)), episodes=2, horizon=40, batch=2,
    )  # fmt: skip
    arms = (
        Arm(name="joint", program="joint"),
        Arm(name="gjd", program=GJD, mixture={"joint": 0.5, "forward_dynamics": 0.5}, steps_factor=2.0),
        Arm(name="cloning", program="decoupled_same_step", video_weight=0.0, want="action"),
    )
    return Protocol(suite="point", arms=arms, tracks=(track,))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("ablation")
    with pytest.MonkeyPatch.context() as patch:
        (root / "point_simulator.py").write_text((EXAMPLES / "point_simulator.py").read_text())
        patch.chdir(root)
        run_all(root / "run", tiny(), say=lambda line: None)
    return root


def test_a_run_is_whole_and_a_killed_one_goes_on(made, monkeypatch):
    """Half an arm, as a kill leaves it, is made again, to the same rows; the other arms are left alone."""
    monkeypatch.chdir(made)
    out = made / "run"
    rows, trainings = collect(out)
    assert len(rows) == 3 * 2 * 2 * 2 + 4 * 2  # arms, seeds, settings, episodes; four sanity arms
    assert [t["steps"] for t in trainings if t["arm"] == "gjd"] == [4, 4]
    assert [row["seed"] for row in rows if row["arm"] == "gjd"] == [0] * 4 + [1] * 4
    assert [row.get("episode_seed") for row in rows if row["arm"] == "gjd"] == [0, 1] * 4
    assert all(t["failure"] is None for t in trainings) and all(is_done(out, unit) for unit in units(tiny()))
    cloned = [row for row in rows if row["arm"] == "cloning"]
    assert cloned and not any(row["imagined_mse"] for row in cloned)
    again = [row["actions"] for row in rows if row["arm"] == "sanity_again"]
    assert again == [row["actions"] for row in rows if (row["arm"], row["seed"], row["chunk"]) == ("joint", 0, 1)]
    assert all(row["success"] and row["expert"] for row in rows if row["arm"] == EXPERT)

    lost = out / "state/gjd/seed1/eval-chunk2-steps1.jsonl"
    before = lost.read_text().splitlines()[:-1]
    lost.unlink()
    shutil.copytree(out / "state/cloning/seed0", made / "kept")
    (out / "state/cloning/seed0/train.json").unlink()  # a kill before the training was stored
    lines: list[str] = []
    run_all(out, tiny(), say=lines.append)
    assert lines[0].startswith("3 of ") and lost.read_text().splitlines()[:-1] == before
    remade, kept = (
        [line for line in (folder / "eval-chunk1-steps1.jsonl").read_text().splitlines()][:-1]
        for folder in (out / "state/cloning/seed0", made / "kept")
    )
    assert remade == kept
    run_all(out, tiny(), say=lines.append)
    assert lines[-1].startswith("0 of ")


def test_another_protocol_is_refused_by_name(made, tmp_path, capsys):
    other = tiny()
    (made / "other.json").write_text(
        json.dumps(replace(other, tracks=(replace(other.tracks[0], horizon=41),)).to_dict())
    )
    assert cli.main(["ablate", "--protocol", str(made / "other.json"), "--out", str(made / "run")]) == 2
    assert "differs in tracks[0].horizon" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("mine")
    assert cli.main(["ablate", "--out", str(tmp_path)]) == 2
    assert "no ablation" in capsys.readouterr().err


def test_a_protocol_is_what_its_file_holds(tmp_path):
    for protocol in (tiny(), metaworld(), quick(metaworld(full=True))):
        (tmp_path / "protocol.json").write_text(json.dumps(protocol.to_dict()))
        assert Protocol.from_json(tmp_path / "protocol.json").to_dict() == protocol.to_dict()
    with pytest.raises(ValueError, match="steps must"):
        Track(name="a", simulators=("b",), training=dict(tiny().tracks[0].training) | {"steps": 0})
    with pytest.raises(ValueError, match="'joint'"):
        Protocol(suite="a", arms=(Arm(name="b", program="joint"),), tracks=tiny().tracks)


def test_the_protocol_of_metaworld():
    """Nine arms that differ in what they are about and in nothing else."""
    protocol = metaworld()
    assert [(track.name, len(track.seeds), track.camera) for track in protocol.tracks] == [
        ("state", 3, None),
        ("pixels", 1, "behindGripper"),
    ]
    for track in protocol.tracks:
        configs = {arm.name: track.train_config(arm) for arm in protocol.arms}
        assert len(configs) == 9
        steps = configs["joint"].steps
        assert configs["gjd_equal_steps"].steps == steps
        assert round(configs["gjd_equal_joint_steps"].steps * 0.6) == steps
        same = {"programs", "mixture", "steps", "video_weight"}
        common = [{k: v for k, v in c.to_dict().items() if k not in same} for c in configs.values()]
        assert all(c == common[0] for c in common)
        assert configs["behaviour_cloning"].video_weight == 0
    seeds = [unit.seed for unit in units(replace(protocol, tracks=protocol.tracks[:1]))]
    assert seeds == sorted(seeds)
    full = metaworld(full=True)
    for track in full.tracks:
        assert track.seeds == (0, 1, 2) and track.settings == ((2, 1), (4, 1), (2, 5), (4, 5))
        made = [unit for unit in units(replace(full, tracks=(track,)))]
        late = [unit for unit in made if unit.settings == track.settings[2:]]  # once every seed is trained
        assert made[-len(late) :] == late and len(late) == 27


def test_an_arm_of_any_training_field():
    track = tiny().tracks[0]
    arm = Arm(name="x", program="video_then_action", steps_factor=2.0, training={"imagined_history": 0.5, "steps": 3})
    config = track.train_config(arm)
    assert (config.imagined_history, config.steps, config.programs) == (0.5, 6, ("video_then_action",))
    for training, message in (
        ({"mixture": {"joint": 1.0}}, "Arm: training must leave mixture to the arm's own fields"),
        ({"colour": 1}, "Track state, arm x: training: unknown fields"),
    ):
        with pytest.raises(ValueError, match=message):
            track.train_config(Arm(name="x", program="joint", training=training))


def test_a_folder_of_before_arms_had_training_is_gone_on_with(made, monkeypatch):
    monkeypatch.chdir(made)
    file = made / "run/protocol.json"
    held = json.loads(file.read_text())
    for arm in held["arms"]:
        del arm["training"]
    file.write_text(json.dumps(held))
    open_folder(made / "run", tiny())


def test_a_report_of_part_of_a_run(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(made)
    part = tmp_path / "part"
    shutil.copytree(made / "run", part)
    shutil.rmtree(part / "state/joint/seed1")
    shutil.rmtree(part / "state/gjd/seed1")
    assert cli.main(["ablate", "report", str(part)]) == 0
    text = capsys.readouterr().out
    assert "chunk 1 with 1 step, arms of 3: seed 0: 3, seed 1: 1" in text and "overstate the certainty" in text
    assert "not comparable" in text and "| `cloning` |" in text
    assert (part / "state.png").stat().st_size > 1000 and (part / "report.md").read_text().strip() == text.strip()
    whole = write_report(made / "run")
    assert "All arms with all seeds" in whole
    files = tmp_path / "files"  # what is kept of a run: the same report from the collected rows alone
    files.mkdir()
    for name in ("protocol.json", "arms.jsonl", "initial_states.jsonl"):
        shutil.copy(made / "run" / name, files)
    (files / "rows.jsonl.gz").write_bytes(gzip.compress((made / "run/rows.jsonl").read_bytes()))
    assert write_report(files) == whole
    states = [json.loads(line) for line in (files / "initial_states.jsonl").read_text().splitlines()]
    assert [s["initial_state"] for s in states] == [load("point_simulator:Point").initial_state(i) for i in range(2)]
    assert cli.main(["ablate", "report", str(tmp_path)]) == 2


@pytest.mark.parametrize("kept", sorted((ROOT / "docs/results").glob("ablation*")), ids=lambda folder: folder.name)
def test_the_recorded_report_is_that_of_its_rows(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "kept")
    assert write_report(tmp_path / "kept") == (kept / "report.md").read_text()


def _rows(arm, seed, successes, **more):
    names = ("a", "b")
    return [
        {"arm": arm, "seed": seed, "simulator": names[i // 2], "episode": i % 2, "success": bool(s), **more}
        for i, s in enumerate(successes)
    ]


def test_numbers_by_hand():
    rows = _rows("joint", 0, [1, 1, 1, 0]) + _rows("x", 0, [1, 0, 0, 0]) + _rows("x", 1, [1, 1, 0, 0])
    found = rates([row for row in rows if row["arm"] == "x"])
    assert (found.successes, found.episodes, found.seeds) == (3, 8, {0: (1, 4), 1: (2, 4)})
    alone = difference(rows, "x")
    assert alone is not None and (alone.seeds, alone.value, alone.low) == ((0,), -0.5, None)
    both = difference(rows + _rows("joint", 1, [1, 1, 0, 0]), "x")
    assert both is not None and both.value == -0.25 and both.low is not None and both.high is not None
    assert both.low < -0.25 < both.high
    assert difference(rows, "nobody") is None
    errors = _rows("x", 0, [1, 1], imagined_mse=[1.0, 3.0], still_mse=[4.0, 4.0])
    assert relative_video_error(errors) == 0.5 and relative_video_error(rows) is None


def test_between_seeds_is_where_the_uncertainty_is():
    """Two arms with the same pooled successes: of one the seeds agree, of the other they do not."""
    rng = np.random.default_rng(0)
    rows = []
    for seed, (steady, moved) in enumerate(((60, 90), (60, 60), (60, 30))):
        for arm, count in (("joint", 50), ("steady", steady), ("moved", moved)):
            success = rng.permutation(np.arange(100) < count)
            rows += [
                {"arm": arm, "seed": seed, "simulator": "a", "episode": i, "success": bool(s)}
                for i, s in enumerate(success)
            ]
    steady, moved = difference(rows, "steady"), difference(rows, "moved")
    assert steady is not None and moved is not None
    assert steady.value == pytest.approx(0.1) == moved.value
    assert moved.high - moved.low > 2 * (steady.high - steady.low)
    chance = np.percentile(permuted_differences(rows, ["joint", "steady", "moved"]), 95)
    assert 0.03 < chance < 0.12
    assert permuted_differences([], ["joint"]).size == 0


def test_what_waits_for_the_weights_of_another_arm():
    """With several processes, the shuffled language begins after the baseline is trained."""
    todo = units(tiny())
    finished: list[str] = []

    def submit(unit):
        if unit.arm == SHUFFLED:
            assert "joint" in finished
        future: Future[str] = Future()
        future.set_result("")
        return future

    run_everywhere(todo, submit, 3, lambda unit, line: finished.append(unit.arm))
    assert len(finished) == len(todo)


def test_units_of_lost_processes():
    """The others are made; what was lost, and what needs its policy, is named. Units of one folder take turns."""
    protocol = tiny()
    protocol = replace(protocol, tracks=(replace(protocol.tracks[0], early=1),))
    todo = units(protocol)
    finished, at_work = list[tuple[str, int]](), dict[tuple[str, int], Future[str]]()

    def submit(unit):
        key = unit.arm, unit.seed
        assert key not in at_work or at_work[key].done()
        future = at_work[key] = Future()

        def end():
            if key == ("joint", 0):
                future.set_exception(ChildProcessError("its machine was lost"))
            else:
                future.set_result("")

        Timer(0.01, end).start()
        return future

    with pytest.raises(ChildProcessError) as raised:
        run_everywhere(todo, submit, len(todo), lambda unit, line: finished.append((unit.arm, unit.seed)))
    message = str(raised.value)
    assert message.startswith("3 arms are missing") and "state joint seed 0: its machine was lost" in message
    assert f"state {SHUFFLED} seed 0: it needs what was lost of joint" in message
    assert len(finished) == len(todo) - 3 and finished.count(("joint", 1)) == 2


def test_without_ray_its_package_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "point_simulator.py").write_text((EXAMPLES / "point_simulator.py").read_text())
    (tmp_path / "protocol.json").write_text(json.dumps(tiny().to_dict()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["ablate", "--protocol", "protocol.json", "--ray", "auto", "--out", "run"]
    assert cli.main(command) == 2
    assert "'ray' is not installed; pip install it, or 'wam-kernels[models,ray]'" in capsys.readouterr().err
    assert not (tmp_path / "run/state/data").exists()


@pytest.mark.slow
def test_quick(tmp_path):
    """The real simulator: two arms learn to reach and to press in 110 steps, the expert and no training bound them."""
    pytest.importorskip("metaworld")
    assert cli.main(["ablate", "--quick", "--out", str(tmp_path / "run")]) == 0
    rows, _ = collect(tmp_path / "run")
    successes = {arm: sum(row["success"] for row in rows if row["arm"] == arm) for arm in {row["arm"] for row in rows}}
    assert successes[EXPERT] >= 9 and successes["sanity_untrained"] <= 2
    assert successes["joint"] > successes["sanity_untrained"]
