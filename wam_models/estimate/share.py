"""What one of several GPUs has of a training step: samples, tokens, shards, and what it exchanges with the others."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..costs import BF16, Sizes, packed_tokens, parameters
from ..train.config import TrainConfig

FLOAT32 = 4


@dataclass(frozen=True)
class Share:
    """Of one GPU, in one micro-batch.

    Args:
        gpus: That train together.
        shards: Over which the model is sharded.
        split: GPUs that share the tokens of a sample.
        clips: Of its micro-batch; packed ones as if all were the longest.
        micro_batches: Of a step.
    """

    gpus: int
    shards: int
    split: int
    clips: int
    micro_batches: int

    @classmethod
    def of(cls, s: Sizes, config: TrainConfig, gpus: int = 1) -> Share:
        """Under the engine of a config.

        Raises:
            ValueError: numbers that do not divide; the message names the field.
        """
        engine = config.engine
        for name in ("replicas", "context_parallel"):
            if gpus % getattr(engine, name):
                raise ValueError(f"engine.{name} must divide --gpus, {gpus}, got {getattr(engine, name)}")
        pieces = gpus // engine.context_parallel * engine.accumulation
        clips = config.batch
        if config.tokens:  # every process has as many packs
            clips = pieces * math.ceil(max(1, config.tokens // packed_tokens(s, 1, config.frames)) / pieces)
        if clips % pieces:
            raise ValueError(f"batch must be a multiple of {pieces} on --gpus {gpus}, got {clips}")
        return cls(gpus, gpus // engine.replicas, engine.context_parallel, clips // pieces, engine.accumulation)

    def of_samples(self, number: int) -> int:
        """Its part of what a micro-batch's samples have."""
        return math.ceil(number / self.split)

    def exchanged(self, s: Sizes, frames: int) -> int:
        """Bytes of a step that come in from other GPUs: weights in bf16, gathered for each forward and backward;
        gradients in float32, once; of split samples queries, keys, values and what attends, there and back."""
        total, c = parameters(s.model), s.model
        others = total * (self.shards - 1) // self.shards
        gathered = self.micro_batches * 2 * BF16 * others
        replicas = self.gpus // self.shards
        reduced = FLOAT32 * others + 2 * FLOAT32 * (total // self.shards) * (replicas - 1) // replicas
        tokens = packed_tokens(s, self.clips, self.clips * frames)
        moved = 4 * 2 * c.layers * c.inner * s.itemsize * tokens * (self.split - 1) // self.split**2
        return gathered + reduced + self.micro_batches * moved
