"""A policy behind a socket, for robots whose programs speak the protocol of ``openpi-client``."""

from .server import PolicyServer

__all__ = ["PolicyServer"]
