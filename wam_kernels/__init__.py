"""Kernels for world-action models: attention under video-action interaction programs."""

from .block_attention import block_attention
from .plan import Plan, TileShape, compile_plan
from .visibility import HISTORIES, PROGRAMS, Geometry, dense_mask, tokens, visible

__all__ = [
    "Geometry",
    "HISTORIES",
    "PROGRAMS",
    "Plan",
    "TileShape",
    "block_attention",
    "compile_plan",
    "dense_mask",
    "tokens",
    "visible",
]
