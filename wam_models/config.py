"""Model sizes: one frozen dataclass, one function per size, JSON in and out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from wam_kernels.qk_norm_rope.table import default_split

from .runtime.checks import check_field, number, whole, wholes
from .runtime.json_fields import from_fields
from .runtime.limits import LARGEST_SIZE


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a dual-expert world-action model.

    Both experts project into the same ``heads * head_dim`` wide attention, whatever their own width, so that
    video and action tokens attend to each other.

    Args:
        hidden: Width of the video expert.
        heads: Attention heads, of both experts.
        head_dim: Width of one head; even. Rope gives ``2 * (head_dim // 6)`` to row and to column, the rest to frame.
        layers: Blocks, of both experts.
        ffn: Feed-forward width of the video expert.
        action_hidden: Width of the action expert.
        action_ffn: Feed-forward width of the action expert.
        action_dim: Numbers in one action.
        actions_per_frame: Action tokens that lead from one latent frame to the next.
        latent_channels: Channels of a video latent.
        text_dim: Width of the raw text embeddings.
        patch: ``(frames, rows, columns)`` of latent pixels in one video token; frames must be 1.
        freq_dim: Width of the sinusoidal timestep embedding; even.
        rope_theta: Base of the rope frequencies.
        eps: Added to the variance in every norm.

    Raises:
        ValueError: a value of the wrong type or outside its range; the message names the field.
    """

    hidden: int
    heads: int
    head_dim: int
    layers: int
    ffn: int
    action_hidden: int
    action_ffn: int
    action_dim: int
    actions_per_frame: int
    latent_channels: int = 48
    text_dim: int = 4096
    patch: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    rope_theta: float = 10000.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int":
                check_field(self, field.name, whole, 1, 1000 if field.name == "layers" else LARGEST_SIZE)
        for name in ("head_dim", "freq_dim"):
            if getattr(self, name) % 2:
                raise ValueError(f"ModelConfig: {name} must be even, got {getattr(self, name)}")
        check_field(self, "patch", _patch)
        check_field(self, "rope_theta", number, 1, 1e12)
        check_field(self, "eps", number, 1e-12, 1)

    @property
    def inner(self) -> int:
        """Width of q, k and v: the same for both experts."""
        return self.heads * self.head_dim

    @property
    def patch_width(self) -> int:
        """Numbers in one video patch."""
        return self.latent_channels * self.patch[0] * self.patch[1] * self.patch[2]

    @property
    def matrices(self) -> int:
        """Numbers in the large matrices: of the blocks, of timesteps and text. Nearly all that the model has."""
        experts = (self.hidden, self.ffn), (self.action_hidden, self.action_ffn)
        blocks = sum(8 * width * self.inner + 2 * width * ffn for width, ffn in experts)
        return self.layers * blocks + sum((7 * width + self.text_dim) * width for width, _ in experts)

    @property
    def rope_split(self) -> tuple[int, int, int]:
        """Head dimensions of frame, row and column; each even."""
        return default_split(self.head_dim)

    def to_dict(self) -> dict:
        """A dict that ``json.dumps`` takes."""
        return asdict(self) | {"patch": list(self.patch)}

    @classmethod
    def from_dict(cls, values: Any, source: str = "ModelConfig") -> ModelConfig:
        """The inverse of :meth:`to_dict`; ``source`` says in messages where the values are from.

        Raises:
            ValueError: unknown or missing fields, by name, or a value that the class refuses.
        """
        return from_fields(cls, values, source)


def _patch(where: str, value: Any) -> tuple[int, ...]:
    patch = tuple(wholes(where, value, 1, 256))
    if len(patch) != 3 or patch[0] != 1:
        raise ValueError(f"{where} must be (1, rows, columns), got {value!r}")
    return patch


def golden_config() -> ModelConfig:
    """The size of ``tests/golden``."""
    return ModelConfig(
        hidden=64,
        heads=2,
        head_dim=32,
        layers=2,
        ffn=128,
        action_hidden=48,
        action_ffn=96,
        action_dim=7,
        actions_per_frame=2,
    )


def demo_config() -> ModelConfig:
    """About 3 million parameters: trains on a laptop-sized data set in minutes, with the word-level text slot."""
    return ModelConfig(
        hidden=128,
        heads=4,
        head_dim=32,
        layers=6,
        ffn=512,
        action_hidden=96,
        action_ffn=384,
        action_dim=7,
        actions_per_frame=4,
        text_dim=64,
    )


def wan_5b_config() -> ModelConfig:
    """A 5-billion video expert with a 2048 wide action expert."""
    return ModelConfig(
        hidden=3072,
        heads=24,
        head_dim=128,
        layers=30,
        ffn=14336,
        action_hidden=2048,
        action_ffn=8192,
        action_dim=7,
        actions_per_frame=4,
    )


def wan_5b_small_action_config() -> ModelConfig:
    """A 5-billion video expert with a 576 wide action expert."""
    return ModelConfig.from_dict(wan_5b_config().to_dict() | {"action_hidden": 576, "action_ffn": 2048})
