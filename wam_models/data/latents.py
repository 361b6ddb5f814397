"""The codecs: a linear patch transform that needs no download, Wan's VAE, and states; see ``Codec`` in ``codec.py``."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .codec import Codec, SavedCodec
from .states import StateCodec

__all__ = ["CODECS", "PatchPCA", "WanVAECodec", "codec_kind", "pictures_of", "psnr", "wan_vae_codec"]

PATCH = 16  # pixels of PatchPCA's cells, unless told otherwise


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures or videos of one shape; infinity if they are equal.

    Raises ValueError for different shapes.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise ValueError(f"psnr: shapes differ, {a.shape} and {b.shape}")
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


class PatchPCA:
    """A fixed linear map of RGB patches to `channels` numbers: the best linear code, and no weights to download.

    Args (use `fit` or `from_state_dict`):
        mean: float32 [3 P P], the mean patch, pixels in [0, 1], ordered (row, column, colour).
        basis: float32 [C, 3 P P], orthonormal rows, by falling variance.
        scale: float32 [C], what each coordinate is multiplied by; positive.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, rows that are not orthonormal.
    """

    temporal = 1
    config: dict[str, Any] = {}

    def __init__(self, mean: Tensor, basis: Tensor, scale: Tensor) -> None:
        patch = math.isqrt(mean.numel() // 3)
        if mean.ndim != 1 or mean.numel() == 0 or 3 * patch * patch != mean.numel():
            raise ValueError(f"PatchPCA: mean has shape {tuple(mean.shape)}, expected [3 P P]")
        if basis.ndim != 2 or basis.shape[1] != mean.numel() or scale.shape != basis.shape[:1] or not len(basis):
            raise ValueError(
                f"PatchPCA: shapes do not fit: mean {tuple(mean.shape)}, basis {tuple(basis.shape)}, "
                f"scale {tuple(scale.shape)}; expected [3 P P], [C, 3 P P], [C]"
            )
        for name, x in (("mean", mean), ("basis", basis), ("scale", scale)):
            if not x.is_floating_point() or not x.isfinite().all():
                raise ValueError(
                    f"PatchPCA: {name} must be finite floats, got {x.dtype} {x.flatten().tolist()[:3]} ..."
                )
        self.mean, self.basis, self.scale = (x.cpu().to(torch.float32).contiguous() for x in (mean, basis, scale))
        if not ((self.mean > -0.01) & (self.mean < 1.01)).all():
            low, high = self.mean.aminmax()
            raise ValueError(f"PatchPCA: mean must be of pixels from 0 to 1, got {low:g} to {high:g}")
        if not ((self.scale > 1e-12) & (self.scale < 1e12)).all():  # else latents or pictures overflow
            low, high = self.scale.aminmax()
            raise ValueError(f"PatchPCA: scale must be from 1e-12 to 1e12, got {low:g} to {high:g}")
        skew = (self.basis @ self.basis.T - torch.eye(len(basis))).abs().max().item()
        if not skew <= 0.02:  # as far as rows stored in bf16 are from it
            raise ValueError(f"PatchPCA: basis must have orthonormal rows, got products that are {skew:g} off")
        self.spatial = patch
        self.channels = basis.shape[0]

    @classmethod
    def fit(cls, frames: np.ndarray | Tensor, channels: int = 48, patch: int = PATCH) -> PatchPCA:
        """Fits the map to uint8 frames [N, H, W, 3] (array or tensor); float64, the same result on every run.

        Raises ValueError if H or W is no multiple of `patch`, `channels` is outside 1 .. 3 patch^2, there is no frame,
        or all patches are equal.
        """
        size = 3 * patch * patch
        if not 1 <= channels <= size:
            raise ValueError(f"PatchPCA.fit: channels is {channels}, expected 1 to {size} for patches of {patch}")
        frames = _check_frames(frames, patch, "PatchPCA.fit")
        total = torch.zeros(size, dtype=torch.float64)
        gram = torch.zeros(size, size, dtype=torch.float64)
        count = 0
        for block in frames.split(64):  # bounds the float64 copy to about 50 MB
            rows = _patches(block, patch).flatten(0, 2).to(torch.float64) / 255
            # centred at middle grey first, so that subtracting the mean below cancels little
            rows -= 0.5
            total += rows.sum(0)
            gram += rows.T @ rows
            count += len(rows)
        mean = total / count
        variance, vectors = torch.linalg.eigh(gram / count - torch.outer(mean, mean))
        std = variance.flip(0)[:channels].clamp_min(0).sqrt()
        if not std[0] > 0:
            raise ValueError("PatchPCA.fit: all patches are equal; give frames with some content")
        basis = vectors.flip(1)[:, :channels].T.contiguous()
        # an eigenvector is known up to its sign: make the entry of largest size positive
        largest = basis.abs().argmax(1, keepdim=True)
        basis = basis * torch.sign(basis.gather(1, largest))
        # Between two bad ends. Unit variance everywhere would make the last channels, which hold hardly a grey level of
        # detail and the codec's noise, count as much as the first. One scale for all leaves them a hundredth of the
        # size of the flow's unit noise, never learnt. So variance goes with std instead of std^2, and is 1 on average.
        std = std.clamp_min(1e-3 * std[0])
        scale = std.rsqrt() / std.mean().sqrt()
        return cls(mean + 0.5, basis, scale)

    def encode(self, frames: np.ndarray | Tensor) -> Tensor:
        """uint8 [T, H, W, 3] (array or tensor) -> float32 [C, T, H / P, W / P], mean 0, variance about 1 on average.

        Raises ValueError for another dtype or rank, or if H or W is no multiple of the patch.
        """
        frames = _check_frames(frames, self.spatial, "PatchPCA.encode")
        rows = _patches(frames, self.spatial).to(torch.float32) / 255 - self.mean
        return ((rows @ self.basis.T) * self.scale).permute(3, 0, 1, 2).contiguous()

    def decode(self, latents: Tensor) -> np.ndarray:
        """float [C, T, h, w] -> uint8 array [T, h P, w P, 3]. Raises ValueError if the channels are not C."""
        if latents.ndim != 4 or latents.shape[0] != self.channels:
            raise ValueError(f"PatchPCA.decode: latents {tuple(latents.shape)}, expected [{self.channels}, T, h, w]")
        _, t, h, w = latents.shape
        p = self.spatial
        rows = (latents.detach().cpu().to(torch.float32).permute(1, 2, 3, 0) / self.scale) @ self.basis + self.mean
        pixels = rows.view(t, h, w, p, p, 3).permute(0, 1, 3, 2, 4, 5).reshape(t, h * p, w * p, 3)
        return (pixels * 255).round().clamp(0, 255).to(torch.uint8).numpy()

    def state_dict(self) -> dict[str, Tensor]:
        """{"mean", "basis", "scale"}: float32 tensors, ready for safetensors."""
        return {"mean": self.mean, "basis": self.basis, "scale": self.scale}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> PatchPCA:
        """The reverse of `state_dict`; `config` says nothing more.

        Raises ValueError for missing or further keys, or shapes that do not fit.
        """
        if set(state) != {"mean", "basis", "scale"}:
            raise ValueError(f"PatchPCA.from_state_dict: keys are {sorted(state)[:5]}, expected basis, mean and scale")
        return cls(**state)


class WanVAECodec:
    """diffusers' AutoencoderKLWan behind the codec interface. Made by `wan_vae_codec`.

    encode takes 1 + 4 k frames; latents are normalised with the mean and std in the VAE's config, as Wan's transformer
    expects them. Wan 2.2's VAE has 48 channels and 16 pixels a cell, Wan 2.1's 16 and 8.
    """

    def __init__(self, vae: Any) -> None:
        self.config = json.loads(vae.to_json_string())
        self.vae = vae.eval().requires_grad_(False)
        config = vae.config
        self.channels = config.z_dim
        self.temporal = 2 ** sum(config.temperal_downsample)  # diffusers' spelling
        self.spatial = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
        self._mean = torch.tensor(config.latents_mean).view(-1, 1, 1, 1)
        self._std = torch.tensor(config.latents_std).view(-1, 1, 1, 1)

    @torch.no_grad()
    def encode(self, frames: np.ndarray | Tensor) -> Tensor:
        """uint8 [1 + 4 k, H, W, 3] -> float32 [C, 1 + k, H / spatial, W / spatial].

        Raises ValueError for another number of frames, and as PatchPCA.encode does.
        """
        frames = _check_frames(frames, self.spatial, "WanVAECodec.encode")
        if (len(frames) - 1) % self.temporal:
            raise ValueError(
                f"WanVAECodec.encode: {len(frames)} frames, expected 1 + {self.temporal} k; cut the clip to that"
            )
        pixels = (frames.to(torch.float32) / 127.5 - 1).permute(3, 0, 1, 2)[None]
        latents = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.mode()[0]
        return (latents.cpu().to(torch.float32) - self._mean) / self._std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """float [C, 1 + k, h, w] -> uint8 array [1 + 4 k, H, W, 3]. Raises ValueError if the channels are not C."""
        if latents.ndim != 4 or latents.shape[0] != self.channels:
            raise ValueError(f"WanVAECodec.decode: latents {tuple(latents.shape)}, expected [{self.channels}, T, h, w]")
        latents = latents.detach().cpu().to(torch.float32) * self._std + self._mean
        pixels = self.vae.decode(latents[None].to(self.vae.device, self.vae.dtype)).sample[0]
        pixels = (pixels.cpu().to(torch.float32).permute(1, 2, 3, 0) + 1) * 127.5
        return pixels.round().clamp(0, 255).to(torch.uint8).numpy()

    def state_dict(self) -> dict[str, Tensor]:
        """The weights of the VAE, in its dtype, ready for safetensors."""
        return self.vae.state_dict()

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> WanVAECodec:
        """The reverse of `state_dict` and `config`, where the tensors are.

        Raises ModuleNotFoundError if diffusers is not installed, ValueError if it refuses the config, or for tensors
        that do not fit or are not finite.
        """
        vae_class = _vae_class("WanVAECodec.from_state_dict")
        try:
            vae = vae_class.from_config(config)
        except Exception as error:  # whatever its constructor makes of wrong sizes
            raise ValueError(f"WanVAECodec: diffusers refuses the config ({type(error).__name__}: {error})") from error
        own = vae.state_dict()
        wrong = sorted(set(own) ^ set(state)) or [k for k in own if own[k].shape != state[k].shape]
        wrong = wrong or [k for k in own if not state[k].is_floating_point() or not state[k].isfinite().all()]
        if wrong:
            raise ValueError(
                f"WanVAECodec: {len(wrong)} tensors are missing, unknown, of another shape or not finite floats, "
                f"among them {wrong[:3]}"
            )
        vae.load_state_dict(state, assign=True)  # keeps dtype and device
        return cls(vae)


CODECS: dict[str, type[SavedCodec]] = {"patch_pca": PatchPCA, "wan_vae": WanVAECodec, "state": StateCodec}


def codec_kind(codec: Codec) -> str:
    """The key of a codec's class in CODECS. Raises ValueError for another class."""
    for kind, cls in CODECS.items():
        if type(codec) is cls:
            return kind
    names = " or a ".join(cls.__name__ for cls in CODECS.values())
    raise ValueError(f"codec must be a {names} to be saved with a policy, got a {type(codec).__name__}")


def pictures_of(codec: Codec, latents: Tensor) -> np.ndarray:
    """The picture of each latent frame, uint8 [T', H, W, 3], of latents [C, T', h, w] that begin an episode."""
    return codec.decode(latents)[:: codec.temporal]


def wan_vae_codec(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> WanVAECodec:
    """Loads Wan's VAE from a local folder in diffusers' layout (config.json and the weights); nothing is downloaded.

    Returns a WanVAECodec. Raises FileNotFoundError if the folder or its files are missing, ModuleNotFoundError if
    diffusers is not installed.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path / 'config.json'}: not found; pass the vae/ folder of a local Wan checkpoint")
    if not any(path.glob("diffusion_pytorch_model*")):
        raise FileNotFoundError(f"{path}/diffusion_pytorch_model*: not found; the folder has a config but no weights")
    vae_class = _vae_class("wan_vae_codec")
    vae = vae_class.from_pretrained(path, torch_dtype=dtype, local_files_only=True)
    return WanVAECodec(vae.to(device))


def _vae_class(where: str) -> Any:
    if importlib.util.find_spec("diffusers") is None:
        raise ModuleNotFoundError(
            f"{where} needs diffusers: pip install diffusers accelerate, or use PatchPCA", name="diffusers"
        )
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan


def _check_frames(frames: np.ndarray | Tensor, patch: int, where: str) -> Tensor:
    """Returns frames as a contiguous uint8 CPU tensor [T, H, W, 3]."""
    if not isinstance(frames, Tensor):
        # torch takes no negative strides, as of a picture that was turned, and warns of arrays that are read-only
        frames = torch.from_numpy(np.require(frames, requirements=["C", "W"]))
    frames = frames.cpu().contiguous()
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
        raise ValueError(f"{where}: frames are {frames.dtype} {tuple(frames.shape)}, expected uint8 [T >= 1, H, W, 3]")
    if frames.shape[1] % patch or frames.shape[2] % patch:
        size = f"{frames.shape[1]} x {frames.shape[2]}"
        raise ValueError(f"{where}: frames are {size}, expected multiples of {patch}; crop or pad them")
    return frames


def _patches(frames: Tensor, patch: int) -> Tensor:
    """[T, H, W, 3] -> [T, h, w, 3 P P], each patch ordered (row, column, colour)."""
    t, height, width, _ = frames.shape
    h, w = height // patch, width // patch
    return frames.view(t, h, patch, w, patch, 3).permute(0, 1, 3, 2, 4, 5).reshape(t, h, w, 3 * patch * patch)
