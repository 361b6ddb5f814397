"""The ops of this package, one row each: what every backend is, which dtypes it takes, what it needs, its limits.

Dispatch, ``wam doctor``, the sanitizers' runs, the benchmarks, the GPU tests and the READMEs' tables follow from these
rows. To add an op, add its folder, its public name and a row; ``tests/test_ops.py`` names the parts that are missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch

HALF = (torch.bfloat16, torch.float16)
HALF_AND_FLOAT = (*HALF, torch.float32)
FLOATS = (*HALF_AND_FLOAT, torch.float64)


class Need(Enum):
    """What a machine must have for a backend to run; the value is how tables name it."""

    TRITON = "triton"
    GPU_OR_INTERPRETER = "a CUDA device or TRITON_INTERPRET=1"
    EXTENSION = "the CUDA extension"
    BUILT_FOR = "compute capability 8.x, 9.0, 10.x or 12.x"  # the list of CMakeLists.txt; another build has another
    SM90 = "compute capability 9.0"


TRITON = (Need.TRITON, Need.GPU_OR_INTERPRETER)
CUDA = (Need.EXTENSION, Need.BUILT_FOR)
HOPPER = (Need.EXTENSION, Need.SM90)


@dataclass(frozen=True)
class Backend:
    """One value of ``impl``; those that need something are GPU kernels."""

    what: str
    dtypes: tuple[torch.dtype, ...] = FLOATS
    needs: tuple[Need, ...] = ()
    # what it takes less of than the op does; config.py has the numbers
    limit: str | None = None


@dataclass(frozen=True)
class Op:
    """A row. Without a backend for its device type (``default``) a tensor goes to ``"reference"``."""

    name: str
    # its folder in wam_kernels and in tests, and its name in the other folders of tests and in bench
    package: str
    backends: Mapping[str, Backend]
    # public functions that take impl, all with these backends
    functions: tuple[str, ...]
    default: Mapping[str, str] = field(default_factory=lambda: {"cpu": "cpu", "cuda": "triton"})
    # elements of a sample up to which a call on a CPU, outside a graph, takes "reference" instead of "cpu": there calls
    # cost more than arithmetic, and PyTorch's own cost least; of a sample, so that no number depends on the batch
    small: int = 0

    @property
    def gpu_backends(self) -> tuple[str, ...]:
        return tuple(impl for impl, backend in self.backends.items() if backend.needs)


_CACHED = "D up to 128 and up to 4 groups"

# Triton against CUDA as the default on a GPU: not yet measured, so Triton
OPS = {
    op.name: op
    for op in (
        Op(
            "block_attention",
            "block_attention",
            {
                "reference": Backend("plain PyTorch, dense S x S, any device"),
                "cpu": Backend("GEMMs over the plan's runs"),
                "triton": Backend("tiles of the plan", HALF_AND_FLOAT, TRITON, "float32 up to D=128"),
                "cuda": Backend("boxes of the plan by TMA", HALF, HOPPER, "D up to 128"),
            },
            ("block_attention", "varlen_attention"),
        ),
        Op(
            "cached_attention",
            "cached_attention",
            {
                "reference": Backend("plain PyTorch, dense, any device"),
                "cpu": Backend("PyTorch's flash kernel over the visible slots"),
                "triton": Backend("split over the keys, then their sum", HALF_AND_FLOAT, TRITON, _CACHED),
                "cuda": Backend("TMA and wgmma on compute capability 9.0, else mma.sync", HALF, CUDA, _CACHED),
            },
            ("cached_attention",),
        ),
        Op(
            "ada_layer_norm",
            "adaln",
            {
                "reference": Backend("plain PyTorch, any device"),
                "cpu": Backend("in chunks that stay in cache"),
                "triton": Backend("one pass over a token", HALF_AND_FLOAT, TRITON),
                "cuda": Backend("CUDA tensors", HALF_AND_FLOAT, CUDA),
            },
            ("ada_layer_norm", "gate_residual_ada_layer_norm"),
            # 2**20 still pays with backward, but keeps what a training of this size would rather not
            small=2**19,
        ),
        Op(
            "qk_norm_rope",
            "qk_norm_rope",
            {
                "reference": Backend("plain PyTorch, any device"),
                "cpu": Backend("in chunks that stay in cache"),
                "triton": Backend("one pass over a token", HALF_AND_FLOAT, TRITON),
                "cuda": Backend("CUDA tensors", HALF_AND_FLOAT, CUDA),
            },
            ("qk_norm_rope",),
        ),
    )
}
