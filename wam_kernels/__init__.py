"""Kernels for world-action models: attention under video-action interaction programs, and the glue of their blocks."""

from .adaln import ada_layer_norm, gate_residual_ada_layer_norm
from .block_attention import block_attention, plan_from_mask_mod, varlen_attention
from .cached_attention import cached_attention
from .frame_index import FrameIndex
from .plan import Plan, TileShape, compile_plan
from .programs import NAMED_PROGRAMS, Program
from .qk_norm_rope import qk_norm_rope, rope_table
from .ranges import Ranges
from .streaming_cache import StreamingCache
from .visibility import HISTORIES, PROGRAMS, Geometry, dense_mask, tokens, visible

__version__ = "0.1.0"

__all__ = [
    "FrameIndex",
    "Geometry",
    "HISTORIES",
    "NAMED_PROGRAMS",
    "PROGRAMS",
    "Plan",
    "Program",
    "Ranges",
    "StreamingCache",
    "TileShape",
    "ada_layer_norm",
    "block_attention",
    "cached_attention",
    "compile_plan",
    "dense_mask",
    "gate_residual_ada_layer_norm",
    "plan_from_mask_mod",
    "qk_norm_rope",
    "rope_table",
    "tokens",
    "varlen_attention",
    "visible",
]
