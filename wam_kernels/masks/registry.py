"""The registry of programs: every name there is, and the one way to add one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, overload

from .programs import TABLE, InteractionProgram
from .rules import RuleGeometry, RuleProgram

Program = InteractionProgram | RuleProgram

# What models call their mixture of objectives over ``joint``: a program of this name would hide behind it.
RESERVED = ("generalist_joint_denoising",)

_registered: dict[str, Program] = {}
# A Geometry holds its program's name, and plans, episodes and caches hold geometries: a name keeps its row as long as
# the process lives, registered or not.
_rows: dict[str, InteractionProgram] = {}


class Registered(Mapping):
    """The registered programs of one kind by name, as they are now: a view that cannot be written to."""

    def __init__(self, name: str, kind: type) -> None:
        self._name, self._kind = name, kind

    def __getitem__(self, name: str) -> Program:
        if name in self:
            return _registered[name]
        near = get_close_matches(str(name), self, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise KeyError(f"{self._name}: name must be one of {tuple(self)}, got {name!r}{hint}")

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and isinstance(_registered.get(name), self._kind)

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, program in _registered.items() if isinstance(program, self._kind)])

    def __len__(self) -> int:
        return sum(isinstance(program, self._kind) for program in _registered.values())

    def __repr__(self) -> str:
        return f"{self._name}{tuple(self)}"

    def __reduce__(self) -> str:
        return self._name


PROGRAMS: Mapping[str, InteractionProgram] = Registered("PROGRAMS", InteractionProgram)
RULE_PROGRAMS: Mapping[str, RuleProgram] = Registered("RULE_PROGRAMS", RuleProgram)


@overload
def register_program(program: InteractionProgram) -> InteractionProgram: ...


@overload
def register_program(program: RuleProgram | Callable[..., RuleGeometry]) -> RuleProgram: ...


def register_program(program: Program | Callable[..., RuleGeometry]) -> Program:
    """Make a program known by its name, in this process: to geometries, models, rollouts, pictures and messages.

    Args:
        program: A row (:class:`InteractionProgram`), which is then in ``PROGRAMS``; or a function of sizes, alone (so
            this is a decorator too) or as a :class:`RuleProgram`, which is then in ``RULE_PROGRAMS``.

    Returns:
        The row, or the RuleProgram.

    Raises:
        ValueError: a name that is taken, or that stood for another row before in this process.
        TypeError: neither a row nor a function.
    """
    if not isinstance(program, Program):
        function_name: Any = getattr(program, "__name__", None)
        program = RuleProgram(function_name, program)
    name = program.name
    if name in _registered or name in RESERVED:
        raise ValueError(f"register_program: name must be new, got {name!r}, which is taken; use another one")
    if isinstance(program, InteractionProgram) and _rows.setdefault(name, program) != program:
        raise ValueError(
            f"register_program: name must be new, got {name!r}, which stood for another row in this process, and "
            "plans may hold it; use another one"
        )
    _registered[name] = program
    return program


def unregister_program(name: str) -> None:
    """Take a name out of the registry. Plans made of it stay; the same row may be registered again.

    Raises:
        ValueError: nothing of this name is registered.
    """
    if name not in _registered:
        raise ValueError(f"unregister_program: name must be one of {tuple(_registered)}, got {name!r}")
    del _registered[name]


def interaction_program(name: str) -> InteractionProgram:
    """The row of a name that a Geometry holds.

    Raises:
        ValueError: the Geometry was made in another process, and here nothing was registered under this name.
    """
    if name not in _rows:
        raise ValueError(f"Geometry: program {name!r} is not known in this process; register_program it here too")
    return _rows[name]


for _row in TABLE:
    register_program(_row)
