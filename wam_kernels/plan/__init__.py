"""Plans: what is visible, compiled into the tiles and steps that the attention kernels walk.

From the bottom: ``intervals`` and ``side_rows`` (ranges of every row of tokens), ``placement`` (where samples lie in a
batch), ``tiles`` (rows that are computed together), ``steps`` (what each tile visits); ``runs``, ``sides`` and
``boxes`` (the forms that backends walk), ``plan`` (all of them, each made at its first use), ``compile``.
"""

from .compile import Sample, compile_plan
from .from_mask_mod import plan_from_mask_mod
from .plan import Plan
from .sides import Side
from .tile_shape import STEP_PART, TileShape, tile_shape

__all__ = ["STEP_PART", "Plan", "Sample", "Side", "TileShape", "compile_plan", "plan_from_mask_mod", "tile_shape"]
