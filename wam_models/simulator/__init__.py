"""Simulators behind one protocol: acting in them closed loop, recording their experts, evaluating policies.

``Simulator`` is what one offers; ``load`` makes one by name; ``play`` acts in one episode of one.
"""

from importlib import import_module

# Names load on first use: a process that holds a simulator needs no torch.
_HOME = {
    "Observation": "protocol",
    "Outcome": "protocol",
    "Played": "closed_loop",
    "Simulator": "protocol",
    "control_freq": "named",
    "load": "named",
    "play": "closed_loop",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
