"""Going on from a checkpoint: whether it fits, and its training state put in place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checkpoint import CONFIG, Checkpoint
from ..data import ClipDataset
from ..data.codec import SavedCodec
from ..runtime.checks import number, whole
from ..state_dicts import abridged, check_finite
from ..text import Text
from ..training_state import VALUES, SavedState
from .config import TrainConfig
from .optimizers import STATE_NAMES
from .ranks import local

ENTRIES = {"step", "planned"}  # of a training state, beside its tensors
# how names of its tensors begin
WEIGHTS, AVERAGE, OPTIMIZER, GENERATOR = "weights.", "average.", "optimizer.", "generator"


def check_resumable(config: TrainConfig, data: ClipDataset, resume: Checkpoint) -> Text:
    """The checkpoint's text, where a run of this config can go on from it with this data.

    Raises:
        ValueError: no training state, a model of other sizes, or data in other latents or units.
    """
    training = resume.metadata.get("training")
    if resume.training_state is None or resume.text is None or not isinstance(training, dict):
        raise ValueError("train: the checkpoint to resume has no training state; name one that wam train wrote")
    ours, theirs = config.model.to_dict(), resume.model.config.to_dict()
    other = [f"{name} {theirs[name]}, not {ours[name]}" for name in ours if ours[name] != theirs[name]]
    if other:
        raise ValueError(f"train: config.model must be that of the checkpoint to resume, which has {', '.join(other)}")
    codec = cast(SavedCodec, data.codec)  # the first save of the run has refused any other
    units = {"action_mean": data.action_mean, "action_std": data.action_std, "varying": ~data.constant_actions}
    if data.state_units is not None:
        units |= zip(("state_mean", "state_std"), data.state_units, strict=True)
    for robot, part in data.robots.items():
        units[f"robots.{robot}.action_mean"] = part.action_mean[: part.own_widths[0]]
        units[f"robots.{robot}.action_std"] = part.action_std[: part.own_widths[0]]
    for name, value in (units | {f"codec.{k}": v for k, v in codec.state_dict().items()}).items():
        saved = resume.extra.get(name)
        # on another machine the same data gives a mean with other last digits
        if (
            saved is None
            or saved.shape != value.shape
            or not torch.allclose(saved.double().cpu(), value.double().cpu())
        ):
            raise ValueError(
                f"train: {name} of data must be the checkpoint's; make data with ClipDataset(root, policy.codec, "
                "units=policy.units), of the policy that Policy.load gives with the checkpoint"
            )
    return resume.text


def best_of(resume: Checkpoint) -> float | None:
    """Score of the best evaluation of the run so far; None without one.

    Raises:
        ValueError: no number.
    """
    score = resume.metadata["training"].get("best")
    return None if score is None else number(f"{resume.folder}: metadata.training.best", score, -math.inf)


def state_tensors(
    learner: nn.Module,
    average: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """All tensors that a run goes on from, by name; sharded ones as they are."""
    names = {id(p): name for name, p in learner.named_parameters()}
    found = {f"{WEIGHTS}{name}": value for name, value in learner.state_dict().items()}
    found |= {f"{AVERAGE}{name}": value for name, value in average.items()}
    for optimizer in optimizers:
        for p, held in optimizer.state.items():
            found |= {f"{OPTIMIZER}{names[id(p)]}.{key}": value for key, value in held.items()}
    return found | {GENERATOR: generator.get_state()}


def restore(
    resume: Checkpoint,
    learner: nn.Module,
    average: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    generator: torch.Generator,
    group: dist.ProcessGroup | None = None,
) -> tuple[int, int | None]:
    """Puts a training state in its places, on all ranks of a group; returns the steps done and the last one, if that
    is decided.

    Raises:
        ValueError: a damaged state; the message names the folder and the entry.
    """
    saved = cast(SavedState, resume.training_state)
    where = saved.folder
    if set(saved.values) != ENTRIES:
        raise ValueError(
            f"{where / VALUES}: entries must be {sorted(ENTRIES)}, got {sorted(saved.values)}; resume from another "
            "checkpoint"
        )
    step = whole(f"{where / VALUES}: step", saved.values["step"], 1)
    planned_end = saved.values["planned"]
    if planned_end is not None:
        planned_end = whole(f"{where / VALUES}: planned", planned_end, 1)
    if (of_config := resume.metadata["training"].get("step")) != step:
        raise ValueError(f"{where}: it is of step {step}, {CONFIG} of step {of_config}; take both from one save")
    try:
        places = _places(saved, learner, average, optimizers, generator)
        saved.read(places, group)
        _check_numbers(places, step)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; resume from another checkpoint") from error
    try:
        generator.set_state(places[GENERATOR])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{where}: {GENERATOR}: {error}; resume from another checkpoint") from error
    # else that run is over, and this one goes beyond
    return step, planned_end if planned_end is not None and step < planned_end else None


def _places(
    saved: SavedState,
    learner: nn.Module,
    average: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Tensors to read into: what an optimizer holds of a parameter is made anew, where it has been saved."""
    names = {id(p): name for name, p in learner.named_parameters()}
    known = set()
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            keys = {key: f"{OPTIMIZER}{names[id(p)]}.{key}" for key in STATE_NAMES[type(optimizer)]}
            known |= set(keys.values())
            if any(key in saved.sizes for key in keys.values()):
                optimizer.state[p] = {
                    key: torch.zeros((), device=p.device) if key == "step" else torch.zeros_like(p.detach())
                    for key in keys
                }
    places = state_tensors(learner, average, optimizers, generator)
    unknown, missing = sorted(set(saved.sizes) - set(places)), sorted(set(places) - set(saved.sizes))
    if unknown or missing or not known & set(saved.sizes):
        wrong = [f"{what} {abridged(of)}" for what, of in (("missing", missing), ("unknown", unknown)) if of]
        raise ValueError(f"must hold the tensors of this config's run, got {', '.join(wrong) or 'no optimizer'}")
    for name, place in places.items():
        if saved.sizes[name] != list(place.shape) or saved.dtypes[name] != place.dtype:
            raise ValueError(
                f"{name} must be {place.dtype} {list(place.shape)}, got {saved.dtypes[name]} {saved.sizes[name]}"
            )
    return places


def _check_numbers(tensors: Mapping[str, Tensor], step: int) -> None:
    """Whether a run can have come to these in so many steps."""
    own = {name: local(value) for name, value in tensors.items() if name != GENERATOR}
    check_finite(own)
    for name, value in own.items():
        key = name.rpartition(".")[2] if name.startswith(OPTIMIZER) else None
        if key == "exp_avg_sq" and value.numel() and value.min() < 0:
            raise ValueError(f"{name} must be mean squares, got {value.min():g}")
        if key == "step" and not 1 <= value <= step:
            raise ValueError(f"{name} must be from 1 to {step}, got {value:g}")
