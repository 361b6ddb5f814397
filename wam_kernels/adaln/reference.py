"""Gated residual and adaptive LayerNorm in plain PyTorch: the definition that every backend is tested against."""

import torch
from torch import Tensor


def gate_residual_norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    gate_table: Tensor | None, shift_table: Tensor | None, scale_table: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, row_of_token: Tensor, eps: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """r (x itself where y is None) and h (None without a norm). Expands modulation to tokens. Any device."""
    acc = torch.promote_types(x.dtype, torch.float32)

    def of_token(rows_BFD: Tensor, table_D: Tensor | None) -> Tensor:
        rows_BFD = rows_BFD.to(acc)
        return (rows_BFD if table_D is None else rows_BFD + table_D.to(acc))[:, row_of_token.long()]

    r = x
    if y is not None:
        update = y.to(acc) if gate is None else of_token(gate, gate_table) * y.to(acc)
        r = (x.to(acc) + update).to(x.dtype)
    if scale is None and weight is None:
        return r, None
    # the norm is of r as it was rounded, so that a fused op equals its parts one after another
    r_acc = r.to(acc)
    centred = r_acc - r_acc.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None and bias is not None:
        return r, (normed * weight.to(acc) + bias.to(acc)).to(x.dtype)
    assert scale is not None and shift is not None
    return r, (normed * (1 + of_token(scale, scale_table)) + of_token(shift, shift_table)).to(x.dtype)
