"""Where the samples of a batch lie, and arrays of a sample moved there."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..masks.ranges import Ranges
from ..masks.visibility import Geometry


class Placement(NamedTuple):
    """Where the samples of a batch begin. P entries, in the order of tokens: samples, and the padding of an element."""

    samples: list[Geometry | Ranges]  # the distinct ones, geometries first
    which: np.ndarray  # int64 [P]: index into samples
    batch: np.ndarray  # int64 [P]
    first: np.ndarray  # int64 [2, P]: query and key
    padding: np.ndarray  # bool [P]


def place(packed: tuple[tuple[Geometry | Ranges, ...], ...], lengths: tuple[int, int]) -> Placement:
    """Lay the samples of every batch element end to end and pad it to ``lengths`` = (queries, keys)."""
    entries = []
    for b, samples in enumerate(packed):
        q, k = 0, 0
        for sample in samples:
            entries.append((sample, b, q, k, False))
            q, k = q + sample.length, k + sample.key_length
        if (q, k) != lengths:  # padding is a sample in which all rows are fully masked
            entries.append((Ranges((), (), lengths[0] - q, lengths[1] - k), b, q, k, True))
    samples, *columns = zip(*entries, strict=True)
    distinct = sorted(dict.fromkeys(samples), key=lambda sample: isinstance(sample, Ranges))
    number = {sample: i for i, sample in enumerate(distinct)}
    batch, first_query, first_key, padding = (np.array(column) for column in columns)
    first = np.stack([first_query, first_key])
    return Placement(distinct, np.array([number[s] for s in samples]), batch, first, padding)


def moved(
    template: np.ndarray, index: np.ndarray, shift: np.ndarray, least: int, out: np.ndarray | None = None
) -> np.ndarray:
    """``template[index] + shift``, row by row, int32; what is NOWHERE becomes ``least``."""
    out = np.take(template, index, axis=0, out=out, mode="clip")  # "raise", the default, would fill a copy of ``out``
    out += shift.astype(np.int32)[:, None]
    return np.maximum(out, least, out=out)
