"""Kernels for world-action models: attention under video-action interaction programs, and the glue of their blocks."""

from . import systems  # noqa: F401 - registers its programs
from .adaln import ada_layer_norm, gate_residual_ada_layer_norm
from .block_attention import block_attention, plan_from_mask_mod, varlen_attention
from .cached_attention import cached_attention
from .frame_index import FrameIndex
from .plan import Plan, TileShape, compile_plan
from .programs import Attends, InteractionProgram
from .qk_norm_rope import qk_norm_rope, rope_table
from .ranges import Ranges
from .registry import PROGRAMS, RULE_PROGRAMS, register_program, unregister_program
from .rules import RuleGeometry, RuleProgram
from .streaming_cache import StreamingCache
from .visibility import HISTORIES, Geometry, dense_mask, tokens, visible

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
