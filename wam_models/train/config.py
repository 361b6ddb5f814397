"""The config of a training run: sizes, samples, optimizer, schedule."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

from wam_kernels import PROGRAMS

from ..bridge import rolls_out, video_attends_to_actions
from ..config import ModelConfig
from ..data import ClipDataset
from ..data.clips import ACTION_FREE, COUNTERFACTUAL, TRAIN
from ..data.latents import PATCH
from ..flow import COUPLINGS, LEVELS_PER, SHIFTS, TimestepDraw
from ..objectives import GJD, GJD_MIXTURE, OBJECTIVES
from ..rollout import RolloutConfig
from ..rollout.config import CONDITIONAL_CHUNK, check_full_attention
from ..runtime.checks import check_field, choice, number, whole
from ..runtime.json_fields import from_fields
from ..runtime.limits import LARGEST_SIZE
from .engine import EngineConfig
from .samples import SampleConfig, StepConfig, stream_pairs

INITIALISATIONS = ("random", "by_hand")
SCHEDULES = ("constant", "cosine", "decay")
OPTIMIZERS = ("muon", "adamw")
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


class StepKind(NamedTuple):
    """Steps of one kind: how often they come, what they are, and the split that each of their clips is drawn from."""

    share: float
    config: StepConfig
    splits: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(SampleConfig):
    """All that a training run depends on, beside the data and the seed. JSON in and out.

    The fields of :class:`SampleConfig` are its own too. The sizes are the demo's, for three minutes on two CPU
    cores; NOTES.md beside this file says what else was tried.

    Args:
        model: Sizes of the model.
        actions_per_token: Actions that one action token holds, k: a latent frame is k ``model.actions_per_frame``
            actions long, and ``model.action_dim`` is k times the width of an action.
        cell: Pixels of a latent cell, in either direction, of the ``PatchPCA`` that is fitted to pictures; its channels
            are ``model.latent_channels``. Of no meaning where frames are states, or latents come with a policy.
        programs: Interaction programs of the ``joint`` objective's samples, equally often. Default: all of
            ``wam_kernels.PROGRAMS``, so that one checkpoint serves every rollout program.
        mixture: Weight of each objective among the samples of demonstrations. Default: GJD's; ``joint`` alone for a
            model without actions or with a bridge of its own.
        counterfactual: The same among samples of the split ``counterfactual``, recorded dynamics whose actions did not
            come from a demonstration: as many samples of each as its weight beside those of ``mixture`` says. Default:
            no such samples. OpenWAM's GJD has 0.6 ``joint``, 0.1 of both others, and 0.1 of both here.
        action_free: Share, among the ``joint`` samples, of those of the split ``action_free``, videos without actions.
        video_shift: Shift of the video's noise levels.
        action_shift: Shift of the actions' noise levels.
        levels_per: What has a noise level of its own: ``"frame"`` or ``"clip"``.
        coupling: Relation of the two streams' noise levels, one of ``flow.COUPLINGS``.
        rollout: Fields of ``RolloutConfig`` by which the policy is rolled out unless told otherwise, in place of those
            of :meth:`default_rollout`; a stream's schedule is a table of its fields.
        batch: Clips of a step.
        frames: Latent frames of a clip; of packed clips the longest.
        tokens: Of a step whose clips are packed: as many as there is room for, of ``shortest`` to ``frames`` frames,
            each with a program, an objective, a chunk and a window of its own, one after another without padding. 0 for
            ``batch`` clips of ``frames`` frames, which share program, chunk and window.
        shortest: Latent frames of the shortest packed clip; with ``frames`` or more, clips are whole episodes where
            these are shorter.
        steps: Steps of the run, and the end of the schedule unless time ends the run before.
        learning_rate: After the warm-up.
        initialisation: Weights of a fresh model: ``"random"``, or ``"by_hand"``, near what any trained model of the
            demo's size does, which saves a short run its first steps (``initialise``).
        warmup: Steps of linear warm-up.
        schedule: ``"constant"``; ``"cosine"``, down to 0 at ``steps``; or ``"decay"``, constant for the first half and
            then linearly down to 0. Of a run whose time is limited, :func:`train` finds the end of ``"decay"``.
        optimizer: ``"muon"``: of the matrices in the blocks, AdamW of the rest; or ``"adamw"``: of all.
        beta2: Of AdamW; its beta1 is 0.9.
        weight_decay: Of AdamW, on matrices alone.
        clip_norm: Longest gradient.
        ema: Exponent of the power-law EMA of the weights (Karras et al. 2024), which is what a checkpoint's model
            holds; 0 for none. It always spans the last 1 / (ema + 1) or so of the run, so training may stop at any
            time, without a learning rate that has to know when.
        save_every: Steps between checkpoints.
        keep: Saves, the last ones, that stay in ``checkpoints/`` beside the latest in ``checkpoint/``.
        frozen: Components that do not train: ``video``, ``video.blocks``, ``video.text``, ``action``,
            ``action.blocks``, ``words``, or modules of the model by name.
        lora: Components that train through LoRA adapters on their linear maps alone, by ``peft``; named as in
            ``frozen``.
        lora_rank: Of an adapter.
        lora_scale: What an adapter's product is multiplied by: alpha / rank.
        stop_gradient: Pairs (query stream, key stream), ``("action", "video")``: keys and values of that stream get no
            gradient from those queries. None follows what is frozen: the keys of a stream of which nothing trains get
            none from the other stream's queries.
        engine: How the run uses its processes, its memory and its numbers.

    Raises:
        ValueError: a value of the wrong type or outside its range; the message names the field.
    """

    model: ModelConfig = field(default_factory=small_model)
    actions_per_token: int = 1
    cell: int = PATCH
    programs: tuple[str, ...] = field(default_factory=lambda: tuple(PROGRAMS))
    mixture: Mapping[str, float] = field(default_factory=dict)
    counterfactual: Mapping[str, float] = field(default_factory=dict)
    windows: tuple[int, int] = (4, 16)
    noised_history: float = 0.0
    action_free: float = 0.0
    video_shift: float = 20.0
    action_shift: float = 15.0
    levels_per: str = "frame"
    coupling: str = "independent"
    rollout: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 2
    frames: int = 9
    tokens: int = 0
    shortest: int = 2
    steps: int = 2000
    learning_rate: float = 1.5e-3
    initialisation: str = "random"
    warmup: int = 20
    schedule: str = "decay"
    optimizer: str = "muon"
    beta2: float = 0.99
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema: float = 7.0
    save_every: int = 500
    keep: int = 0
    frozen: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    lora_rank: int = 16
    lora_scale: float = 1.0
    stop_gradient: tuple[tuple[str, str], ...] | None = None
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        for name, kind in (("model", ModelConfig), ("engine", EngineConfig)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"TrainConfig: {name} must be {'an' if name[0] in 'ae' else 'a'} {kind.__name__}, got "
                    f"{getattr(self, name)!r}"
                )
        if not self.mixture:
            only_joint = not self.model.has_actions or self.model.bridge_layer is not None
            object.__setattr__(self, "mixture", {"joint": 1.0} if only_joint else dict(GJD_MIXTURE))
        super().__post_init__()
        _check_data_gives(self.model)
        _check_objectives(self)
        if self.tokens and self.model.bridge_layer is not None:
            raise ValueError(
                "TrainConfig: tokens must be 0 with model.bridge_layer, whose features are of equally long clips, got "
                f"{self.tokens}; give batch instead"
            )
        if self.tokens and self.model.state_tokens:
            raise ValueError(
                "TrainConfig: tokens must be 0 with model.state_tokens, whose clips have equally many chunks, got "
                f"{self.tokens}; give batch instead"
            )
        if self.tokens and self.imagined_history:
            raise ValueError(
                "TrainConfig: imagined_history must be 0 with tokens, whose packed clips are not imagined first, got "
                f"{self.imagined_history}; give batch instead"
            )
        check_field(self, "actions_per_token", whole, 1, LARGEST_SIZE)
        check_field(self, "cell", whole, 1, LARGEST_SIZE)
        check_field(self, "programs", _programs)
        check_field(self, "action_free", number, 0, 1)
        for name in ("video_shift", "action_shift"):
            check_field(self, name, number, *SHIFTS)
        check_field(self, "batch", whole, 1, LARGEST_SIZE)
        for name, low in (
            ("tokens", 0),
            ("shortest", 2),
            ("frames", 2),
            ("steps", 1),
            ("warmup", 0),
            ("save_every", 1),
            ("keep", 0),
        ):
            check_field(self, name, whole, low)
        check_field(self, "learning_rate", number, SMALLEST_POSITIVE, 100)
        check_field(self, "clip_norm", number, SMALLEST_POSITIVE)
        for name in ("weight_decay", "ema"):
            check_field(self, name, number, 0)
        check_field(self, "initialisation", choice, INITIALISATIONS)
        check_field(self, "schedule", choice, SCHEDULES)
        check_field(self, "optimizer", choice, OPTIMIZERS)
        check_field(self, "beta2", number, 0, 0.999999)
        for name in ("frozen", "lora"):
            check_field(self, name, _names)
        check_field(self, "lora_rank", whole, 1, LARGEST_SIZE)
        check_field(self, "lora_scale", number, SMALLEST_POSITIVE)
        if self.stop_gradient is not None:
            check_field(self, "stop_gradient", stream_pairs)
        check_field(self, "levels_per", choice, LEVELS_PER)
        check_field(self, "coupling", choice, COUPLINGS)
        rollout = self.default_rollout()
        if self.model.full_attention:
            check_full_attention("TrainConfig: rollout", rollout)
            _check_one_chunk(self)

    def to_dict(self) -> dict[str, Any]:
        """A dict that ``json.dumps`` takes."""
        tables = {name: dict(getattr(self, name)) for name in ("mixture", "counterfactual", "rollout")}
        return asdict(self) | {"model": self.model.to_dict()} | tables

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
        if isinstance(values, dict) and "engine" in values:
            engine = from_fields(EngineConfig, values["engine"], f"{source}: engine", defaults=True)
            values = values | {"engine": engine}
        return from_fields(cls, values, source, defaults=True)

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

    def draws(self, frozen: Collection[str] = ()) -> list[StepKind]:
        """What a step may be trained on, such that the samples keep the weights of ``mixture`` and ``counterfactual``.

        A step has one program for all its samples. The conditional objectives share steps of their own, in which each
        sample draws its objective; their chunks are those of a rollout, of one frame but for ``full_attention``.
        ``frozen`` are the streams, of ``video`` and ``action``, of which nothing trains.
        """
        common = StepConfig(
            **{f.name: getattr(self, f.name) for f in fields(SampleConfig)},
            timesteps=TimestepDraw(
                per=self.levels_per,
                coupling=self.coupling,
                video_shift=self.video_shift,
                action_shift=self.action_shift,
            ),
            stop_gradient=tuple(p for p in CROSS if p[1] in frozen)
            if self.stop_gradient is None
            else self.stop_gradient,
        )
        total = sum(self.mixture.values()) + sum(self.counterfactual.values())
        share = {name: self.mixture.get(name, 0.0) / total for name in OBJECTIVES}
        joint = share.pop("joint")
        splits = {TRAIN: 1 - self.action_free, ACTION_FREE: self.action_free}
        kinds = [StepKind(joint / len(self.programs), replace(common, program=p), splits) for p in self.programs]
        shares = {TRAIN: sum(share.values()), COUNTERFACTUAL: sum(self.counterfactual.values()) / total}
        if conditional := sum(shares.values()):
            sizes = self.chunk_sizes if self.model.full_attention else (CONDITIONAL_CHUNK, CONDITIONAL_CHUNK)
            of_train = share if shares[TRAIN] else self.counterfactual  # of no sample then
            step = replace(common, program=GJD, mixture=of_train, chunk_sizes=sizes)
            kinds.append(StepKind(conditional, step, {name: part / conditional for name, part in shares.items()}))
        return kinds

    def default_rollout(self) -> RolloutConfig:
        """How a policy is rolled out unless told otherwise: as ``rollout`` says, and the rest as follows.

        In one step: from noise it gives the mean of what may follow, the best guess that an error can ask for. A bridge
        of the model's own is another for every chunk, and so are then the keys and values of the history.
        """
        possible = [p for p in self.programs if PROGRAMS[p].has_rollout]
        joint = "joint" in possible or not possible or not self.mixture.get("joint")
        cache = "persistent" if self.model.bridge_layer is None else "recomputed"
        found = {
            "program": GJD if joint else possible[0],
            "cache": "last_frame" if self.model.full_attention else cache,
            "chunk_size": self.chunk_sizes[1],
            "window": 4,
            "history": self.history,
            "steps": 1,
            "video_shift": self.video_shift,
            "action_shift": self.action_shift,
        }
        if not isinstance(self.rollout, Mapping):
            raise ValueError(f"TrainConfig: rollout must be a table of RolloutConfig's fields, got {self.rollout!r}")
        return from_fields(RolloutConfig, found | dict(self.rollout), "TrainConfig: rollout", defaults=True)


def _check_data_gives(model: ModelConfig) -> None:
    """A data set gives pictures, text, actions and states."""
    features = [stream.name for stream in model.context if stream.features or stream.aligned]
    if features or (model.bridge_dim and model.bridge_layer is None):
        raise ValueError(
            f"TrainConfig: model must not be given features of another network, got context streams {features} and "
            f"bridge_dim={model.bridge_dim} without bridge_layer; call training_step with them"
        )


def _check_objectives(config: TrainConfig) -> None:
    """What a model without actions, or with a bridge of its own, can learn."""
    conditional = [name for name, weight in config.mixture.items() if name != "joint" and weight]
    conditional += [name for name, weight in config.counterfactual.items() if weight]
    if conditional and (not config.model.has_actions or config.model.bridge_layer is not None):
        raise ValueError(
            f"TrainConfig: mixture and counterfactual must have weight on joint alone for topology "
            f"{config.model.topology!r} and bridge_layer={config.model.bridge_layer}, got {conditional}"
        )
    if config.model.bridge_layer is not None and config.model.bridge_sigma < 1:
        knowing = [p for p in config.programs if video_attends_to_actions(p, config.history)]
        if knowing:
            raise ValueError(
                "TrainConfig: programs and history must not let the video attend to actions for bridge_sigma="
                f"{config.model.bridge_sigma}, which know what it comes to; got {knowing} with history "
                f"{config.history!r}; give video_then_action with video_only"
            )
    of_actions = {name: getattr(config, name) for name in ("video_marginal", "action_marginal", "action_free")}
    if not config.model.has_actions and any(of_actions.values()):
        raise ValueError(
            f"TrainConfig: {', '.join(of_actions)} must be 0 for a model without actions, got {of_actions}"
        )


def _check_one_chunk(config: TrainConfig) -> None:
    """What a model with ``full_attention`` can learn: a clip is the observed frame and one chunk."""
    if config.chunk_sizes != (config.frames - 1,) * 2:
        raise ValueError(
            "TrainConfig: chunk_sizes must be [frames - 1, frames - 1] with model.full_attention, one chunk behind the "
            f"observed frame, got {list(config.chunk_sizes)} with frames={config.frames}"
        )
    for name in ("tokens", "imagined_history"):
        if getattr(config, name):
            raise ValueError(
                f"TrainConfig: {name} must be 0 with model.full_attention, whose clips are of one length and have no "
                f"history but the observed frame, got {getattr(config, name)}"
            )
    others = [p for p in config.programs if not rolls_out(config.model, p, OBJECTIVES["joint"])]
    if others:
        raise ValueError(
            "TrainConfig: programs must be of those in which noisy tokens attend to all noisy ones with "
            f"model.full_attention, as joint, got {others}"
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
    sizes = [
        ("latent_channels", model.latent_channels, channels),
        ("actions_per_frame", model.actions_per_frame, data.actions_per_frame // data.actions_per_token),
    ]
    if model.has_actions:
        sizes.append(("action_dim", model.action_dim, data.action_mean.numel() * data.actions_per_token))
    if model.state_dim:
        sizes.append(("state_dim", model.state_dim, 0 if data.state_units is None else len(data.state_units[0])))
    for name, wants, has in sizes:
        if wants != has:
            raise ValueError(f"TrainConfig: model.{name} must be {has} for this data set, got {wants}")
    for name, split in (("counterfactual", COUNTERFACTUAL), ("action_free", ACTION_FREE)):
        if getattr(config, name) and not data.episodes_of(split):
            raise ValueError(
                f"TrainConfig: {name} must be {'0' if name == 'action_free' else 'empty'} for a data set without "
                f"episodes in split {split!r}, got {getattr(config, name)}"
            )
    # initialise() passes actions through, beside a mean and a constant
    if config.initialisation == "by_hand" and model.has_actions and model.action_hidden < model.action_dim + 2:
        raise ValueError(
            f"TrainConfig: model.action_hidden must be at least {model.action_dim + 2}, two more than action_dim, for "
            f"initialisation by_hand, got {model.action_hidden}"
        )
    if rows % model.patch[1] or columns % model.patch[2]:
        raise ValueError(
            f"TrainConfig: model.patch must divide the latent rows and columns {(rows, columns)}, got {model.patch}"
        )
    splits = [split for kind in config.draws() for split, share in kind.splits.items() if share]
    longest = min(max(map(data.length, data.episodes_of(split))) for split in splits)
    if config.frames > longest and not config.tokens:
        raise ValueError(f"TrainConfig: frames must be at most {longest}, the longest episode, got {config.frames}")
