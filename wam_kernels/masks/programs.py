"""The interaction programs, one row each: which stream attends to which, inside a chunk.

A row is all there is to a program: from it follow the predicate (``visibility``), so every mask and plan; the stages of
a rollout and what a request can leave out; pictures and lists. A row of your own comes in through
``registry.register_program``.

A row does not say what all programs have in common: a token attends to the clean tokens of earlier chunks that the
window and the history of its ``Geometry`` leave, and a clean token never attends to a noisy one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Flag
from functools import cached_property

from ..runtime.checks import identifier

VIDEO, ACTION = 0, 1
STREAMS = ("video", "action")


class Attends(Flag):
    """Which stream attends to which inside a chunk, query TO key; combined with ``|``."""

    NONE = 0
    VIDEO_TO_VIDEO = 1
    VIDEO_TO_ACTION = 2
    ACTION_TO_VIDEO = 4
    ACTION_TO_ACTION = 8
    OWN = VIDEO_TO_VIDEO | ACTION_TO_ACTION
    ALL = OWN | VIDEO_TO_ACTION | ACTION_TO_VIDEO

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(query stream, key stream) of each."""
        every = ((query, key) for query in (VIDEO, ACTION) for key in (VIDEO, ACTION))
        return tuple((query, key) for query, key in every if self.value >> (2 * query + key) & 1)


@dataclass(frozen=True)
class InteractionProgram:
    """Who attends to whom inside a chunk: one row of the table of programs.

    Args:
        name: An identifier; what ``Geometry.program`` holds.
        first: ``"video"`` or ``"action"``, the stream that is resolved first: its order block is the chunk's first.
        noisy_to_noisy: Which noisy tokens attend to noisy ones.
        noisy_to_clean: Which noisy tokens attend to clean ones, those of a stream resolved before.
        clean_to_clean: Which clean tokens attend to clean ones.

    Raises:
        ValueError: a name that is no identifier, or another ``first``.
        TypeError: a relation that is no :class:`Attends`.
    """

    name: str
    first: str
    noisy_to_noisy: Attends
    noisy_to_clean: Attends
    clean_to_clean: Attends

    def __post_init__(self) -> None:
        identifier("InteractionProgram", self.name)
        if self.first not in STREAMS:
            raise ValueError(f"InteractionProgram: first must be one of {STREAMS}, got {self.first!r}")
        for field in ("noisy_to_noisy", "noisy_to_clean", "clean_to_clean"):
            value = getattr(self, field)
            if not isinstance(value, Attends):
                raise TypeError(
                    f"InteractionProgram: {field} must be an Attends, got {value!r}; use as Attends.OWN, or several "
                    "combined with |"
                )

    @cached_property
    def prefixed(self) -> InteractionProgram:
        """The row that holds behind an external clean prefix: video first, and clean tokens keep to their stream."""
        return replace(self, first="video", clean_to_clean=self.clean_to_clean & Attends.OWN)

    @cached_property
    def rank(self) -> tuple[int, int]:
        """Place of video's and of action's order block in a chunk: 0 for the first."""
        return (0, 1) if self.first == "video" else (1, 0)

    def needed(self, wanted: Collection[int]) -> set[int]:
        """The streams without which ``wanted`` cannot be denoised: all that they attend to in their chunk."""
        reads = (*self.noisy_to_noisy.pairs, *self.noisy_to_clean.pairs)
        found = set(wanted)
        for _ in STREAMS:
            found |= {key for query, key in reads if query in found}
        return found

    @cached_property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """The streams as a rollout denoises them: stage after stage, those that read each other's noise in one.

        Raises:
            ValueError: the program has no rollout. In a stage there are the noisy tokens of its own streams and the
                clean copies of those of earlier stages, and a token attends to something else.
        """
        if any(query != key for query, key in self.noisy_to_noisy.pairs):
            stages: tuple[tuple[int, ...], ...] = ((VIDEO, ACTION),)
        else:
            # the stream whose clean copy is read, if any is
            before = [key for query, key in self.noisy_to_clean.pairs if query != key]
            first = before[0] if before else STREAMS.index(self.first)
            stages = ((first,), (1 - first,))
        at = {stream: number for number, stage in enumerate(stages) for stream in stage}
        for query, read in self.noisy_to_clean.pairs:
            why = f"{self.name}: noisy {STREAMS[query]} attends to clean {STREAMS[read]} of its own chunk"
            if at[read] >= at[query]:
                raise ValueError(f"{why}, which no earlier stage has made")
            for copied, key in self.clean_to_clean.pairs:
                if copied == read and at[key] > at[read]:
                    raise ValueError(f"{why}, and that to clean {STREAMS[key]}, which no earlier stage has made")
        return stages

    @property
    def has_rollout(self) -> bool:
        """Whether :attr:`stages` are there."""
        try:
            return bool(self.stages)
        except ValueError:
            return False


_NONE, _OWN, _ALL = Attends.NONE, Attends.OWN, Attends.ALL
_V_TO_A, _A_TO_V = Attends.VIDEO_TO_ACTION, Attends.ACTION_TO_VIDEO

# Without an external prefix; ``InteractionProgram.prefixed`` says what that changes.
TABLE = (
    #                  name                     first     noisy to noisy  noisy to clean  clean to clean
    # one stream after the other: the second attends to the clean copy of the first
    InteractionProgram("video_then_action",     "video",  _OWN,           _A_TO_V,        _OWN | _A_TO_V),
    InteractionProgram("action_then_video",     "action", _OWN,           _V_TO_A,        _OWN | _V_TO_A),
    # both at the same step: each attends to both, or to itself alone
    InteractionProgram("joint",                 "video",  _ALL,           _NONE,          _OWN | _A_TO_V),
    InteractionProgram("decoupled_same_step",   "video",  _OWN,           _NONE,          _OWN),
    # both at the same step, and one of them attends to the noisy other
    InteractionProgram("video_noisy_to_action", "video",  _OWN | _A_TO_V, _NONE,          _OWN | _A_TO_V),
    InteractionProgram("action_noisy_to_video", "action", _OWN | _V_TO_A, _NONE,          _OWN | _V_TO_A),
)  # fmt: skip
