"""Argument checks shared by every public function. Those of an op read metadata only, so they trace."""

import math
import operator
import sys
from collections.abc import Iterable, Mapping, Set
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .host import host_side

# Index tensors are int32.
MAX_INT = 2**31 - 1
_MAX_FLOAT = sys.float_info.max
# tuples, as a union of types does not trace in PyTorch 2.7
_ARRAYS = (Tensor, np.ndarray)
_NO_SEQUENCES = (Set, Mapping, bytes)  # without an order, or not of numbers
_NUMBERS = (int, float, np.integer, np.floating, torch.SymInt, torch.SymFloat)


def are_tensors(op: str, **args: object) -> None:
    """
    Raises:
        TypeError: one is no tensor; names the op, the argument, what came and the way out.
    """
    for name, value in args.items():
        if not isinstance(value, Tensor):
            way_out = {np.ndarray: "; use torch.from_numpy", type(None): ""}.get(type(value), "; use torch.tensor")
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}{way_out}")


def bind_dims(op: str, **args: tuple[Tensor, str]) -> dict[str, int]:
    """Match tensors to letters, ``x=(x, "B S D")``, and return the size of each letter.

    Raises:
        TypeError: not a tensor.
        ValueError: a tensor of another rank, or a letter with two sizes; names the op, argument and both shapes.
    """
    dims: dict[str, int] = {}
    for name, (tensor, spec) in args.items():
        if not isinstance(tensor, Tensor):
            are_tensors(op, **{name: tensor})
        letters, shape = spec.split(), tensor.shape
        if len(letters) == len(shape):
            for letter, size in zip(letters, shape, strict=True):
                if dims.setdefault(letter, size) != size:
                    break
            else:
                continue
        want = ", ".join(f"{k}={dims[k]}" if k in dims else k for k in letters)
        before = list(args.values())[: list(args).index(name)]
        sure = {k: n for t, s in before for k, n in zip(s.split(), t.shape, strict=True)}
        hint = heads_first(name, tensor, spec, sure)
        raise ValueError(f"{op}: {name} must have shape [{want}], got {list(shape)}{hint}")
    return dims


def heads_first(name: str, tensor: Tensor, spec: str, dims: Mapping[str, int]) -> str:
    """What to add to a message about ``tensor`` if its dims fit with heads and tokens swapped: "" if they do not.

    Args:
        spec: As for :func:`bind_dims`, with heads after tokens.
        dims: Sizes that are sure.
    """
    letters = spec.split()
    heads = next((i for i, letter in enumerate(letters) if letter.startswith("H")), 0)
    if not heads or len(letters) != tensor.ndim:
        return ""
    letters[heads - 1 : heads + 1] = letters[heads], letters[heads - 1]
    sure = [(dims[letter], size) for letter, size in zip(letters, tensor.shape, strict=True) if letter in dims]
    if not sure or any(want != got for want, got in sure):
        return ""
    return f"; {name} looks like [{', '.join(letters)}]: use {name}.transpose({heads - 1}, {heads})"


def same_kind(op: str, like_name: str, like: Tensor, **args: Tensor) -> None:
    """Every tensor has the dtype and device of ``like``.

    Raises:
        ValueError: names the op, the argument, both dtypes and both devices.
    """
    for name, t in args.items():
        if t.dtype != like.dtype or t.device != like.device:
            raise ValueError(
                f"{op}: {name} must be {like.dtype} on {like.device} like {like_name}, got {t.dtype} on {t.device}"
            )


def accumulator(t: Tensor) -> torch.dtype:
    """The dtype of sums over ``t``."""
    # not promote_types: that is an operation, recorded as one by whatever watches, and there is none for float8
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def integer(op: str, name: str, value: object, least: int = 0, most: int | None = MAX_INT) -> int:
    """``value`` as a Python int. NumPy's integers and those of CPU tensors are integers; bools, floats and strings not.

    Raises:
        ValueError: not an integer, or outside ``least .. most``; names the op and the argument.
    """
    if type(value) is not int:
        found = index_of(value)
        if found is None:
            raise ValueError(f"{op}: {name} must be an int, got {value!r}")
        value = found
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise ValueError(f"{op}: {name} must be at most {most}, got {value}")
    return value


def identifier(op: str, value: object) -> str:
    """``value`` as a name: a string that could be a variable's.

    Raises:
        ValueError: it is none; names the op.
    """
    if not isinstance(value, str) or not value.isidentifier():
        raise ValueError(f"{op}: name must be an identifier, as 'my_program', got {value!r}")
    return value


def index_of(value: Any) -> int | None:
    """``value`` as a Python int if it is an integer: of Python, of NumPy, or a CPU tensor without dims; else None."""
    dtype, device = getattr(value, "dtype", None), getattr(value, "device", None)
    try:
        # a tensor of a GPU would stop for it
        if isinstance(value, (bool, np.bool_)) or dtype == torch.bool or getattr(value, "ndim", 0):
            return None
        return operator.index(value) if str(device or "cpu") == "cpu" else None
    except TypeError:
        return None


def number(op: str, name: str, value: object, least: float = -_MAX_FLOAT) -> float:
    """``value``, a finite number of Python or NumPy, as a float.

    Raises:
        ValueError: not a number, NaN, infinite or below ``least``; names the op and the argument.
    """
    if isinstance(value, Tensor):
        raise ValueError(
            f"{op}: {name} must be a number, got a tensor, which would get no gradient; multiply an input by it, or "
            "use .item()"
        )
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise ValueError(f"{op}: {name} must be a number, got {value!r}")
    try:
        value = float(value)
    except OverflowError:  # an int
        value = math.inf if value > 0 else -math.inf
    if not least <= value <= _MAX_FLOAT:  # NaN neither
        at_least = "" if least == -_MAX_FLOAT else f" of at least {least}"
        raise ValueError(f"{op}: {name} must be a finite number{at_least}, got {value}")
    return value


def integers(op: str, name: str, values: Iterable[Any], least: int = 0) -> tuple[int, ...]:
    """As :func:`integer`, of each of ``values``: a sequence, or what :func:`int_array` takes as ``[n]``."""
    if isinstance(values, _ARRAYS):
        array = int_array(op, name, values)
        if array.ndim != 1:
            raise ValueError(f"{op}: {name} must have shape [n], got {list(array.shape)}")
        values, good = tuple(array.tolist()), not ((array < least) | (array > MAX_INT)).any()
    else:
        try:
            if isinstance(values, _NO_SEQUENCES):
                raise TypeError
            values = tuple(values)
        except TypeError:
            raise ValueError(f"{op}: {name} must be a sequence of ints, got {values!r}") from None
        good = not set(map(type, values)) - {int} and (not values or least <= min(values) <= max(values) <= MAX_INT)
    # one by one only where something is wrong, or NumPy's: there may be one for every token
    if not good:
        values = tuple(integer(op, f"{name}[{i}]", value, least) for i, value in enumerate(values))
    return values


def int_array(op: str, name: str, values: Any) -> np.ndarray:
    """The integers of nested sequences, a NumPy array or a CPU tensor; a copy, int64.

    Raises:
        ValueError: numbers that are no integers, or that are not on the host; names the op and the argument.
    """
    if isinstance(values, Tensor):
        if values.device.type != "cpu":
            raise ValueError(
                f"{op}: {name} must be on the host, got {values.device}; reading them back would stop for the device, "
                "so keep the numbers that they were made from"
            )
        of_tensor = values.dtype
        integral = not (of_tensor.is_floating_point or of_tensor.is_complex or of_tensor == torch.bool)
        kind: torch.dtype | np.dtype = of_tensor
        array = _numbers(op, name, values) if integral else np.empty(0)
    elif isinstance(values, np.ma.MaskedArray):
        raise ValueError(f"{op}: {name} must not be a masked array, whose mask would be lost; use .compressed()")
    else:
        try:
            array = np.array(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{op}: {name} must be integers, got {values!r} ({error})") from None
        dtype = array.dtype
        # beside ints NumPy takes a bool for one
        if array.ndim in (1, 2) and isinstance(values, list | tuple):
            types = set(map(type, values if array.ndim == 1 else chain(*values)))
            dtype = np.dtype(bool) if types & {bool, np.bool_} else dtype
        kind, integral = dtype, dtype.kind in "iu" or not array.size
    if not integral:
        raise ValueError(f"{op}: {name} must be integers, got {kind} {list(np.shape(values))}")
    return array.astype(np.int64)


@host_side
def _numbers(op: str, name: str, tensor: Tensor) -> np.ndarray:
    try:
        return tensor.numpy()
    except RuntimeError:
        raise ValueError(
            f"{op}: {name} must be numbers, got a tensor that has none: it is fake, or was made inside a torch.func "
            "transform; pass a list or an array"
        ) from None


def int_pairs(op: str, name: str, values: object) -> np.ndarray:
    """As :func:`int_array`, int64 ``[R, 2]``."""
    array = int_array(op, name, values)
    if array.size == 0:
        return array.reshape(0, 2)
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"{op}: {name} must have shape [R, 2], got {list(array.shape)}")
    return array


def flags(op: str, name: str, values: Any, length: int) -> np.ndarray:
    """bool ``[length]`` of a sequence, a NumPy array or a CPU tensor, read-only; all False for None.

    Raises:
        ValueError: another length, numbers that are not bool, or that are not on the host; names the op and the
            argument.
    """
    if isinstance(values, Tensor):
        if values.device.type != "cpu":
            raise ValueError(f"{op}: {name} must be on the host, got {values.device}; use .cpu()")
        values = _numbers(op, name, values)
    array = np.zeros(length, bool) if values is None else np.array(values)
    if array.size == 0:
        array = array.astype(bool)
    if array.dtype != bool or array.shape != (length,):
        raise ValueError(f"{op}: {name} must be R={length} bools, got {array.dtype} {list(array.shape)}")
    array.setflags(write=False)
    return array
