"""What MuJoCo renders with on this machine."""

from __future__ import annotations

import importlib
import os
import sys
from ctypes.util import find_library

RENDERER = (
    "pictures need EGL (Debian: apt install libegl1 libgles2 libgl1-mesa-dri; MUJOCO_GL=egl) or OSMesa (apt install "
    "libosmesa6; MUJOCO_GL=osmesa); states need neither"
)
BACKENDS = {"egl": "EGL", "osmesa": "OSMesa"}  # MuJoCo's names to libraries, the fastest first


def installed_backend() -> str | None:
    """MuJoCo's name of the first one whose library is there."""
    return next((name for name, library in BACKENDS.items() if find_library(library)), None)


def choose_backend() -> None:
    """Have MuJoCo render with what this machine has, unless ``MUJOCO_GL`` or a screen decides it.

    Raises whatever PyOpenGL and MuJoCo make of a missing library.
    """
    if "MUJOCO_GL" not in os.environ and "DISPLAY" not in os.environ:
        found = installed_backend()
        if found is None:
            raise OSError(f"neither lib{' nor lib'.join(BACKENDS.values())}")
        os.environ["MUJOCO_GL"] = found
        if "mujoco.gl_context" in sys.modules:
            importlib.reload(sys.modules["mujoco.gl_context"])  # MuJoCo was imported before, for states
    from mujoco import gl_context

    gl_context.GLContext(8, 8).free()  # a Renderer that fails on the way complains once more when it is collected


def no_renderer(where: str, error: Exception) -> ValueError:
    """What to raise for whatever a missing library led to."""
    return ValueError(f"{where}: {RENDERER} ({type(error).__name__}: {error})")
