"""The command line: ``wam demo | train | distill | rollout | serve | export | verify | mask | bench | doctor`` ...

Every subcommand is a function ``run(args: argparse.Namespace)`` of a module that is imported when it is chosen, so
``wam --help`` needs neither torch nor time. What a user can get wrong (a flag, a file, a config field, a learning rate,
sizes beyond the memory) is raised there as :class:`UserError`, ``ValueError``, ``OSError``, ``FloatingPointError`` or
as what could not be allocated, and ends here as one line on stderr and exit code 2; ``WAM_TRACEBACK=1`` shows where it
came from.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from ..runtime.threads import limit_spinning
from .parser import COMMANDS, UserError, make_parser

__all__ = ["COMMANDS", "UserError", "main", "make_parser", "run_command"]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
    args, unknown = parser.parse_known_args(argv)
    if COMMANDS[args.command][1] is None:  # its own process parses them
        args.rest = unknown
    elif unknown:  # argparse's parse_args would name the help page of ``wam``, not that of the command
        parser.commands[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    args.argv = list(sys.argv[1:] if argv is None else argv)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    _take_any_character()
    args = _parse(argv)
    if "torch" not in sys.modules:  # else it has no effect on this process any more
        limit_spinning()
    return run_command(args.command, lambda: import_module(COMMANDS[args.command][0]).run(args))


def run_command(name: str, run: Callable[[], int | None]) -> int:
    """The exit code of ``run``; what a user can mend ends as one line on stderr, after ``wam NAME``, and code 2."""
    _take_any_character()
    try:
        return run() or 0
    except Exception as error:
        if not _mendable(error) or os.environ.get("WAM_TRACEBACK") == "1":  # a bug can raise ValueError too
            raise
        message = _one_line(error)
    except KeyboardInterrupt:
        print(f"wam {name}: interrupted", file=sys.stderr)
        return 130
    # only here has a progress bar that the error cut short gone, and ended its line
    print(f"wam {name}: error: {message}", file=sys.stderr)
    return 2


def _take_any_character() -> None:
    for stream in (sys.stdout, sys.stderr):
        # an instruction or a folder's name in characters that the terminal does not have is no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _mendable(error: Exception) -> bool:
    """By the user, that is no bug."""
    if isinstance(error, ModuleNotFoundError):
        return not (error.name or "").startswith("wam_")
    return isinstance(error, UserError | ValueError | OSError | FloatingPointError) or _out_of_memory(error)


def _out_of_memory(error: Exception) -> bool:
    # torch has a class of its own for it on a GPU alone
    lacks = isinstance(error, RuntimeError) and ("out of memory" in str(error) or "allocate memory" in str(error))
    return lacks or isinstance(error, MemoryError)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError):
        own = {"msgpack": ",serve", "websockets": ",serve", "ray": ",ray"}
        extras = f"models{own.get(error.name or '', '')}"
        way_out = f"pip install it, or 'wam-kernels[{extras}]' for all that wam needs"
        return f"the Python package {error.name!r} is not installed; {way_out}"
    if _out_of_memory(error):
        text = f"not enough memory for sizes such as those of model, batch and window: {error}"
    else:
        text = str(error)
    text = " ".join(text.split())
    return text if len(text) <= 1000 else f"{text[:900]} ... ({len(text)} characters)"  # what came can be of any length
