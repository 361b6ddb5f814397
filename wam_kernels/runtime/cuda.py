"""The compiled CUDA kernels, loaded by the first call that wants them; importing wam_kernels probes nothing."""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from ..ops import OPS, Need

_HOPPER = "90a"


def extension() -> ModuleType:
    """The module ``wam_kernels._C``. Loading it needs no driver; calling its functions needs a GPU.

    Raises:
        RuntimeError: the module was not built, or does not load; the message says how to build it.
    """
    try:
        module = import_module("wam_kernels._C")
        if not hasattr(module, "architectures"):  # an editable install whose sources have moved on
            raise ImportError("it was built from older sources")
    except ImportError as error:
        raise RuntimeError(
            f"wam_kernels._C, the CUDA extension, cannot be loaded ({error}); to build it, put nvcc (CUDA toolkit 12.3 "
            "or newer) on PATH and run `WAM_CUDA=1 pip install --no-deps --force-reinstall .` in a checkout of "
            "wam-kernels"
        ) from error
    return module


def architectures() -> tuple[str, ...]:
    """What the extension's kernels were compiled for, as nvcc names it: ``("80", "90a")``.

    Raises:
        RuntimeError: as :func:`extension`.
    """
    return tuple(extension().architectures.split())


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs machine code that was compiled for ``architecture``.

    It does if the code is for its own compute capability or an earlier one of the same major number; code for ``90a``
    runs on 9.0 alone, and Orin (8.7) runs nothing that was built for other GPUs.
    """
    number = int(architecture.rstrip("af"))
    exact = architecture.endswith("a") or capability == (8, 7)
    of_code = divmod(number, 10)
    return of_code == capability or (not exact and of_code[0] == capability[0] and of_code[1] <= capability[1])


def architecture_names(architectures: tuple[str, ...]) -> str:
    return ", ".join(f"sm_{architecture}" for architecture in architectures)


def refusal(
    needs: tuple[Need, ...], built_for: tuple[str, ...], capability: tuple[int, int], device: str = "this device"
) -> str | None:
    """Why a GPU has no kernel of a backend with these needs, or None where it has one."""
    number = "{}{}".format(*capability)
    if Need.SM90 in needs:
        return None if runs_on(_HOPPER, capability) else f"needs sm_90; {device} is sm_{number}; use impl='triton'"
    if any(runs_on(architecture, capability) for architecture in built_for):
        return None
    return (
        f"is built for {architecture_names(built_for)}; {device} is sm_{number}; use impl='triton', or "
        f"build it with WAM_CUDA_ARCHITECTURES={number}"
    )


@cache
def refusal_on(device: torch.device, op: str) -> str | None:
    """:func:`refusal` of a device for the CUDA kernels of an op, by its package; looked up once."""
    needs = next(row.backends["cuda"].needs for row in OPS.values() if row.package == op)
    return refusal(needs, architectures(), torch.cuda.get_device_capability(device))


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether the kernels for sm_90a run there; looked up once."""
    return runs_on(_HOPPER, torch.cuda.get_device_capability(device))


def launch(function: str, like: Tensor, **arguments: object) -> None:
    """Calls ``function`` of the extension with the dtype of ``like``, on its device and the current stream there.

    Raises:
        RuntimeError: the extension has no kernel of this op for the device; names both.
    """
    op = function.removesuffix("_forward").removesuffix("_backward")
    if like.is_cuda and (reason := refusal_on(like.device, op)):
        raise RuntimeError(f"impl='cuda' of {op} {reason}")
    with torch.cuda.device_of(like):
        stream = torch.cuda.current_stream().cuda_stream
        dtype = str(like.dtype).removeprefix("torch.")
        getattr(extension(), function)(**arguments, dtype=dtype, stream=stream)
