"""The modes of PyTorch that an episode's tensors are made in."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def in_plain_mode(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Out of reach of the caller's grad mode, inference mode and autocast: what it makes serves calls in any mode."""

    @wraps(method)
    def run(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        autocast = torch.autocast(self.model.device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), autocast:
            return method(self, *args, **kwargs)

    return run
