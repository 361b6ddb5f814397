"""Context parallelism: the tokens of a sample split over processes, and in attention its heads.

Jacobs et al., "DeepSpeed Ulysses" (2023). Norms, projections and feed-forward run on a process's own tokens of every
stream; for the attention, q, k and v change from all heads of those tokens to all tokens of a share of the heads, and
its output changes back. Embeddings and heads of the model run on all tokens in every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from wam_kernels import FrameIndex

from ..model.blocks import Attend, PerStream, StreamInputs, Text, Uncast
from ..model.clips import ClipText
from ..model.dual_expert import WorldActionModel

SEQUENCE = -3  # the dim of tokens in rope tables and in q, k, v


def split_tokens(model: WorldActionModel, mesh: DeviceMesh) -> None:
    """Let the processes of a mesh with one dim share the blocks' work on every sample, wherever gradients are on.

    All of them must call the model with the same inputs. What comes out is whole in each, and so is its loss; the
    gradients of parameters are parts, whose mean over the mesh is the gradient.
    """
    stack = model.packed_block_stack
    forward = stack.forward

    def forward_split(
        streams: PerStream[StreamInputs | None],
        rope: Uncast[Tensor | None],
        text: Sequence[PerStream[Text]],
        attend: Attend,
        out: Any = None,
        wanted: Sequence[int] | None = None,
    ) -> PerStream[StreamInputs | None]:
        if not torch.is_grad_enabled():
            return forward(streams, rope, text, attend, out, wanted)
        lengths = [0 if s is None else s.x.shape[1] for s in streams]
        parts = [own_part(length, mesh) for length in lengths]
        own = [s if s is None else _cut(s, part) for s, part in zip(streams, parts, strict=True)]
        tables = [
            t if t is None else t.narrow(SEQUENCE, part.start, part.stop - part.start)
            for t, part in zip(rope.tensors, parts, strict=True)
        ]
        text = [tuple(map(_cut_text, of_block, parts)) for of_block in text]
        split = _split_attend(attend, lengths, parts, mesh)
        after = forward(tuple(own), Uncast(*tables), text, split, None, wanted)
        return tuple(
            s if s is None or whole is None else whole._replace(x=_gathered(s.x, whole.x.shape[1], mesh))
            for s, whole in zip(after, streams, strict=True)
        )

    stack.forward = forward_split  # type: ignore[method-assign]


def own_part(length: int, mesh: DeviceMesh) -> slice:
    """This process's tokens of so many: contiguous, the first processes have most, as ``torch.chunk`` cuts."""
    each = -(-length // mesh.size())
    first = min(length, each * mesh.get_local_rank())
    return slice(first, min(length, first + each))


def _cut(stream: StreamInputs, part: slice) -> StreamInputs:
    index = stream.frame_index
    rows = FrameIndex.from_tensor(index.row_of_token[part].cpu(), index.frames, device=stream.x.device)
    return stream._replace(x=stream.x[:, part], frame_index=rows)


def _cut_text(text: Text, part: slice) -> Text:
    return text.cut(part.start, part.stop) if isinstance(text, ClipText) else text


def _split_attend(attend: Attend, lengths: list[int], parts: list[slice], mesh: DeviceMesh) -> Attend:
    own = [part.stop - part.start for part in parts]

    def attend_split(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qkv = torch.stack([q, k, v])  # [3, B, S, H, h]
        streams = [
            _moved(mine, mesh, Shard(2), Shard(3), 2, length)
            for mine, length in zip(qkv.split(own, 2), lengths, strict=True)
        ]
        out = attend(layer, *torch.cat(streams, 2).unbind(0))
        heads = q.shape[2]
        return torch.cat(
            [_moved(t, mesh, Shard(2), Shard(1), 2, heads) for t in out.split(lengths, 1)],
            1,
        )

    return attend_split


def _moved(own: Tensor, mesh: DeviceMesh, before: Placement, after: Placement, dim: int, size: int) -> Tensor:
    """This process's part of a tensor that is cut otherwise; ``size`` is that of all parts along ``dim``."""
    return _spread(own, mesh, before, dim, size).redistribute(placements=[after]).to_local()


def _gathered(own: Tensor, length: int, mesh: DeviceMesh) -> Tensor:
    """All tokens ``[B, S, D]``; the backward sums what the processes make of them."""
    whole = _spread(own, mesh, Shard(1), 1, length).redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Partial()])


def _spread(own: Tensor, mesh: DeviceMesh, placement: Placement, dim: int, size: int) -> DTensor:
    shape = torch.Size([*own.shape[:dim], size, *own.shape[dim + 1 :]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own.contiguous(), mesh, [placement], run_check=False, shape=shape, stride=stride)
