"""The processes of a run, as ``torchrun`` starts them: who has which shards, samples and tokens."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..model.dual_expert import WorldActionModel
from .context_parallel import split_tokens
from .engine import EngineConfig

Result = TypeVar("Result")
PATIENCE = timedelta(hours=4)  # processes wait so long for the first, while it evaluates


class Ranks:
    """The processes that train together; one, where ``torch.distributed`` is not initialised.

    Neighbouring ranks share a sample's tokens (``context_parallel``); the ranks of one replica hold the shards of one
    copy of the model.

    Attributes:
        rank, count: This process's number, and how many there are.
        group: Of all of them, on the CPU; None where there is one.
        writers: Another one, for threads that write checkpoints: of two threads in one group, collectives could mix.
        part, parts: Which part of a step's samples it computes, and how many parts there are.

    Raises:
        ValueError: processes that the engine's settings do not divide.
    """

    def __init__(self, engine: EngineConfig, device: torch.device) -> None:
        self.engine, self.device = engine, device
        started = dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if started else (0, 1)
        for name in ("replicas", "context_parallel"):
            if self.count % getattr(engine, name):
                raise ValueError(
                    f"TrainConfig: engine.{name} must divide the {self.count} processes of this run, got "
                    f"{getattr(engine, name)}; start another number with torchrun --nproc-per-node, or change it"
                )
        # of the CPU: one for what is agreed on between steps, one for checkpoints, which a thread writes beside them
        self.group = dist.new_group(backend="gloo") if self.count > 1 else None
        self.writers = dist.new_group(backend="gloo") if self.count > 1 else None
        together = engine.context_parallel
        self.part, self.parts = self.rank // together, self.count // together

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes, prints and measures."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.count > 1

    def shard(self, learner: nn.ModuleDict, model: WorldActionModel, *, bf16: bool) -> None:
        """Shard the parameters of a learner, the same on every rank, in place: each block, then what is around them.

        Raises:
            ValueError: ``context_parallel`` does not divide the model's heads.
        """
        together = self.engine.context_parallel
        if model.config.heads % together:
            raise ValueError(
                f"TrainConfig: engine.context_parallel must divide model.heads, {model.config.heads}, got {together}"
            )
        if not self.sharded:
            return
        kind, replicas = self.device.type, self.engine.replicas
        if together > 1:
            mesh = init_device_mesh(kind, (self.parts, together), mesh_dim_names=("samples", "tokens"))
            split_tokens(model, mesh["tokens"])
        shape, names = (replicas, self.count // replicas), ("replicas", "shards")
        mesh = init_device_mesh(kind, shape[replicas == 1 :], mesh_dim_names=names[replicas == 1 :])
        # what it warns of, an in-place operation on the model's output, is nowhere
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
        text = learner.get_submodule("text")
        trained = [text] if list(text.parameters()) else []
        for module in (*model.packed_block_stack.packed_blocks, model, *trained):
            fully_shard(module, mesh=mesh, mp_policy=policy)

    def samples(self, batch: int) -> list[slice]:
        """Of a step's batch, this process's samples, micro-batch by micro-batch.

        Raises:
            ValueError: a batch that does not divide.
        """
        pieces = self.parts * self.engine.accumulation
        if batch % pieces:
            raise ValueError(
                f"TrainConfig: batch must be a multiple of {pieces}, {self.engine.accumulation} micro-batches of "
                f"{self.parts} processes with samples of their own, got {batch}"
            )
        each = batch // pieces
        firsts = ((micro * self.parts + self.part) * each for micro in range(self.engine.accumulation))
        return [slice(first, first + each) for first in firsts]

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes that have samples of their own."""
        if not self.sharded:
            return list(values)
        counts = self.rank % self.engine.context_parallel == 0  # the others have the same
        total = torch.tensor(values, dtype=torch.float64, device=self.device) * float(counts)
        dist.all_reduce(total)
        return total.tolist()

    def largest(self, value: int) -> int:
        """That of any process."""
        if not self.sharded:
            return value
        found = torch.tensor(value, dtype=torch.int32, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def raise_any(self, error: Exception | None) -> None:
        """Raises in every process the error of the first one that has any; what a user can mend keeps its class."""
        if error is not None and not isinstance(error, OSError | ValueError):
            error = OSError(f"train: {type(error).__name__}: {error}")
        errors = [error]
        if self.sharded:
            errors = [None] * self.count
            dist.all_gather_object(errors, error, group=self.group)
        found = next((e for e in errors if e is not None), None)
        if found is not None:
            raise found

    def of_first(self, call: Callable[[], Result]) -> Result | None:
        """What the first process's call returns, there; an error of it is raised in all."""
        result, error = None, None
        if self.main:
            try:
                result = call()
            except (OSError, ValueError) as found:
                error = found
        self.raise_any(error)
        return result

    def synchronise(self, learner: nn.ModuleDict, last: bool) -> None:
        """Whether the backward that follows reduces the gradients over the processes: that of the last micro-batch."""
        if self.sharded:
            for module in learner.values():
                if isinstance(module, FSDPModule):
                    module.set_requires_gradient_sync(last)

    def agreed(self, value: Any) -> Any:
        """The first process's value."""
        if not self.sharded:
            return value
        held = [value]
        dist.broadcast_object_list(held, device=self.device)
        return held[0]


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes that ``torchrun`` has started, if it has; gives this one's device."""
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        yield device
        return
    backend = "gloo"
    if device.type == "cuda":
        device, backend = torch.device("cuda", int(os.environ["LOCAL_RANK"])), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def local(value: Tensor) -> Tensor:
    """The numbers of a tensor that this process holds, as a view."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole_tensor(value: Tensor) -> Tensor:
    """All numbers of a tensor, on every process."""
    return value.full_tensor() if isinstance(value, DTensor) else value
