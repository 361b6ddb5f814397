"""How much shared memory one block of a GPU may have: what the stages and rows of a launch must fit into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch

# Bytes by compute capability (90 is 9.0): "Maximum amount of shared memory per thread block" of the CUDA Programming
# Guide 13, section 5.1.3, table "Memory Information per Compute Capability". Kernels opt in to more than 48 KB.
BLOCK_BYTES: Mapping[int, int] = MappingProxyType(
    {
        capability: kilobytes * 1024
        for capability, kilobytes in {
            80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99,
        }.items()
    }
)  # fmt: skip
SMALL_BLOCK = 99 * 1024  # of boards for desktops and robots; what is newer than this table is taken for one

_compiled_for: list[int] = []


@contextmanager
def compiling_for(capability: int) -> Iterator[None]:
    """Launches are chosen for this compute capability meanwhile: compilation ahead of time."""
    _compiled_for.append(capability)
    try:
        yield
    finally:
        _compiled_for.pop()


def compute_capability() -> int:
    """Of the current device, 90 for 9.0; without CUDA (the interpreter, ahead-of-time compilation) of an H100."""
    if _compiled_for:
        return _compiled_for[-1]
    if torch.cuda.is_initialized():
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor
    return 90


def block_bytes() -> int:
    """Of a block on the current device."""
    return BLOCK_BYTES.get(compute_capability(), SMALL_BLOCK)
