"""States as frames: each number of ``observation.state`` is a channel of a latent frame of one cell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEAST = 0.01  # of the largest standard deviation: numbers that vary less count less than the others
# Standard deviations. A number that hardly varies in training may leave its range by dozens of them, as the orientation
# of an object does that falls over; a model that never saw such a latent imagines nonsense about everything else.
LIMIT = 5.0


class StateCodec:
    """States in units of their standard deviation in training, behind the codec interface of
    :class:`~wam_models.data.codec.Codec`; its frames are float32 ``[T, S]`` instead of pictures.

    Args:
        mean: Float32 ``[S]``.
        std: Float32 ``[S]``, what each number is divided by; positive.
        limit: Largest latent; a number further from its mean is encoded as if it were so far.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, or a std or limit that is not positive.
    """

    temporal = spatial = 1

    def __init__(self, mean: Tensor, std: Tensor, limit: float = math.inf) -> None:
        if mean.ndim != 1 or not len(mean) or mean.shape != std.shape:
            raise ValueError(f"StateCodec: mean and std must be [S], got {list(mean.shape)} and {list(std.shape)}")
        for name, x in (("mean", mean), ("std", std)):
            if not x.is_floating_point() or not x.isfinite().all():
                raise ValueError(f"StateCodec: {name} must be finite floats, got {x.dtype} {x.tolist()[:3]} ...")
        if not ((std > 1e-12) & (std < 1e12)).all():
            raise ValueError(f"StateCodec: std must be from 1e-12 to 1e12, got {std.min():g} to {std.max():g}")
        if not limit > 0:
            raise ValueError(f"StateCodec: limit must be positive, got {limit!r}")
        self.limit = float(limit)
        # nothing where there is no limit, as in checkpoints from before there was one
        self.config: dict[str, Any] = {} if math.isinf(self.limit) else {"limit": self.limit}
        self.mean, self.std = (x.cpu().to(torch.float32).contiguous() for x in (mean, std))
        self.channels = len(mean)

    @classmethod
    def fit(cls, states: np.ndarray) -> StateCodec:
        """Fits the units to float ``[N, S]``. Raises ValueError if no number varies."""
        values = np.asarray(states, dtype=np.float64)
        std = values.std(0)
        if not std.max() > 0:
            raise ValueError("StateCodec.fit: all states are equal; give episodes in which something moves")
        std = np.maximum(std, LEAST * std.max())
        mean, std = (torch.from_numpy(x.astype(np.float32)) for x in (values.mean(0), std))
        return cls(mean, std, LIMIT)

    def encode(self, frames: np.ndarray | Tensor) -> Tensor:
        """Float32 ``[T, S]`` -> float32 ``[S, T, 1, 1]``. Raises ValueError for another shape or dtype."""
        states = torch.as_tensor(frames)
        if states.ndim != 2 or states.shape[1] != self.channels or not states.is_floating_point() or not len(states):
            raise ValueError(
                f"StateCodec.encode: frames are {states.dtype} {tuple(states.shape)}, expected states as floats "
                f"[T >= 1, {self.channels}]"
            )
        latents = ((states.cpu().to(torch.float32) - self.mean) / self.std).clamp(-self.limit, self.limit)
        return latents.T[:, :, None, None].contiguous()

    def decode(self, latents: Tensor) -> np.ndarray:
        """Float ``[S, T, 1, 1]`` -> float32 ``[T, S]``. Raises ValueError for another shape."""
        if latents.ndim != 4 or (latents.shape[0], *latents.shape[2:]) != (self.channels, 1, 1):
            raise ValueError(f"StateCodec.decode: latents {tuple(latents.shape)}, expected [{self.channels}, T, 1, 1]")
        states = latents.detach().cpu().to(torch.float32)[:, :, 0, 0].T
        return (states * self.std + self.mean).numpy()

    def state_dict(self) -> dict[str, Tensor]:
        """``{"mean", "std"}``: float32 tensors, ready for safetensors."""
        return {"mean": self.mean, "std": self.std}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> StateCodec:
        """The reverse of :meth:`state_dict`; ``config`` says nothing more.

        Raises:
            ValueError: missing or further keys, or tensors that the class refuses.
        """
        if set(state) != {"mean", "std"}:
            raise ValueError(f"StateCodec.from_state_dict: keys are {sorted(state)[:5]}, expected mean and std")
        options = dict(config or {})
        limit = options.pop("limit", math.inf)
        if options or isinstance(limit, bool) or not isinstance(limit, int | float):
            raise ValueError(
                f"StateCodec.from_state_dict: config must be empty or have limit, a number, got {config!r}"
            )
        return cls(**state, limit=limit)
