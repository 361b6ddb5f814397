"""The demo end to end on tiny data, the rollout of its checkpoint, and the mask pictures."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data import tiny
from wam_kernels import PROGRAMS, Geometry, dense_mask
from wam_models import GJD, cli
from wam_models.cli import demo as demo_module
from wam_models.cli.demo import make_demo
from wam_models.cli.demo_report import verdicts
from wam_models.data import LeRobotDataset
from wam_models.draw.masks import draw_programs
from wam_models.draw.style import save_small
from wam_models.evaluate import Evaluation, Row, all_cases, evaluate, rmse
from wam_models.rollout.policy import Camera, Policy
from wam_models.train import TrainConfig, train


@pytest.fixture(scope="module")
def demo(root, config, tmp_path_factory):
    """(folder, report) of a demo of six steps."""
    out = tmp_path_factory.mktemp("out") / "demo"
    return out, make_demo(out, root, seconds=60, config=replace(config, steps=6), progress=False)


def test_the_demo_writes_a_report(demo):
    out, report = demo
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    rows = report["evaluation"]["rows"]
    assert [(r["objective"], r["program"]) for r in rows] == all_cases()
    for row in rows:
        has_action, has_video = row["objective"] != "forward_dynamics", row["objective"] != "inverse_dynamics"
        for name in ("action_rmse", "repeat_action_rmse", "mean_action_rmse"):
            assert (row[name] is not None) == has_action and (not has_action or 0 < row[name] < 100)
        for name in ("psnr", "repeat_frame_psnr", "ceiling_psnr"):
            assert (row[name] is not None) == has_video and (not has_video or 0 < row[name] < 100)
        assert row["seconds"] > 0
    assert report["steps"] == 6 and report["evaluation"]["frames"] == (3, 5)
    page = (out / "report.md").read_text()
    assert all(program in page for program, row in PROGRAMS.items() if row.has_rollout)
    assert all(s in page for s in report["verdicts"])


def test_a_demo_is_run_again_over_a_demo_alone(demo, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(demo_module, "read_data", lambda *_, **__: asked.append("read") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_demo(demo[0], tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="holds a run"):
        make_demo(tmp_path, tmp_path)
    assert asked == ["read"]


def test_the_demo_draws(demo):
    out, _ = demo
    for name in ("loss.png", "imagined.png", "masks.png", *(f"masks/{p}.png" for p in PROGRAMS)):
        with Image.open(out / name) as image:
            assert min(image.size) > 100 and np.unique(np.asarray(image.convert("L"))).size > 5
    with Image.open(out / "imagined.gif") as film:
        assert film.n_frames == 5


@pytest.mark.parametrize(
    "flags, objective, program",
    [
        ([], "joint", GJD),
        (["--program", "video_then_action", "--open-loop"], "joint", "video_then_action"),
        (["--objective", "forward_dynamics", "--steps", "2", "--episode", "0"], "forward_dynamics", GJD),
    ],
)
def test_rollout_loads_the_checkpoint(demo, root, tmp_path, capsys, flags, objective, program):
    out, _ = demo
    base = ["rollout", "--checkpoint", str(out / "checkpoint"), "--data", str(root), "--out", str(tmp_path)]
    assert cli.main(base + flags) == 0
    printed = capsys.readouterr().out
    size = "1 frame, 4 actions" if objective == "forward_dynamics" else "2 frames, 8 actions"
    words = ("p50", "p95", "actions/second", "peak memory", "dB PSNR", f"program {program}", f"({size} each)")
    assert all(w in printed for w in words)
    assert [p.suffix for p in tmp_path.glob("*.npz")] == ([] if objective == "forward_dynamics" else [".npz"])
    (film,) = tmp_path.glob(f"*_{objective}_{program}_seed0.gif")
    with Image.open(film) as pictures:
        assert pictures.n_frames == (6 if "0" in flags else 5)


def test_rollout_writes_its_actions(demo, root, tmp_path, capsys):
    """In the units of the data set, beside those of the recording; inverse dynamics has no video."""
    base = ["rollout", "--checkpoint", str(demo[0] / "checkpoint"), "--data", str(root), "--out", str(tmp_path / "new")]
    assert cli.main([*base, "--objective", "inverse_dynamics"]) == 0
    printed = capsys.readouterr().out
    assert "dB" not in printed
    (path,) = (tmp_path / "new").iterdir()
    assert f"written        {path}: action [4, 4, 7], recorded [4, 4, 7], frame [4]" in printed
    found = np.load(path)
    np.testing.assert_allclose(found["recorded"].reshape(-1, 7), tiny.actions(3)[:16], atol=1e-4)
    assert found["frame"].tolist() == [1, 2, 3, 4] and found["action"].dtype == np.float32
    policy, _ = Policy.load(demo[0] / "checkpoint")
    guess, real = (torch.from_numpy(found[k] / policy.action_std.numpy()) for k in ("action", "recorded"))
    assert f"action error   {rmse(guess, real, policy.varying):.3f}" in printed


@pytest.mark.parametrize(
    "flags", [["rollout", "--checkpoint", "none", "--data", "none"], ["train", "--data", "none"], ["demo"]]
)
def test_a_folder_that_cannot_be_written_is_refused_first(flags, tmp_path, capsys, monkeypatch):
    """Before any other mistake is met, and so before minutes of work."""
    (tmp_path / "file").touch()
    if flags == ["demo"]:
        flags = ["demo", "--data", str(tmp_path)]
    assert cli.main([*flags, "--out", str(tmp_path / "file")]) == 2
    assert f"--out must be a folder, but {tmp_path / 'file'} is a file" in capsys.readouterr().err
    assert cli.main([*flags, "--out", str(tmp_path / "file/below")]) == 2
    assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert cli.main([*flags, "--out", str(tmp_path / "new/er")]) == 2
    assert f"no right to write in {tmp_path};" in capsys.readouterr().err


@pytest.mark.parametrize("kind, full", [("npz", (np, "savez")), ("gif", (Image.Image, "save"))])
def test_a_full_disk_leaves_earlier_results(kind, full, demo, root, tmp_path, capsys, monkeypatch):
    command = ["rollout", "--checkpoint", str(demo[0] / "checkpoint"), "--data", str(root), "--out", str(tmp_path)]
    assert cli.main([*command, "--chunks", "1"]) == 0
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    name = next(path for path in files if path.suffix == f".{kind}")

    def write(*given, **_):
        next(g for g in given if isinstance(g, Path)).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*full, write)
    capsys.readouterr()
    assert cli.main([*command, "--chunks", "1"]) == 2
    assert f"error: cannot write {name}: No space left on device; what was there" in capsys.readouterr().err
    if kind == "gif":  # the actions of this call were written
        files = {path: data for path, data in files.items() if path == name}
    assert all(path.read_bytes() == data for path, data in files.items()) and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda p, d, root: p.clip(str(root), 0), TypeError, "Policy.clip: dataset must be a LeRobotDataset, got str"),
        (lambda p, d, _: p.clip(d, 4), ValueError, "Policy.clip: episode must be a whole number from 0 to 3, got 4"),
        (
            lambda p, d, _: p.clip(d, True),
            ValueError,
            "Policy.clip: episode must be a whole number from 0 to 3, got True",
        ),
        (lambda p, d, _: p.text(None), ValueError, "instructions must be a list of strings, got None"),
        (
            lambda p, d, _: p.denormalize_action(np.zeros(7)),
            TypeError,
            "action must be a Tensor, got ndarray; torch.from",
        ),
        (
            lambda p, d, _: p.denormalize_action(torch.zeros(3, 1)),
            ValueError,
            r"action must be \[..., 7\], got \[3, 1\]",
        ),
        (lambda p, d, root: train(TrainConfig(), root), TypeError, "train: data must be a ClipDataset, got PosixPath"),
        (lambda p, d, _: train({}, d), TypeError, "train: config must be a TrainConfig, got dict"),
    ],
)
def test_mistakes_in_python(call, error, message, demo, root):
    policy, dataset = Policy.load(demo[0] / "checkpoint")[0], LeRobotDataset(root)
    assert torch.equal(policy.clip(dataset, dataset.episodes[1])["action"], policy.clip(dataset, 1)["action"])
    with pytest.raises(error, match=message):
        call(policy, dataset, root)


SIMULATOR = """
import numpy as np

class Box:
    def __init__(self):
        self.calls, self.rng = 0, np.random.default_rng(0)
    def reset(self):
        return self.rng.integers(0, 255, (32, 64, 3), np.uint8), "lift"
    def step(self, actions):
        assert actions.shape == (8, 7) and actions.dtype == np.float32
        self.calls += 1
        done = self.calls == 4
        return self.rng.integers(0, 255, (1 if self.calls == 2 else 2, 32, 64, 3), np.uint8), done

class TooMany(Box):
    def step(self, actions):
        return np.zeros((3, 32, 64, 3), np.uint8), False

empty = object
"""


def test_rollout_acts_in_a_simulator(demo, tmp_path, capsys, monkeypatch):
    (tmp_path / "toy_simulator.py").write_text(SIMULATOR)
    monkeypatch.chdir(tmp_path)
    base = ["rollout", "--checkpoint", str(demo[0] / "checkpoint"), "--out", str(tmp_path), "--simulator"]
    assert cli.main([*base, "toy_simulator:Box"]) == 0
    printed = capsys.readouterr().out
    # the second chunk was cut short after one of its two frames, the fourth finished the task
    chunks = "4 (2 frames, 8 actions each), 7 frames executed"
    for words in (chunks, "task           done", "p50", "p95", "Hz", "peak memory", "action [8, 4, 7], frame [8]"):
        assert words in printed
    assert list(tmp_path.glob("simulated_toy_simulator+Box_joint_*_seed0.gif"))
    assert cli.main([*base, "toy_simulator:Box", "--chunks", "2"]) == 0
    assert "2 (2 frames, 8 actions each), 3 frames executed" in (printed := capsys.readouterr().out)
    assert "not done" in printed
    for name, message in (
        ("toy_simulator", "must be module:factory"),
        ("toy_simulator:Ball", "cannot be loaded"),
        ("toy_simulator:empty", "without reset and step"),
        ("toy_simulator:TooMany", "at most 2 pictures for 8 actions"),
        ("toy_simulator:Box --episode 1", "--episode must be left out"),
        ("toy_simulator:Box --objective inverse_dynamics", "--objective must be joint"),
    ):
        assert cli.main([*base, *name.split()]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--checkpoint {tmp}", "config.json"),
        ("--objective dreams", "--objective must be one of"),
        ("--program waltz", "--program must be one of"),
        ("--program joint --objective inverse_dynamics", "--program must be generalist_joint_denoising"),
        ("--episode 9", "--episode must be below 4, got 9"),
        ("--data {tmp}", "meta/info.json"),
        ("--device toaster", "--device must be cpu"),
    ],
)
def test_rollout_mistakes_are_one_line(flags, message, demo, root, tmp_path, capsys):
    base = ["rollout", "--checkpoint", str(demo[0] / "checkpoint"), "--data", str(root)]
    assert cli.main(base + flags.format(tmp=tmp_path).split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_foreign_checkpoint_is_refused(demo, tmp_path, capsys):
    broken = shutil.copytree(demo[0] / "checkpoint", tmp_path / "broken")
    settings = json.loads((broken / "config.json").read_text())
    del settings["metadata"]["rollout"]
    (broken / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="no checkpoint of wam train"):
        Policy.load(broken)


def test_acting_needs_no_training_state(demo, root, tmp_path, capsys):
    shutil.copytree(demo[0] / "checkpoint", tmp_path / "copy")
    (tmp_path / "copy" / "training/.metadata").write_bytes(b"damaged")
    base = ["rollout", "--checkpoint", str(tmp_path / "copy"), "--data", str(root), "--out", str(tmp_path)]
    assert cli.main([*base, "--objective", "inverse_dynamics"]) == 0


def test_a_policy_survives_its_checkpoint(demo, root, config, data):
    policy, found = Policy.load(demo[0] / "checkpoint")
    assert found.training_state.values["step"] == 6 and policy.rollout.chunk_size == 2
    assert torch.equal(policy.action_std, data.action_std)
    clip = policy.clip(LeRobotDataset(root), 3)
    whole = data.episode(3)
    assert torch.equal(clip["video"], whole["video"]) and torch.allclose(clip["action"], whole["action"], atol=1e-6)


def test_the_camera_is_the_one_it_was_trained_on(demo, root, tmp_path, capsys):
    """Of two cameras a rollout takes the policy's; pictures of another size are refused, whoever names the camera."""
    policy, _ = Policy.load(demo[0] / "checkpoint")
    assert policy.camera == Camera(name=tiny.KEY, height=32, width=64)
    shutil.copytree(root, tmp_path / "two")
    path = tmp_path / "two/meta/info.json"
    info = json.loads(path.read_text())
    info["features"]["wrist"] = info["features"][tiny.KEY]
    path.write_text(json.dumps(info))
    clip = policy.clip(policy.dataset(tmp_path / "two"), 3)
    assert torch.equal(clip["video"], policy.clip(LeRobotDataset(root), 3)["video"])
    for command in (
        ["rollout", "--checkpoint", str(demo[0] / "checkpoint")],
        ["train", "--out", str(tmp_path / "out")],
        ["demo", "--out", str(tmp_path / "out")],
    ):
        assert cli.main([*command, "--data", str(tmp_path / "two"), "--camera", "left"]) == 2
        assert f"camera (--camera) must be one of {tiny.KEY}, wrist" in capsys.readouterr().err
        if command[0] != "rollout":
            assert cli.main([*command, "--data", str(tmp_path / "two")]) == 2
            assert f"2 cameras, {tiny.KEY}, wrist; choose one" in capsys.readouterr().err
    info["features"][tiny.KEY] = {**info["features"][tiny.KEY], "shape": [64, 64, 3]}
    path.write_text(json.dumps(info))
    with pytest.raises(ValueError, match="pictures are 64 x 64, but the policy was trained on 32 x 64"):
        policy.clip(policy.dataset(tmp_path / "two"), 3)


def test_errors_against_a_model_that_knows_nothing(demo, root):
    """With no flow at all the prediction is the noise it started from: the errors must say so."""
    policy, _ = Policy.load(demo[0] / "checkpoint")
    with torch.no_grad():
        for p in policy.model.parameters():
            p.zero_()
    clips = [policy.clip(LeRobotDataset(root), i) for i in range(4)]
    case = ("inverse_dynamics", GJD)
    result = evaluate(policy, clips, cases=[case], seed=5, progress=False)
    (row,) = result.rows
    first, end = result.frames
    real = torch.cat([c["action"][:, first:end] for c in clips])
    assert row.mean_action_rmse == pytest.approx(rmse(real * 0, real, policy.varying))
    last = torch.cat([c["action"][:, first - 1 : end - 1, -1:].expand(-1, -1, 4, -1) for c in clips])
    assert row.repeat_action_rmse == pytest.approx(rmse(last, real, policy.varying))
    assert row.action_rmse == pytest.approx((1 + row.mean_action_rmse**2) ** 0.5, rel=0.25)


def test_verdicts_follow_the_numbers():
    inverse = Row("inverse_dynamics", GJD, 1, 4, 0.5, 1.0, 2.0, None, None, None, None, 0.1)
    joint = Row("joint", "joint", 4, 16, 1.5, 1.0, 1.2, 20.0, 21.0, 22.0, 30.0, 0.1)
    other = replace(joint, program="video_then_action", action_rmse=1.1)
    sentences = verdicts(Evaluation((inverse, joint, other), 1, (5, 9), 1))
    assert sentences == [
        "inverse dynamics, action error 0.500: beats the mean action (2.000).",
        "inverse dynamics, action error 0.500: beats repeating the last action for 4 steps (1.000).",
        "joint, action error 1.100 to 1.500: video_then_action beats, the others do NOT beat, the mean action (1.200).",
        "joint, action error 1.100 to 1.500: NO program beats repeating the last action for 16 steps (1.000).",
        "joint, imagined frames 20.00 to 20.00 dB: NO program beats repeating the last frame for 4 (21.00 dB).",
    ]


def test_mask_prints_the_density_and_draws(tmp_path, capsys):
    path = tmp_path / "mask.png"
    sizes = ["--frames", "6", "--video-tokens", "4", "--action-tokens", "2", "--chunk-size", "2", "--window", "3"]
    for program in PROGRAMS:
        assert cli.main(["mask", "--program", program, *sizes, "--chunk-origin", "1", "--out", str(path)]) == 0
        geometry = Geometry(
            program=program, video_frames=6, video_tokens=4, action_frames=6, action_tokens=2, chunk_size=2, window=3,
            history="video_only", chunk_origin=1,
        )  # fmt: skip
        mask = dense_mask(geometry)
        printed = capsys.readouterr().out
        assert (
            f"density        {mask.mean():.4f}" in printed and f"visible pairs  {mask.sum()} of {mask.size}" in printed
        )
        with Image.open(path) as image:
            assert min(image.size) > 500


def test_a_mask_pixel_is_a_pair():
    """The picture of a small mask has a colour exactly where a pair is visible (centres of the pixel blocks)."""
    from wam_models.draw.masks import MASKED, mask_image, small_geometry

    for program in PROGRAMS:
        geometry = small_geometry(program)
        n = geometry.length
        image = mask_image(geometry, 5 * n)
        centres = np.asarray(image)[2::5, 2::5].astype(int)
        assert np.array_equal((np.abs(centres - MASKED) > 12).any(-1), dense_mask(geometry))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--program waltz", "program must be one of"),
        ("--history none", "history must be one of"),
        ("--out {tmp}/mask.gif", "--out must be a file name that ends in .png"),
        ("--frames 400 --out {tmp}/mask.png", "take fewer frames or tokens"),
    ],
)
def test_mask_mistakes_are_one_line(flags, message, tmp_path, capsys):
    assert cli.main(["mask", *flags.format(tmp=tmp_path).split()]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_the_readme_picture_is_current(tmp_path):
    from pathlib import Path

    save_small(draw_programs(), tmp_path / "masks.png")
    stored = Path(__file__).parents[2] / "docs/masks.png"
    with Image.open(tmp_path / "masks.png") as new, Image.open(stored) as old:
        new, old = (np.asarray(i.convert("RGB")).astype(int) for i in (new, old))
    # another FreeType may draw letters a little differently
    assert new.shape == old.shape and np.abs(new - old).mean() < 2
    assert stored.stat().st_size < 200_000
