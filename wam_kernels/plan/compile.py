"""Plans: a geometry compiled into the tiles that the attention kernels walk, in time O(tokens x ranges).

A plan has two *sides*. The query side lists, for every tile of queries, the keys it visits (forward and dQ); the
key side lists, for every tile of keys, the queries it visits (dK, dV). How a visit looks depends on the backend, each
of which has a form of its own: ``runs`` (CPU), ``sides`` (Triton), ``boxes`` (CUDA). All follow from ``side_rows``.

Row order decides the efficiency: one action chunk is only 4 to 16 tokens. Tiles of queries take rows by (sample,
stream, chunk, noise): noisy and clean tokens of a chunk attend to almost the same history, and an action tile spans few
chunks. Tiles of keys take them by (sample, stream, noise, chunk): a noisy token is attended to by its own chunk alone,
a clean one by all that follow. The incomplete tile of such a row set is put where the least is attended to, and so
wasted: first of the queries, last of the keys.

No token attends to another sample, so each distinct one is compiled once, with tokens that count from its first one,
and then moved to every place where it lies. What is large (the tokens of tiles and of steps) is written straight into
the form's one buffer: touching fresh memory costs more than computing what goes there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

import torch

from ..masks.programs import STREAMS
from ..masks.ranges import Ranges
from ..masks.rules import RuleGeometry
from ..masks.visibility import Geometry
from ..runtime.checks import MAX_INT, integer
from ..runtime.host import device_of, eager, host_side
from .plan import FORMS, Plan
from .side_rows import Stops, StreamPairs, batch_rows
from .tile_shape import LONG_WINDOW, TileShape, tile_shape

# What a plan is made of: one sample, whose tokens attend to each other and nothing else.
Sample = Geometry | RuleGeometry | Ranges


@eager
def compile_plan(
    batch: Sample | Sequence[Sample | Sequence[Sample]],
    *,
    length: int | None = None,
    key_length: int | None = None,
    device: torch.device | str = "cpu",
    tile: TileShape | None = None,
    impl: str | None = None,
    stop_gradient: Collection[tuple[str, str]] = (),
    frozen: Collection[str] = (),
) -> Plan:
    """Compile geometries into a :class:`Plan`. Cached by geometry; never builds anything of size S x S.

    Args:
        batch: One sample (a :class:`Geometry`, a :class:`RuleGeometry` or :class:`Ranges`) shared by every batch
            element; or one entry per batch element, each a sample or a sequence of samples packed one after another.
        length: Query tokens of every batch element; the rest is padding, fully masked. Default: the longest one.
        key_length: Key tokens of every batch element, the rest attended to by none. Default: ``length`` where all
            samples have as many keys as queries, else the longest element.
        device: Where the plan's index tensors go.
        tile: Tiles of both sides for Triton; default by :func:`tile_shape`. For measurements.
        impl: The backend of ``block_attention`` whose index tensors are made now: ``"cpu"``, ``"triton"``, ``"cuda"``.
            Those of the others are made at their first use, which ``torch.compile`` cannot trace. Default: the one
            that tensors on ``device`` get.
        stop_gradient: Pairs (query stream, key stream): keys and values of that stream get no gradient from those
            queries, as if they were detached for them. The forward and the gradients of the queries are as without.
            Streams of a Geometry are ``"video"`` and ``"action"``, those of a RuleGeometry are its ``segments``.
            ``Ranges`` mark their own entries.
        frozen: Streams of which nothing gets a gradient: neither their queries, whose tiles dq leaves out, nor their
            keys and values, whatever queries attend to them. ``Ranges`` name their own queries.

    Raises:
        ValueError: an empty batch, no queries or no keys at all, ``length`` or ``key_length`` that is no integer or
            shorter than the samples, more tokens than int32 counts (than boxes can name, for ``impl="cuda"``),
            another ``impl``, or a ``stop_gradient`` or ``frozen`` that is no such pairs or names, or names no stream of
            some sample.
        TypeError: an entry that is none of the three.
    """
    stops = Stops(_stream_pairs(stop_gradient), _stream_names(frozen))
    packed = _packed(batch, stops)
    lengths = [[(s.length, s.key_length) for s in samples] for samples in packed]
    square = all(queries == keys for samples in lengths for queries, keys in samples)
    longest = max(sum(queries for queries, _ in samples) for samples in lengths)
    longest_keys = max(sum(keys for _, keys in samples) for samples in lengths)
    length = integer("compile_plan", "length", longest if length is None else length)
    if key_length is None:
        key_length = length if square else longest_keys
    key_length = integer("compile_plan", "key_length", key_length)
    for name, value, least in (("length", length, longest), ("key_length", key_length, longest_keys)):
        if value < least:
            raise ValueError(f"compile_plan: {name} must be at least {least} (the longest element), got {value}")
    if length == 0 or key_length == 0:
        raise ValueError(
            f"compile_plan: batch must hold at least one query and one key, got {length} queries and {key_length} "
            "keys; attention over no keys gives 0, so leave the call out"
        )
    if len(packed) * max(length, key_length) > MAX_INT:
        raise ValueError(
            f"compile_plan: batch must hold at most {MAX_INT} tokens in all, got {len(packed)} elements of "
            f"{max(length, key_length)}; split the batch"
        )
    if tile is not None and not isinstance(tile, TileShape):
        raise TypeError(f"compile_plan: tile must be a TileShape, got {type(tile).__name__}")
    if impl not in (None, *FORMS):
        raise ValueError(f"compile_plan: impl must be one of {', '.join(FORMS)} or None, got {impl!r}")
    # what is tuned for this GPU is known as soon as CUDA runs, so plans from before are others
    tuned_tiles = tile is None and torch.cuda.is_initialized()
    plan = compiled(packed, stops, (length, key_length), tile, tuned_tiles, device_of("compile_plan", device))
    plan.compile_for(impl)
    return plan


def _listed(samples: Any) -> tuple:
    """A sequence as a tuple; anything else, a sample above all, as a tuple of it alone."""
    try:
        return (samples,) if isinstance(samples, Sample) else tuple(samples)
    except TypeError:
        return (samples,)


def _packed(batch: Any, stops: Stops) -> tuple[tuple[Geometry | Ranges, ...], ...]:
    """The samples of each batch element, those of rules as ranges."""
    packed = tuple(_listed(entry) for entry in _listed(batch))
    if not packed:
        raise ValueError("compile_plan: batch must hold at least one geometry, got none; pass a Geometry")
    for samples in packed:
        for sample in samples:
            if not isinstance(sample, Sample):
                kind = type(sample).__name__
                raise TypeError(f"compile_plan: batch must hold Geometry, RuleGeometry or Ranges objects, got {kind}")
            _require_streams(sample, stops)
    return tuple(tuple(_ranges(s, stops) if isinstance(s, RuleGeometry) else s for s in each) for each in packed)


def _stream_pairs(stop_gradient: Any) -> StreamPairs:
    """The pairs, each once and sorted, so that equal ones make one plan."""
    if not isinstance(stop_gradient, tuple | list | set | frozenset):
        stop_gradient = (stop_gradient,)  # no pair: refused below
    for pair in stop_gradient:
        names = pair if isinstance(pair, tuple | list) else ()
        if len(names) != 2 or not all(isinstance(name, str) for name in names):
            raise ValueError(
                "compile_plan: stop_gradient must hold pairs (query stream, key stream) of names, got "
                f"{pair!r}; use as [('action', 'video')]"
            )
    return tuple(sorted({(query, key) for query, key in stop_gradient}))


def _stream_names(frozen: Any) -> tuple[str, ...]:
    """The names, each once and sorted, so that equal ones make one plan."""
    if not isinstance(frozen, tuple | list | set | frozenset) or not all(isinstance(name, str) for name in frozen):
        raise ValueError(f"compile_plan: frozen must hold names of streams, got {frozen!r}; use as ['video']")
    return tuple(sorted(set(frozen)))


def _require_streams(sample: Sample, stops: Stops) -> None:
    named = [("stop_gradient", name) for pair in stops.pairs for name in pair] + [("frozen", s) for s in stops.frozen]
    for argument, name in named:
        if isinstance(sample, Ranges):
            raise ValueError(
                f"compile_plan: {argument} must come with samples that have streams, got Ranges; mark theirs instead: "
                "Ranges(..., stop_gradient=[True, ...], frozen_queries=[(begin, end), ...])"
            )
        kind, known = (sample.name, sample.segments) if isinstance(sample, RuleGeometry) else (sample.program, STREAMS)
        if name not in known:
            raise ValueError(f"compile_plan: {argument} must name streams of {kind}, {known}, got {name!r}")


@lru_cache(maxsize=64)
def _ranges(sample: RuleGeometry, stops: Stops) -> Ranges:
    return sample.stopped(*stops) if any(stops) else sample.ranges


def forget_plans() -> None:
    """Drop the plans that are cached, so that the next call builds its plan: for measurements."""
    compiled.cache_clear()


@lru_cache(maxsize=64)
@host_side
def compiled(
    packed: tuple,
    stops: Stops,
    lengths: tuple[int, int],
    tile: TileShape | None,
    tuned_tiles: bool,
    device: torch.device,
) -> Plan:
    """A plan without any form: what is visible, and which tiles it gets."""
    rows = batch_rows(packed, lengths, stops)
    visible, of_queries, of_keys, _ = rows.pairs
    tile = tile or tile_shape(visible >= LONG_WINDOW * len(packed) * lengths[0])
    shapes = tile, TileShape(tile.key_rows or tile.rows, tile.step)
    return Plan(packed, stops, lengths, (visible, of_keys, of_queries), shapes, device, rows=rows)
