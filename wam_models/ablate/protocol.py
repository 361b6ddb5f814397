"""What an ablation trains and how it is judged, fixed before anything runs; ``protocol.json`` of its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from wam_kernels import PROGRAMS

from ..objectives import GJD, GJD_MIXTURE, MODEL_PROGRAMS, checked_mixture
from ..rollout import RolloutConfig
from ..runtime.checks import check_field, choice, number, whole
from ..runtime.json_fields import from_fields, read_json
from ..simulator.record import RecordConfig
from ..train.config import TrainConfig

BASELINE = "joint"  # the arm that the others are compared with


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train and to roll out.

    Args:
        name: Of its rows and its folder.
        program: Interaction program, of training and rollout.
        mixture: Share of each objective among the samples.
        steps_factor: Its training steps over those of the track.
        video_weight: Factor on the video loss.
        want: What a rollout denoises: ``"both"``, or ``"action"`` where nothing is imagined.
        training: Fields of :class:`~wam_models.train.TrainConfig` in place of the track's, other than the above.

    Raises:
        ValueError: a value of the wrong type or outside its range; the message names the field.
    """

    name: str
    program: str
    mixture: Mapping[str, float] = field(default_factory=lambda: {"joint": 1.0})
    steps_factor: float = 1.0
    video_weight: float = 1.0
    want: str = "both"
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_field(self, "program", choice, MODEL_PROGRAMS)
        check_field(self, "mixture", checked_mixture)
        check_field(self, "steps_factor", number, 0.001)
        check_field(self, "video_weight", number, 0)
        check_field(self, "want", choice, ("both", "action"))
        if own := sorted({"programs", "mixture", "video_weight"} & set(self.training)):
            raise ValueError(f"Arm: training must leave {', '.join(own)} to the arm's own fields, got {self.training}")


@dataclass(frozen=True, kw_only=True)
class Track:
    """One kind of frames: its data, model, budget and evaluation, the same for every arm.

    Args:
        name: Of its rows and its folder.
        simulators: As of ``--simulator``.
        camera: The camera whose pictures are frames; None where frames are states.
        size: Height and width of its pictures.
        record: Of the demonstrations, as :class:`~wam_models.simulator.record.RecordConfig`.
        training: As :class:`~wam_models.train.TrainConfig`, from weights by hand unless it says another
            initialisation; program, mixture and video weight are the arm's.
        seeds: Of the weights and of everything that training draws.
        settings: (chunk, denoising steps) of each evaluation of one training.
        early: Of the settings, so many are evaluated right after a training, the others once every seed is trained.
        window: Of a rollout, in order blocks.
        episodes: Played of each simulator.
        first_seed: Episode i has the seed ``first_seed`` + i, of its initial state and its noise.
        horizon: Actions of an episode.
        batch: Episodes played at once.

    Raises:
        ValueError: a value that is refused; the message names the field.
    """

    name: str
    simulators: tuple[str, ...]
    camera: str | None = None
    size: int = 64
    record: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    settings: tuple[tuple[int, int], ...] = ((2, 1),)
    early: int = 1
    window: int = 4
    episodes: int = 25
    first_seed: int = 0
    horizon: int = 200
    batch: int = 16

    def __post_init__(self) -> None:
        for name in ("simulators", "seeds", "settings"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not value:
                raise ValueError(f"Track: {name} must be a list that is not empty, got {value!r}")
        object.__setattr__(self, "simulators", tuple(self.simulators))
        object.__setattr__(self, "seeds", tuple(whole("Track: seeds", seed, 0) for seed in self.seeds))
        pairs = tuple(tuple(whole("Track: settings", value, 1) for value in pair) for pair in self.settings)
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"Track: settings must be pairs of chunk and denoising steps, got {self.settings!r}")
        object.__setattr__(self, "settings", pairs)
        for name, low in (
            ("size", 8),
            ("early", 1),
            ("window", 2),
            ("episodes", 1),
            ("first_seed", 0),
            ("horizon", 1),
            ("batch", 1),
        ):
            check_field(self, name, whole, low)
        RecordConfig(**self.record)
        self.train_config(Arm(name=BASELINE, program="joint"))

    def train_config(self, arm: Arm) -> TrainConfig:
        """The training of an arm."""
        training = {"initialisation": "by_hand"} | dict(self.training) | dict(arm.training)
        base = TrainConfig.from_dict(training, f"Track {self.name}, arm {arm.name}: training")
        program = "joint" if arm.program == GJD else arm.program
        steps = round(base.steps * arm.steps_factor)
        return replace(base, programs=(program,), mixture=dict(arm.mixture), video_weight=arm.video_weight, steps=steps)

    def rollout(self, arm: Arm, setting: tuple[int, int]) -> RolloutConfig:
        """How an arm acts under a setting."""
        chunk, steps = setting
        base = self.train_config(arm).default_rollout()
        return replace(base, program=arm.program, chunk_size=chunk, steps=steps, window=self.window)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """All of an ablation.

    Args:
        suite: Its name.
        arms: What is compared; one of them is ``"joint"``.
        tracks: What it is compared on.

    Raises:
        ValueError: names that repeat, no ``"joint"``, or what arms and tracks refuse.
    """

    suite: str
    arms: tuple[Arm, ...]
    tracks: tuple[Track, ...]

    def __post_init__(self) -> None:
        for what in ("arms", "tracks"):
            names = [one.name for one in getattr(self, what)]
            if not names or len(set(names)) < len(names):
                raise ValueError(f"Protocol: {what} must have different names, got {names}")
        if BASELINE not in [arm.name for arm in self.arms]:
            raise ValueError(f"Protocol: arms must hold {BASELINE!r}, with which the others are compared")

    def arm(self, name: str) -> Arm:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)

    def track(self, name: str) -> Track:
        """The track of this name."""
        return next(track for track in self.tracks if track.name == name)

    def to_dict(self) -> dict[str, Any]:
        """A dict that ``json.dumps`` takes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, source: str = "Protocol") -> Protocol:
        """From a dict as JSON gives it. Raises ValueError; the message names the field and ``source``."""
        if isinstance(values, dict):
            arms = tuple(from_fields(Arm, v, f"{source}: arms", defaults=True) for v in values.get("arms", ()))
            tracks = tuple(from_fields(Track, v, f"{source}: tracks", defaults=True) for v in values.get("tracks", ()))
            values = values | {"arms": arms, "tracks": tracks}
        return from_fields(cls, values, source)

    @classmethod
    def from_json(cls, path: Path) -> Protocol:
        """From a file. Raises ValueError, naming file and field, or OSError where it cannot be read."""
        return cls.from_dict(read_json(path), str(path))


def arms() -> tuple[Arm, ...]:
    """The programs, GJD at equal steps and at equal joint steps, and behaviour cloning, which imagines nothing."""
    order = ("joint", *(name for name in PROGRAMS if name != "joint"))
    return (
        *(Arm(name=name, program=name) for name in order),
        Arm(name="gjd_equal_steps", program=GJD, mixture=GJD_MIXTURE),
        Arm(
            name="gjd_equal_joint_steps", program=GJD, mixture=GJD_MIXTURE, steps_factor=1 / GJD_MIXTURE["joint"]
        ),
        Arm(name="behaviour_cloning", program="decoupled_same_step", video_weight=0.0, want="action"),
    )  # fmt: skip


def metaworld_state() -> Track:
    """Eight tasks of Meta-World, states as frames."""
    tasks = (
        "reach", "push", "pick-place", "door-open", "drawer-open", "button-press-topdown", "peg-insert-side",
        "window-close",
    )  # fmt: skip
    model = {
        "hidden": 96, "heads": 6, "head_dim": 16, "layers": 3, "ffn": 384, "action_hidden": 96, "action_ffn": 384,
        "action_dim": 16, "actions_per_frame": 1, "latent_channels": 17, "text_dim": 64, "patch": [1, 1, 1],
        "rope_theta": 100.0,
    }  # fmt: skip
    return Track(
        name="state",
        simulators=tuple(f"metaworld/{task}-v3" for task in tasks),
        record={"episodes": 50},
        training={
            "model": model, "actions_per_token": 4, "history": "video_only", "chunk_sizes": [1, 4], "windows": [2, 8],
            "noised_history": 0.0, "video_shift": 5.0, "action_shift": 5.0, "batch": 64, "frames": 6, "steps": 200,
            "learning_rate": 1.5e-3, "warmup": 30, "schedule": "decay", "ema": 7.0,
        },
        seeds=(0, 1, 2),
        settings=((2, 1), (4, 1)),
        early=2, episodes=15, batch=16,
    )  # fmt: skip


def metaworld_pixels() -> Track:
    """Five tasks of Meta-World, 64 x 64 pictures of the camera behind the gripper as frames, and no state."""
    tasks = ("button-press-topdown", "drawer-open", "faucet-open", "window-close", "window-open")
    model = {
        "hidden": 128, "heads": 8, "head_dim": 16, "layers": 3, "ffn": 384, "action_hidden": 128, "action_ffn": 384,
        "action_dim": 16, "actions_per_frame": 1, "latent_channels": 48, "text_dim": 64, "patch": [1, 2, 2],
        "rope_theta": 10.0,
    }  # fmt: skip
    return Track(
        name="pixels",
        simulators=tuple(f"metaworld/{task}-v3" for task in tasks),
        camera="behindGripper",
        record={"episodes": 50, "picture_every": 4},
        training={
            "model": model, "actions_per_token": 4, "cell": 8, "history": "video_only", "chunk_sizes": [1, 4],
            "windows": [2, 8], "noised_history": 0.0, "video_shift": 5.0, "action_shift": 5.0, "batch": 8, "frames": 6,
            "steps": 300, "learning_rate": 1.5e-3, "warmup": 60, "schedule": "decay", "ema": 7.0,
        },
        settings=((2, 1), (4, 1)),
        early=2, episodes=8, batch=10,
    )  # fmt: skip


def metaworld(*, full: bool = False) -> Protocol:
    """The suite ``metaworld``: :func:`metaworld_state` and :func:`metaworld_pixels`; with ``full``, both with three
    seeds and also with five denoising steps, for which a rollout takes two to four times as long."""
    tracks: tuple[Track, ...] = (metaworld_state(), metaworld_pixels())
    if full:
        tracks = tuple(
            replace(track, seeds=(0, 1, 2), settings=(*track.settings, *((chunk, 5) for chunk, _ in track.settings)))
            for track in tracks
        )
    return Protocol(suite="metaworld", arms=arms(), tracks=tracks)


def quick(protocol: Protocol) -> Protocol:
    """Minutes in place of hours: two arms, two tasks, one seed, few steps. Says that all works, not which is best."""
    chosen = tuple(arm for arm in protocol.arms if arm.name in (BASELINE, "decoupled_same_step"))
    tracks = tuple(
        replace(
            track,
            simulators=(
                "metaworld/button-press-topdown-v3", f"metaworld/{'drawer-open' if track.camera else 'reach'}-v3"
            ),
            record=dict(track.record) | {"episodes": 20},
            training=dict(track.training) | {"steps": 110},
            seeds=(0,), settings=((2, 1),), early=1, episodes=5, batch=10,
        )
        for track in protocol.tracks
    )  # fmt: skip
    return replace(protocol, arms=chosen, tracks=tracks)
