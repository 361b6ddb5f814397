"""Cosmos Policy: the ``Attention`` of its diffusion transformer, per-head q/k norm and rotate-half rope.

Its attention is dense (``cosmos_policy``): there is nothing to skip, and the model's own flash attention stays.
Replaced is ``compute_qkv`` of every self-attention, where both norms and both rotations, with their casts, become one
launch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._kernels import Tables, norm_rope, require_kernel
from ._patching import Foreign, Patch, Unsupported, of_class, require_class, require_norms, require_parts

SYSTEM = "Cosmos Policy"
_PARTS = ("is_selfattn", "q_proj", "k_proj", "v_proj", "output_proj", "q_norm", "k_norm", "compute_qkv", "attn_op")


def find(model: nn.Module) -> list[nn.Module]:
    """The self-attentions of a model; diffusers has an ``Attention`` too, with other parts."""
    return [m for m in of_class(model, "Attention") if all(hasattr(m, part) for part in _PARTS) and m.is_selfattn]


def apply(patch: Patch, attentions: list[Foreign]) -> None:
    tables = _RotateHalf()
    for attn in attentions:
        require_class(SYSTEM, attn, "Attention")
        require_parts(SYSTEM, attn, ("head_dim", "n_heads", "v_norm"))
        require_kernel(SYSTEM, attn.q_proj.weight.new_empty(attn.head_dim))
        require_norms(SYSTEM, attn.q_norm, attn.k_norm, attn.head_dim)
        layout = getattr(attn, "qkv_format", "bshd")
        if layout != "bshd":
            raise Unsupported(f"patch: {SYSTEM}'s attention must have qkv_format='bshd', got {layout!r}")
        patch.method(attn, "compute_qkv", _compute_qkv, tables)
        if isinstance(attn.attn_op, nn.Module):
            patch.leave_alone(attn.attn_op, "attends to the whole sequence: nothing to skip")


def _compute_qkv(
    tables: _RotateHalf, attn: Foreign, x: Tensor, context: Tensor | None = None, rope_emb: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    if rope_emb is None or x.ndim != 3:
        raise Unsupported(
            f"patch: {SYSTEM}'s self-attention must get [B, S, C] and rope_emb, got {list(x.shape)} and "
            f"{'None' if rope_emb is None else 'rope_emb'}"
        )
    context = x if context is None else context
    table = tables.of(rope_emb, tables.table)
    q, k, v = attn.q_proj(x), attn.k_proj(context), attn.v_proj(context)
    options = {"head_dim": attn.head_dim, "per_head": True, "interleaved": False}
    q, k = norm_rope(SYSTEM, q, k, attn.q_norm, attn.k_norm, table, **options)
    return q, k, attn.v_norm(v.unflatten(-1, (attn.n_heads, attn.head_dim)))


class _RotateHalf(Tables):
    """Tables of rotate-half angles. The model builds its angles anew in every forward, always by the same code.

    So whether the second half of the channels repeats the first is looked at once for each shape on a device, where
    looking stops it; on the CPU it costs nothing and is looked at always. A compiled graph asserts it on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._checked: set[tuple] = set()

    def table(self, angles: Tensor) -> Tensor:
        """Angles ``[S, 1, 1, D]`` to ``[S, D / 2, 2]``."""
        first, second = angles.flatten(1).double().chunk(2, -1)
        if torch.compiler.is_compiling():
            torch._assert_async((first == second).all(), f"patch: {SYSTEM}'s rope_emb must repeat its first half")
            return torch.stack((first.cos(), first.sin()), -1)
        shape = angles.shape, angles.device
        if shape not in self._checked:
            if not torch.equal(first, second):
                raise Unsupported(f"patch: {SYSTEM}'s rope_emb must repeat its first half, but its halves differ")
            if waits_for_device(angles):
                self._checked.add(shape)
        return torch.stack((first.cos(), first.sin()), -1)


def waits_for_device(tensor: Tensor) -> bool:
    """Reading a value of it makes the host wait."""
    return tensor.device.type != "cpu"
