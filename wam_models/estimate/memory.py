"""Bytes that a rollout and a training step keep at once, from sizes alone."""

from __future__ import annotations

from wam_kernels.masks.visibility import VIDEO

from ..costs import Sizes, block_matrices, parameters
from ..rollout import RolloutConfig
from ..train.config import TrainConfig
from .forward import layout_of
from .share import FLOAT32, Share


def rollout_memory(s: Sizes, config: RolloutConfig, *, objective: str = "joint", batch: int = 1) -> dict[str, int]:
    """Bytes of what stays during an episode, by name; the activations of one chunk are small beside it."""
    c, layout = s.model, layout_of(s, config, objective, batch)
    of_text = s.texts * sum(stream.owns_expert for stream in c.streams)
    of_text += (1 + layout.chunk_size) * s.tokens(VIDEO) if c.bridge_layer is not None else 0
    text = layout.samples * of_text * 2 * c.layers * c.inner * s.itemsize  # keys and values
    narrower = 0 if s.block_itemsize is None else s.itemsize - s.block_itemsize
    return {
        "weights": parameters(c) * s.itemsize - narrower * sum(m * n * times for m, n, times in block_matrices(c)),
        "keys and values": layout.cache_bytes(c, s.itemsize),
        "of the text": text,
    }


def block_activations(s: Sizes, samples: int, frames: int) -> int:
    """Bytes that the backward of one block needs of its forward, statistics of norms left out."""
    c, numbers = s.model, 0
    for place, stream in enumerate(c.streams):
        rows = samples * (s.copies * frames * s.tokens(place) if place in s.denoised else s.given_tokens(place))
        # inputs of norms, gates and products; q, k, v and what attends, before and after their norms
        numbers += rows * (8 * stream.width + 11 * c.inner + 2 * stream.ffn)
        numbers += samples * s.texts * 3 * c.inner
    return numbers * s.itemsize


def block_products(s: Sizes, samples: int, frames: int) -> int:
    """Bytes of what the matrix products and attentions of one block give."""
    c, numbers = s.model, 0
    for place, stream in enumerate(c.streams):
        rows = samples * (s.copies * frames * s.tokens(place) if place in s.denoised else s.given_tokens(place))
        numbers += rows * (6 * c.inner + 3 * stream.width + stream.ffn) + samples * s.texts * 2 * c.inner
    return numbers * s.itemsize


def block_inputs(s: Sizes, samples: int, frames: int) -> int:
    """Bytes of the streams between two blocks."""
    numbers = 0
    for place, stream in enumerate(s.model.streams):
        rows = samples * (s.copies * frames * s.tokens(place) if place in s.denoised else s.given_tokens(place))
        numbers += rows * stream.width
    return numbers * s.itemsize


def train_memory(s: Sizes, config: TrainConfig, gpus: int = 1) -> dict[str, int]:
    """Bytes of one GPU at the end of a forward of a training step, by name: weights in float32, products in bf16.

    Raises:
        ValueError: ``gpus`` that the engine or the batch does not divide.
    """
    share, layers = Share.of(s, config, gpus), s.model.layers
    total, n = parameters(s.model), share.shards
    muon = sum(rows * columns * times for rows, columns, times in block_matrices(s.model))
    if config.optimizer == "adamw":
        muon = 0
    of_block = block_activations(s, share.clips, config.frames)
    kept = {"none": of_block, "block": block_inputs(s, share.clips, config.frames)}
    kept["selective"] = kept["block"] + block_products(s, share.clips, config.frames)
    recompute = config.engine.recompute
    # of the blocks two are gathered, one at work and the next, and one has its gradients
    block = sum(rows * columns * times for rows, columns, times in block_matrices(s.model)) // layers
    cast = s.itemsize * total if n == 1 else s.itemsize * (total - (layers - 2) * block) + FLOAT32 * block
    return {
        "weights and gradients": 2 * FLOAT32 * total // n,
        "optimizers": FLOAT32 * (muon + 2 * (total - muon)) // n,
        "average": FLOAT32 * total // n,
        "weights in bf16" if n == 1 else "gathered blocks": cast,
        "activations of blocks": share.of_samples(layers * kept[recompute] + (recompute != "none") * of_block),
    }
