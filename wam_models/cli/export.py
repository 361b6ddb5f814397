"""``wam export``: a checkpoint's weights in another system's keys."""

from __future__ import annotations

import argparse

from ..checkpoint import load_checkpoint
from ..weights.convert import weights_to
from ..weights.folders import write_folder


def run(args: argparse.Namespace) -> int:
    """``wam export``."""
    model = load_checkpoint(args.checkpoint, training=False).model
    state = weights_to(args.layout, model.state_dict(), model.config, without=args.without)
    write_folder(args.out, args.layout, state, model.config)
    print(f"{len(state)} tensors in the keys of {args.layout}: {args.out}")
    return 0
