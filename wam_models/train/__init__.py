"""Training: the step, the loop around it, its config and its files."""

from .config import TrainConfig
from .trainer import train

__all__ = ["TrainConfig", "train"]
