"""Timing, checking, recording and printing shared by the suites: a number is kept with what redoes it."""

from .ceilings import bandwidth, ceilings
from .checking import (
    Function,
    correct_providers,
    first_line,
    outputs_and_gradients,
    own_backends,
    require_equal,
)
from .options import Options
from .recording import environment, record
from .table import table
from .timing import held_megabytes, measure, peak_megabytes, percentiles, rotated

__all__ = [
    "Function",
    "Options",
    "bandwidth",
    "ceilings",
    "correct_providers",
    "environment",
    "first_line",
    "held_megabytes",
    "measure",
    "outputs_and_gradients",
    "own_backends",
    "peak_megabytes",
    "percentiles",
    "record",
    "require_equal",
    "rotated",
    "table",
]
