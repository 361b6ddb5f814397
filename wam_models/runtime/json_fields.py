"""A config, or any other JSON, as a file holds it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


Config = TypeVar("Config", bound=_Dataclass)


def read_json(path: Path) -> Any:
    """What a UTF-8 JSON file holds.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deep to be read, or an object with the same key twice, of which
            Python would keep the last without a word; the message names the file.
        OSError: the file cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error


def from_fields(cls: type[Config], values: Any, source: str, *, defaults: bool = False) -> Config:
    """``cls(**values)`` of what a JSON file holds.

    Args:
        cls: A dataclass.
        values: Should be an object of its fields.
        source: Begins every message: the file, and where in it.
        defaults: Whether fields that have a default may be left out.

    Raises:
        ValueError: no object, unknown or missing fields, by name, or a value that the class refuses.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{source}: must be an object of fields, got {values!r}")
    known = {f.name for f in fields(cls)}
    may_lack = {f.name for f in fields(cls) if defaults and (f.default, f.default_factory) != (MISSING, MISSING)}
    unknown, missing = sorted(set(values) - known), sorted(known - may_lack - set(values))
    if unknown or missing:
        wrong = [f"{what} fields {names}" for what, names in (("unknown", unknown), ("missing", missing)) if names]
        raise ValueError(f"{source}: {', '.join(wrong)}{nearest(unknown, known)}; expected {sorted(known)}")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def nearest(unknown: Iterable[str], known: Collection[str]) -> str:
    """What the names may have been meant to be, as a part of a message; empty where nothing is near."""
    found = {name: difflib.get_close_matches(name, known, 1) for name in map(str, unknown)}
    meant = [f"{name} {match[0]}" for name, match in found.items() if match]
    return f" (for {', '.join(meant)}?)" if len(meant) > 1 else f" (is {meant[0].split()[-1]} meant?)" if meant else ""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    held = dict(pairs)
    if len(held) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object holds the key {next(key for key in held if keys.count(key) > 1)!r} twice")
    return held
