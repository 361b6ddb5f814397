"""The training step, and the loop around it."""

from .trainer import TrainConfig, train

__all__ = ["TrainConfig", "train"]
