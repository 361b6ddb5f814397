"""Models with random weights."""

from __future__ import annotations

import torch

from wam_models import WorldActionModel
from wam_models.config import ModelConfig


def make_model(config: ModelConfig, device: str, dtype: torch.dtype, seed: int) -> WorldActionModel:
    """Random weights, made in place: a float32 copy of the full size would not fit beside a bf16 one."""
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = WorldActionModel(config)
    finally:
        torch.set_default_dtype(before)
    # a fresh model predicts 0 and so sends no gradient back; a trained one does not
    for out in (model.core.proj_out, model.action_expert.action_proj_out):
        torch.nn.init.normal_(out.weight, std=0.02)
    return model
