"""How a run uses its processes, its memory and its numbers: what changes its speed and what it holds, not its steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..runtime.checks import check_field, choice, whole

PRECISIONS = ("auto", "float32", "bf16")
RECOMPUTED = ("none", "block", "selective")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The ``engine`` of a :class:`TrainConfig`.

    Two processes, micro-batches and split sequences give the losses of one process, up to the order of sums: every
    process draws the whole step from the same numbers, and computes its part of it.

    Args:
        accumulation: Micro-batches that a step's batch is computed in, one after the other; must divide, times the
            processes that have samples of their own, the batch.
        replicas: Copies of the model, each sharded over its share of the processes (HSDP); 1 shards it over all (FSDP).
        context_parallel: Processes that share the tokens of each sample; in attention each has all tokens of its share
            of the heads (Ulysses). Must divide the model's heads.
        precision: ``"bf16"``: products in bf16, of weights and optimizers in float32; ``"auto"``: that on a GPU,
            ``"float32"`` on a CPU.
        recompute: What the backward computes again in place of keeping it: ``"none"``, every ``"block"``, or
            ``"selective"``: of every block all but its matrix products and attentions.
        compile: Backend of ``torch.compile`` for the blocks, such as ``"inductor"``; empty for none.

    Raises:
        ValueError: a value of the wrong type or outside its range; the message names the field.
    """

    accumulation: int = 1
    replicas: int = 1
    context_parallel: int = 1
    precision: str = "auto"
    recompute: str = "none"
    compile: str = ""

    def __post_init__(self) -> None:
        for name in ("accumulation", "replicas", "context_parallel"):
            check_field(self, name, whole, 1)
        check_field(self, "precision", choice, PRECISIONS)
        check_field(self, "recompute", choice, RECOMPUTED)
        backends = torch.compiler.list_backends(exclude_tags=())
        if self.compile and self.compile not in backends:
            raise ValueError(
                f"EngineConfig: compile must name a backend of torch.compile, of {backends}, got {self.compile!r}"
            )
