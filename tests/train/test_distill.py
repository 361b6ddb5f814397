"""Step distillation: its targets by hand, what it learns, what it refuses; and from the command line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.train.conftest import TINY_MODEL, frozen, trained
from wam_models import Schedule, cli
from wam_models.cli.closed_loop_demo import demo_training
from wam_models.cli.distill import JUDGED, compared
from wam_models.cli.train import read_data
from wam_models.data import ClipDataset
from wam_models.flow import noise_levels
from wam_models.rollout.policy import Policy
from wam_models.train import train
from wam_models.train.distill import DistillConfig, distill


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    rollout = {"program": "joint", "chunk_size": 2}
    return trained(data, tmp_path_factory.mktemp("distill"), steps=30, batch=8, rollout=rollout)


@pytest.fixture(scope="module")
def teacher(folder):
    return frozen(folder)


@pytest.fixture(scope="module")
def clips(teacher, root):
    dataset = teacher.dataset(root)
    return [teacher.clip(dataset, i) for i in range(4)]


def test_one_step_of_one_is_the_teacher_itself(teacher, data):
    """From noise one Euler step ends at level 0, where f is x: the student begins at its target."""
    once = DistillConfig(teacher_steps=1, steps=1, batch=2, recorded=0)
    student, losses = distill(teacher, data, once, progress=False)
    assert losses == [pytest.approx(0, abs=1e-12)]  # with a graph, norms round in another order than without
    of_clip = [distill(teacher, data, replace(once, recorded=r), progress=False)[1][0] for r in (0.5, 1.0)]
    assert 0 < of_clip[0] == pytest.approx(of_clip[1] / 4, rel=1e-5)  # a share of the way to the clip
    assert student.rollout == replace(teacher.rollout, steps=1, video=Schedule(), action=Schedule())


def test_the_observed_frame_of_full_attention_is_given(data, tmp_path, monkeypatch):
    model = TINY_MODEL | {"full_attention": True}
    sizes = {"programs": ["joint"], "frames": 3, "chunk_sizes": [2, 2], "steps": 1}
    policy, told = frozen(trained(data, tmp_path, model=model, **sizes)), []
    forward = type(policy.model).forward

    def spied(model, *args, **more):
        told.append(args)
        return forward(model, *args, **more)

    monkeypatch.setattr(type(policy.model), "forward", spied)
    distill(policy, data, DistillConfig(teacher_steps=4, steps=1, batch=4), progress=False)
    assert len(told) == 3
    for video, clean, action, clean_action, level, *_ in told:
        assert clean is None and clean_action is None and (level.tensors[0][:, 0] == 0).all()
        assert torch.equal(video[:, :, 0], told[0][0][:, :, 0]) and action.shape[1] == 3


def test_the_target_of_a_step_by_hand(teacher, data, monkeypatch):
    """A teacher whose flow is a constant moves along a straight line, of which the student's f is the end."""
    steps, shifts = 4, {"video": 5.0, "action": 1.0}
    levels = {name: noise_levels(steps, shift) for name, shift in shifts.items()}
    told, flows = [], {"video": 0.5, "action": -2.0}

    def constant(model):
        def forward(noisy_video, clean_video, noisy_action, clean_action, video_level, action_level, text, plan):
            told.append((video_level.tensors[0], action_level.tensors[0], noisy_video, noisy_action))
            grown = next(model.parameters()).sum() * 0
            return torch.full_like(noisy_video, 0.5) + grown, torch.full_like(noisy_action, -2.0) + grown

        return forward

    monkeypatch.setattr(type(teacher.model), "forward", lambda self, *args, **more: constant(self)(*args, **more))
    rollout = replace(teacher.rollout, video_shift=5.0, action_shift=1.0)
    _, losses = distill(
        replace(teacher, rollout=rollout),
        data,
        DistillConfig(teacher_steps=steps, steps=1, batch=4, recorded=0),
        progress=False,
    )
    assert losses[0] < 1e-10
    (video, action, x, a), (then_video, then_action, moved, moved_action), (again, _, _, _) = told
    assert torch.equal(video, again) and x.shape[2] == 5  # the longest episode has six frames
    at = [(1000 * levels["video"] == level).nonzero().item() for level in video[:, 1]]
    for i, place in enumerate(at):  # joint: both streams at one place, each at its own level; chunks of two frames
        assert torch.equal(video[i, 1:3], 1000 * levels["video"][place].expand(2))
        assert torch.equal(action[i, 1:3], 1000 * levels["action"][place].expand(2))
        assert torch.equal(then_video[i, 1], 1000 * levels["video"][place + 1])
        ds = (levels["action"][place + 1] - levels["action"][place]).item()
        torch.testing.assert_close(moved_action[i, 1], a[i, 1] + ds * flows["action"])
    assert len(set(at)) > 1


def test_a_cascade_draws_a_place_for_each_stream(teacher, data, monkeypatch):
    seen = []
    forward = type(teacher.model).forward

    def watched(self, *args, **more):
        seen.append((args[4].tensors[0], args[5].tensors[0]))
        return forward(self, *args, **more)

    monkeypatch.setattr(type(teacher.model), "forward", watched)
    shift = {"video_shift": 1.0, "action_shift": 1.0, "history": "video_only"}
    for program, same in (("joint", True), ("video_then_action", False)):
        seen.clear()
        policy = replace(teacher, rollout=replace(teacher.rollout, program=program, **shift))
        distill(policy, data, DistillConfig(steps=1, batch=8), progress=False)
        assert torch.equal(*seen[0]) == same


def test_a_student_comes_nearer_to_the_teacher_s_steps(teacher, data, clips):
    config = DistillConfig(teacher_steps=4, steps=25, batch=8, learning_rate=2e-3, average=0.8, recorded=0)
    before = [p.clone() for p in teacher.model.parameters()]
    student, losses = distill(teacher, data, config, progress=False)
    rows = compared(teacher, student, clips, 4)
    assert list(rows) == ["teacher 4", "teacher 1", "student 1"]
    assert rows["teacher 4"]["action_gap"] == rows["teacher 4"]["frame_gap"] == 0
    for gap in ("action_gap", "frame_gap"):
        assert rows["student 1"][gap] < 0.95 * rows["teacher 1"][gap]
    assert all(torch.equal(p, b) for p, b in zip(teacher.model.parameters(), before, strict=True))
    again, same = distill(teacher, data, replace(config, steps=2), progress=False)
    other, _ = distill(teacher, data, replace(config, steps=2), progress=False, seed=1)
    assert same[0] == losses[0]
    assert not torch.equal(again.model.core.proj_out.weight, other.model.core.proj_out.weight)


def test_what_is_refused(teacher, data):
    with pytest.raises(ValueError, match="policy must have guidance=1.0, got 2"):
        distill(replace(teacher, rollout=replace(teacher.rollout, guidance=2)), data, progress=False)
    with pytest.raises(ValueError, match="data must have an episode of 65 latent frames, the longest has 6"):
        distill(replace(teacher, rollout=replace(teacher.rollout, chunk_size=64)), data, progress=False)
    with pytest.raises(ValueError, match="DistillConfig: teacher_steps must be a whole number from 1"):
        DistillConfig(teacher_steps=0)
    with pytest.raises(FloatingPointError, match="loss of step 2 is nan"):
        distill(teacher, data, DistillConfig(steps=3, batch=1, learning_rate=100, clip_norm=100), progress=False)


def test_from_the_command_line(folder, root, tmp_path, capsys):
    out = tmp_path / "student"
    words = ["distill", "--checkpoint", str(folder), "--data", str(root), "--out", str(out), "--steps", "3"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "student 1" in printed and "action_gap" in printed
    found = json.loads((out / "distilled.json").read_text())
    assert len(found["losses"]) == 3 and found["config"]["teacher_steps"] == 5
    policy, _ = Policy.load(out)
    assert policy.rollout.steps == 1 and policy.rollout.program == "joint"
    assert cli.main(words) == 2
    assert "--out must be a new or an empty folder" in capsys.readouterr().err
    assert cli.main(["rollout", "--checkpoint", str(out), "--data", str(root), "--chunks", "1"]) == 0


@pytest.mark.slow
def test_one_step_of_the_demo_s_model_is_as_good_as_five():
    """As ``wam distill`` does it, on its held-out episodes: no worse in either stream (docs/benchmarks.md)."""
    root = Path(__file__).parents[2] / "data/metaworld_demo"
    config = replace(demo_training(), steps=150, mixture={"joint": 1.0})
    policy = train(config, read_data(root, config, progress=False), progress=False).policy
    policy.model.requires_grad_(False)
    dataset = policy.dataset(root)
    data = ClipDataset(
        dataset, policy.codec, units=policy.units, actions_per_frame=policy.actions_per_frame,
        actions_per_token=policy.actions_per_token,
    )  # fmt: skip
    clips = [policy.clip(dataset, i) for i in data.held_out if data.length(i) >= 5][:JUDGED]
    student, _ = distill(policy, data, progress=False)
    rows = compared(policy, student, clips, 5)
    before, once, after = rows.values()
    for name in ("action", "frame"):
        assert after[f"{name}_gap"] < once[f"{name}_gap"]
        assert after[f"{name}_rmse"] <= before[f"{name}_rmse"] < before[f"repeat_{name}_rmse"]
