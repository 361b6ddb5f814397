"""Block attention over a plan's boxes, the CUDA kernels for Hopper: ``csrc/README.md`` has a picture of them.

Tensors go to the extension as (address, batch stride, token stride, head stride). Launched on the current stream of
their device; errors come from csrc and name the argument.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime import cuda


def _heads(t: Tensor) -> tuple[int, int, int, int]:
    return t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)


def _side(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The tensors of a :class:`wam_kernels.plan.boxes.BoxSide`, and how many tiles it has."""
    return *(t.data_ptr() for t in tensors), tensors[0].shape[0]


def forward(
    q: Tensor, k: Tensor, v: Tensor, queries: Sequence[Tensor], shared: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out ``[B, S, H, D]`` contiguous, lse ``[B, H, S]`` float32."""
    (B, S, H, D), (T, Hkv) = q.shape, k.shape[1:3]
    out, lse = q.new_empty(q.shape), q.new_empty((B, H, S), dtype=torch.float32)
    counters = _counters(q)
    cuda.launch(
        "block_attention_forward", q, shape=(B, S, T, H, Hkv, D), q=_heads(q), k=_heads(k), v=_heads(v),
        queries=_side(queries), shared=shared, scale=scale, counters=counters.data_ptr(), out=_heads(out),
        lse=lse.data_ptr(),
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    shared: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous: two launches, the same bits every time.

    ``queries`` are those for dq: tiles of frozen ones have no steps, and leave delta and zeros.
    """
    if dout.stride(-1) != 1 or dout.data_ptr() % 16 or any(stride % 8 for stride in dout.stride()[:-1]):
        dout = dout.contiguous()  # autograd chose these strides, which TMA cannot take
    (B, S, H, D), (T, Hkv) = q.shape, k.shape[1:3]
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    delta, counters = lse.new_empty(lse.shape), _counters(q)
    cuda.launch(
        "block_attention_backward", q, shape=(B, S, T, H, Hkv, D), q=_heads(q), k=_heads(k), v=_heads(v),
        queries=_side(queries), keys=_side(keys), shared=shared, scale=scale, counters=counters.data_ptr(),
        out=_heads(out), lse=lse.data_ptr(), dout=_heads(dout), dlse=dlse.data_ptr(), delta=delta.data_ptr(),
        dq=_heads(dq), dk=_heads(dk), dv=_heads(dv),
    )  # fmt: skip
    return dq, dk, dv


def _counters(like: Tensor) -> Tensor:
    """From which blocks draw their work. Cleared by a kernel of its own, so a CUDA graph clears them at each replay."""
    return torch.zeros(2, dtype=torch.int32, device=like.device)
