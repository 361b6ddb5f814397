"""``wam export``: a checkpoint's weights in another system's keys, or its adapters as peft has them."""

from __future__ import annotations

import argparse

from ..checkpoint import TRAINING, load_checkpoint
from ..train.config import TrainConfig
from ..train.resume import AVERAGE
from ..weights.convert import weights_to
from ..weights.folders import write_folder
from ..weights.parts import is_adapter, write_adapters


def run(args: argparse.Namespace) -> int:
    """``wam export``."""
    if args.layout == "peft":
        return _adapters(args)
    model = load_checkpoint(args.checkpoint, training=False).model
    state = weights_to(args.layout, model.state_dict(), model.config, without=args.without)
    write_folder(args.out, args.layout, state, model.config)
    print(f"{len(state)} tensors in the keys of {args.layout}: {args.out}")
    return 0


def _adapters(args: argparse.Namespace) -> int:
    if args.without:
        raise ValueError(f"--without must be left out with --layout peft, got {args.without}")
    found = load_checkpoint(args.checkpoint)
    saved = found.training_state
    names = [] if saved is None else [n for n in saved.sizes if n.startswith(AVERAGE) and is_adapter(n)]
    if saved is None or not names:
        raise ValueError(f"--layout peft: {args.checkpoint / TRAINING} holds no adapters; train with lora")
    adapters = {name.removeprefix(AVERAGE): value for name, value in saved.held(names).items()}
    trained = TrainConfig.from_dict(
        found.metadata["training"]["config"], f"{args.checkpoint}: metadata.training.config"
    )
    write_adapters(args.out, adapters, rank=trained.lora_rank, scale=trained.lora_scale)
    print(f"{len(adapters)} tensors as peft has them: {args.out}")
    return 0
