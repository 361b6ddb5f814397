"""Kernels for world-action models: attention under video-action interaction programs, and the glue of their blocks."""

from .adaln import ada_layer_norm, gate_residual_ada_layer_norm
from .block_attention import block_attention, varlen_attention
from .cached_attention import cached_attention
from .frame_index import FrameIndex
from .masks import (
    HISTORIES,
    PROGRAMS,
    RULE_PROGRAMS,
    Attends,
    Geometry,
    InteractionProgram,
    Ranges,
    RuleGeometry,
    RuleProgram,
    dense_mask,
    register_program,
    tokens,
    unregister_program,
    visible,
)
from .plan import Plan, TileShape, compile_plan, plan_from_mask_mod
from .qk_norm_rope import qk_norm_rope, rope_table
from .streaming_cache import StreamingCache

__version__ = "0.1.0"

__all__ = [
    "Attends",
    "FrameIndex",
    "Geometry",
    "HISTORIES",
    "InteractionProgram",
    "PROGRAMS",
    "Plan",
    "RULE_PROGRAMS",
    "Ranges",
    "RuleGeometry",
    "RuleProgram",
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
    "register_program",
    "rope_table",
    "tokens",
    "unregister_program",
    "varlen_attention",
    "visible",
]
