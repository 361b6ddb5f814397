"""``wam distill``: a policy that takes one denoising step of each stream where another takes several."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import torch

from ..data import ClipDataset
from ..evaluate import RECORDED_CHUNKS, decisions, evaluate, fewest_frames, rmse
from ..rollout import Schedule
from ..rollout.policy import Policy
from ..runtime.checks import check_device, writable_folder
from ..runtime.files import new_file
from ..runtime.threads import pick_threads, restores_threads
from ..train.distill import DistillConfig, distill

JUDGED = 8  # held-out episodes at most
COLUMNS = ("action_rmse", "action_gap", "frame_rmse", "frame_gap", "seconds")


@restores_threads
def run(args: argparse.Namespace) -> int:
    """``wam distill``."""
    device = check_device(args.device)
    given = {f.name: getattr(args, f.name, None) for f in fields(DistillConfig)}
    config = DistillConfig(**{name: value for name, value in given.items() if value is not None})
    writable_folder("--out", args.out)
    if args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"--out must be a new or an empty folder, got {args.out}")
    teacher, _ = Policy.load(args.checkpoint, device, training=False)
    teacher.model.requires_grad_(False)
    dataset = teacher.dataset(args.data, args.camera)
    data = ClipDataset(
        dataset, teacher.codec, units=teacher.units, states=teacher.state_units or False,
        actions_per_frame=teacher.actions_per_frame, actions_per_token=teacher.actions_per_token,
    )  # fmt: skip
    least = fewest_frames(teacher.rollout.chunk_size)
    judged = [i for i in data.held_out if data.length(i) >= least][:JUDGED]
    if not judged:
        raise ValueError(f"--data {args.data} must have a held-out episode of {least} latent frames")
    if device.type == "cpu":
        pick_threads(lambda: distill(teacher, data, replace(config, steps=2), seed=args.seed, progress=False))
    student, losses = distill(teacher, data, config, seed=args.seed)
    rows = compared(teacher, student, [teacher.clip(dataset, i) for i in judged], config.teacher_steps, args.seed)
    student.save(args.out, training={})
    with new_file(args.out / "distilled.json") as part:
        part.write_text(json.dumps({"config": asdict(config), "losses": losses, "rows": rows}, indent=1) + "\n")
    tenth = max(len(losses) // 10, 1)
    print(f"loss           {sum(losses[:tenth]) / tenth:.4g} at first, {sum(losses[-tenth:]) / tenth:.4g} at last")
    steps = f"{config.teacher_steps} steps of the teacher"
    print(f"held out       {len(judged)} episodes; gap: to {steps}, from the same noise")
    for name, row in rows.items():
        shown = (f"{column} {row[column]:.4f}" for column in COLUMNS if row[column] is not None)
        print(f"{name:<14} {', '.join(shown)}")
    print(f"written        {args.out}")
    return 0


def compared(
    teacher: Policy, student: Policy, clips: Sequence[dict], steps: int, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Errors on recorded episodes of the teacher in ``steps`` steps of each stream and in one, and of the student.

    Returns:
        By ``"teacher N"``, ``"teacher 1"`` and ``"student 1"``: errors against the recording and seconds a chunk, as in
        ``evaluate.Row``, and ``action_gap`` and ``frame_gap``, root mean square differences to the teacher's N steps
        from the same noise, in the same units.
    """
    rollout = replace(teacher.rollout, steps=steps, video=Schedule(), action=Schedule())
    once = replace(rollout, steps=1)
    several = {f"teacher {steps}": (teacher, rollout), "teacher 1": (teacher, once), "student 1": (student, once)}
    found, full = dict[str, dict[str, Any]](), dict[str, torch.Tensor]()
    for name, (policy, how) in several.items():
        cases = [("joint", how.program)]
        (row,) = evaluate(
            replace(policy, rollout=how), clips, chunks=RECORDED_CHUNKS, seed=seed, cases=cases, progress=False
        ).rows
        chosen = decisions(policy, how, clips, chunks=RECORDED_CHUNKS, seed=seed)
        full = full or chosen
        video = (chosen["video"] - full["video"]).double().square().mean().sqrt().item()
        action = rmse(chosen["action"], full["action"], policy.varying) if "action" in full else None
        found[name] = asdict(row) | {"action_gap": action, "frame_gap": video}
    return found
