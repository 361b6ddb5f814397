"""Bytes that a rollout and a training step keep at once, from sizes alone."""

from __future__ import annotations

from wam_kernels.masks.visibility import VIDEO

from ..costs import Sizes, block_matrices, parameters
from ..rollout import RolloutConfig
from ..train.config import TrainConfig
from .forward import layout_of

FLOAT32 = 4


def rollout_memory(s: Sizes, config: RolloutConfig, *, objective: str = "joint", batch: int = 1) -> dict[str, int]:
    """Bytes of what stays during an episode, by name; the activations of one chunk are small beside it."""
    c, layout = s.model, layout_of(s, config, objective, batch)
    of_text = s.texts * sum(stream.owns_expert for stream in c.streams)
    of_text += (1 + layout.chunk_size) * s.tokens(VIDEO) if c.bridge_layer is not None else 0
    text = layout.samples * of_text * 2 * c.layers * c.inner * s.itemsize  # keys and values
    return {
        "weights": parameters(c) * s.itemsize,
        "keys and values": layout.cache_bytes(c, s.itemsize),
        "of the text": text,
    }


def block_activations(s: Sizes, samples: int, frames: int) -> int:
    """Bytes that the backward of one block needs of its forward, statistics of norms left out."""
    c, numbers = s.model, 0
    for place, stream in enumerate(c.streams):
        rows = samples * (2 * frames * s.tokens(place) if place in s.denoised else stream.tokens)
        # inputs of norms, gates and products; q, k, v and what attends, before and after their norms
        numbers += rows * (8 * stream.width + 11 * c.inner + 2 * stream.ffn)
        numbers += samples * s.texts * 3 * c.inner
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
