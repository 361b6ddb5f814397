"""What lies between the products of a transformer block, on this library's fused ops.

Adaptive norms, gates, residual sums and the norms that follow them. The rows of the modulation stay as the model made
them: in its dtype, one for a sample, a frame, a block of frames or a token, with the block's own table beside them
instead of a sum of the two. Results have the dtype that the model's own promotions give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adaln.config import MAX_D
from ..adaln.op import uniform_gate_residual_norm
from ._patching import Foreign, Patch, Unsupported


class Rows(NamedTuple):
    """A shift, scale or gate of a block: a row for every run of tokens, and what is added to all of them."""

    rows: Tensor  # [B, F, D]
    table: Tensor | None  # [D]
    dtype: torch.dtype  # of the model's own sum of the two


_rows = partial(tuple.__new__, Rows)  # as Rows(*values), without a Python function around it


def split_rows(rows: Tensor, table: Tensor | None, dtype: torch.dtype) -> list[Rows]:
    """``[B, F, n, D]`` and ``[n, D]``, one by one; ``dtype`` is that of their sum in the model."""
    tables = [None] * rows.shape[2] if table is None else table.unbind(0)
    pairs = zip(rows.unbind(2), tables, strict=True)
    if torch.compiler.is_dynamo_compiling():  # PyTorch 2.7 does not trace the other
        return [Rows(row, of_row, dtype) for row, of_row in pairs]
    return [_rows((row, of_row, dtype)) for row, of_row in pairs]


def why_not(width: int, norms: Sequence[nn.Module], affine: Sequence[nn.Module] = ()) -> str | None:
    """Why the fused ops cannot take a block's glue, or None.

    Args:
        width: Channels of the residual stream.
        norms: Those that are modulated: LayerNorm without weight and bias.
        affine: The others: LayerNorm with both or neither, or nothing.
    """
    if width % 8 or not 8 <= width <= MAX_D:
        return f"a width of {width}: the fused norms take multiples of 8 up to {MAX_D}"
    for norm in (*norms, *affine):
        if isinstance(norm, nn.Identity) and norm in affine:
            continue
        if not isinstance(norm, nn.LayerNorm) or tuple(norm.normalized_shape) != (width,):
            return f"its norm is {norm}, not a LayerNorm of {width} channels"
        has_weight, has_bias = norm.weight is not None, norm.bias is not None
        if norm not in affine and (has_weight or has_bias):
            return "a norm that it modulates has weights of its own"
        if has_weight != has_bias:
            return "its norm has only one of weight and bias"
    return None


def replace(patch: Patch, owner: Foreign, name: str, new: Callable, why_not: Callable[[], str | None]) -> bool:
    """Replace the method that holds the glue of ``owner``, or leave it and say why; returns whether it was replaced.

    Args:
        patch: Of the model.
        owner: A module. Its attention is served in either case.
        name: Of the method.
        new: What stands there.
        why_not: Why the fused ops cannot take the glue, or None; may raise Unsupported, as for a fork's block.
    """
    try:
        reason = why_not()
        if reason is None:
            patch.method(owner, name, new)
    except Unsupported as refused:
        reason = str(refused)
    if reason is not None:
        patch.leave_alone(owner, f"gates, residual sums and norms: {reason}")
    return reason is None


def require_rows(system: str, x: Tensor, *rows: Rows) -> None:
    """The fused ops take these rows with the tokens ``x``.

    Raises:
        Unsupported: tokens that are no ``[B, S, D]``, or a mixture of float64 and other dtypes.
    """
    tensors = [x]
    for r in rows:
        tensors += (r.rows,) if r.table is None else (r.rows, r.table)
    fine = x.ndim == 3
    for t in tensors:
        fine = fine and t.is_floating_point() and (t.dtype == torch.float64) == (x.dtype == torch.float64)
    if not fine:
        names = ", ".join(sorted({str(t.dtype) for t in tensors}))
        raise Unsupported(
            f"patch: {system}'s modulation must be of tokens [B, S, D] in floats of at most 32 bits, or float64 alone, "
            f"got {list(x.shape)} and {names}"
        )


def promoted(x: Tensor, *others: Tensor | Rows | None) -> torch.dtype:
    dtype = x.dtype
    for other in others:
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    return dtype


def modulated(norm: Foreign, x: Tensor, shift: Rows, scale: Rows, dtype: torch.dtype | None = None) -> Tensor:
    """``LN(x) (1 + scale) + shift`` ``[B, S, D]`` of ``dtype``, that of ``x`` unless it is given."""
    return _fused(dtype, x, None, None, shift, scale, eps=norm.eps)[1]


def added(x: Tensor, y: Tensor, gate: Rows | None, dtype: torch.dtype | None = None) -> Tensor:
    """``x + gate y`` ``[B, S, D]`` of ``dtype``, that of ``x`` unless it is given."""
    if gate is None:
        x = x if dtype is None else x.to(dtype)
        return x + y.to(x.dtype)
    return _fused(dtype, x, y, gate)[0]


def added_and_modulated(
    x: Tensor, y: Tensor, gate: Rows | None, norm: Foreign, shift: Rows, scale: Rows, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """``r = x + gate y`` and ``LN(r) (1 + scale) + shift``, in one pass where their rows are laid out alike."""
    if gate is not None and gate.rows.shape[1] != shift.rows.shape[1]:
        r = added(x, y, gate, dtype)
        return r, modulated(norm, r, shift, scale)
    return _fused(dtype, x, y, gate, shift, scale, eps=norm.eps)


def added_and_normed(
    x: Tensor, y: Tensor, gate: Rows | None, norm: Foreign, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """``r = x + gate y`` and the affine norm of it, by the module itself where that costs less or is no LayerNorm.

    The sums over all tokens of weight and bias want long segments, which a row for every token does not have.
    """
    token_rows = gate is not None and gate.rows.shape[1] == x.shape[1]
    weight = getattr(norm, "weight", None)
    if token_rows or weight is None or weight.dtype not in (dtype or x.dtype, torch.float32):
        r = added(x, y, gate, dtype)
        return r, norm(r)
    return _fused(dtype, x, y, gate, weight=weight, bias=norm.bias, eps=norm.eps)


def rows_of_mixture(t_mod: Tensor, block: Foreign) -> list[Rows]:
    """The six of a Fast-WAM block: of its table and ``t_mod`` ``[B, 6, D]``, or ``[B, S, 6, D]``."""
    rows = t_mod if t_mod.ndim == 4 else t_mod[:, None]
    return split_rows(rows, block.modulation[0], t_mod.dtype)


def why_not_mixture(block: Foreign) -> str | None:
    """Why :func:`rest_of_mixture` cannot take a Fast-WAM block, or None."""
    table = getattr(block, "modulation", None)
    if not isinstance(table, Tensor) or table.ndim != 3 or tuple(table.shape[:2]) != (1, 6):
        return "its block's modulation is not [1, 6, D]"
    return why_not(table.shape[-1], (block.norm1, block.norm2), [block.norm3] if hasattr(block, "norm3") else [])


def over_context(
    attend: Callable[[Tensor, Tensor, Tensor | None], Tensor], payload: dict | None
) -> Callable[[Tensor], Tensor] | None:
    """The cross-attention of Fast-WAM's ``{"context": [B, L, D], "mask": [B, S, L], [B, 1, S, L] or none}``, or None.

    ``attend`` takes tokens, context and mask.
    """
    payload = payload or {}
    context, mask = payload.get("context"), payload.get("mask")
    if context is None:
        return None
    mask = mask.unsqueeze(1) if mask is not None and mask.dim() == 3 else mask
    return lambda h: attend(h, context, mask)


def rest_of_mixture(
    system: str, block: Foreign, x: Tensor, y: Tensor, rows: Sequence[Any], cross: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """A Fast-WAM block behind its self-attention.

    Args:
        system: For messages.
        block: With ``norm2``, ``norm3`` where there is ``cross``, and ``ffn``.
        x: Tokens ``[B, S, D]``.
        y: The attention's projected output.
        rows: gate of the attention; shift, scale and gate of the feed-forward.
        cross: The cross-attention of normed tokens, or None.

    Raises:
        Unsupported: rows that a replaced method did not make.
    """
    gate, shift, scale, gate_mlp = rows
    if not isinstance(gate, Rows):
        raise Unsupported(f"patch: {system}'s gates must be those of a patched _build_expert_attention_io")
    modulation, dtype = (block.norm2, shift, scale), promoted(x, y, gate)
    if cross is None:
        x, h = added_and_modulated(x, y, gate, *modulation, dtype)
    else:
        x, h = added_and_normed(x, y, gate, block.norm3, dtype)
        y = cross(h)
        x, h = added_and_modulated(x, y, None, *modulation, promoted(x, y))
    y = block.ffn(h)
    return added(x, y, gate_mlp, promoted(x, y, gate_mlp))


def _fused(
    dtype: torch.dtype | None, x: Tensor, y: Tensor | None = None,
    gate: Rows | None = None, shift: Rows | None = None, scale: Rows | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """r and h of ``gate_residual_ada_layer_norm`` for tokens that become ``dtype``; h alone without ``y``.

    Up to here everything is as that op asks for it but for layouts, which are made here, and shapes, which are compared
    here, so its checks are left out: they are most of what a short step would wait for.
    """
    if dtype is None:
        dtype = x.dtype
    if x.dtype != dtype or x.stride(-1) != 1:
        x = _tokens(x, dtype)
    if y is not None and (y.dtype != dtype or y.stride(-1) != 1):
        y = _tokens(y, dtype)
    B, _, D = x.shape
    if y is not None and y.shape != x.shape:
        raise Unsupported(f"patch: what is added to tokens {list(x.shape)} must have their shape, got {list(y.shape)}")
    count = 0
    rows: list[Tensor | None] = []
    tables: list[Tensor | None] = []
    for r in (gate, shift, scale):
        t = table = None
        if r is not None:
            t, table = r.rows, r.table
            count = count or t.shape[1]
            if t.shape[0] not in (1, B) or t.shape[1] != count or t.shape[2] != D:
                raise Unsupported(
                    f"patch: the modulation of tokens {list(x.shape)} must have rows of one shape [B, F, D], got "
                    f"{list(t.shape)}"
                )
            if t.stride(-1) != 1:
                t = t.contiguous()
            if t.shape[0] != B:
                t = t.expand(B, -1, -1)
        rows.append(t)
        tables.append(table)
    inputs = x, y, rows[0], rows[1], rows[2], tables[0], tables[1], tables[2], weight, bias
    return uniform_gate_residual_norm(*inputs, count or 1, eps)


def _tokens(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, S, D]`` of a dtype, channels side by side."""
    t = t.to(dtype)
    return t if t.stride(-1) == 1 else t.contiguous()
