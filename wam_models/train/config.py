"""The config of a training run: sizes, samples, optimizer, schedule."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from wam_kernels import HISTORIES, PROGRAMS

from ..config import ModelConfig
from ..data import ClipDataset
from ..data.latents import PATCH
from ..flow import SHIFTS, TimestepDraw
from ..objectives import GJD, GJD_MIXTURE, OBJECTIVES, checked_mixture
from ..rollout import RolloutConfig
from ..rollout.config import CONDITIONAL_CHUNK
from ..runtime.checks import check_field, choice, number, whole, whole_range
from ..runtime.json_fields import from_fields, read_json
from ..runtime.limits import LARGEST_INT32, LARGEST_SIZE
from .step import TrainingConfig, stream_pairs

SCHEDULES = ("constant", "cosine", "decay")
DECAY_PART = 0.5  # part of a "decay" run, its end, over which the learning rate falls
CROSS = (("action", "video"), ("video", "action"))  # (query stream, key stream)
SMALLEST_POSITIVE = 1e-12  # of a learning rate or a gradient's length, which must be positive


def small_model() -> ModelConfig:
    """The demo's model; NOTES.md beside this file says what else was tried."""
    return ModelConfig(
        hidden=192,
        heads=12,
        head_dim=16,
        layers=2,
        ffn=512,
        action_hidden=128,
        action_ffn=384,
        action_dim=7,
        actions_per_frame=4,
        text_dim=64,
        rope_theta=10.0,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that a training run depends on, beside the data and the seed. JSON in and out.

    The defaults are the demo's, for three minutes on two CPU cores; NOTES.md beside this file says what else was tried.

    Args:
        model: Sizes of the model.
        actions_per_token: Actions that one action token holds, k: a latent frame is k ``model.actions_per_frame``
            actions long, and ``model.action_dim`` is k times the width of an action.
        cell: Pixels of a latent cell, in either direction, of the ``PatchPCA`` that is fitted to pictures; its channels
            are ``model.latent_channels``. Of no meaning where frames are states, or latents come with a policy.
        programs: Interaction programs of the ``joint`` objective's samples, equally often. Default: all of
            ``wam_kernels.PROGRAMS``, so that one checkpoint serves every rollout program.
        mixture: Share of each objective among the samples.
        history: Which earlier clean tokens a query attends to, one of ``wam_kernels.HISTORIES``.
        chunk_sizes: Smallest and largest chunk, in frames; drawn for every step.
        windows: Smallest and largest window, in order blocks; drawn for every step.
        noised_history: Probability that the clean video copy of a sample is itself noised.
        video_shift: Shift of the video's noise levels.
        action_shift: Shift of the actions' noise levels.
        video_weight: Factor on the video loss.
        action_weight: Factor on the action loss.
        batch: Clips of a step.
        frames: Latent frames of a clip.
        steps: Steps of the run, and the end of the schedule unless time ends the run before.
        learning_rate: After the warm-up.
        warmup: Steps of linear warm-up.
        schedule: ``"constant"``; ``"cosine"``, down to 0 at ``steps``; or ``"decay"``, constant for the first half and
            then linearly down to 0. Of a run whose time is limited, :func:`train` finds the end of ``"decay"``.
        beta2: Of AdamW; its beta1 is 0.9.
        weight_decay: Of AdamW, on matrices alone.
        clip_norm: Longest gradient.
        ema: Exponent of the power-law EMA of the weights (Karras et al. 2024), which is what a checkpoint's model
            holds; 0 for none. It always spans the last 1 / (ema + 1) or so of the run, so training may stop at any
            time, without a learning rate that has to know when.
        save_every: Steps between checkpoints.
        frozen: Components that do not train: ``video``, ``video.blocks``, ``video.text``, ``action``,
            ``action.blocks``, ``words``, or modules of the model by name.
        lora: Components that train through LoRA adapters on their linear maps alone, by ``peft``; named as in
            ``frozen``.
        lora_rank: Of an adapter.
        lora_scale: What an adapter's product is multiplied by: alpha / rank.
        stop_gradient: Pairs (query stream, key stream), ``("action", "video")``: keys and values of that stream get no
            gradient from those queries. None follows what is frozen: the keys of a stream of which nothing trains get
            none from the other stream's queries.

    Raises:
        ValueError: a value of the wrong type or outside its range; the message names the field.
    """

    model: ModelConfig = field(default_factory=small_model)
    actions_per_token: int = 1
    cell: int = PATCH
    programs: tuple[str, ...] = field(default_factory=lambda: tuple(PROGRAMS))
    mixture: Mapping[str, float] = field(default_factory=lambda: dict(GJD_MIXTURE))
    history: str = "full"
    chunk_sizes: tuple[int, int] = (1, 4)
    windows: tuple[int, int] = (4, 16)
    noised_history: float = 0.0
    video_shift: float = 20.0
    action_shift: float = 15.0
    video_weight: float = 1.0
    action_weight: float = 1.0
    batch: int = 2
    frames: int = 9
    steps: int = 2000
    learning_rate: float = 1.5e-3
    warmup: int = 20
    schedule: str = "decay"
    beta2: float = 0.99
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema: float = 7.0
    save_every: int = 500
    frozen: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    lora_rank: int = 16
    lora_scale: float = 1.0
    stop_gradient: tuple[tuple[str, str], ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, ModelConfig):
            raise ValueError(f"TrainConfig: model must be a ModelConfig, got {self.model!r}")
        features = [stream.name for stream in self.model.context if stream.features]
        m = self.model
        if features or m.state_dim or m.bridge_dim or not m.has_actions:
            got = f"context features {features}, topology={m.topology!r}, state_dim={m.state_dim} and "
            got += f"bridge_dim={m.bridge_dim}"
            raise ValueError(
                f"TrainConfig: model must have actions and be given nothing but pictures and text, got {got}; for "
                "others call training_step"
            )
        check_field(self, "actions_per_token", whole, 1, LARGEST_SIZE)
        check_field(self, "cell", whole, 1, LARGEST_SIZE)
        check_field(self, "programs", _programs)
        check_field(self, "mixture", checked_mixture)
        check_field(self, "history", choice, HISTORIES)
        for name in ("chunk_sizes", "windows"):
            check_field(self, name, whole_range, 1, LARGEST_INT32)
        check_field(self, "noised_history", number, 0, 1)
        for name in ("video_shift", "action_shift"):
            check_field(self, name, number, *SHIFTS)
        check_field(self, "batch", whole, 1, LARGEST_SIZE)
        for name, low in (("frames", 2), ("steps", 1), ("warmup", 0), ("save_every", 1)):
            check_field(self, name, whole, low)
        check_field(self, "learning_rate", number, SMALLEST_POSITIVE, 100)
        check_field(self, "clip_norm", number, SMALLEST_POSITIVE)
        for name in ("weight_decay", "ema", "video_weight", "action_weight"):
            check_field(self, name, number, 0)
        check_field(self, "schedule", choice, SCHEDULES)
        check_field(self, "beta2", number, 0, 0.999999)
        for name in ("frozen", "lora"):
            check_field(self, name, _names)
        check_field(self, "lora_rank", whole, 1, LARGEST_SIZE)
        check_field(self, "lora_scale", number, SMALLEST_POSITIVE)
        if self.stop_gradient is not None:
            check_field(self, "stop_gradient", stream_pairs)

    def to_dict(self) -> dict[str, Any]:
        """A dict that ``json.dumps`` takes."""
        return asdict(self) | {"model": self.model.to_dict(), "mixture": dict(self.mixture)}

    @classmethod
    def from_dict(cls, values: Any, source: str = "TrainConfig") -> TrainConfig:
        """From a dict as JSON gives it; fields that are left out keep their defaults, in ``model`` too.

        Raises:
            ValueError: an unknown field, or a value that is refused; the message names it and ``source``.
        """
        if isinstance(values, dict) and "model" in values:
            model = values["model"]
            if isinstance(model, dict):
                model = small_model().to_dict() | model
            values = values | {"model": ModelConfig.from_dict(model, f"{source}: model")}
        return from_fields(cls, values, source, defaults=True)

    @classmethod
    def from_json(cls, path: str | Path) -> TrainConfig:
        """From a file. Raises ValueError, naming file and field, or OSError where it cannot be read."""
        return cls.from_dict(read_json(Path(path)), str(path))

    @property
    def actions_per_frame(self) -> int:
        """Actions, and so rows of the data set, from one latent frame to the next."""
        return self.actions_per_token * self.model.actions_per_frame

    def rate(self, step: int, end: int | None = None) -> float:
        """Learning rate of a step, counted from 0, of a run that ends at step ``end`` (default ``steps``)."""
        end = self.steps if end is None else end
        remaining = 1 - min(1.0, step / end)
        decay = {
            "constant": 1.0,
            "cosine": 0.5 * (1 - math.cos(math.pi * remaining)),
            "decay": min(1.0, remaining / DECAY_PART),
        }[self.schedule]
        return self.learning_rate * min(1.0, (step + 1) / (self.warmup + 1)) * decay

    def draws(self, frozen: Collection[str] = ()) -> list[tuple[float, TrainingConfig]]:
        """What a step may be trained on, with probabilities, such that the samples keep the mixture.

        A step has one program for all its samples. The conditional objectives share steps of their own, in which each
        sample draws its objective; their chunks are of one frame, as in a rollout. ``frozen`` are the streams, of
        ``video`` and ``action``, of which nothing trains.
        """
        total = sum(self.mixture.values())
        share = {name: self.mixture.get(name, 0.0) / total for name in OBJECTIVES}
        common = TrainingConfig(
            history=self.history,
            chunk_sizes=self.chunk_sizes,
            windows=self.windows,
            timesteps=TimestepDraw(video_shift=self.video_shift, action_shift=self.action_shift),
            noised_history=self.noised_history,
            video_weight=self.video_weight,
            action_weight=self.action_weight,
            stop_gradient=tuple(p for p in CROSS if p[1] in frozen)
            if self.stop_gradient is None
            else self.stop_gradient,
        )
        joint = share.pop("joint")
        kinds = [(joint / len(self.programs), replace(common, program=p)) for p in self.programs]
        conditional = sum(share.values())
        if conditional > 0:
            one = (CONDITIONAL_CHUNK, CONDITIONAL_CHUNK)
            kinds.append((conditional, replace(common, program=GJD, mixture=share, chunk_sizes=one)))
        return kinds

    def default_rollout(self) -> RolloutConfig:
        """How a policy is rolled out unless told otherwise.

        In one step: from noise it gives the mean of what may follow, the best guess that an error can ask for.
        """
        return RolloutConfig(
            chunk_size=self.chunk_sizes[1],
            window=4,
            history=self.history,
            steps=1,
            video_shift=self.video_shift,
            action_shift=self.action_shift,
        )


def _programs(where: str, value: Any) -> tuple[str, ...]:
    listed = isinstance(value, list | tuple | Mapping) and value
    if not listed or not all(p in PROGRAMS for p in value) or len(set(value)) < len(value):
        raise ValueError(f"{where} must be some of {tuple(PROGRAMS)}, each once, got {value!r}")
    return tuple(value)


def _names(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) and v for v in value):
        raise ValueError(f"{where} must be a list of names of components, got {value!r}")
    return tuple(value)


def check_fit(config: TrainConfig, data: ClipDataset) -> None:
    """Whether a model of these sizes can be trained on this data.

    Raises:
        ValueError: it cannot; the message names the field.
    """
    channels, rows, columns = data.latent_shape
    model = config.model
    for name, wants, has in (
        ("latent_channels", model.latent_channels, channels),
        ("action_dim", model.action_dim, data.action_mean.numel() * data.actions_per_token),
        ("actions_per_frame", model.actions_per_frame, data.actions_per_frame // data.actions_per_token),
    ):
        if wants != has:
            raise ValueError(f"TrainConfig: model.{name} must be {has} for this data set, got {wants}")
    if model.action_hidden < model.action_dim + 2:  # initialise() passes actions through, beside a mean and a constant
        raise ValueError(
            f"TrainConfig: model.action_hidden must be at least {model.action_dim + 2}, two more than action_dim, got "
            f"{model.action_hidden}"
        )
    if rows % model.patch[1] or columns % model.patch[2]:
        raise ValueError(
            f"TrainConfig: model.patch must divide the latent rows and columns {(rows, columns)}, got {model.patch}"
        )
    longest = max(data.length(i) for i in data.train)
    if config.frames > longest:
        raise ValueError(f"TrainConfig: frames must be at most {longest}, the longest episode, got {config.frames}")
