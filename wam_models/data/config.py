"""The config of a data set: where it is and how much of a training it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..runtime.checks import check_field, number
from ..runtime.json_fields import from_fields


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One data set of a training.

    Args:
        path: Its folder.
        camera: The feature that frames come from; needed only where there are several.
        weight: Its share of the samples, beside those of the other data sets.

    Raises:
        ValueError: a value of the wrong type or outside its range; the message names the field.
    """

    path: str
    camera: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | Path) or not str(self.path):
            raise ValueError(f"DataConfig: path must be the folder of a data set, got {self.path!r}")
        object.__setattr__(self, "path", str(self.path))
        if self.camera is not None and not (isinstance(self.camera, str) and self.camera):
            raise ValueError(f"DataConfig: camera must be the name of a feature, got {self.camera!r}")
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
