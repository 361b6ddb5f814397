"""Messages of ``openpi-client``: msgpack, in which an array is a map of its bytes, dtype and shape.

The format is that of ``openpi_client.msgpack_numpy`` (openpi, Apache-2.0). That package is no requirement, because
its release asks for NumPy 1.
"""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np

KINDS = "biuf"  # of dtypes: no objects, whose bytes are pointers


def pack(message: Any) -> bytes:
    """A message of dicts, lists, strings, numbers and arrays."""
    return msgpack.packb(message, default=_as_map)


def unpack(data: bytes) -> Any:
    """The message again; arrays are read-only views of ``data``.

    Raises:
        ValueError: no msgpack, or an array whose bytes, dtype and shape contradict each other.
    """
    try:
        return msgpack.unpackb(data, object_hook=_as_array, strict_map_key=False)
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise ValueError(f"message: no msgpack as openpi-client packs it: {error or type(error).__name__}") from error


def _as_map(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in KINDS:
        raise ValueError(f"message: dtypes must be of numbers, got {value.dtype}")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return value


def _as_array(found: dict) -> Any:
    array, number = b"__ndarray__" in found, b"__npgeneric__" in found
    if not array and not number:
        return found
    try:
        dtype = np.dtype(found[b"dtype"])
        if dtype.kind not in KINDS:
            raise ValueError(f"an array of {dtype}")
        return np.ndarray(found[b"shape"], dtype, found[b"data"]) if array else dtype.type(found[b"data"])
    except KeyError as error:
        raise ValueError(f"an array without {error}") from error
