"""``--eight-bit`` of the commands that roll a policy out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..data.clips import TRAINED
from ..eight_bit import DECISION_ERROR, eight_bit
from ..rollout.config import RolloutConfig
from ..rollout.policy import Policy
from ..runtime.files import new_file

CALIBRATION = 4  # episodes at most to calibrate 8-bit weights on, and to judge them on


def check_eight_bit_flags(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: a flag that says how, without the one that says whether.
    """
    for flag in ("eight_bit_keep", "eight_bit_error"):
        if getattr(args, flag) is not None and args.eight_bit is None:
            raise ValueError(f"--{flag.replace('_', '-')} must be left out without --eight-bit")


def with_eight_bits(args: argparse.Namespace, policy: Policy, config: RolloutConfig, out: Path | None) -> Policy:
    """The policy with 8-bit weights where ``--eight-bit`` asks for them; prints what they change, and writes it to
    ``out``.

    Raises:
        ValueError: a data set without episodes to calibrate on and others to judge by, or a decision that errs more
            than ``--eight-bit-error``.
    """
    if args.eight_bit is None:
        return policy
    dataset = policy.dataset(args.eight_bit)
    trained = [e.index for e in dataset.episodes if e.split == "train"][:CALIBRATION]
    held_out = [e.index for e in dataset.episodes if e.split not in ("train", *TRAINED)][:CALIBRATION]
    if not trained or not held_out:
        raise ValueError(f"--eight-bit {args.eight_bit} must have episodes in split 'train' and held-out ones")
    calibration, others = ([policy.clip(dataset, i) for i in episodes] for episodes in (trained, held_out))
    error = DECISION_ERROR if args.eight_bit_error is None else args.eight_bit_error
    policy, table = eight_bit(
        policy, calibration, others, config, keep=args.eight_bit_keep or (), decision_error=error, seed=args.seed
    )
    print(table)
    if out is not None:
        path = out / "eight_bit.json"
        with new_file(path) as part, part.open("w") as file:
            json.dump(table.to_dict(), file, indent=1)
        print(f"written        {path}")
    return policy
