"""Simulators by name: ``SUITE/TASK`` of the ones built in, ``MODULE:FACTORY`` of any other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from .protocol import METHODS, checked_frequency, lacking, raised

CONTROL_FREQ = 20.0  # Hz, of an adapter that does not say: LIBERO's, and so that of the shipped data
FREQUENCIES = 1e-6, 1e9  # Hz; those of data sets too
SUITES = {  # suite -> what makes a task of it
    "metaworld": "wam_models.simulator.metaworld:MetaWorld",
    "libero": "wam_models.simulator.libero:Libero",
    "gymnasium": "wam_models.simulator.gymnasium:Gymnasium",
}
Cameras = Mapping[str, tuple[int, int]]


def load(name: str, cameras: Cameras | None = None) -> Any:
    """The simulator that ``suite/task`` names, or what ``module:factory`` makes: modules of the working directory are
    found too.

    Args:
        name: ``metaworld/pick-place-v3``, ``libero/libero_object/3``, ``gymnasium/ID`` (the ID may be ``module:ID``),
            or ``module:factory``; the factory is called without arguments.
        cameras: Camera to (height, width) of the pictures to render; a factory decides that itself.

    Returns:
        A :class:`~wam_models.simulator.Simulator`, or an adapter of two methods (see :func:`~.closed_loop.play`).

    Raises:
        ValueError: no such name, or what it makes is no simulator, or one with a ``control_freq`` that is no frequency.
        ModuleNotFoundError: the suite's packages are not installed; the message says what to install.
    """
    suite, slash, task = name.partition("/")
    if suite in SUITES or (slash and ":" not in name):
        if suite not in SUITES:
            raise ValueError(f"--simulator {name}: there is no suite {suite!r}; the suites are {', '.join(SUITES)}")
        return _imported(SUITES[suite])(task, cameras or {})
    if not all(name.partition(":")):
        raise ValueError(f"--simulator must be module:factory, or suite/task as metaworld/reach-v3, got {name!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = _imported(name)()
    except Exception as error:
        raise ValueError(f"--simulator {name} cannot be loaded: {raised(error)}") from error
    finally:
        sys.path.pop(0)
    if not is_adapter(made) and (lacks := lacking(made)):
        if not any(callable(getattr(made, method, None)) for method in set(METHODS) - {"reset"}):
            lacks = [method for method in ("reset", "step") if not callable(getattr(made, method, None))]
        raise ValueError(f"--simulator {name} made a {type(made).__name__} without {' and '.join(lacks)}")
    control_freq(made)
    return made


def file_name(name: str) -> str:
    """The name of a simulator as part of a file's."""
    return name.replace("/", "+").replace(":", "+")


def is_adapter(made: object) -> bool:
    """Whether it is an adapter of two methods, ``reset`` and ``step``, and no :class:`~.protocol.Simulator`."""
    return all(callable(getattr(made, m, None)) for m in ("reset", "step")) and not hasattr(made, "act")


def control_freq(simulator: object) -> float:
    """Actions a second, in simulated time.

    Raises:
        ValueError: what the simulator says is not a positive number, or asking it raises.
    """
    try:
        freq = getattr(simulator, "control_freq", CONTROL_FREQ)
    except Exception as error:
        raise ValueError(f"simulator: control_freq raised {raised(error)}") from error
    return checked_frequency("simulator: control_freq", freq, *FREQUENCIES)


def _imported(name: str) -> Callable:
    module, _, factory = name.partition(":")
    return getattr(import_module(module), factory)
