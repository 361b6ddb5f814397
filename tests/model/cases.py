"""The recorded reference: weights, packed forwards and rollouts of ``tests/golden``."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from wam_kernels import Geometry
from wam_models import WorldActionModel, golden_config, load_weights

GOLDEN = Path(__file__).parent.parent / "golden"
META = json.loads((GOLDEN / "dual_expert" / "meta.json").read_text())
ROLLOUTS = json.loads((GOLDEN / "rollout" / "meta.json").read_text())
# The bound on ||a - b|| / ||b|| in float32.
BOUND = 1e-5


@cache
def weights() -> dict[str, Tensor]:
    return load_file(GOLDEN / "dual_expert" / "state_dict.safetensors")


def golden_model(dtype: torch.dtype = torch.float32) -> WorldActionModel:
    model = WorldActionModel(golden_config())
    load_weights(model, weights())
    return model.to(dtype).eval().requires_grad_(False)


def packed_geometry(program: str, **changes) -> Geometry:
    values = {
        "program": program,
        "video_frames": META["frames"],
        "video_tokens": META["tokens_per_frame"],
        "action_frames": META["frames"],
        "action_tokens": META["actions_per_frame"],
        "chunk_size": META["chunk_size_frames"],
        "window": META["window"],
        "history": META["cases"][program]["history_stream_visibility"],
    }
    return Geometry(**values | changes)


def packed_inputs(program: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Arguments of the packed forward, and what the reference got."""
    g = load_file(GOLDEN / "dual_expert" / f"{program}.safetensors")
    per_frame = META["actions_per_frame"]
    names = (
        "noisy_video",
        "clean_video",
        "noisy_action",
        "clean_action",
        "video_timesteps",
        "action_timesteps",
        "text",
    )
    inputs = {n: g[n].unflatten(1, (-1, per_frame)) if "action" in n else g[n] for n in names}
    return inputs, {k: v for k, v in g.items() if k not in names}


def error(a: Tensor, b: Tensor) -> float:
    """``||a - b|| / ||b||``, computed in float64."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
