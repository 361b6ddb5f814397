from .op import block_attention
from .varlen import varlen_attention

__all__ = ["block_attention", "varlen_attention"]
