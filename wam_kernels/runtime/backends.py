"""What the ops' choice of a backend has in common. Devices and names only, so it traces; and what launchers share."""

import os
from collections.abc import Callable, Mapping
from functools import cache, wraps
from importlib import import_module
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ..ops import Op

P = ParamSpec("P")
T = TypeVar("T")

MODULES = {"cpu": ".cpu", "triton": ".kernel_triton", "cuda": ".kernel_cuda"}


@cache
def launchers(package: str, impl: str) -> ModuleType:
    """The module of an op's folder with the launchers of ``impl``; imported at the first call that needs it.

    Triton and the compiled extension are optional.
    """
    return import_module(MODULES[impl], package)


def select_backend(
    op: str, row: Op, impl: str | None, beyond: Mapping[str, str | None] | None = None, **like: Tensor
) -> str:
    """The backend of a call.

    Args:
        op: The public function.
        row: Its op. Where the default backend cannot take the call, ``impl=None`` is ``"reference"``, and on a CPU also
            where the call is small. The meta device is like the CPU: nothing runs there, every backend gives the same
            shapes.
        impl: What the caller asked for.
        beyond: By GPU backend: what came, if it is beyond its limit.
        like: The tensor whose dtype and device count, by its name.

    Raises:
        ValueError: ``impl`` is no backend of the op or cannot take the call; names what it takes and the way out.
    """
    ((name, x),) = like.items()
    device, backends, beyond = x.device.type, row.backends, beyond or {}
    if impl is None:
        impl = row.default.get("cpu" if device == "meta" else device, "reference")
        if x.dtype not in backends[impl].dtypes or beyond.get(impl):
            impl = "reference"
        # a graph is for all sizes
        if impl == "cpu" and row.small and not torch.compiler.is_compiling() and x.shape[1:].numel() <= row.small:
            impl = "reference"
    if not isinstance(impl, str) or impl not in backends:
        raise ValueError(f"{op}: impl must be None or one of {tuple(backends)}, got {impl!r}")
    if impl == "cpu" and device not in ("cpu", "meta"):
        raise ValueError(f"{op}: impl='cpu' needs CPU tensors, got {x.device}; use impl=None")
    takes = backends[impl]
    interpreted = impl == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if takes.needs and device not in ("cuda", "meta") and not interpreted:
        other = " (or TRITON_INTERPRET=1)" if impl == "triton" else ""
        raise ValueError(f"{op}: impl={impl!r} needs CUDA tensors{other}, got {x.device}; use impl=None")
    if x.dtype not in takes.dtypes:
        names = ", ".join(str(t).removeprefix("torch.") for t in takes.dtypes)
        way_out = "impl=None" if x.dtype in backends["reference"].dtypes else f"{name}.to({takes.dtypes[0]})"
        raise ValueError(f"{op}: {name} must be {names} for impl={impl!r}, got {x.dtype}; use {way_out}")
    if came := beyond.get(impl):
        default = row.default["cuda"]
        way_out = "reference" if beyond.get(default) or x.dtype not in backends[default].dtypes else default
        raise ValueError(f"{op}: impl={impl!r} takes {takes.limit}, got {came}; use impl={way_out!r}")
    return impl


def product(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` in their own dtype, under autocast too, which would take it in a narrower one."""
    if x.device.type == "meta":  # has no autocast
        return x @ y
    with torch.autocast(x.device.type, enabled=False):
        return x @ y


def on_its_device(launcher: Callable[P, T]) -> Callable[P, T]:
    """Makes the device of the first tensor current while ``launcher`` runs: Triton launches on the current one."""

    @wraps(launcher)
    def launch(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
            return launcher(*args, **kwargs)

    return launch


def check_grid(op: str, **sizes: int) -> None:
    """Sizes that a launch spreads over a grid's second or third axis.

    Raises:
        ValueError: one is above 65535, which CUDA refuses.
    """
    for name, size in sizes.items():
        if size > 65535:
            raise ValueError(f"{op}: {name} must be at most 65535 for impl='triton', got {size}; split the call")
