"""What the ops' choice of a backend has in common. Devices and names only, so it traces; and what launchers share."""

import os
from collections.abc import Callable, Collection
from functools import wraps
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

_MODULES = {"cpu": ".cpu", "triton": ".kernel_triton", "cuda": ".kernel_cuda"}


def launchers(package: str, impl: str) -> ModuleType:
    """The module of an op's folder with the launchers of ``impl``; imported at the first call that needs it.

    Triton and the compiled extension are optional.
    """
    return import_module(_MODULES[impl], package)


def check_impl(op: str, impl: str, impls: Collection[str], device: torch.device) -> None:
    """``impl`` is one of the op's and runs on ``device``.

    Raises:
        ValueError: names the op, the backends that there are or the device that it needs, and what came.
    """
    if impl not in impls:
        raise ValueError(f"{op}: impl must be None or one of {tuple(impls)}, got {impl!r}")
    # no kernel runs there: every backend gives the same shapes
    if device.type == "meta":
        return
    if impl == "cpu" and device.type != "cpu":
        raise ValueError(f"{op}: impl='cpu' needs CPU tensors, got {device}; use impl=None")
    if impl == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"{op}: impl='triton' needs CUDA tensors (or TRITON_INTERPRET=1), got {device}; use impl=None")
    if impl == "cuda" and device.type != "cuda":
        raise ValueError(f"{op}: impl='cuda' needs CUDA tensors, got {device}; use impl=None")


def on_its_device(launcher: Callable) -> Callable:
    """Makes the device of the first tensor current while ``launcher`` runs: Triton launches on the current one."""

    @wraps(launcher)
    def launch(*args):
        with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
            return launcher(*args)

    return launch


def check_grid(op: str, **sizes: int) -> None:
    """Sizes that a launch spreads over a grid's second or third axis.

    Raises:
        ValueError: one is above 65535, which CUDA refuses.
    """
    for name, size in sizes.items():
        if size > 65535:
            raise ValueError(f"{op}: {name} must be at most 65535 for impl='triton', got {size}; split the call")
