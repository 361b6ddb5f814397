"""Norms of other libraries. Not run yet, written from the sources named at each: Liger and quack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .availability import Unavailable, installed


@dataclass(frozen=True)
class NormPeer:
    """A library's LayerNorm as ``norm(x, weight, bias, eps)``, or its RMSNorm as ``norm(x, weight, eps)``; last dim."""

    name: str
    what: str
    package: str
    module: str
    make: Callable[[], Callable]

    def load(self, device: str) -> Callable:
        """
        Raises:
            Unavailable: another device, or not installed.
        """
        if device != "cuda":
            raise Unavailable("runs on cuda only")
        if not installed(self.module):
            raise Unavailable(f"{self.package} is not installed")
        return self.make()


def _liger_layer_norm() -> Callable:
    """Source: liger_kernel/transformers/functional.py."""
    from liger_kernel.transformers.functional import liger_layer_norm

    return liger_layer_norm


def _liger_rms_norm() -> Callable:
    from liger_kernel.transformers.functional import liger_rms_norm

    # in place it would overwrite the incoming gradient, which the next call needs
    return lambda x, weight, eps: liger_rms_norm(x, weight, eps, in_place=False)


def _quack_rms_norm() -> Callable:
    """Source: quack/rmsnorm.py. Its LayerNorm has no bias, so it cannot stand for a shift."""
    from quack import rmsnorm

    return lambda x, weight, eps: rmsnorm(x, weight, eps=eps)


NORMS = (
    NormPeer("liger", "layer_norm", "liger-kernel", "liger_kernel", _liger_layer_norm),
    NormPeer("liger", "rms_norm", "liger-kernel", "liger_kernel", _liger_rms_norm),
    NormPeer("quack", "rms_norm", "quack-kernels", "quack", _quack_rms_norm),
)
