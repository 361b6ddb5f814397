from .op import qk_norm_rope
from .table import rope_table

__all__ = ["qk_norm_rope", "rope_table"]
