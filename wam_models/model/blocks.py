"""The transformer blocks: the experts of all streams around one attention.

A model is a list of streams, ``config.streams``, and what it computes is a list with an entry for each, in that order:
None where a stream is absent. A stream's tokens run through its expert; streams that share one run through the same.
The tokens come in runs that share one timestep (the tokens of a frame). Everything that depends on the timestep
stays at ``[B, T, D]``; a ``FrameIndex`` tells the fused ops which row a token reads, so nothing is ever expanded to
one row per token. Attention, norms, modulation, gates, residuals and rope are ``wam_kernels`` ops; matrix products are
PyTorch's. Letters of shapes as in ``dual_expert``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from wam_kernels import FrameIndex, ada_layer_norm, block_attention, gate_residual_ada_layer_norm, qk_norm_rope

from ..config import ModelConfig
from .clips import ClipText

T = TypeVar("T")
PerStream = tuple[T, ...]  # one of each stream of ``config.streams``; None in it for a stream that is absent
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # attend(block, q, k, v), all [B, S, H, h]
# Text as one block's cross-attention takes it: projected embeddings [B, L, D], their keys and values, or of clips.
Text = Tensor | tuple[Tensor, Tensor] | ClipText


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in the dtype of sums and modulations: float32, or float64 where the model is float64."""
    return x if x.dtype == torch.float64 else x.float()


def dtype_of(linear: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """What a linear map takes; ``otherwise`` where its weight does not say: it is quantised, or behind an adapter.

    Parts of a model may differ, because some are kept in float32, or FSDP shards them with another policy.
    """
    weight = getattr(linear, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else otherwise


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dim (all heads together) of the cross-attention's q and k, which have no rope."""
    # PyTorch's fused kernel takes one dtype; under autocast x is narrower than the weight
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


@torch.no_grad()
def draw_table(table: Tensor) -> None:
    """A modulation table ``[1, N, D]`` as a new model has it."""
    table.copy_(torch.randn_like(table) / table.shape[-1] ** 0.5)


class Uncast(Generic[T]):
    """Tensors that keep their dtype where they pass from module to module.

    FSDP's mixed precision casts every float tensor that a module is given, through tuples, dicts and dataclasses, but
    does not look into other objects. In bf16, timesteps near 1000 are 4 apart and a rope table has 3 digits.
    """

    __slots__ = ("tensors",)

    def __init__(self, *tensors: T) -> None:
        self.tensors = tensors


class StreamInputs(NamedTuple):
    """What one stream brings to the blocks; row t of the modulation serves timestep t's tokens."""

    x: Tensor  # [B, S, D]
    modulation: Uncast[Tensor]  # shift1, scale1, gate1, shift2, scale2, gate2 of the blocks: [B, T, D] float32 each
    head: Uncast[Tensor]  # shift and scale of the head, likewise
    frame_index: FrameIndex  # the row of every token


class BridgeVideo(NamedTuple):
    """The video of whose features a bridge is made, where the model has a ``config.bridge_layer``."""

    video: Tensor  # [B, C, F, y, x]: the frame before a chunk, and the chunk's
    timesteps: Uncast[Tensor]  # [B, F]
    trains: bool  # whether the actions' loss reaches the video expert through it


class QKVBuffers(NamedTuple):
    """Where a block writes its normed and rotated q and k, and its v.

    Whole tensors and a place in them, not views: torch.compile cannot write to views of views.
    """

    q: Tensor  # [B, S, H, h], all of it
    k: Tensor  # [B, N, H, h], S slots of a cache from ``first_slot`` on
    v: Tensor
    first_slot: int


def stream_inputs(x_BSD: Tensor, t_proj_BT6D: Tensor, head: tuple[Tensor, ...]) -> StreamInputs:
    T = t_proj_BT6D.shape[1]
    index = FrameIndex.from_runs([x_BSD.shape[1] // T] * T, device=x_BSD.device)
    return StreamInputs(x_BSD, Uncast(*t_proj_BT6D.unbind(2)), Uncast(*head), index)


class Attention(nn.Module):
    """Projections and norms of one attention; who attends to whom is the caller's business."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.head_dim, self.eps = config.head_dim, config.eps
        self.to_q = nn.Linear(width, config.inner)
        self.to_k = nn.Linear(width, config.inner)
        self.to_v = nn.Linear(width, config.inner)
        self.to_out = nn.ModuleList([nn.Linear(config.inner, width)])
        # their weights alone are read: the norm is fused with the rotation, or rms_norm
        self.norm_q = nn.RMSNorm(config.inner)
        self.norm_k = nn.RMSNorm(config.inner)

    def rotated(
        self, x_BSD: Tensor, rope_Sh2: Tensor, out: QKVBuffers | None = None, first_token: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v ``[B, S, H, h]``; q and k are normed and rotated. Written to ``out`` where given, and all of it.

        ``first_token`` is the place of the stream's tokens among those of ``out``.
        """
        q, k, v = self.to_q(x_BSD), self.to_k(x_BSD), self.to_v(x_BSD)
        options: dict[str, Any] = {"head_dim": self.head_dim, "eps": self.eps}
        weights = self.norm_q.weight, self.norm_k.weight
        if out is not None:
            place = first_token, out.first_slot + first_token
            qk_norm_rope(q, k, *weights, rope_Sh2, v=v, out=out[:3], out_first=place, **options)
            return out[:3]
        q, k = qk_norm_rope(q, k, *weights, rope_Sh2, **options)
        return q, k, v.unflatten(-1, (-1, self.head_dim))

    def query(self, x_BSD: Tensor) -> Tensor:
        """``[B, S, H, h]``, normed. For the cross-attention, whose q and k have no positions."""
        return rms_norm(self.to_q(x_BSD), self.norm_q.weight, self.eps).unflatten(-1, (-1, self.head_dim))

    def key_value(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Two ``[B, S, H, h]``; the keys are normed."""
        k = rms_norm(self.to_k(x_BSD), self.norm_k.weight, self.eps).unflatten(-1, (-1, self.head_dim))
        return k, self.to_v(x_BSD).unflatten(-1, (-1, self.head_dim))

    def output(self, out_BSHh: Tensor) -> Tensor:
        return self.to_out[0](out_BSHh.flatten(2))


class LinearGELU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([LinearGELU(width, inner), nn.Identity(), nn.Linear(inner, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class ExpertBlock(nn.Module):
    """One expert's half of a block: what comes before the shared attention, and what comes after."""

    def __init__(self, config: ModelConfig, width: int, ffn: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, width))
        self.reset_parameters()
        self.attn1 = Attention(config, width)
        self.attn2 = Attention(config, width)
        self.norm2 = nn.LayerNorm(width, eps=config.eps)
        self.ffn = FeedForward(width, ffn)

    def reset_parameters(self) -> None:
        draw_table(self.scale_shift_table)

    def tables(self) -> tuple[Tensor, ...]:
        """What the block adds to each modulation of a stream: six ``[D]``, float32."""
        return at_least_float32(self.scale_shift_table)[0].unbind(0)

    def before(
        self, stream: StreamInputs, rope: Tensor, out: QKVBuffers | None, first_token: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        (shift, scale, *_), (shift_table, scale_table, *_) = stream.modulation.tensors, self.tables()
        h = ada_layer_norm(
            stream.x, shift, scale, stream.frame_index, shift_table=shift_table, scale_table=scale_table, eps=self.eps
        )
        return self.attn1.rotated(h, rope, out, first_token)

    def after(self, stream: StreamInputs, out_BSHh: Tensor, text: Text) -> StreamInputs:
        x, index = stream.x, stream.frame_index
        _, _, gate1, shift2, scale2, gate2 = stream.modulation.tensors
        _, _, gate1_table, shift2_table, scale2_table, gate2_table = self.tables()
        norm = self.norm2

        def add(
            x: Tensor, update: Tensor, gate: Tensor | None, shift: Tensor | None = None, scale: Tensor | None = None,
            **options: Any,
        ) -> tuple[Tensor, Any]:  # fmt: skip
            # under autocast an update comes in a narrower dtype than the residual stream
            return gate_residual_ada_layer_norm(
                x, update.to(x.dtype), gate, shift, scale, index, eps=self.eps, **options
            )

        affine = {"weight": norm.weight, "bias": norm.bias}
        x, h = add(x, self.attn1.output(out_BSHh), gate1, gate_table=gate1_table, **affine)
        tables = {"shift_table": shift2_table, "scale_table": scale2_table}
        x, h = add(x, self.cross_attention(h, text), None, shift2, scale2, **tables)
        x, _ = add(x, self.ffn(h), gate2, gate_table=gate2_table)
        return stream._replace(x=x)

    def cross_attention(self, h_BSD: Tensor, text: Text) -> Tensor:
        q = self.attn2.query(h_BSD)
        if isinstance(text, ClipText):
            k, v = (t.flatten(0, 1)[None] for t in self.attn2.key_value(text.tokens))
            return self.attn2.output(block_attention(q, k.to(q.dtype), v.to(q.dtype), text.plan))
        k, v = text if isinstance(text, tuple) else self.attn2.key_value(text)
        samples = q.shape[0]
        if samples != k.shape[0]:  # candidates of a rollout, one after the other, have its text: one sample of it
            q = q.unflatten(0, (k.shape[0], -1)).flatten(1, 2)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        return self.attn2.output(out if samples == k.shape[0] else out.unflatten(1, (-1, h_BSD.shape[1])).flatten(0, 1))


class PackedBlock(nn.Module):
    """The experts of all streams around one attention over their tokens, stream after stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.names = [f"{stream.expert}_block" for stream in config.streams]
        for stream in config.streams:
            if stream.owns_expert:
                self.add_module(f"{stream.name}_block", ExpertBlock(config, stream.width, stream.ffn))

    def expert(self, stream: int) -> ExpertBlock:
        """That which the tokens of a stream run through."""
        return cast(ExpertBlock, getattr(self, self.names[stream]))

    def forward(
        self,
        streams: PerStream[StreamInputs | None],
        rope: Uncast[Tensor | None],
        text: PerStream[Text],
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        out: QKVBuffers | None,
        wanted: PerStream[bool],
    ) -> PerStream[StreamInputs | None]:
        """As :class:`PackedBlockStack`, of one block; ``wanted`` says of each stream whether its result is needed."""
        every = enumerate(zip(streams, rope.tensors, strict=True))
        present = [(i, x, table) for i, (x, table) in every if x is not None and table is not None]
        lengths = [stream.x.shape[1] for _, stream, _ in present]
        firsts = accumulate(lengths, initial=0)
        parts = [
            self.expert(i).before(stream, table, out, first)
            for (i, stream, table), first in zip(present, firsts, strict=False)
        ]
        done: list[StreamInputs | None] = [None] * len(streams)
        if not any(wanted[i] for i, _, _ in present):
            return tuple(done)
        q, k, v = (torch.cat(part, 1) for part in zip(*parts, strict=True)) if out is None else out[:3]
        for (i, stream, _), attended in zip(present, attend(q, k, v).split(lengths, 1), strict=True):
            if wanted[i]:
                done[i] = self.expert(i).after(stream, attended, text[i])
        return tuple(done)


# attentions and matrix products
PRODUCTS = (
    torch.ops.wam.block_attention.default,
    torch.ops.wam.block_attention_boxes.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def _keep_products() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(list(PRODUCTS))


class PackedBlockStack(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.packed_blocks = nn.ModuleList(PackedBlock(config) for _ in range(config.layers))
        self.checkpoint_activations = False
        self.selective = False  # keeps what PRODUCTS give

    def forward(
        self,
        streams: PerStream[StreamInputs | None],
        rope: Uncast[Tensor | None],
        text: Sequence[PerStream[Text]],
        attend: Attend,
        out: Sequence[QKVBuffers] | None = None,
        wanted: Sequence[int] | None = None,
    ) -> PerStream[StreamInputs | None]:
        """The streams after the last block; None for a stream that is absent or not wanted.

        Args:
            streams: What goes in; None leaves a stream out.
            rope: Rope table of each stream.
            text: ``text[i]`` is the text of block i, of each stream.
            attend: ``attend(i, q, k, v)`` is the attention of block i over the tokens, stream after stream; with
                ``out``, k and v are the caches of block i.
            out: ``out[i]`` is where block i writes q, k and v; default new tensors. Inference only.
            wanted: Streams whose result the caller needs, default all: the last block computes nothing else but keys
                and values.
        """
        last, every = len(self.packed_blocks) - 1, (True,) * len(streams)
        # not `s in wanted`: with dynamic=True Dynamo makes the ints symbolic, and finds none of them
        at_last = every if wanted is None else tuple([any(i == s for i in wanted) for s in range(len(streams))])
        for i, block in enumerate(self.packed_blocks):

            def attend_in_block(q: Tensor, k: Tensor, v: Tensor, i: int = i) -> Tensor:
                return attend(i, q, k, v)

            buffers = None if out is None else out[i]
            inputs = streams, rope, text[i], attend_in_block, buffers, at_last if i == last else every
            if self.checkpoint_activations and torch.is_grad_enabled():
                contexts = _keep_products if self.selective else noop_context_fn
                streams = checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)
            else:
                streams = block(*inputs)
        return streams
