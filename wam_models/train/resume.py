"""Going on from a checkpoint: whether it fits, and its training state put in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..checkpoint import CONFIG, TRAINING, Checkpoint
from ..data import ClipDataset
from ..data.codec import SavedCodec
from ..model.weights import abridged, check_finite, load_weights
from ..runtime.checks import whole
from ..text import WordEmbedding
from ..weights.parts import adapters_of
from .config import TrainConfig
from .optimizers import STATE_NAMES

Found = TypeVar("Found")

ENTRIES = {"step", "planned", "generator", "weights", "optimizers"}  # of a training state
ADAPTERS = "adapters"  # one more where there are any: their averages, which in the checkpoint's model are merged


def check_resumable(config: TrainConfig, data: ClipDataset, resume: Checkpoint) -> WordEmbedding:
    """The checkpoint's words, where a run of this config can go on from it with this data.

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


def averaged_weights(resume: Checkpoint, learner: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint that :func:`restore` put in place, by the learner's names, as copies."""
    average = {f"model.{k}": v for k, v in resume.model.state_dict().items()}
    if resume.text is not None:
        average |= {f"text.{k}": v for k, v in resume.text.state_dict().items()}
    average |= (resume.training_state or {}).get(ADAPTERS, {})
    # what is under an adapter is frozen, so it is its own average
    own = learner.state_dict()
    return {k: average.get(k, v).detach().to(device, copy=True) for k, v in own.items()}


def restore(
    resume: Checkpoint, learner: nn.Module, optimizers: Sequence[torch.optim.Optimizer], generator: torch.Generator
) -> tuple[int, int | None]:
    """Puts a training state in its places; returns the steps done and the last one, if that is decided.

    Raises:
        ValueError: a damaged state; the message names the file and the entry.
    """
    file = (resume.folder or Path()) / TRAINING
    state = resume.training_state or {}
    adapters = adapters_of(learner.state_dict())
    if not set(state) <= (entries := ENTRIES | {ADAPTERS} if adapters else ENTRIES):
        unknown = sorted(map(str, set(state) - entries))
        raise ValueError(f"{file}: unknown entries {unknown}; resume with the version that wrote it")
    step = _use(file, state, "step", _step_number)
    planned_end = _use(file, state, "planned", lambda value: None if value is None else _step_number(value))
    saved = resume.metadata["training"].get("step")
    if saved != step:
        raise ValueError(f"{file}: it is of step {step}, {CONFIG} of step {saved}; take both from one save")
    _use(file, state, "generator", generator.set_state)
    _use(file, state, "weights", partial(_load_weights, learner))
    _use(file, state, "optimizers", partial(_load_optimizers, optimizers, step))
    if adapters:
        _use(file, state, ADAPTERS, partial(_check_adapters, adapters))
    # else that run is over, and this one goes beyond
    return step, planned_end if planned_end is not None and step < planned_end else None


def _use(file: Path, state: Mapping[str, Any], name: str, use: Callable[[Any], Found]) -> Found:
    """What ``use`` makes of an entry; whatever is wrong with it is reported with the file and the entry."""
    if name not in state:
        raise ValueError(f"{file}: {name} is missing; resume from another checkpoint")
    try:
        return use(state[name])
    except Exception as error:  # what is damaged can raise anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{file}: {name}: {kind}{error}; resume from another checkpoint") from error


def _step_number(value: Any) -> int:
    return whole("it", value, 1)


def _load_weights(learner: nn.Module, weights: Mapping[str, Tensor]) -> None:
    unused = load_weights(learner, weights)
    if unused:
        raise ValueError(f"keys that the model does not have: {abridged(unused)}")
    check_finite(learner.state_dict())


def _check_adapters(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    if {k: list(v.shape) for k, v in saved.items()} != {k: list(v.shape) for k, v in own.items()}:
        raise ValueError("must be the adapters of this config's lora and lora_rank, got others")
    check_finite(saved)


def _load_optimizers(optimizers: Sequence[torch.optim.Optimizer], step: int, states: Sequence[dict[str, Any]]) -> None:
    for optimizer, state in zip(optimizers, states, strict=True):
        own = optimizer.state_dict()["param_groups"]
        if [g["params"] for g in state["param_groups"]] != [g["params"] for g in own]:
            raise ValueError("param_groups must be of the parameters of this model, got others")
        params = [p for g in optimizer.param_groups for p in g["params"]]
        if not state["state"] or not set(state["state"]) <= set(range(len(params))):
            raise ValueError(
                f"state must be of parameters 0 to {len(params) - 1}, got {abridged(list(state['state']))}"
            )
        for i, saved in state["state"].items():
            _check_parameter_state(saved, params[i], STATE_NAMES[type(optimizer)], step)
        # the settings are those of the config
        optimizer.load_state_dict({"state": state["state"], "param_groups": own})


def _check_parameter_state(saved: Mapping[str, Tensor], p: Tensor, names: set[str], step: int) -> None:
    """Whether this is what an optimizer holds of a parameter after so many steps."""
    if set(saved) != names:
        raise ValueError(f"must hold {sorted(names)} of a parameter, got {sorted(saved)}")
    for name, value in saved.items():
        shape = [] if name == "step" else list(p.shape)
        if not value.is_floating_point() or list(value.shape) != shape:
            raise ValueError(f"{name} must be floats {shape} as its parameter, got {value.dtype} {list(value.shape)}")
    check_finite(saved)
    if "exp_avg_sq" in saved and saved["exp_avg_sq"].min() < 0:
        raise ValueError(f"exp_avg_sq must be mean squares, got {saved['exp_avg_sq'].min():g}")
    if "step" in saved and not 1 <= saved["step"] <= step:
        raise ValueError(f"step of a parameter must be from 1 to {step}, got {saved['step']:g}")
