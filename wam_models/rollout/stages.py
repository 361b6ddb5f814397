"""The denoising loops of a chunk, as they follow from the row of its interaction program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from wam_kernels.masks.programs import STREAMS
from wam_kernels.masks.visibility import ACTION, VIDEO

from ..objectives import MODEL_PROGRAMS, Objective
from ..runtime.checks import choice

WANTS = {"both": (VIDEO, ACTION), "video": (VIDEO,), "action": (ACTION,)}


class Pace(NamedTuple):
    """How often the streams of a stage step, and what runs between the steps of one."""

    counts: Mapping[int, int]  # forwards of each stream
    interleave: bool = False  # as RolloutConfig has it
    reuse_keys: bool = False  # likewise


class Forward(NamedTuple):
    """One forward of a denoising loop."""

    streams: tuple[int, ...]  # whose tokens run
    live: tuple[int, ...]  # of them, those whose flow is needed
    read_later: bool  # whether its keys and values stay for a later forward that does not compute them again


@dataclass(frozen=True)
class Stage:
    """One denoising loop of a chunk."""

    streams: tuple[int, ...]  # whose noisy tokens run through the model
    denoised: tuple[int, ...]  # of them, those that are not given
    promoted: int | None = None  # whose clean tokens a later stage attends to
    attends: frozenset[tuple[int, int]] = frozenset()  # (query, key): whose noisy tokens attend to whose
    wanted: tuple[int, ...] = ()  # whose end the request or a later stage needs

    def forwards(self, pace: Pace) -> list[Forward]:
        """The forwards of the loop, in order.

        A stream that takes no step at a forward stays as it is. Its keys and values are in their slots, so it runs only
        where another attends to it and they have changed: right after its last step, unless that waits for the end of
        the loop (``interleave``), or where it attends to a stream that steps, unless its keys are used again.
        """
        at = {s: self._steps_at(s, pace) for s in self.denoised}
        # a stream that never steps is read as it is given
        renewed = {s: 0 if pace.interleave else len(at.get(s, ())) for s in self.streams}
        runs = []
        for i in range(1 + max((at[s][-1] for s in self.wanted if at.get(s)), default=-1)):
            live = tuple(s for s in self.denoised if i in at[s])
            again = [
                s for s in self.streams
                if s not in live
                and any((other, s) in self.attends for other in live)
                and (i == renewed[s] or not pace.reuse_keys and any((s, other) in self.attends for other in live))
            ]  # fmt: skip
            runs.append((tuple(sorted((*live, *again))), live))
        return [
            Forward(streams, live, any((q, k) in self.attends for q in after for k in {*streams} - {*after}))
            for (streams, live), (after, _) in pairwise([*runs, ((), ())])
        ]

    def _steps_at(self, stream: int, pace: Pace) -> list[int]:
        """The forwards at which a stream steps: its first ones, or evenly among those of the stream with the most."""
        count = pace.counts[stream]
        most = max(pace.counts[s] for s in self.denoised)
        return [k * most // count if pace.interleave else k for k in range(count)]


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
            promoted = next((s for s in streams if s in attended), None)
            wanted = tuple(s for s in streams if s in WANTS[want] or s == promoted)
            pairs = frozenset((q, k) for q, k in row.noisy_to_noisy.pairs if q != k)
            loops.insert(0, Stage(streams, denoised, promoted, pairs, wanted))
    return tuple(loops)
