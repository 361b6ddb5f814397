"""Bytes that a rollout and a training step keep at once, from sizes alone."""

from __future__ import annotations

from wam_kernels.masks.visibility import ACTION, VIDEO

from ..objectives import OBJECTIVES
from ..rollout import RolloutConfig
from ..rollout.layout import ChunkLayout
from ..train.config import TrainConfig
from .forward import Sizes, block_matrices, parameters

FLOAT32 = 4


def rollout_memory(s: Sizes, config: RolloutConfig, *, objective: str = "joint", batch: int = 1) -> dict[str, int]:
    """Bytes of what stays during an episode, by name; the activations of one chunk are small beside it."""
    c, layout = s.model, ChunkLayout(config, OBJECTIVES[objective], batch, s.grid, s.model.actions_per_frame)
    text = layout.samples * s.text_tokens * 2 * 2 * c.layers * c.inner * s.itemsize  # two streams, keys and values
    return {
        "weights": parameters(c) * s.itemsize,
        "keys and values": layout.cache_bytes(c, s.itemsize),
        "of the text": text,
    }


def block_activations(s: Sizes, samples: int, frames: int) -> int:
    """Bytes that the backward of one block needs of its forward, statistics of norms left out."""
    c = s.model
    ffn = {VIDEO: c.ffn, ACTION: c.action_ffn}
    numbers = 0
    for stream in (VIDEO, ACTION):
        rows = samples * 2 * frames * s.tokens(stream)
        # inputs of norms, gates and products; q, k, v and what attends, before and after their norms
        numbers += rows * (8 * s.width(stream) + 11 * c.inner + 2 * ffn[stream])
        numbers += samples * s.text_tokens * 3 * c.inner
    return numbers * s.itemsize


def train_memory(s: Sizes, config: TrainConfig) -> dict[str, int]:
    """Bytes at the end of the forward of a training step, by name: weights in float32, products in bf16."""
    total = parameters(s.model)
    muon = sum(rows * columns * times for rows, columns, times in block_matrices(s.model))
    return {
        "weights and gradients": 2 * FLOAT32 * total,
        "optimizers": FLOAT32 * (muon + 2 * (total - muon)),
        "average": FLOAT32 * total,
        "weights in bf16": s.itemsize * total,
        "activations of blocks": s.model.layers * block_activations(s, config.batch, config.frames),
    }
