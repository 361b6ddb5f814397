"""Gated residual and adaptive LayerNorm in plain PyTorch: the definition that every backend is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gate_residual_norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    gate_table: Tensor | None, shift_table: Tensor | None, scale_table: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, row_of_token: Tensor | None, eps: float, tokens_a_row: int = 0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """r (x itself where y is None) and h (None without a norm). Any device.

    Rows of ``tokens_a_row`` tokens each, in order, are broadcast over them; others (0) are gathered, one for a token.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    B, S, D = x.shape
    tokens = (B, S // tokens_a_row, tokens_a_row, D) if tokens_a_row else (B, S, D)

    def of_token(rows_BFD: Tensor, table_D: Tensor | None) -> Tensor:
        rows_BFD = rows_BFD.to(acc)
        rows_BFD = rows_BFD if table_D is None else rows_BFD + table_D.to(acc)
        if tokens_a_row:
            return rows_BFD.unsqueeze(2)
        assert row_of_token is not None
        # on a GPU the backward of index_select adds in any order
        return rows_BFD[:, row_of_token.long()] if rows_BFD.is_cuda else rows_BFD.index_select(1, row_of_token)

    r = x
    if y is not None:
        r_acc = x.to(acc).reshape(tokens)
        update = y.to(acc).reshape(tokens)
        r_acc = r_acc + update if gate is None else torch.addcmul(r_acc, update, of_token(gate, gate_table))
        r = r_acc.to(x.dtype).reshape(x.shape)
    if scale is None and weight is None:
        return r, None
    # the norm is of r as it was rounded, so that a fused op equals its parts one after another
    if weight is not None and bias is not None:
        return r, F.layer_norm(r.to(acc), (D,), weight.to(acc), bias.to(acc), eps).to(x.dtype)
    assert scale is not None and shift is not None
    normed = F.layer_norm(r.to(acc), (D,), eps=eps).reshape(tokens)
    h = torch.addcmul(of_token(shift, shift_table), normed, 1 + of_token(scale, scale_table))
    return r, h.to(x.dtype).reshape(x.shape)
