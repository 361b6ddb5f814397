"""Checks of values that come from a user, a JSON file or NumPy; a number that fits comes back as Python's."""

from __future__ import annotations

import math
import os
import resource
import sys
from collections.abc import Callable, Collection, Iterable
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wam_kernels.runtime.checks import index_of


def check_field(config: object, name: str, check: Callable, *bounds) -> None:
    """Put into a field of a frozen dataclass what ``check(where, value, *bounds)`` makes of it."""
    value = check(f"{type(config).__name__}: {name}", getattr(config, name), *bounds)
    object.__setattr__(config, name, value)


def instance(where: str, value: object, kind: type) -> None:
    """``value`` is of this class.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, kind):
        hint = "; torch.from_numpy makes one" if isinstance(value, np.ndarray) else ""
        raise TypeError(f"{where} must be a {kind.__name__}, got {type(value).__name__}{hint}")


def whole(where: str, value: Any, low: int, high: int | None = None) -> int:
    """``value`` as an int: an integer of Python or NumPy, or one of a CPU tensor without dims; no bool, no float.

    Args:
        where: Begins the message: the class or function and the field, ``"RolloutConfig: steps"``.
        value: What was given.
        low: Smallest that is allowed.
        high: Largest that is allowed.

    Raises:
        ValueError: it is no whole number, or outside the range.
    """
    bound = f"of at least {low}" if high is None else f"from {low} to {high}"
    found = index_of(value)
    if found is None or found < low or (high is not None and found > high):
        raise ValueError(f"{where} must be a whole number {bound}, got {value!r}")
    return found


def wholes(where: str, values: object, low: int, high: int | None = None) -> list[int]:
    """As :func:`whole`, of a sequence, an array or a tensor with one dim.

    Raises:
        ValueError: no sequence, or a number in it that is refused.
    """
    if not isinstance(values, Iterable) or isinstance(values, str | bytes) or getattr(values, "ndim", 1) != 1:
        raise ValueError(f"{where} must be a sequence of whole numbers, got {values!r}")
    return [whole(f"{where}[{i}]", value, low, high) for i, value in enumerate(values)]


def whole_range(where: str, value: object, low: int, high: int) -> tuple[int, int]:
    """``value`` as (smallest, largest), two integers from ``low`` to ``high`` in order.

    Raises:
        ValueError: it is not that.
    """
    pair = tuple(wholes(where, value, low, high))
    if len(pair) != 2 or pair[0] > pair[1]:
        raise ValueError(f"{where} must be two whole numbers, {low} <= low <= high, got {value!r}")
    return pair


def number(where: str, value: object, low: float, high: float = math.inf) -> float:
    """``value`` as a finite float: a real number of Python or NumPy; no bool, no string.

    Args:
        where: Begins the message, as in :func:`whole`.
        value: What was given.
        low: Smallest that is allowed.
        high: Largest that is allowed.

    Raises:
        ValueError: it is no finite number, or outside the range.
    """
    expected = f"finite number of at least {low:g}" if high == math.inf else f"number from {low:g} to {high:g}"
    try:
        found = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        found = math.nan
    if not (math.isfinite(found) and low <= found <= high):
        raise ValueError(f"{where} must be a {expected}, got {value!r}")
    return found


def switch(where: str, value: object) -> bool:
    """``value`` as a bool; 0, 1 and strings are refused.

    Raises:
        ValueError: it is no bool.
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{where} must be True or False, got {value!r}")
    return bool(value)


def choice(where: str, value: object, choices: Collection[str]) -> str:
    """``value``, one of ``choices``.

    Raises:
        ValueError: it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{where} must be one of {tuple(choices)}, got {value!r}")
    return value


def writable_folder(where: str, path: Path) -> None:
    """Whether files can be made in ``path``, or in the folder above that exists; looked at before work begins.

    Raises:
        ValueError: there is a file or a link to nothing of that name or on the way to it, or no right to write.
    """
    found = path.absolute()
    while not found.exists():
        if found.is_symlink():
            raise ValueError(
                f"{where} must be a folder, but {found} is a link to {found.readlink()}, which is not there"
            )
        found = found.parent
    if not found.is_dir():
        raise ValueError(f"{where} must be a folder, but {found} is a file; name another")
    if not os.access(found, os.W_OK | os.X_OK):
        raise ValueError(
            f"{where} must be a folder to write in, but there is no right to write in {found}; name another"
        )


def memory(device: torch.device) -> float:
    """Bytes of the device's memory; infinity where that cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if device.type == "cpu" else math.inf


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that this process's tensors have had there, else the most that the process has had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 2**10 * peak  # bytes on macOS, kilobytes on Linux


def check_device(name: str) -> torch.device:
    """The device of a ``--device`` flag. Raises ValueError where there is none such."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from error
    if name != "cpu" and device.type != "cuda":  # there is one cpu
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; see wam doctor")
    return device
