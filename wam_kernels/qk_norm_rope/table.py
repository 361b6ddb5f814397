"""Rotation angles of tokens at three-dimensional positions, computed once and shared by every layer, q and k."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime.checks import integer, integers, number

_OP = "rope_table"


def default_split(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head for frame, row and column: ``2 (h // 6)`` for row and column each, the rest for frame."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_table(
    positions: Tensor,
    head_dim: int,
    *,
    theta: float = 10000.0,
    split: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Cosine and sine of every token's rotation angles, for :func:`wam_kernels.qk_norm_rope`.

    .. math:: angle_{s,i} = p_s \; \theta^{-2i/d}, \quad i = 0 .. d/2 - 1

    with p the frame, row or column of token s and d the channels of that axis; the three axes follow each other.

    Angles, cosines and sines are float64, rounded once, so an entry is within 2^-25 + 1e-15 \|p\| of the exact value:
    3.0e-8, and 3.1e-8 for positions up to 1e6. (Angles in float32 would be wrong by 6e-8 \|p\|: 0.06 at 1e6.)

    Compute it once per forward. A token's row is 512 bytes at head_dim 128, read beside the 24 KB that q and k of 24
    heads in bf16 take in and out; sines and cosines inside the kernel would cost float64 instructions in every layer,
    for q and for k, to save 2 % of the traffic (it mostly comes from the L2 cache, q and k being rotated together).

    Args:
        positions: ``[..., S, 3]`` frame, row, column; float32 or float64; fractional and negative values are fine.
            ``[B, S, 3]`` where the samples of a batch are at different positions.
        head_dim: Channels of a head; even.
        theta: Base of the geometric series of frequencies; positive.
        split: Channels of frame, row, column: even, sum ``head_dim``. Default ``2 (h // 6)`` for row and for column and
            the rest for frame: 44, 42, 42 of 128.
        dtype: float32, or float64 for a model that is float64.

    Returns:
        ``[..., S, head_dim // 2, 2]``: (cos, sin), ``dtype``, contiguous, on the device of ``positions``. Plain
        PyTorch, so differentiable, but ``qk_norm_rope`` has no gradient for a table and refuses one that requires it.

    Raises:
        ValueError: a shape, dtype, head_dim, theta or split outside the above.
        TypeError: ``positions`` is not a tensor.

    Source: Su et al., "RoFormer", 2021; three axes as in Wan (``diffusers.WanRotaryPosEmbed``).
    """
    if not isinstance(positions, Tensor):
        raise TypeError(f"{_OP}: positions must be a tensor [..., S, 3], got {type(positions).__name__}")
    if positions.ndim < 2 or positions.shape[-1] != 3:
        raise ValueError(
            f"{_OP}: positions must have shape [..., S, 3] (frame, row, column), got {list(positions.shape)}"
        )
    if positions.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{_OP}: positions must be float32 or float64, got {positions.dtype}; half precision drifts, integers: "
            "use .double()"
        )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{_OP}: dtype must be torch.float32 or torch.float64, got {dtype}")
    head_dim = integer(_OP, "head_dim", head_dim)
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"{_OP}: head_dim must be even and at least 2, got {head_dim}")
    theta = number(_OP, "theta", theta)
    if theta <= 0:
        raise ValueError(f"{_OP}: theta must be positive, got {theta}")
    split = default_split(head_dim) if split is None else integers(_OP, "split", split)
    if len(split) != 3 or any(d % 2 for d in split) or sum(split) != head_dim:
        raise ValueError(f"{_OP}: split must be three even sizes that sum to head_dim={head_dim}, got {split}")
    positions = positions.double()
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return _table(positions, split, theta, dtype)
    with torch.inference_mode(False):  # a training step may use it later on
        return _table(positions, split, theta, dtype)


def _table(positions: Tensor, split: Sequence[int], theta: float, dtype: torch.dtype) -> Tensor:
    angles = []
    for axis, d in enumerate(split):
        power = torch.arange(0, d, 2, dtype=torch.float64, device=positions.device) / max(d, 1)
        angles.append(positions[..., axis : axis + 1] * theta**-power)
    angle = torch.cat(angles, -1)
    return torch.stack((angle.cos(), angle.sin()), -1).to(dtype)
