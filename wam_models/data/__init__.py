"""Demonstrations on disk, latent pictures and training clips."""

from .clips import ClipDataset
from .latents import PatchPCA, psnr, wan_vae_codec
from .lerobot import Episode, LeRobotDataset
from .states import StateCodec

__all__ = ["ClipDataset", "Episode", "LeRobotDataset", "PatchPCA", "StateCodec", "psnr", "wan_vae_codec"]
