"""Why a library cannot serve here."""

from __future__ import annotations

from importlib.util import find_spec


class Unavailable(Exception):
    """Why a peer cannot run on this machine or for this workload."""


def installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
