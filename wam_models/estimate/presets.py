"""Sizes under a name: what ``--preset`` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from ..config import ModelConfig, wan_5b_config, wan_5b_small_action_config
from ..costs import Sizes
from ..rollout import RolloutConfig
from ..train.config import TrainConfig, small_model


@dataclass(frozen=True)
class Preset:
    """A model on the pictures and the text that it is meant for, and the runs that the estimate is of."""

    what: str
    model: Callable[[], ModelConfig]
    grid: tuple[int, int]  # rows and columns of a frame's video tokens
    text_tokens: int
    rollout: RolloutConfig
    frames: int  # of a training clip
    batch: int = 1

    def sizes(self) -> Sizes:
        return Sizes(self.model(), self.grid, self.text_tokens)

    def train(self) -> TrainConfig:
        r = self.rollout
        return TrainConfig(
            model=self.model(), programs=(r.program,), history=r.history, chunk_sizes=(1, r.chunk_size),
            windows=(4, r.window), batch=self.batch, frames=self.frames,
        )  # fmt: skip


def _robotwin() -> ModelConfig:
    return replace(wan_5b_config(), action_dim=14, actions_per_frame=8)


_FULL = RolloutConfig(program="joint", chunk_size=4, window=64, history="video_only", steps=20)
_DEMO = RolloutConfig(program="joint", chunk_size=4, window=4, steps=1)
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "libero": Preset("5B + 2.5B on two LIBERO views", wan_5b_config, (4, 8), 512, _FULL, 68),
        "libero-small": Preset("5B + 0.6B on two LIBERO views", wan_5b_small_action_config, (4, 8), 512, _FULL, 68),
        "robotwin": Preset("5B + 2.5B on three RoboTwin views", _robotwin, (10, 12), 512, _FULL, 33),
        "demo": Preset("the demo's model on libero_demo", small_model, (4, 8), 16, _DEMO, 9, 2),
    }
)
