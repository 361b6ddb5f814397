"""``wam verify``: our model against the package that weights are from, layer by layer."""

from __future__ import annotations

import argparse
from typing import Any

from ..runtime.checks import check_device
from ..weights.verify import checked_tolerance, first_difference, verify


def run(args: argparse.Namespace) -> int:
    """``wam verify``: 0 where no layer differs, 1 where one does."""
    device, tolerance = check_device(args.device), checked_tolerance(args.tolerance)
    sizes: dict[str, Any] = {
        name: value
        for name, value in (("head_dim", args.head_dim), ("actions_per_frame", args.actions_per_frame))
        if value is not None
    }
    rows = verify(
        args.checkpoint, args.against, seed=args.seed, device=device, without=tuple(args.without), **sizes
    )  # fmt: skip
    width = max(len(row.layer) for row in rows)
    for row in rows:
        print(f"{row.layer:{width}}  {row.difference:.2e}{'  *' if row.difference > tolerance else ''}")
    differs = first_difference(rows, tolerance)
    if differs is None:
        largest = max(row.difference for row in rows)
        print(f"no layer differs from {args.against} by more than {largest:.2e} of its size")
        return 0
    print(f"the first layer that differs from {args.against}: {differs.layer}, by {differs.difference:.2e} of its size")
    return 1
