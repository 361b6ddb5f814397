"""``wam validate``: all that is wrong with a config, its data set and this machine, before anything is loaded."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..data import LeRobotDataset
from ..data.clips import TRAIN
from ..data.config import DataConfig
from ..data.lerobot import STATE
from ..estimate import Sizes, parameters, train_memory
from ..runtime.checks import check_device, memory
from ..train.config import TrainConfig
from ..train.recipe import Recipe, recipe_faults, recipe_values
from ..train.run_folder import RunFolder
from .estimate import DEFAULT_TEXT_TOKENS, tokens_of

GB = 1e9


def run(args: argparse.Namespace) -> int:
    """``wam validate``: a line for each fault on stderr and exit code 2, or what would be trained."""
    faults, lines = examine(args)
    for fault in faults:
        print(f"wam validate: {fault}", file=sys.stderr)
    if faults:
        print(f"wam validate: {len(faults)} fault{'s' * (len(faults) > 1)}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


def examine(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The faults of a training as the flags ask for it, and what is known of it; only metadata of the data is read."""
    values, source = recipe_values(args.config, args.set)
    flags: dict[str, Any] = {"data": args.data, "out": args.out, "device": args.device}
    values |= {name: str(value) for name, value in flags.items() if value is not None}
    faults, lines = recipe_faults(values, source), list[str]()
    if faults:
        return faults, lines
    recipe = Recipe.from_dict(values, source)
    config = recipe.train
    device = faults_of(faults, check_device, recipe.device or "cpu")
    if recipe.out is None:
        faults.append(f"{source}: out must be given: the folder of the run")
    else:
        faults_of(faults, RunFolder, recipe.out)
    if not recipe.data:
        faults.append(f"{source}: data must be given: the folder of a data set")
    grids = set()
    for one in recipe.data:
        dataset = faults_of(faults, partial(LeRobotDataset, state=one.state), Path(one.path), one.camera)
        if dataset is not None:
            faults += data_faults(config, one, dataset)
            grids.add(_grid(config, dataset))
            episodes = [e for e in dataset.episodes if e.split == "train"]
            count = sum(e.length for e in episodes)
            lines.append(f"data: {one.path}, {len(episodes)} episodes of {count} frames to train on")
    if recipe.init is not None and not Path(recipe.init).exists():
        faults.append(f"{source}: init must be weights on this machine, there is no {recipe.init}")
    if config.lora and importlib.util.find_spec("peft") is None:
        faults.append(f"{source}: lora needs the Python package peft, which is not installed; pip install peft")
    lines.insert(0, f"model: {parameters(config.model):,} parameters")
    if device is not None and grids and not faults:
        sizes = Sizes(config.model, max(grids, key=lambda g: g[0] * g[1]), DEFAULT_TEXT_TOKENS)
        estimated = faults_of(faults, train_memory, sizes, config)
        needed, available = sum((estimated or {}).values()), memory(device)
        if needed > available:
            faults.append(
                f"{source}: a step needs {needed / GB:.3g} GB (estimated), {device} has {available / GB:.3g}; make "
                "batch, frames or the model smaller"
            )
        lines.append(f"memory: {needed / GB:.3g} GB a step (estimated), of {available / GB:.3g} on {device}")
    return faults, lines


def faults_of(faults: list[str], make: Callable, *args: Any) -> Any:
    """``make(*args)``, or None where that is refused, and ``faults`` has the message."""
    try:
        return make(*args)
    except (ValueError, OSError) as error:
        faults.append(str(error))
        return None


def _grid(config: TrainConfig, dataset: LeRobotDataset) -> tuple[int, int]:
    cell = 1 if dataset.has_states_as_frames else config.cell
    return tokens_of(*dataset.picture_size, cell, config.model)


def data_faults(config: TrainConfig, one: DataConfig, dataset: LeRobotDataset) -> Iterator[str]:
    """Where a config and the metadata of a data set do not fit."""
    where, model = f"{one.path} ({dataset.camera})", config.model
    if model.has_actions:
        width = dataset.width("action")
        fits = width is None or width * config.actions_per_token == model.action_dim
        if width is not None and one.robot is not None:
            fits = width * config.actions_per_token <= model.action_dim
        if width is not None and not fits:
            yield f"{where}: model.action_dim must be {width * config.actions_per_token}, got {model.action_dim}"
    states = dataset.width(dataset.state_name) if model.state_dim else None
    narrower = one.robot is not None and 0 < (states or 0) <= model.state_dim
    if model.state_dim and states != model.state_dim and not narrower:
        name = dataset.state_name or STATE
        yield f"{where}: model.state_dim must be {states}, the numbers of {name}, got {model.state_dim}"
    cell = 1 if dataset.has_states_as_frames else config.cell
    height, columns = dataset.picture_size
    for name, pixels, patch in (("rows", height, model.patch[1]), ("columns", columns, model.patch[2])):
        if pixels % (cell * patch):
            yield f"{where}: {name} of pictures must be a multiple of cell x patch, {cell} x {patch}, got {pixels}"
    if dataset.has_states_as_frames and (states := dataset.width(dataset.camera)) not in (None, model.latent_channels):
        yield f"{where}: model.latent_channels must be {states}, the numbers of a state, got {model.latent_channels}"
    if not dataset.has_states_as_frames and config.actions_per_frame % dataset.picture_every:
        expected = f"a multiple of {dataset.picture_every}"
        yield f"{where}: actions of a frame must be {expected}, as its pictures are, got {config.actions_per_frame}"
    drawn = {TRAIN} | {split for kind in config.draws() for split, share in kind.splits.items() if share}
    for split in sorted(drawn):
        lengths = [1 + (e.length - 1) // config.actions_per_frame for e in dataset.episodes if e.split == split]
        if not lengths:
            yield f"{where}: splits must have an episode in {split!r}, got none"
        elif config.frames > max(lengths) and not config.tokens:
            yield f"{where}: frames must be at most {max(lengths)}, the longest episode's, got {config.frames}"
