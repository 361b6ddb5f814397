"""Our model against the package that its weights are from, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import holds_checkpoint, load_checkpoint
from ..config import ModelConfig
from ..runtime.checks import choice, number, whole
from ..runtime.limits import LARGEST_INT64
from .convert import sizes_from, weights_from, weights_to
from .folders import read_folder
from .layers import (
    Inputs,
    Layers,
    diffusers_layers,
    openwam_layers,
    openwam_parallel_layers,
    our_layers,
    our_model,
)

TOLERANCE = 1e-4  # in parts of a layer's size; the tests hold 5e-6 for small models
PACKAGES = {
    "diffusers": diffusers_layers,
    "openwam": openwam_layers,
    "openwam_parallel": openwam_parallel_layers,
}


@dataclass(frozen=True)
class Compared:
    """One layer: its name, and ``||ours - theirs|| / ||theirs||``; infinite where one is not finite."""

    layer: str
    difference: float


def compare(ours: Layers, theirs: Layers) -> list[Compared]:
    """Layers in the order in which our model computes them.

    Raises:
        ValueError: layers that one of both lacks, or of other shapes.
    """
    if set(ours) != set(theirs):
        raise ValueError(f"verify: only one of both has the layers {sorted(set(ours) ^ set(theirs))}")
    found = []
    for name, own in ours.items():
        other = theirs[name]
        if own.shape != other.shape:
            raise ValueError(f"verify: {name} is {list(own.shape)} in our model, {list(other.shape)} in the other")
        error, size = (own.double() - other.double()).norm(), other.double().norm()
        difference = float(error / size) if size > 0 else float(error)
        found.append(Compared(name, difference if difference == difference else float("inf")))
    return found


def first_difference(compared: list[Compared], tolerance: float) -> Compared | None:
    """The first layer that differs by more; None where none does."""
    return next((row for row in compared if row.difference > tolerance), None)


def verify(
    path: str | Path,
    against: str,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    without: tuple[str, ...] = (),
    **sizes: Any,
) -> list[Compared]:
    """Run the same random inputs through our model and through the package, with one set of weights, in float32.

    Every token attends to every other: which attend to which is what the masks' own tests are for.

    Args:
        path: A checkpoint of ``save_checkpoint``, or weights in the package's own keys: a folder, an index of shards or
            a file.
        against: ``diffusers``, the video expert alone, ``openwam``, both experts, or ``openwam_parallel``, the one of
            both.
        seed: Of the inputs.
        device: Where both run.
        without: Parts of the weights to leave out, as in ``weights_from``.
        **sizes: What the weights do not tell, as in ``sizes_from``.

    Raises:
        ValueError: weights that cannot be read or do not fit, sizes that the package cannot have.
        ModuleNotFoundError: the package is not installed; its name is in the message.
    """
    run = PACKAGES[choice("verify: against", against, PACKAGES)]
    seed = whole("verify: seed", seed, 0, LARGEST_INT64)
    config, ours, theirs = _both(Path(path), against, without, sizes)
    if config.inner != config.hidden:
        raise ValueError(
            f"verify: {against} has heads of hidden / heads numbers, so hidden must be {config.inner}, heads times "
            f"head_dim, got {config.hidden}"
        )
    device = torch.device(device)
    ours, theirs = ({name: value.to(device) for name, value in state.items()} for state in (ours, theirs))
    inputs = Inputs.drawn(config, seed, device)
    found = our_layers(our_model(config, ours), inputs, actions=against != "diffusers")
    return compare(found, run(config, theirs, inputs))


def checked_tolerance(value: float) -> float:
    """Raises ValueError for one that is no positive number."""
    return number("--tolerance", value, 1e-12, 1)


def _both(
    path: Path, against: str, without: tuple[str, ...], sizes: Mapping[str, Any]
) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Tensor]]:
    """Sizes, and the weights under both names."""
    if holds_checkpoint(path):
        model = load_checkpoint(path, training=False).model
        own = model.state_dict()
        left_out = ("action",) if against == "diffusers" else ()
        return model.config, own, weights_to(against, own, model.config, without=left_out)
    theirs, told = read_folder(path)
    config = sizes_from(against, theirs, **(told | dict(sizes)))
    found = weights_from(against, theirs, config, without=without)
    left = {key for keys in found.left_out.values() for key in keys}
    return config, found.state, {key: value for key, value in theirs.items() if key not in left}
