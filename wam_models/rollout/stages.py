"""The denoising loops of a chunk, as they follow from the row of its interaction program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    attends: frozenset[tuple[int, int]] = frozenset()  # (query, key): whose noisy tokens attend to whose
    wanted: tuple[int, ...] = ()  # whose end the request or a later stage needs

    def forwards(self, counts: Mapping[int, int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(streams that run, those of them whose flow is needed) of each forward of the loop, in order.

        A stream that has had its ``counts[s]`` forwards, 0 if it is given, stays as it is. Its keys and values are in
        their slots, so it runs again only where another attends to it and they have changed: right after its last
        step, or where it attends to a stream that goes on itself.
        """
        for i in range(max((counts[s] for s in self.wanted if s in self.denoised), default=0)):
            live = tuple(s for s in self.denoised if i < counts[s])
            done = {s: counts[s] if s in self.denoised else 0 for s in self.streams if s not in live}
            again = [
                s for s, count in done.items()
                if any((other, s) in self.attends for other in live)
                and (i == count or any((s, other) in self.attends for other in live))
            ]  # fmt: skip
            yield tuple(sorted((*live, *again))), live


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
