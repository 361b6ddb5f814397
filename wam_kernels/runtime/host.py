"""What is built on the host, seldom, and kept: apart from the modes of whichever call comes first, and from tracing."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

# Not traced: torch.compile breaks its graph there. As torch.compiler.disable, which would import Dynamo and Triton now.
eager = torch._disable_dynamo


def host_side(builder: Callable[P, T]) -> Callable[P, T]:
    """Decorates what builds index tensors: plain tensors, which any later call may use, whatever call builds them.

    Plans are cached, so one that is an inference tensor, a fake or a meta one, or one of a functorch level would break
    the calls after it. While ``builder`` runs there is no inference mode, no ``torch.device(...)`` or other function
    mode, no dispatch mode (``FakeTensorMode``, ``make_fx``), no functorch level; and ``torch.compile`` traces nothing.
    """

    @eager
    @wraps(builder)
    def build(*args: P.args, **kwargs: P.kwargs) -> T:
        with (
            torch.inference_mode(False),
            torch._C.DisableTorchFunction(),
            torch._C._DisableTorchDispatch(),
            torch._C._DisableFuncTorch(),
        ):
            return builder(*args, **kwargs)

    return build


def plain(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy where it was born in inference mode (unpickled, copied) and autograd would refuse it."""
    return _cloned(tensor) if tensor.is_inference() else tensor


@host_side
def _cloned(tensor: Tensor) -> Tensor:
    return tensor.clone()


def device_of(op: str, device: torch.device | str | int) -> torch.device:
    """``device`` as its tensors name it: the current device of its kind where no index is given.

    Raises:
        ValueError: not a device; names the op and what came.
    """
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"{op}: device must be a torch.device or a name such as 'cuda:0', got {device!r}") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "meta" or device.index is not None:
        return device
    return _current(device)


@host_side
def _current(device: torch.device) -> torch.device:
    return torch.empty(0, device=device).device
