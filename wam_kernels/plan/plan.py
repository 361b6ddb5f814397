"""What a compiled plan is: index tensors of both sides, which the attention kernels walk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..masks.ranges import Ranges
from ..masks.visibility import Geometry, dense_mask
from ..runtime import index_buffer
from ..runtime.host import device_of, host_side, plain
from .boxes import Boxes, compile_boxes
from .tile_shape import STEP_PART, TileShape


class Side:
    """Tiles of one side; int32 tensors that are views of one buffer.

    ``tiles`` ``[T, 5]``: batch element, begin and end in ``full``, begin and end in ``part`` (in steps), heaviest
    first. ``rows`` ``[T, tile]``: token of each row, -1 for none. ``bounds_row`` ``[T, tile]``: its row of
    ``bounds``.
    ``bounds`` ``[G, ranges, 2]``. ``full`` ``[steps]``: first token. ``part`` ``[steps, STEP_PART]``: tokens or -1.
    """

    FIELDS = ("tiles", "rows", "bounds_row", "bounds", "full", "part")
    tiles: Tensor
    rows: Tensor
    bounds_row: Tensor
    bounds: Tensor
    full: Tensor
    part: Tensor

    def __init__(self, shape: TileShape, tensors: Sequence[Tensor]) -> None:
        self.shape = shape
        for name, tensor in zip(self.FIELDS, tensors, strict=True):
            setattr(self, name, tensor)

    def tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.FIELDS]

    def __reduce__(self) -> tuple:
        # on its own it needs its views alone, not the plan's whole buffer with each
        return _unpickled_side, (self.shape, [t.clone() for t in self.tensors()])

    @property
    def computed_pairs(self) -> int:
        steps = self.full.shape[0] * self.shape.step + self.part.shape[0] * STEP_PART
        return steps * self.shape.rows


def _unpickled_side(shape: TileShape, tensors: Sequence[Tensor]) -> Side:
    return Side(shape, [plain(t) for t in tensors])


class Plan:
    """What ``block_attention`` needs to know about a batch. Made by :func:`compile_plan`; immutable.

    Can be copied and pickled, a DataLoader's workers may send it: as its samples and its one buffer.

    Attributes:
        length: Query tokens S of one batch element. Tensors of another length are refused.
        key_length: Key tokens T of one batch element; S unless the plan was made from rectangular ``Ranges``.
        batch: Batch elements; 1 serves any batch size with the same visibility.
        visible_pairs: Pairs of a query and a key that it attends to, over the batch elements of the plan.
        device: Where the index tensors live; q, k, v must be there too.
    """

    def __init__(
        self,
        batch_geometries: tuple[tuple[Geometry | Ranges, ...], ...],
        lengths: tuple[int, int],
        visible_pairs: int,
        shapes: tuple[TileShape, TileShape],
        layout: tuple[tuple[int, ...], ...],
        buffer: Tensor,
    ) -> None:
        self.geometries = batch_geometries
        self.batch = len(batch_geometries)
        self.length, self.key_length = lengths
        self.visible_pairs = visible_pairs
        self._shapes, self._layout, self.buffer = shapes, layout, plain(buffer)
        n, views = len(Side.FIELDS), index_buffer.views(layout, self.buffer)
        self.queries, self.keys = Side(shapes[0], views[:n]), Side(shapes[1], views[n : 2 * n])
        self.runs = views[2 * n]
        self._boxes: Boxes | None = None

    @property
    def device(self) -> torch.device:
        return self.buffer.device

    @property
    def efficiency(self) -> float:
        """Visible pairs / computed pairs of the forward, with the tiles that the kernel uses."""
        return self.visible_pairs / max(1, self.queries.computed_pairs)

    @property
    def density(self) -> float:
        """Visible pairs / all pairs."""
        return self.visible_pairs / max(1, self.batch * self.length * self.key_length)

    def tensors(self) -> list[Tensor]:
        """Everything a registered op reads: query side, key side, runs."""
        return [*self.queries.tensors(), *self.keys.tensors(), self.runs]

    @property
    def boxes(self) -> Boxes:
        """Both sides as full steps and boxes of 128-row tiles, for ``impl="cuda"``.

        Compiled at the first use, on the host, and kept; ``torch.compile`` cannot trace that first use.
        """
        if self._boxes is None:
            self._boxes = self._compile_boxes()
        return self._boxes

    @host_side
    def _compile_boxes(self) -> Boxes:
        boxes = compile_boxes(self.geometries, (self.length, self.key_length))
        return boxes if self.device.type == "cpu" else boxes.to(self.device)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Plan:
        """The same plan on another device, in one copy; itself when it is there already."""
        return self if device == self.device else self._moved(device, non_blocking)

    @host_side
    def _moved(self, device: torch.device | str, non_blocking: bool) -> Plan:
        device = device_of("Plan.to", device)
        if device == self.device:
            return self
        parts = self._parts()
        return Plan(*parts[:-1], parts[-1].to(device, non_blocking=non_blocking))

    def _parts(
        self,
    ) -> tuple[
        tuple[tuple[Geometry | Ranges, ...], ...],
        tuple[int, int],
        int,
        tuple[TileShape, TileShape],
        tuple[tuple[int, ...], ...],
        Tensor,
    ]:
        """What it is made of."""
        lengths = (self.length, self.key_length)
        return self.geometries, lengths, self.visible_pairs, self._shapes, self._layout, self.buffer

    def __reduce__(self) -> tuple:
        return Plan, self._parts()

    @host_side
    def mask(self) -> Tensor:
        """Dense bool ``[batch, 1, S, T]`` straight from the predicate: for the reference backend and for tests."""
        mask = torch.zeros(self.batch, 1, self.length, self.key_length, dtype=torch.bool, device="cpu")
        for b, samples in enumerate(self.geometries):
            q, k = 0, 0
            for sample in samples:
                dense = sample.dense_mask() if isinstance(sample, Ranges) else dense_mask(sample)
                mask[b, 0, q : q + sample.length, k : k + sample.key_length] = torch.from_numpy(dense)
                q, k = q + sample.length, k + sample.key_length
        return mask.to(self.device)

    def __repr__(self) -> str:
        return (
            f"Plan(batch={self.batch}, length={self.length}, density={self.density:.3f}, "
            f"efficiency={self.efficiency:.3f}, device={self.device})"
        )
