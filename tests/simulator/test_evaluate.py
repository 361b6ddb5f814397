"""Success rates: what an episode does depends on its seed alone, and a broken simulator costs its episode alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from wam_models import Policy, RolloutConfig, WordEmbedding, WorldActionModel, cli
from wam_models.data import ClipDataset, StateCodec
from wam_models.evaluate import evaluate as evaluate_recorded
from wam_models.evaluate import table
from wam_models.simulator import load, play
from wam_models.simulator.evaluate import Rate, Task, evaluate, summary, wilson
from wam_models.simulator.record import RecordConfig, record
from wam_models.train import train
from wam_models.train.recipe import Recipe

from .conftest import EXAMPLES

POINT = "point_simulator:Point"
STEPS = 200  # of 16 episodes 16, 16, 11 and 16 succeeded after 220 steps with seeds 0 to 3, 16, 14, 12 and 15 after 160


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A policy of the example, and the same untrained."""
    root = tmp_path_factory.mktemp("point")
    with pytest.MonkeyPatch.context() as patch:
        (root / "point_simulator.py").write_text((EXAMPLES / "point_simulator.py").read_text())
        patch.chdir(root)
        record(root / "data", [POINT], RecordConfig(episodes=40), jobs=2)
    config = replace(Recipe.read(EXAMPLES / "point_train.json").train, steps=STEPS)
    data = ClipDataset(root / "data", actions_per_frame=2, actions_per_token=2)
    assert data.latent_shape == (4, 1, 1) and isinstance(data.codec, StateCodec)
    policy = train(config, data, progress=False, out=root / "run").policy
    return policy, train(replace(config, steps=1), data, progress=False).policy


def results(policy, tasks, **options):
    return sorted(evaluate(policy, policy.rollout, tasks, **options), key=lambda r: (r.simulator, r.episode))


def points(count):
    return [Task(POINT, i, 100 + i) for i in range(count)]


def test_training_makes_the_difference(trained, folder):
    policy, untrained = trained
    good, bad = (results(p, points(16), horizon=40) for p in (policy, untrained))
    assert sum(r.success for r in good) >= 8 and sum(r.success for r in bad) <= 2
    assert [r.initial_state for r in good] == [load(POINT).initial_state(100 + i) for i in range(16)]
    failed = [r for r in bad if not r.success]
    assert all(r.failure in ("not done after 40 actions", "fell off the table") for r in failed)
    row = good[0].row()
    assert json.loads(json.dumps(row)) == row
    assert len(row["imagined_mse"]) == len(row["still_mse"]) == policy.rollout.chunk_size


def test_an_episode_depends_on_its_seed_alone(trained, folder):
    """Not on the batch, nor on the order; and the loop over one episode that shows a film does the same."""
    policy, _ = trained
    together, alone = results(policy, points(6), batch=4), results(policy, points(6)[::-1], batch=1)
    for a, b in zip(together, alone, strict=True):
        assert (a.success, a.actions, a.initial_state) == (b.success, b.actions, b.initial_state)
        np.testing.assert_allclose(np.stack(a.frames), np.stack(b.frames), atol=1e-5)
    rng = torch.Generator().manual_seed(100)
    played = play(policy, policy.rollout, load(POINT), chunks=30, generator=rng, seed=100, progress=False)
    assert played.done == together[0].success
    np.testing.assert_allclose(played.pictures, np.stack(together[0].frames), atol=1e-5)
    np.testing.assert_allclose(played.imagined[1:3], together[0].imagined[0], atol=1e-5)
    assert played.actions.shape[1:] == (2, 2)


def test_a_horizon_of_any_length(trained, folder):
    _, untrained = trained
    for horizon in (1, 5):
        (result,) = results(untrained, points(1), horizon=horizon)
        assert (result.failure, result.actions) == (f"not done after {horizon} actions", horizon)


@pytest.mark.parametrize(
    "kind, message", [("Raises", "the motor is stuck"), ("Hangs", "hung"), ("Dies", "died"), ("NotFinite", "finite")]
)
def test_a_broken_simulator_costs_its_episode(kind, message, trained, folder):
    policy, _ = trained
    found = results(policy, [Task(f"broken:{kind}", i, i) for i in range(3)], batch=2, timeout=3)
    assert [r.broken for r in found] == [False, True, False]
    assert message in found[1].failure and not found[1].success
    rate = Rate.of([r.row() for r in found])
    assert rate.episodes == 3 and rate.broken == 1


def test_a_simulator_that_never_begins(trained, folder):
    (folder / "late.py").write_text(
        "from point_simulator import Point\nclass Late(Point):\n"
        "    def reset(self, initial_state):\n        raise OSError('no robot')\n"
    )
    found = results(trained[0], [Task("late:Late", i, i) for i in range(3)] + points(2), batch=2)
    assert [r.broken for r in found] == [True] * 3 + [False] * 2 and "no robot" in found[0].failure


def test_simulators_are_made_seldom(trained, folder):
    kind = "class {0}(Point):\n    def __init__(self):\n        super().__init__()\n"
    kind += "        open('made', 'a').write('{0}')\n"
    (folder / "counted.py").write_text("from point_simulator import Point\n" + kind.format("A") + kind.format("B"))
    alternating = [Task(f"counted:{name}", i, i) for i in range(4) for name in "AB"]
    assert len(results(trained[0], alternating, horizon=1, batch=1)) == 8
    assert (folder / "made").read_text() == "ABA"  # to be described, and to play what the process has not kept


@pytest.mark.parametrize("k, n, low, high", [(0, 20, 0, 0.161), (20, 20, 0.839, 1), (31, 50, 0.482, 0.741)])
def test_wilson(k, n, low, high):
    """Against the closed form's published values for 0/20 and 20/20, and another computation of 31/50."""
    np.testing.assert_allclose(wilson(k, n), (low, high), atol=6e-4)


def test_rates_are_of_each_simulator_and_pooled():
    def row(name, success):
        return {"simulator": name, "success": success, "broken": False, "imagined_mse": [], "still_mse": []}

    found = summary([row("a", True), row("a", False), row("b", True)])
    assert found["simulators"]["a"]["successes"] == 1 and found["all"]["successes"] == 2
    assert found["all"]["episodes"] == 3


def test_the_command_goes_on_where_it_stopped(trained, folder, tmp_path, capsys):
    policy, _ = trained
    policy.save(tmp_path / "checkpoint")
    flags = ["eval", "--checkpoint", str(tmp_path / "checkpoint"), "--simulator", POINT, "--simulator", "broken:Raises"]
    flags += ["--episodes", "3", "--out", str(tmp_path / "eval"), "--keep-frames", "--films", str(tmp_path / "films")]
    assert cli.main(flags) == 0
    printed = capsys.readouterr().out
    assert "broken:Raises" in printed and ", 1 broken" in printed and "the motor is stuck" in printed
    rows = (tmp_path / "eval/episodes.jsonl").read_text().splitlines(keepends=True)
    whole = json.loads((tmp_path / "eval/summary.json").read_text())
    assert len(rows) == 6 and whole["all"]["episodes"] == 6 and whole["timing"]["chunk_seconds"]["p50"] > 0
    held = np.load(tmp_path / "eval/frames/point_simulator+Point/00000.npz")
    assert held["frames"].shape[1:] == (4,) and held["imagined"].shape[1:] == (2, 4)
    films = {film.name: film for film in (tmp_path / "films").iterdir()}
    assert len(films) == 6 and sum(name.endswith("_broken.gif") for name in films) == 1
    for row in map(json.loads, rows):
        end = "broken" if row["broken"] else "success" if row["success"] else "failure"
        path = films[f"{row['simulator'].replace(':', '+')}_{row['episode']:05d}_{end}.gif"]
        if row["simulator"] == POINT:
            held = np.load(tmp_path / f"eval/frames/point_simulator+Point/{row['episode']:05d}.npz")
            with Image.open(path) as film:  # what happened beside what was imagined, as fast as the robot
                assert (film.n_frames, film.size) == (len(held["frames"]), (880, 200)) and film.info["duration"] == 100
    (tmp_path / "eval/episodes.jsonl").write_text("".join(rows[:4]) + rows[4][:20])  # as a kill leaves it
    assert cli.main(flags) == 0
    assert "4 episodes of" in (printed := capsys.readouterr().out) and "2 are left" in printed
    again = json.loads((tmp_path / "eval/summary.json").read_text())
    assert again["simulators"] == whole["simulators"] and again["all"] == whole["all"]
    assert cli.main([*flags, "--steps", "2"]) == 2
    assert "holds an evaluation of other settings" in capsys.readouterr().err
    assert cli.main([*flags, "--steps", "2", "--overwrite"]) == 0


def test_the_command_on_recorded_episodes(trained, folder, tmp_path, capsys):
    """Without a simulator: the errors of the held-out episodes, beside those of guesses that know nothing."""
    policy, _ = trained
    policy.save(tmp_path / "checkpoint")
    record(folder / "data", [POINT], RecordConfig(episodes=1, held_out=3, interrupted=0.0), jobs=1)
    flags = ["eval", "--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "eval")]
    assert cli.main([*flags, "--data", str(folder / "data"), "--program", "joint"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "eval/summary.json").read_text())["recorded"]
    dataset = policy.dataset(folder / "data")
    clips = [policy.clip(dataset, e) for e in dataset.episodes if e.split != "train" and e.length >= 9]
    assert 0 < found["episodes"] == len(clips) <= 3 and f"recorded       {len(clips)} episodes" in printed
    joint = replace(policy, rollout=replace(policy.rollout, program="joint"))
    row = evaluate_recorded(joint, clips, cases=[("joint", "joint")], progress=False).rows[0]
    for name in ("action_rmse", "repeat_action_rmse", "mean_action_rmse", "frame_rmse", "repeat_frame_rmse"):
        assert found[name] == pytest.approx(getattr(row, name), rel=1e-5)  # of another number of threads
    assert row.action_rmse < row.mean_action_rmse and f"action error   {row.action_rmse:.3f}" in printed
    for more, message in (([], "--simulator or --data"), (["--data", "data", "--films", "f"], "--films needs")):
        assert cli.main([*flags, *more]) == 2
        assert message in capsys.readouterr().err
    assert cli.main([*flags, "--data", str(folder / "data"), "--chunk", "50", "--overwrite"]) == 2
    assert "no held-out episode of 101 latent frames" in capsys.readouterr().err


@pytest.mark.parametrize(
    "simulator, message",
    [
        ("misfits:Wide", "its actions have 3 numbers, those of the policy 2"),
        ("misfits:Long", "its states have 5 numbers, those of the policy 4"),
        ("misfits:Chunked", "a Chunked has reset and step alone"),
        ("misfits:Missing", "misfits:Missing failed: ValueError: --simulator misfits:Missing cannot be loaded"),
    ],
)
def test_what_does_not_fit_is_refused(simulator, message, trained, folder, tmp_path, capsys):
    (folder / "misfits.py").write_text(
        "from point_simulator import Point\nclass Wide(Point):\n    action_names = 'xyz'\n"
        "class Long(Point):\n    state_names = 'vwxyz'\n"
        "class Chunked:\n    def reset(self): ...\n    def step(self, actions): ...\n"
    )
    trained[0].save(tmp_path / "checkpoint")
    assert cli.main(["eval", "--checkpoint", str(tmp_path / "checkpoint"), "--simulator", simulator]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_recorded_states_are_predicted(trained, folder):
    """Errors of frames are in units of the codec, an action is repeated as such where a token holds several."""
    policy, _ = trained
    record(folder / "data", [POINT], RecordConfig(episodes=3, interrupted=0.0, start=(0, 0)), jobs=1)
    dataset = policy.dataset(folder / "data")
    clips = [policy.clip(dataset, e) for e in dataset.episodes if e.length >= 11]
    found = evaluate_recorded(policy, clips, chunks=1, cases=[("joint", "joint")], progress=False)
    (row,) = found.rows
    real = torch.cat([clip["video"][:, :, 3:5] for clip in clips])
    still = torch.cat([clip["video"][:, :, 2:3] for clip in clips])
    assert row.repeat_frame_rmse == pytest.approx((real - still).square().mean().sqrt().item(), rel=1e-5)
    actions = torch.cat([clip["action"][:, :5] for clip in clips])
    actions = actions.flatten(1).unflatten(1, (10, 2))  # [E, 10 actions, 2 numbers]
    error = (actions[:, 6:] - actions[:, 5:6]).square().mean().sqrt().item()
    assert row.repeat_action_rmse == pytest.approx(error, rel=1e-5)
    assert row.chunk_actions == 4 and row.psnr is None
    assert "frame RMSE" in table(found) and "PSNR" not in table(found)


def test_a_policy_of_states_keeps_what_it_needs(trained, tmp_path):
    policy, _ = trained
    policy.save(tmp_path / "checkpoint")
    loaded, _ = Policy.load(tmp_path / "checkpoint")
    assert (loaded.actions_per_frame, loaded.actions_per_token, loaded.frames_are_states) == (2, 2, True)
    assert loaded.camera.name == "observation.state" and loaded.cameras == {}
    torch.testing.assert_close(loaded.codec.std, policy.codec.std, rtol=0, atol=0)
    settings = json.loads((tmp_path / "checkpoint/config.json").read_text())
    settings["metadata"]["actions_per_token"] = 3
    (tmp_path / "checkpoint/config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="actions_per_frame must be 2 / 3 for this policy, got 1"):
        Policy.load(tmp_path / "checkpoint")


def test_commands_on_recorded_states(trained, folder, tmp_path, capsys, monkeypatch):
    """wam rollout over recorded states, and in a simulator, whose film is drawn from the places in its states."""
    monkeypatch.delenv("DISPLAY", raising=False)
    policy, _ = trained
    policy.save(tmp_path / "checkpoint")
    record(folder / "data", [POINT], RecordConfig(episodes=2), jobs=1)
    base = ["rollout", "--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "out")]
    assert cli.main([*base, "--data", str(folder / "data"), "--episode", "0", "--program", "joint"]) == 0
    assert "state error" in capsys.readouterr().out
    held = np.load(tmp_path / "out/episode000_joint_joint_seed0.npz")
    assert held["state"].shape == held["imagined"].shape and held["action"].shape[1:] == (1, 4)
    act = [*base, "--simulator", POINT, "--program", "joint", "--chunks", "3", "--seed"]
    assert cli.main([*act, "0"]) == cli.main([*act, "1"]) == 0
    printed = capsys.readouterr().out
    assert "task           " in printed and "window         none: there is no screen (DISPLAY is not set)" in printed
    name = "simulated_point_simulator+Point_joint_joint_seed{}.{}"  # another seed is another film
    held, other = (np.load(tmp_path / "out" / name.format(seed, "npz")) for seed in (0, 1))
    assert held["imagined"].shape == (7, 4) and held["action"].shape[1:] == (2, 2)
    assert not np.array_equal(held["state"], other["state"])
    with Image.open(tmp_path / "out" / name.format(0, "gif")) as film:
        assert film.n_frames == len(held["state"]) and film.info["duration"] == 100  # 2 actions at 20 Hz
        assert film.size == (880, 200)  # two columns, and from above alone: the point has no height


def test_a_policy_that_is_told_states_gets_those_of_its_own_episode(folder):
    """The batch gives what the loop over one episode does, which other actions follow from if a state is another."""
    torch.manual_seed(0)
    config = replace(Recipe.read(EXAMPLES / "point_train.json").train.model, state_dim=4)
    model = WorldActionModel(config)
    for p in (model.core.proprio_hidden_context_encoder.proj.weight, model.action_expert.action_proj_out.weight):
        torch.nn.init.normal_(p)
    unit = torch.zeros(2), torch.ones(2), torch.ones(2, dtype=torch.bool)
    policy = Policy(
        model.eval().requires_grad_(False), WordEmbedding.from_instructions([load(POINT).instruction], config.text_dim),
        StateCodec(torch.zeros(4), torch.ones(4)), *unit, RolloutConfig(chunk_size=2, steps=1), None, 2,
        (torch.zeros(4), torch.full((4,), 0.5)),
    )  # fmt: skip
    found = results(policy, points(3), batch=2, horizon=12)
    for result in found:
        rng = torch.Generator().manual_seed(result.seed)
        played = play(policy, policy.rollout, load(POINT), chunks=3, generator=rng, seed=result.seed, progress=False)
        frames = min(len(played.pictures), len(result.frames))
        assert frames >= 5
        np.testing.assert_allclose(played.pictures[:frames], np.stack(result.frames)[:frames], atol=1e-5)
    narrow = replace(
        policy, model=WorldActionModel(replace(config, state_dim=3)), state_units=(torch.zeros(3), torch.ones(3))
    )
    with pytest.raises(ValueError, match="its states have 4 numbers, those of the policy 3"):
        results(narrow, points(1))
