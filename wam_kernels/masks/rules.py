"""Programs that are rules: a function of sizes, which gives runs of tokens and one predicate on them.

The predicate is read once per pair of runs (a frame, a chunk, a segment), never per pair of tokens, so a sample costs
runs x runs and a plan what its ranges cost. ``wam_kernels.masks.systems`` has the rules of other systems.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from inspect import signature
from types import MappingProxyType

import numpy as np

from ..runtime.checks import MAX_INT, identifier, int_pairs, integer
from .ranges import Ranges


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of tokens, int64 ``[N]`` each; what an attribute counts is the program's business. Indexing indexes all."""

    count: np.ndarray  # tokens
    segment: np.ndarray  # index into the program's segments
    frame: np.ndarray
    block: np.ndarray
    sample: np.ndarray

    def __getitem__(self, index) -> Runs:
        return Runs(*(getattr(self, field.name)[index] for field in fields(self)))

    @property
    def length(self) -> int:
        return int(self.count.sum())

    def tokens(self) -> Runs:
        """One run for every token."""
        each = self[np.repeat(np.arange(self.count.size), self.count)]
        return Runs(np.ones_like(each.count), *(getattr(each, field.name) for field in fields(self)[1:]))


Rule = Callable[[Runs, Runs], np.ndarray]


@dataclass(frozen=True, eq=False)
class RuleGeometry:
    """One sample of a rule: its tokens and the predicate on them. ``compile_plan`` takes it like a Geometry.

    Attributes:
        name: Of the rule.
        segments: Names of the segments that ``Runs.segment`` counts.
        queries, keys: The tokens; the same object where every token is both.
        visible: May query ``q`` attend to key ``k``? Broadcasts over the attributes of runs or of tokens; returns bool.
        program, sizes: The :class:`RuleProgram` that made it and its arguments, which is how it is pickled; None for
            one that was made directly.
    """

    name: str
    segments: tuple[str, ...]
    queries: Runs
    keys: Runs
    visible: Rule
    program: RuleProgram | None = None
    sizes: Mapping[str, object] | None = None

    @property
    def length(self) -> int:
        """Query tokens."""
        return self.queries.length

    @property
    def key_length(self) -> int:
        return self.keys.length

    def dense_mask(self) -> np.ndarray:
        """The predicate on every pair of tokens, bool ``[length, key_length]``: for tests and pictures."""
        q, k = self.queries.tokens(), self.keys.tokens()
        visible = self.visible(q[:, None], k[None, :])
        return np.broadcast_to(visible, (self.length, self.key_length)).copy()

    @cached_property
    def ranges(self) -> Ranges:
        """The predicate on every pair of runs, as ranges."""
        return self.stopped(())

    def stopped(self, pairs: Collection[tuple[str, str]], frozen: Collection[str] = ()) -> Ranges:
        """As :attr:`ranges`, with a stop-gradient for the ``pairs`` (segment of the query, segment of the key) and no
        gradient to anything of the segments in ``frozen``.
        """
        shape = (self.queries.count.size, self.keys.count.size)
        visible = np.broadcast_to(self.visible(self.queries[:, None], self.keys[None, :]), shape)
        kind = visible.astype(np.int8)  # 2: with a stop-gradient
        for query, key in pairs:
            of_query, of_key = self.segments.index(query), self.segments.index(key)
            kind[visible & (self.queries.segment == of_query)[:, None] & (self.keys.segment == of_key)] = 2
        constant = [self.segments.index(name) for name in frozen]
        kind[visible & np.isin(self.keys.segment, constant)] = 2
        change = np.diff(np.pad(kind, ((0, 0), (1, 1))), axis=1) != 0
        before, after = np.pad(kind, ((0, 0), (1, 0))), np.pad(kind, ((0, 0), (0, 1)))
        row_of, begin = np.nonzero(change & (after > 0))
        _, end = np.nonzero(change & (before > 0))
        q, k = (np.concatenate([[0], runs.count.cumsum()]) for runs in (self.queries, self.keys))
        q_ranges, k_ranges = np.stack([q[row_of], q[row_of + 1]], 1), np.stack([k[begin], k[end]], 1)
        stopped, row = after[row_of, begin] == 2, np.flatnonzero(np.isin(self.queries.segment, constant))
        frozen_queries = np.stack([q[row], q[row + 1]], 1)
        return Ranges(q_ranges, k_ranges, self.length, self.key_length, stopped, frozen_queries)

    def __reduce__(self) -> tuple:
        if self.program is not None and self.sizes is not None:
            return _made_again, (self.program, dict(self.sizes))
        return RuleGeometry, (self.name, self.segments, self.queries, self.keys, self.visible)

    def __repr__(self) -> str:
        return f"RuleGeometry({self.name}, length={self.length}, key_length={self.key_length})"


def _made_again(program: RuleProgram, sizes: dict[str, object]) -> RuleGeometry:
    return program(**sizes)


@dataclass(frozen=True)
class RuleProgram:
    """A program that is a function of sizes. The same sizes give the same sample.

    Args:
        name: An identifier.
        build: Makes the :class:`RuleGeometry` of sizes, all of them keyword arguments. What it annotates ``int`` comes
            as a Python int, what it annotates ``tuple[...]`` as a tuple of pairs of them.

    Raises:
        ValueError: a name that is no identifier.
        TypeError: what cannot be called.
    """

    name: str
    build: Callable[..., RuleGeometry]

    def __post_init__(self) -> None:
        if not callable(self.build):
            raise TypeError(f"RuleProgram: build must be a function of sizes, got {self.build!r}")
        identifier("RuleProgram", self.name)
        like = {name: getattr(self.build, name, None) for name in ("__doc__", "__module__")}
        vars(self).update(like, __wrapped__=self.build)

    def __call__(self, **sizes) -> RuleGeometry:
        # before the cache, to which 2.0 and True are 2 and 1
        for size, value in sizes.items():
            kind = self._kinds.get(size, "")
            if kind == "int":
                value = integer(self.name, size, value, -MAX_INT, most=None)
                # beyond all tokens a window makes no difference
                sizes[size] = min(value, MAX_INT) if size == "window" else value
            elif kind.startswith("tuple"):
                sizes[size] = tuple(map(tuple, int_pairs(self.name, size, value).tolist()))
        return self._made(*sorted(sizes.items()))

    @cached_property
    def _kinds(self) -> dict[str, str]:
        """The annotation of each size, which is a string in some modules and a class in others."""
        parameters = signature(self.build).parameters.values()
        return {p.name: getattr(p.annotation, "__name__", str(p.annotation)) for p in parameters}

    @cached_property
    def _made(self) -> Callable[..., RuleGeometry]:
        @lru_cache
        def made(*sizes: tuple[str, object]) -> RuleGeometry:
            sample = self.build(**dict(sizes))
            if not isinstance(sample, RuleGeometry):
                raise TypeError(f"{self.name}: its function must return a RuleGeometry, got {type(sample).__name__}")
            return replace(sample, program=self, sizes=MappingProxyType(dict(sizes)))

        return made

    def __reduce__(self) -> str | tuple:
        # where it replaced its function, as a decorator does, pickle finds it like a function
        module, name = (getattr(self.build, part, "") for part in ("__module__", "__qualname__"))
        decorated = getattr(sys.modules.get(module), name, None) is self
        return name if decorated else (RuleProgram, (self.name, self.build))
