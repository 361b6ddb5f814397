"""The optimizers of a run: Muon for the matrices inside a model's blocks, AdamW for the rest.

Muon is momentum whose steps are orthogonalised.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the step size that fits AdamW's
learning rates is that of Liu et al., "Muon is scalable for LLM training" (2025). ``torch.optim.Muon`` multiplies in
bf16, which on a CPU without bf16 units takes 20 times as long as float32 does here, matrices of one shape together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import overload

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..weights.parts import is_adapter
from .config import TrainConfig
from .ranks import local

# Quintic Newton-Schulz iteration of Jordan et al.: drives singular values between 0 and 1 to about 1 in a few rounds.
A, B, C = 3.4445, -4.7750, 2.0315
ROUNDS = 4


def orthogonalised(matrices_Nmn: Tensor) -> Tensor:
    """``U V^T`` of each ``U S V^T``, about: singular values come out between 0.6 and 1.3 unless they were tiny."""
    m, n = matrices_Nmn.shape[-2:]
    x = matrices_Nmn if m <= n else matrices_Nmn.mT  # the smaller side is the cheaper one to square
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=B, alpha=C), x, beta=A)
    return x if m <= n else x.mT


def _spread_orthogonalised(matrices_Nmn: Tensor) -> Tensor:
    """As :func:`orthogonalised`; of sharded matrices each process computes some, whole, for all."""
    if not isinstance(matrices_Nmn, DTensor):
        return orthogonalised(matrices_Nmn)
    mesh, placements = matrices_Nmn.device_mesh, matrices_Nmn.placements
    whole, size = [Shard(0)] * mesh.ndim, matrices_Nmn.shape
    own = orthogonalised(matrices_Nmn.redistribute(placements=whole).to_local())
    found = DTensor.from_local(own, mesh, whole, run_check=False, shape=size, stride=matrices_Nmn.stride())
    return found.redistribute(placements=placements)


class Muon(torch.optim.Optimizer):
    """Args: matrices to learn; learning rate (as for AdamW); momentum; decoupled weight decay."""

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step along the gradients that are there; ``closure`` computes them anew first and gives the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            momentum = group["momentum"]
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["average"] = torch.zeros_like(p)
                average = state["average"].lerp_(p.grad, 1 - momentum)
                alike.setdefault(p.shape, []).append((p, p.grad.lerp(average, momentum)))
            for shape, pairs in alike.items():
                matrices, updates = zip(*pairs, strict=True)
                # 0.2 is the usual size of the entries of an AdamW step
                steps = local(_spread_orthogonalised(torch.stack(updates))) * (-0.2 * max(shape) ** 0.5 * group["lr"])
                for p, by in zip(matrices, steps, strict=True):
                    local(p).mul_(1 - group["lr"] * group["weight_decay"]).add_(by)
        return loss


def make_optimizers(learner: nn.Module, config: TrainConfig) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the blocks, unless ``config.optimizer`` is ``"adamw"``; AdamW for the rest and for
    adapters, of which only matrices decay.

    They hold what trains; one that has nothing to do is left out.
    """
    named = [(n, p) for n, p in learner.named_parameters() if p.requires_grad]
    muon = config.optimizer == "muon"
    inner = [p for n, p in named if muon and p.ndim == 2 and ".packed_blocks." in n and not is_adapter(n)]
    ids = {id(p) for p in inner}
    outer = [(n, p) for n, p in named if id(p) not in ids]
    decayed = [p.ndim == 2 and not n.startswith("text.") and "table" not in n for n, p in outer]
    groups = [
        {"params": [p for (_, p), d in zip(outer, decayed, strict=True) if d], "weight_decay": config.weight_decay},
        {"params": [p for (_, p), d in zip(outer, decayed, strict=True) if not d], "weight_decay": 0.0},
    ]
    made: list[torch.optim.Optimizer] = []
    if inner:
        made.append(Muon(inner, config.learning_rate, weight_decay=config.weight_decay))
    if outer:
        made.append(torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True))
    return tuple(made)


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """The same rate for every parameter."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


# what each holds of a parameter between steps
STATE_NAMES: dict[type[torch.optim.Optimizer], set[str]] = {
    Muon: {"average"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
}
