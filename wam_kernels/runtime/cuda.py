"""The compiled CUDA kernels, loaded by the first call that wants them; importing wam_kernels probes nothing."""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor


def extension() -> ModuleType:
    """The module ``wam_kernels._C``. Loading it needs no driver; calling its functions needs a GPU.

    Raises:
        RuntimeError: the module was not built, or does not load; the message says how to build it.
    """
    try:
        return import_module("wam_kernels._C")
    except ImportError as error:
        raise RuntimeError(
            f"wam_kernels._C, the CUDA extension, cannot be loaded ({error}); to build it, put nvcc (CUDA toolkit 12.3 "
            "or newer) on PATH and run `WAM_CUDA=1 pip install --no-deps --force-reinstall .` in a checkout of "
            "wam-kernels"
        ) from error


def launch(function: str, like: Tensor, **arguments: object) -> None:
    """Calls ``function`` of the extension with the dtype of ``like``, on its device and the current stream there."""
    with torch.cuda.device_of(like):
        stream = torch.cuda.current_stream().cuda_stream
        dtype = str(like.dtype).removeprefix("torch.")
        getattr(extension(), function)(**arguments, dtype=dtype, stream=stream)
