"""Tuned launch choices: measured on a device, kept in ``tuned/<device>.json``, laid over the defaults of ``config.py``.

A function of a ``config.py`` that decides how a kernel is launched stays the one home of its default and of the reason
for it; :func:`tuned` lays a recorded choice over what it returns, where this device has one for these arguments:

    @tuned("block_attention.forward")
    def forward(D: int, itemsize: int) -> Config: ...

A file reads ``{"device": ..., "choices": {op: {"D=128 itemsize=2": {"choice": ..., "ms": ..., "default": ...,
"default_ms": ...}}}}``. A choice is an object with some fields of the dataclass that the function returns, or a number
where it returns one, or null where the default was found to be the fastest.
"""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import cache, wraps
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "tuned"

# Functions whose launch choices can be tuned, by key, filled by the decorator; and what `wam bench tune` is trying now.
TUNABLE: dict[str, Callable] = {}
_trial: dict[str, object] = {}


def path_of(device: str) -> Path:
    """Where the choices of a device stand: ``"NVIDIA H100 80GB HBM3"`` -> ``nvidia-h100-80gb-hbm3.json``."""
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def key_of(**arguments: object) -> str:
    return " ".join(f"{name}={value}" for name, value in arguments.items())


def tuned(op: str) -> Callable[[Callable], Callable]:
    """Decorates a function that returns launch options: a dataclass, or a number.

    Raises:
        ValueError: from a decorated call, where the file of this device cannot be read or names a field that the
            options do not have.
    """

    def decorate(default_of: Callable) -> Callable:
        signature = inspect.signature(default_of)

        @wraps(default_of)
        def options(*args, **kwargs):
            default = default_of(*args, **kwargs)
            if op in _trial:
                return _over(default, _trial[op], f"trial of {op}")
            # without CUDA (the interpreter, ahead-of-time compilation) there is no device to have tuned for
            if not torch.cuda.is_initialized():
                return default
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            found = recorded_choice(op, key_of(**bound.arguments), torch.cuda.current_device())
            return default if found is None else _over(default, found, f"{op} in {path_of(device_name())}")

        TUNABLE[op] = options
        return options

    return decorate


@contextmanager
def trying(op: str, choice: object) -> Iterator[None]:
    """Launches of ``op`` use ``choice`` meanwhile: how ``wam bench tune`` measures candidates."""
    _trial[op] = choice
    try:
        yield
    finally:
        del _trial[op]


def reload() -> None:
    """Forget what was read: the file has changed."""
    recorded_choice.cache_clear()


def device_name() -> str:
    return torch.cuda.get_device_name()


@cache
def recorded_choice(op: str, key: str, device: int) -> object | None:
    """The recorded choice; None where the default was measured to be best, or, with one warning, where nothing was."""
    path, name = path_of(device_name()), device_name()
    try:
        found = json.loads(path.read_text())["choices"].get(op, {}).get(key)
        if found is not None:
            return found["choice"]
    except FileNotFoundError:
        warn_once(f"no tuned launch choices for {name!r} ({path} is not there); defaults are used")
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must hold launch choices, got {error!r}; write it with `wam bench tune`") from None
    warn_once(f"no tuned launch choice for {op} with {key} on {name!r}; its default is used")
    return None


@cache
def warn_once(message: str) -> None:
    warnings.warn(f"wam_kernels: {message}. `wam bench tune` in a clone measures and records them", stacklevel=5)


def _over(default, choice: object, where: str):
    if not is_dataclass(default) or isinstance(default, type):
        if isinstance(choice, bool) or not isinstance(choice, int):
            raise ValueError(f"wam_kernels: {where} must be a whole number, got {choice!r}")
        return choice
    known = [field.name for field in fields(default)]
    if not isinstance(choice, dict) or not set(choice) <= set(known):
        raise ValueError(f"wam_kernels: {where} must be an object with some of the fields {known}, got {choice!r}")
    if not all(value is None or type(value) is int and value >= 1 for value in choice.values()):
        raise ValueError(f"wam_kernels: {where} must have whole numbers of at least 1, got {choice!r}")
    return replace(default, **choice)
