"""The config of a data set: where it is and how much of a training it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..runtime.checks import check_field, choice, number
from ..runtime.json_fields import from_fields
from .clips import NORMALIZATIONS


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One data set of a training.

    Args:
        path: Its folder.
        camera: The feature that frames come from; needed only where there are several. Several are tiled on one
            canvas: ``"A,B"`` side by side, ``"A/B,C"`` in rows.
        weight: Its share of the clips, beside those of the other data sets.
        state: The feature of the robot's state; default ``observation.state``, or the only one there is.
        normalization: Units of actions and states: ``"mean_std"``, ``"min_max"``, ``"quantile"`` or ``"none"``; the
            same of all data sets of a robot. They are saved with the policy.
        latents: Folder that ``wam encode`` wrote of it; without, pictures are encoded when a training begins.
        robot: Its robot, of a training on robots whose actions or states differ in width or units: data sets of one
            robot share units. Of all data sets of a training or of none.
        texts: Folder that ``wam encode --text`` wrote, of the same encoder for all data sets of a training; without,
            the vectors of words are trained.

    Raises:
        ValueError: a value of the wrong type or outside its range; the message names the field.
    """

    path: str
    camera: str | None = None
    weight: float = 1.0
    state: str | None = None
    normalization: str = "mean_std"
    latents: str | None = None
    texts: str | None = None
    robot: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | Path) or not str(self.path):
            raise ValueError(f"DataConfig: path must be the folder of a data set, got {self.path!r}")
        object.__setattr__(self, "path", str(self.path))
        for name, what in (
            ("camera", "the name of a feature"),
            ("latents", "the folder of its latents"),
            ("texts", "the folder of its texts"),
            ("robot", "the name of its robot"),
            ("state", "the name of a feature"),
        ):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise ValueError(f"DataConfig: {name} must be {what}, got {value!r}")
        check_field(self, "normalization", choice, NORMALIZATIONS)
        check_field(self, "weight", number, 1e-12, 1e12)

    def to_dict(self) -> dict[str, Any]:
        """A dict that ``json.dumps`` takes."""
        return asdict(self)


def data_configs(values: Any, source: str = "data") -> tuple[DataConfig, ...]:
    """What ``data`` of a recipe holds: a folder, a table of fields, or a list of them.

    Raises:
        ValueError: none of those, or a field that is refused; the message names it and ``source``.
    """
    if not isinstance(values, list | tuple):
        return (_data_config(values, source),)
    if not values:
        raise ValueError(f"{source} must have at least one data set, got {values!r}")
    return tuple(_data_config(value, f"{source}.{i}") for i, value in enumerate(values))


def _data_config(value: Any, source: str) -> DataConfig:
    if isinstance(value, DataConfig):
        return value
    return from_fields(DataConfig, {"path": value} if isinstance(value, str) else value, source, defaults=True)
