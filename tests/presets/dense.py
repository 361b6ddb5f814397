"""An attention that knows no plan."""

import numpy as np
import torch
from torch import nn

from wam_models import WorldActionModel


class Densely(nn.Module):
    """A model whose attention is a softmax over the mask by hand, in place of a plan."""

    def __init__(self, model: WorldActionModel, mask: np.ndarray, names: list[str], insulated: bool) -> None:
        super().__init__()
        self.module, self.mask = model, torch.from_numpy(mask)
        streams = np.array([{"A": "action", "C": "context"}.get(name[:1].upper(), "video") for name in names])
        self.action, self.video = (torch.from_numpy(streams == s) for s in ("action", "video"))
        self.action &= insulated

    def forward(self, *inputs, **named):
        named.pop("impl")

        def dense(q, k, v):
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
            return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~self.mask, float("-inf")).softmax(-1), v)

        def attend(layer, q, k, v):
            blind = (torch.where(self.video[:, None, None], t.detach(), t) for t in (k, v))
            return torch.where(self.action[:, None, None], dense(q, *blind), dense(q, k, v))

        return self.module(*inputs[:-1], attend=attend, **named)  # without the plan
