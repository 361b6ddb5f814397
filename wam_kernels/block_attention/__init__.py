from .op import block_attention

__all__ = ["block_attention"]
