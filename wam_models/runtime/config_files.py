"""Configs as files: TOML or JSON, one that extends another, single values set from the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .json_fields import read_json

EXTENDS = "extends"  # the key that names the config, relative to its own file, which a config changes


def read_config(path: str | Path) -> dict[str, Any]:
    """What a config file holds, on top of the one that it extends: tables are merged, all else is replaced.

    Raises:
        ValueError: neither ``.toml`` nor ``.json``, a file that cannot be parsed or holds no table, or files that
            extend each other; the message names the file.
        OSError: a file cannot be read.
    """
    return _read(Path(path), ())


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        raise ValueError(f"{path}: {EXTENDS} itself, by way of {len(above)} files; end the chain")
    if path.suffix not in (".toml", ".json"):
        raise ValueError(f"{path}: a config must be a .toml or a .json file")
    values = _read_toml(path) if path.suffix == ".toml" else read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be an object of fields, got {values!r}")
    base = values.pop(EXTENDS, None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ValueError(f"{path}: {EXTENDS} must be the name of a config, relative to this file, got {base!r}")
    return merged(_read(path.parent / base, (*above, path.resolve())), values)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from error


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with changes: of two tables the keys of both, of all else that of ``changes``."""
    found = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merged(found[key], value) if both else value
    return found


def with_settings(values: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """A config with single values replaced, each by ``a.b=value``.

    The value is TOML (``5``, ``1e-4``, ``true``, ``["joint"]``, ``{joint = 1}``), and text where it is none.
    A whole number in the name is a place in a list. Whether there is such a field, and of which type, says whoever
    makes a config of the result.

    Raises:
        ValueError: no ``=`` or no name, a part of something that has none, or brackets and quotes that are no TOML.
    """
    for setting in settings:
        name, equals, text = setting.partition("=")
        keys = name.strip().split(".")
        if not equals or not all(keys):
            raise ValueError(f"--set must be NAME=VALUE, as in model.layers=4, got {setting!r}")
        values = _with_value(values, keys, _value(setting, text.strip()), f"--set {name.strip()}")
    return values


def _with_value(held: Any, keys: list[str], value: Any, where: str) -> Any:
    if not keys:
        return value
    key, *rest = keys
    if isinstance(held, list):
        if not key.isdecimal() or int(key) >= len(held):
            raise ValueError(f"{where}: {key} must be a place from 0 to {len(held) - 1} in a list")
        return [_with_value(v, rest, value, where) if i == int(key) else v for i, v in enumerate(held)]
    if not isinstance(held, dict):
        raise ValueError(f"{where}: there is no {key} in {held!r}, which has no parts")
    return held | {key: _with_value(held.get(key, {}), rest, value, where)}


def _value(setting: str, text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"] if "\n" not in text else text
    except tomllib.TOMLDecodeError as error:
        if text[:1] in ("[", "{", '"', "'"):
            raise ValueError(f"--set {setting}: not valid TOML: {error}") from error
        return text
