"""The features of a model's own video that its actions cross-attend to: of which video, under which programs."""

from __future__ import annotations

import torch
from torch import Tensor

from wam_kernels import Attends
from wam_kernels.masks.visibility import ACTION, VIDEO

from .config import ModelConfig
from .flow import add_noise, timesteps
from .model.blocks import BridgeVideo, Uncast
from .objectives import MODEL_PROGRAMS, Objective


def bridge_video(config: ModelConfig, video: Tensor, noise: Tensor, trains: bool = False) -> BridgeVideo:
    """The video of ``config.bridge_layer``: the frame before a chunk as it is, the chunk's noised.

    Args:
        config: Of a model with a ``bridge_layer``.
        video: ``[B, C, 1 + K, y, x]``, the frame before the chunk and the chunk.
        noise: Likewise; that of the first frame is not used.
        trains: Whether the actions' loss reaches the video expert through it.
    """
    sigma = torch.full((video.shape[0], video.shape[2]), config.bridge_sigma, device=video.device)
    sigma[:, 0] = 0
    noised = add_noise(video.transpose(1, 2), noise.transpose(1, 2), sigma).transpose(1, 2)
    return BridgeVideo(noised, Uncast(timesteps(sigma)), trains)


def video_attends_to_actions(program: str, history: str) -> bool:
    """Whether the video attends to actions of its chunk or of earlier ones, and so to the features that these know."""
    row = MODEL_PROGRAMS[program]
    relations = row.noisy_to_noisy, row.noisy_to_clean, row.clean_to_clean
    return history == "full" or any((VIDEO, ACTION) in relation.pairs for relation in relations)


def rolls_out(config: ModelConfig, program: str, objective: Objective) -> bool:
    """Whether a model can roll out an objective under a program that has rollouts.

    One with ``full_attention`` has the programs in which noisy tokens attend to all noisy ones. One without actions, or
    with a ``bridge_layer``, has the objective ``joint`` alone; below a ``bridge_sigma`` of 1 the program must resolve
    the video before the actions.
    """
    if config.full_attention and MODEL_PROGRAMS[program].noisy_to_noisy != Attends.ALL:
        return False
    if config.has_actions and config.bridge_layer is None:
        return True
    if objective.conditional or not config.has_actions or config.bridge_sigma == 1:
        return not objective.conditional
    first, *later = MODEL_PROGRAMS[program].stages
    return first == (VIDEO,) and bool(later)
