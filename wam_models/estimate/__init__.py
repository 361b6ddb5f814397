"""What a chunk of a rollout and a training step compute, move and keep, from sizes alone: nothing is loaded or run.

``forward`` has FLOPs and bytes, ``memory`` what is kept, ``presets`` sizes under a name, ``report`` the page.
"""

from ..costs import Sizes, parameters
from .forward import Part, rollout_chunk, train_step
from .memory import rollout_memory, train_memory
from .presets import PRESETS
from .report import report, total
from .share import Share

__all__ = [
    "PRESETS", "Part", "Share", "Sizes", "parameters", "report", "rollout_chunk", "rollout_memory", "total",
    "train_memory", "train_step",
]  # fmt: skip
