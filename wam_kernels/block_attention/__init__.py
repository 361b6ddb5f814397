from .doors import plan_from_mask_mod, varlen_attention
from .op import block_attention

__all__ = ["block_attention", "plan_from_mask_mod", "varlen_attention"]
