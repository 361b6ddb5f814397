"""What a compiled plan is: index tensors of both sides, which the attention kernels walk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..masks.ranges import Ranges
from ..masks.visibility import Geometry, dense_mask, tokens
from ..runtime.host import device_of, host_side
from .boxes import Boxes, compile_boxes
from .runs import Runs, compile_runs
from .side_rows import BatchRows, Stops, batch_rows, frozen_streams, stopped_streams
from .sides import Side, Sides, compile_sides
from .tile_shape import TileShape

FORMS = ("cpu", "triton", "cuda")  # the backends that walk a form of a plan
# the backend whose form a plan has from the start, by the kind of its device
_FIRST = {"cpu": "cpu", "cuda": "triton"}


class Plan:
    """What ``block_attention`` needs to know about a batch. Made by :func:`compile_plan`; immutable.

    Every backend has a form of its own: ``"cpu"`` walks ``runs``, ``"triton"`` walks ``queries``, ``query_gradients``
    and ``keys``, ``"cuda"`` walks ``boxes``. A form is compiled at its first use, on the host, and kept.

    Can be copied and pickled, a DataLoader's workers may send it: as its samples and the forms that it has.

    Attributes:
        length: Query tokens S of one batch element. Tensors of another length are refused.
        key_length: Key tokens T of one batch element; S unless the plan was made from rectangular ``Ranges``.
        batch: Batch elements; 1 serves any batch size with the same visibility.
        visible_pairs: Pairs of a query and a key that it attends to, over the batch elements of the plan.
        gradient_pairs: Those of them through which keys and values get gradients: without a stop-gradient, all.
        query_gradient_pairs: Those through which queries get gradients: without frozen streams, all.
        stop_gradient: Pairs (query stream, key stream) whose keys and values get none, as ``compile_plan`` was told.
        frozen: Streams that get none at all, likewise.
        device: Where the index tensors live; q, k, v must be there too.
    """

    def __init__(
        self,
        batch_geometries: tuple[tuple[Geometry | Ranges, ...], ...],
        stops: Stops,
        lengths: tuple[int, int],
        pairs: tuple[int, int, int],
        shapes: tuple[TileShape, TileShape],
        device: torch.device,
        forms: tuple[Runs | None, Sides | None, Boxes | None] = (None, None, None),
        rows: BatchRows | None = None,
    ) -> None:
        self.geometries, self._stops = batch_geometries, stops
        self.stop_gradient, self.frozen = stops
        self.batch = len(batch_geometries)
        self.length, self.key_length = lengths
        self.visible_pairs, self.gradient_pairs, self.query_gradient_pairs = pairs
        self.device = device
        self._shapes, self._rows = shapes, rows
        self._runs, self._sides, self._boxes = forms

    @property
    def runs(self) -> Tensor:
        """Runs of queries that attend to the same keys, for ``impl="cpu"``: :class:`wam_kernels.plan.runs.Runs`."""
        return self._of_runs().rows

    @property
    def queries(self) -> Side:
        """Tiles of queries, for ``impl="triton"``."""
        return self._of_sides().queries

    @property
    def query_gradients(self) -> Side:
        """The same tiles for dq: without steps where all queries of a tile are frozen."""
        return self._of_sides().query_gradients

    @property
    def keys(self) -> Side:
        """Tiles of keys, for ``impl="triton"``."""
        return self._of_sides().keys

    @property
    def boxes(self) -> Boxes:
        """Both sides as full steps and boxes of 128-row tiles, for ``impl="cuda"``."""
        if self._boxes is None:
            self._boxes = self._compiled("cuda")
        return self._boxes

    def _of_runs(self) -> Runs:
        if self._runs is None:
            self._runs = self._compiled("cpu")
        return self._runs

    def _of_sides(self) -> Sides:
        if self._sides is None:
            self._sides = self._compiled("triton")
        return self._sides

    @host_side
    def _compiled(self, impl: str) -> Any:
        """The form that a backend walks; torch.compile cannot trace it."""
        if self._rows is None:
            self._rows = batch_rows(self.geometries, (self.length, self.key_length), self._stops)
        form: Any
        if impl == "triton":
            form = compile_sides(self._rows, self._shapes)
        else:
            form = compile_runs(self._rows) if impl == "cpu" else compile_boxes(self._rows)
        return form if self.device.type == "cpu" else form.to(self.device)

    def compile_for(self, impl: str | None = None) -> None:
        """Make what a backend walks now and not at its first use. Default: the backend of CPU or CUDA tensors."""
        impl = impl or _FIRST.get(self.device.type)
        if impl in ("cpu", "triton"):
            self._of_runs()
        if impl == "triton":
            self._of_sides()
        elif impl == "cuda":
            self.boxes  # noqa: B018

    @property
    def full_step(self) -> int:
        """Tokens of a full step of either side's tiles."""
        return self._shapes[0].step

    @property
    def efficiency(self) -> float:
        """Visible pairs / computed pairs of the forward, with the tiles that the kernel uses."""
        return self.visible_pairs / max(1, self.queries.computed_pairs)

    @property
    def key_efficiency(self) -> float:
        """Gradient pairs / computed pairs of dk and dv, with the tiles that the kernel uses."""
        return self.gradient_pairs / max(1, self.keys.computed_pairs)

    @property
    def density(self) -> float:
        """Visible pairs / all pairs."""
        return self.visible_pairs / max(1, self.batch * self.length * self.key_length)

    def tensors(self, impl: str = "triton") -> list[Tensor]:
        """What the registered op reads with ``impl``, "triton" or "cpu": query side, key side, tiles of dq, runs with a
        gradient, runs.

        Those that the backend does not walk are empty; runs are always there, to count FLOPs by.
        """
        runs = self._of_runs()
        if impl == "triton":
            sides = [*self.queries.tensors(), *self.keys.tensors(), self.query_gradients.tiles]
            return [*sides, runs.gradient, runs.rows]
        return [*(runs.nothing,) * (2 * len(Side.FIELDS) + 1), runs.gradient, runs.rows]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Plan:
        """The same plan on another device, each of its forms in one copy; itself when it is there already."""
        return self if device == self.device else self._moved(device, non_blocking)

    @host_side
    def _moved(self, device: torch.device | str, non_blocking: bool) -> Plan:
        device = device_of("Plan.to", device)
        if device == self.device:
            return self
        geometries, stops, lengths, pairs, shapes, _, forms = self._parts()
        there: Any = tuple(form and form.to(device, non_blocking) for form in forms)
        plan = Plan(geometries, stops, lengths, pairs, shapes, device, there, self._rows)
        plan.compile_for()
        return plan

    def _parts(self) -> tuple:
        """What it is made of."""
        lengths = self.length, self.key_length
        pairs = self.visible_pairs, self.gradient_pairs, self.query_gradient_pairs
        forms = self._runs, self._sides, self._boxes
        return self.geometries, self._stops, lengths, pairs, self._shapes, self.device, forms

    def __reduce__(self) -> tuple:
        return Plan, self._parts()

    @host_side
    def mask(self, gradient: bool = False) -> Tensor:
        """Dense bool ``[batch, 1, S, T]`` straight from the predicate: for the reference backend and for tests.

        With ``gradient`` only the pairs through which keys and values get gradients.
        """
        mask = torch.zeros(self.batch, 1, self.length, self.key_length, dtype=torch.bool, device="cpu")
        for b, samples in enumerate(self.geometries):
            q, k = 0, 0
            for sample in samples:
                if isinstance(sample, Ranges):
                    dense = sample.dense_mask(gradient)
                else:
                    dense, stream = dense_mask(sample), tokens(sample).stream
                    if gradient:
                        dense &= ~stopped_streams(self._stops)[stream[:, None], stream]
                mask[b, 0, q : q + sample.length, k : k + sample.key_length] = torch.from_numpy(dense)
                q, k = q + sample.length, k + sample.key_length
        return mask.to(self.device)

    @host_side
    def frozen_queries(self) -> Tensor:
        """bool ``[batch, S]``: the queries that get no gradient, for the reference backend and for tests."""
        frozen = torch.zeros(self.batch, self.length, dtype=torch.bool, device="cpu")
        for b, samples in enumerate(self.geometries):
            q = 0
            for sample in samples:
                if isinstance(sample, Ranges):
                    of_token = sample.frozen_rows.repeat(sample.rows.tokens)
                else:
                    of_token = frozen_streams(self._stops)[tokens(sample).stream]
                frozen[b, q : q + sample.length] = torch.from_numpy(of_token)
                q += sample.length
        return frozen.to(self.device)

    def __repr__(self) -> str:
        stopped = self.visible_pairs - self.gradient_pairs
        return (
            f"Plan(batch={self.batch}, length={self.length}, density={self.density:.3f}, "
            f"efficiency={self.efficiency:.3f}, "
            + (f"stopped_pairs={stopped}, " if stopped else "")
            + f"device={self.device})"
        )
