"""RMSNorm and rope of q and k, the CUDA kernels.

``csrc/qk_norm_rope/kernels.cu`` has the formulas and what a block owns.
Tensors go to the extension as (address, batch stride, token stride, head stride). Launched on the current stream of
their device; errors come from csrc and name the argument.
"""

from torch import Tensor

from ..runtime import cuda

# Backward: blocks of each of q and k, so also rows of partial weight gradients: three blocks on each of an H100's 132
# SMs, which is what 106 registers and 192 threads (24 x 128) leave room for. A constant, not the number of SMs, so that
# every bit is the same on every GPU. Estimated, not measured.
BLOCKS = 198


_ABSENT = (0, 0, 0, 0)


def _heads(name: str, t: Tensor | None, head_dim: int) -> tuple[int, int, int, int]:
    """Of ``[B, S, H, D]``, or of ``[B, S, inner]`` with heads side by side."""
    if t is None:
        return _ABSENT
    if t.stride(-1) != 1:
        raise ValueError(
            f"qk_norm_rope (impl='cuda'): {name} must have last-dim stride 1, got {t.stride(-1)}; "
            "pass a contiguous copy"
        )
    return t.data_ptr(), t.stride(0), t.stride(1), t.stride(2) if t.ndim == 4 else head_dim


def _table(t: Tensor) -> tuple[int, int]:
    """Address, and batch stride: 0 where all samples share the table."""
    return t.data_ptr(), t.stride(0) if t.ndim == 4 else 0


def forward(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor,
    head_dim: int, per_head: bool, interleaved: bool, eps: float, q_out: Tensor, k_out: Tensor,
    v: Tensor | None = None, v_out: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills ``q_out``, ``k_out`` and, with v, ``v_out`` ``[B, S, H, D]``, whatever their strides but the last.

    One launch.
    """
    # weights may have the dtype of q; these must outlive the call
    weight_q, weight_k = weight_q.float(), weight_k.float()
    B, S, inner = q.shape
    cuda.launch(
        "qk_norm_rope_forward", q, shape=(B, S, inner // head_dim, head_dim),
        q=_heads("q", q, head_dim), k=_heads("k", k, head_dim), v=_heads("v", v, head_dim),
        weight_q=weight_q.data_ptr(), weight_k=weight_k.data_ptr(), table=_table(table),
        q_out=_heads("q_out", q_out, head_dim), k_out=_heads("k_out", k_out, head_dim),
        v_out=_heads("v_out", v_out, head_dim), per_head=per_head, interleaved=interleaved, eps=eps,
    )  # fmt: skip


def backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor,
    head_dim: int, per_head: bool, interleaved: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk ``[B, S, inner]`` contiguous, dweight_q, dweight_k in the weights' dtype. Two launches."""
    B, S, inner = q.shape
    dtype = weight_q.dtype
    weight_q, weight_k = weight_q.float(), weight_k.float()
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    dweight_q, dweight_k = weight_q.new_empty(weight_q.shape), weight_k.new_empty(weight_k.shape)
    tokens = B * S
    tokens_per_block = -(-tokens // BLOCKS)
    blocks = -(-tokens // max(1, tokens_per_block))
    partials = weight_q.new_empty((blocks, 2, weight_q.numel()))
    cuda.launch(
        "qk_norm_rope_backward", q, shape=(B, S, inner // head_dim, head_dim),
        dq_out=_heads("dq_out", dq_out, head_dim),
        dk_out=_heads("dk_out", dk_out, head_dim), q=_heads("q", q, head_dim), k=_heads("k", k, head_dim),
        weight_q=weight_q.data_ptr(), weight_k=weight_k.data_ptr(), table=_table(table),
        dq=_heads("dq", dq, head_dim), dk=_heads("dk", dk, head_dim), dweight_q=dweight_q.data_ptr(),
        dweight_k=dweight_k.data_ptr(), partials=partials.data_ptr(), blocks=blocks,
        tokens_per_block=tokens_per_block, per_head=per_head, interleaved=interleaved, eps=eps,
    )  # fmt: skip
    return dq, dk, dweight_q.to(dtype), dweight_k.to(dtype)
