"""What a codec is: the map between pictures and latents that data sets, policies and rollouts use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor


class Codec(Protocol):
    """Encodes T = 1 + temporal (T' - 1) frames of an episode as T' latent frames, and back.

    ``PatchPCA`` has ``temporal`` 1, Wan's VAE 4; ``ClipDataset`` gives either of them the frames that make latent frame
    f stand for video frame n f, at n actions a frame. ``StateCodec`` encodes states, float32 ``[T, S]``, in place of
    pictures.

    Attributes:
        channels: C of a latent frame ``[C, h, w]``.
        spatial: Pixels of a latent cell, in either direction.
        temporal: Video frames for each latent frame after the first.
    """

    channels: int
    spatial: int
    temporal: int

    def encode(self, frames: np.ndarray | Tensor, /) -> Tensor:
        """uint8 ``[T, H, W, 3]`` -> float32 ``[C, T', H / spatial, W / spatial]``."""

    def decode(self, latents: Tensor, /) -> np.ndarray:
        """The reverse of :meth:`encode`, uint8 ``[T, H, W, 3]``."""


class SavedCodec(Codec, Protocol):
    """A codec that is saved with a policy: one of ``wam_models.data.latents.CODECS``.

    Attributes:
        config: What JSON takes.
    """

    config: dict[str, Any]

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors."""

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> SavedCodec:
        """The codec again."""
