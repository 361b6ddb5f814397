from .op import cached_attention

__all__ = ["cached_attention"]
