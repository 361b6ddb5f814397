"""What becomes of what this backend does not take of OpenWAM: an error, or OpenWAM's own code."""

from __future__ import annotations

import warnings


class UnsupportedError(RuntimeError):
    """Something of OpenWAM's that this backend does not take; the message names it."""


class OnUnsupported:
    """What to do with the unsupported: raise, or warn once for each reason and leave it to the original code."""

    def __init__(self, on_unsupported: str) -> None:
        self.on_unsupported = on_unsupported
        self.warned: set[str] = set()

    def refuse(self, reason: str) -> None:
        if self.on_unsupported == "error":
            raise UnsupportedError(
                f"wam_kernels.integrations.openwam: {reason} is not supported; "
                "install(on_unsupported='original') leaves it to OpenWAM's own code"
            )
        if reason not in self.warned:
            self.warned.add(reason)
            message = f"wam_kernels.integrations.openwam: {reason} is not supported and runs OpenWAM's own code"
            warnings.warn(message, stacklevel=3)
