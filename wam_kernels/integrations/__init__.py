"""Drop-in backends: one line accelerates the world-action models of others. Nothing is patched at import."""

from ._patching import Patch, Unsupported
from ._systems import accelerate, patch, unpatch

__all__ = ["Patch", "Unsupported", "accelerate", "patch", "unpatch"]
