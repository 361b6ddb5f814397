"""Who attends to whom: the predicate, the programs it follows from, and visibility that is given as ranges."""

from . import systems  # noqa: F401 - registers its programs
from .programs import Attends, InteractionProgram
from .ranges import Ranges
from .registry import PROGRAMS, RULE_PROGRAMS, register_program, unregister_program
from .rules import RuleGeometry, RuleProgram
from .visibility import HISTORIES, Geometry, dense_mask, tokens, visible

__all__ = [
    "HISTORIES",
    "PROGRAMS",
    "RULE_PROGRAMS",
    "Attends",
    "Geometry",
    "InteractionProgram",
    "Ranges",
    "RuleGeometry",
    "RuleProgram",
    "dense_mask",
    "register_program",
    "tokens",
    "unregister_program",
    "visible",
]
