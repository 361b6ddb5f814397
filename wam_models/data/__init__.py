"""Demonstrations on disk, latent pictures and training clips."""

from wam_models.data.clips import ClipDataset
from wam_models.data.latents import PatchPCA, psnr, wan_vae_codec
from wam_models.data.lerobot import Episode, LeRobotDataset

__all__ = ["ClipDataset", "Episode", "LeRobotDataset", "PatchPCA", "psnr", "wan_vae_codec"]
