"""A recipe: a training config with the data and the folders of its run, in one file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..data.config import DataConfig, data_configs
from ..runtime.checks import check_field, switch, whole
from ..runtime.config_files import read_config, with_settings
from ..runtime.json_fields import nearest
from ..runtime.limits import LARGEST_INT64
from .config import TrainConfig, small_model


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What ``wam train`` is told by a file; all but ``train`` can be left out, and flags come before it.

    In the file the fields of ``train`` are beside the others: ``steps = 100`` and ``[model]``, not ``[train]``.

    Args:
        train: The training config.
        data: Data sets; relative paths, here and below, are relative to the working directory.
        out: Folder of the run.
        seed: Of the weights and of all that is drawn.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        init: Weights to start from.
        init_layout: Their layout, as ``diffusers``; default our own.
        init_without: Parts to leave out of them.
        init_action: How an action expert is made of the video's: ``"copy"`` or ``"interpolate"``.
        tensorboard: Write the log for TensorBoard too.
        eval_every: Steps between evaluations; default none.
        simulator: Simulators that an evaluation acts in.
        eval_episodes: Of each of them.
        eval_chunk: Frames of a chunk in evaluations.

    Raises:
        ValueError: a value of the wrong type or outside its range; the message names the field.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    data: tuple[DataConfig, ...] = ()
    out: str | None = None
    seed: int | None = None
    device: str | None = None
    init: str | None = None
    init_layout: str | None = None
    init_without: tuple[str, ...] = ()
    init_action: str | None = None
    tensorboard: bool = False
    eval_every: int | None = None
    simulator: tuple[str, ...] = ()
    eval_episodes: int | None = None
    eval_chunk: int | None = None

    def __post_init__(self) -> None:
        for name in ("out", "device", "init", "init_layout", "init_action"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise ValueError(f"Recipe: {name} must be text, got {value!r}; quote it")
        if self.seed is not None:
            check_field(self, "seed", whole, 0, LARGEST_INT64)
        for name in ("eval_every", "eval_episodes", "eval_chunk"):
            if getattr(self, name) is not None:
                check_field(self, name, whole, 1)
        check_field(self, "tensorboard", switch)
        for name, what in (("init_without", "parts"), ("simulator", "names")):
            listed = getattr(self, name)
            if not isinstance(listed, list | tuple) or not all(isinstance(one, str) for one in listed):
                raise ValueError(f"Recipe: {name} must be a list of {what}, got {listed!r}")
            object.__setattr__(self, name, tuple(listed))

    def to_dict(self) -> dict[str, Any]:
        """What a config file holds of it: all fields but those that are left out."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("train", "data")}
        own = {name: value for name, value in own.items() if value is not None and value != ()}
        return self.train.to_dict() | {"data": [one.to_dict() for one in self.data]} | own

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "Recipe") -> Recipe:
        """From what a config file holds.

        Raises:
            ValueError: unknown fields, with the names that they may have been meant to be, or a value that is refused.
        """
        own, trained, unknown = _sorted_out(values)
        if unknown:
            raise ValueError(_unknown(unknown, source))
        if "data" in own:
            own["data"] = data_configs(own["data"], f"{source}: data")
        train = TrainConfig.from_dict(trained, source)
        try:
            return cls(train=train, **own)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def read(cls, path: str | Path | None, settings: Iterable[str] = ()) -> Recipe:
        """From a file, or the defaults, with values set by ``a.b=value``.

        Raises:
            ValueError: as ``read_config``, ``with_settings`` and :meth:`from_dict`.
            OSError: the file cannot be read.
        """
        return cls.from_dict(*recipe_values(path, settings))


def recipe_values(path: str | Path | None, settings: Iterable[str] = ()) -> tuple[dict[str, Any], str]:
    """What a file, or nothing, holds with values set by ``a.b=value``, and how messages call it.

    Raises:
        ValueError, OSError: as :meth:`Recipe.read`.
    """
    settings = list(settings)
    values = {} if path is None else read_config(path)
    if isinstance(values.get("data"), str):
        values["data"] = {"path": values["data"]}  # so that --set data.camera has a place
    values = with_settings(values, settings)
    return values, str(path) if path is not None else "--set" if settings else "the defaults"


def _sorted_out(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The fields of a recipe, those of its training, and the names of the others."""
    names = [f.name for f in fields(Recipe) if f.name != "train"], [f.name for f in fields(TrainConfig)]
    own, trained = ({k: v for k, v in values.items() if k in known} for known in names)
    return own, trained, [k for k in values if k not in own and k not in trained]


def _unknown(names: list[str], source: str) -> str:
    known = [f.name for kind in (Recipe, TrainConfig) for f in fields(kind) if f.name != "train"]
    return f"{source}: unknown fields {sorted(names)}{nearest(names, known)}; expected {sorted(known)}"


def recipe_faults(values: dict[str, Any], source: str) -> list[str]:
    """All that :meth:`Recipe.from_dict` would refuse, one after the other; empty where it would not."""
    own, trained, unknown = _sorted_out(values)
    found = [_unknown(unknown, source)] if unknown else []
    sets = own.pop("data", ())
    for i, one in enumerate(sets if isinstance(sets, list) else [sets] if sets else []):
        where = f"{source}: data.{i}" if isinstance(sets, list) else f"{source}: data"
        found += field_faults(partial(data_configs, source=where), one)
    model = trained.get("model")
    if isinstance(model, dict):
        start = small_model().to_dict()
        faults = field_faults(lambda v: ModelConfig.from_dict(start | v, f"{source}: model"), model)
        if faults:
            found += faults
            del trained["model"]
    found += field_faults(lambda v: TrainConfig.from_dict(v, source), trained)
    return found + field_faults(lambda v: Recipe.from_dict(v, source), own)


def field_faults(make: Callable[[Any], Any], values: Any) -> list[str]:
    """Every refusal of ``make(values)``, which raises at the first: values that it names are taken out in turn.

    What is wrong between fields is reported where each is right by itself.
    """
    found: list[str] = []
    while True:
        try:
            make(values)
        except ValueError as error:
            message = str(error)
            named = [key for key in values if _names(message, key)] if isinstance(values, dict) else []
            alone = [key for key in named if _refuses(make, {key: values[key]}, key)]
            if not alone:
                return found or [message]
            found.append(message)
            values = {key: value for key, value in values.items() if key not in alone[:1]}
        else:
            return found


def _names(message: str, key: str) -> bool:
    return f": {key} must" in message or f": {key}: " in message or f": {key}[" in message or f"'{key}'" in message


def _refuses(make: Callable[[Any], Any], values: Any, key: str) -> bool:
    try:
        make(values)
    except ValueError as error:
        return _names(str(error), key)
    return False
