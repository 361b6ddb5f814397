"""The denoising loops of a chunk, as they follow from the row of its interaction program."""

from __future__ import annotations

from dataclasses import dataclass

from wam_kernels.masks.programs import STREAMS
from wam_kernels.masks.visibility import ACTION, VIDEO

from ..objectives import MODEL_PROGRAMS, Objective
from ..runtime.checks import choice

WANTS = {"both": (VIDEO, ACTION), "video": (VIDEO,), "action": (ACTION,)}


@dataclass(frozen=True)
class Stage:
    """One denoising loop of a chunk."""

    streams: tuple[int, ...]  # whose noisy tokens run through the model
    denoised: tuple[int, ...]  # of them, those that are not given
    promoted: int | None = None  # whose clean tokens a later stage attends to


def stages(
    program: str, objective: Objective, want: str, streams: tuple[int, ...] = WANTS["both"]
) -> tuple[Stage, ...]:
    """The loops that a request needs, in order; what nothing needs is left out.

    Args:
        program: One of ``MODEL_PROGRAMS``.
        objective: Says which streams are denoised and which are given.
        want: One of ``WANTS``, what the caller needs.
        streams: Those that the model has.

    Raises:
        ValueError: an unknown program, or one that has no rollout; the message says why.
    """
    row = MODEL_PROGRAMS[choice("stages: program", program, MODEL_PROGRAMS)]
    needed = row.needed(WANTS[want]) & set(streams)
    loops: list[Stage] = []
    # from the last one back: a stream becomes clean if a later stage attends to its clean copy
    for resolved in reversed(row.stages):
        streams = tuple(s for s in resolved if s in needed)
        if streams:
            later = {s for loop in loops for s in loop.streams}
            attended = {key for query, key in row.noisy_to_clean.pairs if query in later}
            denoised = tuple(s for s in streams if getattr(objective, STREAMS[s]))
            loops.insert(0, Stage(streams, denoised, next((s for s in streams if s in attended), None)))
    return tuple(loops)
