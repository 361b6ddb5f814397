"""A trained model with all it needs to act: words, latent codec, the units of its actions, how to roll it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import CONFIG, EXTRA, Checkpoint, Save, load_checkpoint, save_checkpoint
from ..data import ClipDataset, LeRobotDataset, StateCodec
from ..data.canvas import Canvas, Cell
from ..data.clips import LEAST_STD, STRIDE, episode_frames, reaching_actions
from ..data.codec import Codec, SavedCodec
from ..data.latents import CODECS, codec_kind
from ..data.lerobot import Episode
from ..model.dual_expert import WorldActionModel
from ..runtime.checks import check_field, choice, instance, whole
from ..runtime.json_fields import from_fields
from ..text import Text
from ..training_state import TrainingState
from .config import RolloutConfig
from .robot import STATE_UNITS, UNITS, Robot, model_of

PICTURES = "observation.images."  # how the features of cameras begin
_STATE_UNITS = STATE_UNITS  # of the extra tensors of a checkpoint
_CODEC = "codec."  # prefix of the codec's tensors in a checkpoint


@dataclass(frozen=True, kw_only=True)
class Camera:
    """Where a policy's training pictures came from.

    Args:
        name: The feature of the data set.
        height: Of its pictures, in pixels.
        width: Of its pictures, in pixels.
        cells: Of several cameras on one canvas: name, top, left, height and width of each.

    Raises:
        ValueError: a value of the wrong type or outside its range; the message names the field.
    """

    name: str
    height: int
    width: int
    cells: tuple[tuple[str, int, int, int, int], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"Camera: name must be a string, got {self.name!r}")
        for name in ("height", "width"):
            check_field(self, name, whole, 1)
        try:
            cells = tuple(Cell(str(name), *(whole("cell", n, 0) for n in rest)) for name, *rest in self.cells)
            fits = not cells or Canvas(cells).size == (self.height, self.width)
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(
                f"Camera: cells must be (name, top, left, height, width) that cover {self.height} x {self.width}, got "
                f"{self.cells!r}"
            )
        object.__setattr__(self, "cells", cells)

    def check(self, where: str, height: int, width: int) -> None:
        """Raises ValueError for pictures of another size."""
        if (height, width) != (self.height, self.width):
            raise ValueError(
                f"{where}: pictures are {height} x {width}, but the policy was trained on {self.height} x {self.width} "
                f"({self.name}); render, crop or scale them to that"
            )


@dataclass(frozen=True, eq=False)
class Policy:
    """What training leaves behind.

    Args:
        model: In eval mode, on its device.
        text: Word embedding trained with it, on the same device.
        codec: Pictures to latents and back.
        action_mean: float32 ``[A]``, in the units of the data set.
        action_std: float32 ``[A]``; normalised actions are ``(action - mean) / std``.
        varying: bool ``[A]``: the action dimensions that vary in the training split. Errors average over these.
        rollout: How to roll it out unless told otherwise.
        camera: Of the training pictures, or ``observation.state``; None for a checkpoint that does not say.
        actions_per_token: Actions that one action token holds: the model's ``action_dim`` is so many times A.
        state_units: Mean and std of the states that a model with ``state_dim`` is told, float32 ``[S]`` each, in the
            units of the data set.
        robots: Several that it was trained on, by name; its own units are then those of the first, filled up to the
            model's widths.

    Raises:
        ValueError: parts that do not fit together, or action statistics that turn actions into no numbers.
    """

    model: WorldActionModel
    text: Text
    codec: Codec
    action_mean: Tensor
    action_std: Tensor
    varying: Tensor
    rollout: RolloutConfig
    camera: Camera | None = None
    actions_per_token: int = 1
    state_units: tuple[Tensor, Tensor] | None = None
    robots: Mapping[str, Robot] = field(default_factory=dict)

    def __post_init__(self) -> None:
        c = self.model.config
        check_field(self, "actions_per_token", whole, 1)
        width = c.action_dim // self.actions_per_token if c.has_actions else len(self.action_mean)
        if c.has_actions and width * self.actions_per_token != c.action_dim:
            raise ValueError(
                f"Policy: actions_per_token must divide the model's action_dim, {c.action_dim}, got "
                f"{self.actions_per_token}"
            )
        for name, dtype in (("action_mean", torch.float32), ("action_std", torch.float32), ("varying", torch.bool)):
            units = getattr(self, name)
            if units.dtype != dtype or units.shape != (width,):
                raise ValueError(
                    f"Policy: {name} must be {dtype} [{width}] for this model, got {units.dtype} {list(units.shape)}"
                )
        for name, fits, expected in (
            ("action_mean", self.action_mean.isfinite(), "finite"),
            ("action_std", self.action_std.isfinite() & (self.action_std >= LEAST_STD), f"at least {LEAST_STD:g}"),
        ):
            if not fits.all():
                raise ValueError(f"Policy: {name} must be {expected}, got {getattr(self, name).tolist()}")
        self._check_state_units(c.state_dim)
        for name, has, wants in (
            ("codec.channels", self.codec.channels, c.latent_channels),
            ("text.text_dim", self.text.text_dim, c.text_dim),
        ):
            if has != wants:
                raise ValueError(f"Policy: {name} must be {wants} for this model, got {has}")

    def _check_state_units(self, width: int) -> None:
        shapes = None if self.state_units is None else [list(units.shape) for units in self.state_units]
        if shapes != ([[width], [width]] if width else None):
            expected = f"two tensors [{width}]" if width else "None without the model's state_dim"
            raise ValueError(f"Policy: state_units must be {expected}, got {shapes}")
        if self.state_units is not None:
            mean, std = self.state_units
            if not (mean.isfinite() & std.isfinite() & (std >= LEAST_STD)).all():
                raise ValueError(
                    f"Policy: state_units must be finite, the std at least {LEAST_STD:g}, got {self.state_units}"
                )

    @classmethod
    def of(cls, model: WorldActionModel, text: Text, data: ClipDataset, rollout: RolloutConfig) -> Policy:
        """With the codec, the action statistics and the camera of the data that the model was trained on."""
        units = data.action_mean.clone(), data.action_std.clone(), ~data.constant_actions
        cells = () if data.canvas is None or len(data.canvas.cells) == 1 else data.canvas.cells
        camera = Camera(name=data.camera, height=data.picture_size[0], width=data.picture_size[1], cells=cells)
        states = data.state_units if model.config.state_dim else None
        robots = {name: _robot_of(part, model.config.state_dim) for name, part in data.robots.items()}
        return cls(
            model.eval(), text.eval(), data.codec, *units, rollout, camera, data.actions_per_token, states, robots
        )

    def of_robot(self, name: str | None = None) -> Policy:
        """The policy of one of its robots, default the first: that model alone, in that robot's units.

        Raises:
            ValueError: no such robot.
        """
        if not self.robots and name is None:
            return self
        name = choice("Policy.of_robot: name", next(iter(self.robots)) if name is None else name, self.robots)
        robot = self.robots[name]
        return replace(
            self, model=model_of(robot, self.model, self.actions_per_token), action_mean=robot.action_mean,
            action_std=robot.action_std, varying=robot.varying, camera=Camera(**robot.camera),
            state_units=robot.state_units, robots={},
        )  # fmt: skip

    @property
    def actions_per_frame(self) -> int:
        """Actions from one latent frame to the next."""
        return self.model.config.actions_per_frame * self.actions_per_token

    @property
    def frames_are_states(self) -> bool:
        """Whether frames are states, float32 ``[S]``, in place of pictures."""
        return isinstance(self.codec, StateCodec)

    @property
    def cameras(self) -> dict[str, tuple[int, int]]:
        """The cameras that a simulator has to render, and (height, width) of their pictures; none of states."""
        if self.frames_are_states or self.camera is None:
            return {}
        if self.camera.cells:
            return {name.removeprefix(PICTURES): (h, w) for name, _, _, h, w in self.camera.cells}
        return {self.camera.name.removeprefix(PICTURES): (self.camera.height, self.camera.width)}

    def frame(self, state: np.ndarray, pictures: Mapping[str, np.ndarray]) -> np.ndarray:
        """What its codec takes of a simulator's observation: the state ``[S]``, or the picture of its camera.

        Raises:
            ValueError: the observation lacks the camera.
        """
        if self.frames_are_states:
            return state
        if self.camera is not None and self.camera.cells:
            short = [Cell(name.removeprefix(PICTURES), *place) for name, *place in self.camera.cells]
            try:
                return Canvas(short).compose(pictures)
            except ValueError as error:
                raise ValueError(f"simulator: observe: {error}, which the policy was trained on") from error
        name = self.camera.name.removeprefix(PICTURES) if self.camera is not None else next(iter(pictures), None)
        if name is None or name not in pictures:
            raise ValueError(
                f"simulator: observe must return a picture of {name}, which the policy was trained on, got "
                f"{sorted(pictures) or 'no pictures'}"
            )
        return pictures[name]

    @property
    def units(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of its actions, as ClipDataset takes them."""
        return self.action_mean, self.action_std, self.varying

    def state(self, states: np.ndarray) -> Tensor | None:
        """States ``[..., S]`` of a data set or a simulator as the model is told them; None for one that is told none.

        Raises:
            ValueError: states of another width.
        """
        if self.state_units is None:
            return None
        mean, std = self.state_units
        if states.shape[-1:] != mean.shape:
            raise ValueError(f"Policy.state: states must have {len(mean)} numbers for this model, got {states.shape}")
        return (torch.as_tensor(states, dtype=torch.float32) - mean) / std

    def save(
        self,
        folder: str | Path | Save,
        *,
        training: Mapping | None = None,
        training_state: TrainingState | None = None,
    ) -> None:
        """Write a checkpoint folder; ``training`` (anything for JSON) and ``training_state`` serve a resume.

        Raises:
            ValueError: a codec that is none of ``wam_models.data.latents.CODECS``.
        """
        kind, codec = codec_kind(self.codec), cast(SavedCodec, self.codec)
        extra = {_CODEC + k: v for k, v in codec.state_dict().items()}
        extra |= {"action_mean": self.action_mean, "action_std": self.action_std, "varying": self.varying}
        extra |= zip(_STATE_UNITS, self.state_units or (), strict=False)
        metadata: dict[str, Any] = {"rollout": asdict(self.rollout), "training": dict(training or {})}
        metadata["codec"] = {"kind": kind, "config": codec.config}
        if (self.actions_per_frame, self.actions_per_token) != (STRIDE, 1):
            metadata |= {"actions_per_frame": self.actions_per_frame, "actions_per_token": self.actions_per_token}
        if self.camera is not None:
            metadata["camera"] = asdict(self.camera)
        if self.robots:
            metadata["robots"] = {name: robot.camera for name, robot in self.robots.items()}
            for name, robot in self.robots.items():
                extra |= robot.tensors(name)
        save_checkpoint(
            folder, self.model, text=self.text, extra=extra, metadata=metadata, training_state=training_state
        )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        *,
        training: bool = True,
        robot: str | None = None,
        every: bool = False,
    ) -> tuple[Policy, Checkpoint]:
        """The policy of a folder that :meth:`save` wrote, and the checkpoint itself.

        Args:
            folder: See :func:`load_checkpoint`.
            device: Of the model and its text embedding.
            training: Also read the training state, which only a resume needs.
            robot: Of a policy that was trained on several, the one that it is to act for; default: the first.
            every: Load the model of all robots, which a resume goes on with.

        Raises:
            ValueError: a file that is missing, unreadable or lacks an entry; the message names it.
            ModuleNotFoundError: the codec is Wan's VAE, and diffusers is not installed.
        """
        found = load_checkpoint(folder, device, training=training)
        config, extra = Path(folder) / CONFIG, Path(folder) / EXTRA
        if found.text is None or "rollout" not in found.metadata:
            lacks = "vocabulary" if found.text is None else "metadata.rollout"
            raise ValueError(f"{config}: no checkpoint of wam train, {lacks} is missing; train again")
        rollout = found.metadata["rollout"]
        if isinstance(rollout, dict):
            # fields that older checkpoints lack
            rollout = {"video": {}, "action": {}, "interleave": False, "reuse_keys": False} | rollout
        rollout = from_fields(RolloutConfig, rollout, f"{config}: metadata.rollout")
        camera = found.metadata.get("camera")
        if camera is not None:
            camera = from_fields(Camera, camera, f"{config}: metadata.camera", defaults=True)
        kind = found.metadata.get("codec", {"kind": "patch_pca", "config": {}})  # all that older checkpoints have
        if not isinstance(kind, dict) or set(kind) != {"kind", "config"} or kind["kind"] not in list(CODECS):
            raise ValueError(f"{config}: metadata.codec must have a config and a kind of {list(CODECS)}, got {kind!r}")
        packed = whole(f"{config}: metadata.actions_per_token", found.metadata.get("actions_per_token", 1), 1)
        trained = found.metadata.get("actions_per_frame", STRIDE)
        if found.model.config.actions_per_frame * packed != trained:
            tokens = found.model.config.actions_per_frame
            expected = trained if packed == 1 else f"{trained} / {packed}"
            raise ValueError(f"{config}: model: actions_per_frame must be {expected} for this policy, got {tokens}")
        units = ("action_mean", "action_std", "varying", *(_STATE_UNITS if found.model.config.state_dim else ()))
        missing = [name for name in units if name not in found.extra]
        if missing:
            raise ValueError(f"{extra}: no checkpoint of wam train, {missing} are missing; train again")
        try:
            state = {k.removeprefix(_CODEC): v for k, v in found.extra.items() if k.startswith(_CODEC)}
            codec = CODECS[kind["kind"]].from_state_dict(state, kind["config"])
            mean, std, varying, *states = (found.extra[name].cpu() for name in units)
            of_states = (states[0], states[1]) if states else None
            robots = _robots_in(found)
            policy = cls(found.model, found.text, codec, mean, std, varying, rollout, camera, packed, of_states, robots)
        except ValueError as error:
            raise ValueError(f"{extra}: {error}; train again") from error
        return policy if every else policy.of_robot(robot), found

    def denormalize_action(self, action: Tensor, where: str = "Policy.denormalize_action") -> Tensor:
        """float32 ``[..., k A]`` on the CPU, in the units of the data set, of normalised actions on any device; k is
        ``actions_per_token``.

        Raises:
            TypeError: no tensor.
            ValueError: actions of another width, or one that is not finite, which no robot must get. Every message
                begins with ``where``.
        """
        instance(f"{where}: action", action, Tensor)
        std, mean = (units.repeat(self.actions_per_token) for units in (self.action_std, self.action_mean))
        if action.shape[-1:] != mean.shape:
            raise ValueError(f"{where}: action must be [..., {len(mean)}], got {list(action.shape)}")
        found = action.cpu() * std + mean
        if not found.isfinite().all():
            raise ValueError(
                f"{where}: actions are not finite and must not be executed; are there such numbers in the weights, or "
                "do they overflow in half precision?"
            )
        return found

    def dataset(self, root: str | Path, camera: str | None = None) -> LeRobotDataset:
        """The data set in ``root``; of several cameras this policy's, unless ``camera`` names one.

        Raises:
            ValueError, FileNotFoundError: as LeRobotDataset does.
        """
        return LeRobotDataset(root, camera, None if self.camera is None else self.camera.name)

    def clip(self, dataset: LeRobotDataset, episode: int | Episode) -> dict:
        """One whole episode in this policy's latents and units; only its own frames are decoded.

        Returns:
            ``frames`` uint8 ``[F, H, W, 3]``, the pictures, or float32 ``[F, S]``, the states;
            ``video`` float32 ``[1, C, F, y, x]``, their latents;
            ``action`` float32 ``[1, F, n, k A]`` normalised, frame 0 zeros; ``text``, the instruction;
            ``state`` float32 ``[1, F, S]`` normalised, None for a model that is told none.

        Raises:
            ValueError: an episode that does not exist, actions of another width, or pictures of another size.
            FileNotFoundError: a file of the data set is missing.
            TypeError: no LeRobotDataset.
        """
        instance("Policy.clip: dataset", dataset, LeRobotDataset)
        number = episode.index if isinstance(episode, Episode) else episode
        episode = whole("Policy.clip: episode", number, 0, len(dataset.episodes) - 1)
        action = torch.from_numpy(dataset.action(episode))
        if action.shape[1:] != self.action_mean.shape:
            raise ValueError(
                f"{dataset.root}: actions have {action.shape[1]} numbers, those of the checkpoint "
                f"{len(self.action_mean)}"
            )
        if self.camera is not None:
            self.camera.check(f"{dataset.root} ({dataset.camera})", *dataset.picture_size)
        frames = episode_frames(dataset, episode, self.codec, self.actions_per_frame)
        video = self.codec.encode(frames)
        slots = reaching_actions(
            (action - self.action_mean) / self.action_std,
            video.shape[1],
            self.actions_per_frame,
            self.actions_per_token,
        )
        pictures = frames[:: self.codec.temporal]
        task = dataset.episodes[episode].task
        state = None
        if self.state_units is not None:
            state = self.state(dataset.state(episode)[:: self.actions_per_frame][None, : video.shape[1]])
        return {"frames": pictures, "video": video[None], "action": slots[None], "text": task, "state": state}


def _robot_of(part: ClipDataset, state_dim: int) -> Robot:
    actions, states = part.own_widths
    cells = () if part.canvas is None or len(part.canvas.cells) == 1 else part.canvas.cells
    camera = Camera(name=part.camera, height=part.picture_size[0], width=part.picture_size[1], cells=cells)
    mean, std = part.state_units or (None, None)
    of_states = None if mean is None or std is None or not state_dim else (mean[:states].clone(), std[:states].clone())
    units = [u[:actions].clone() for u in (part.action_mean, part.action_std, ~part.constant_actions)]
    return Robot(units[0], units[1], units[2], of_states, asdict(camera))


def _robots_in(found: Checkpoint) -> dict[str, Robot]:
    """Those of a checkpoint; none where it was trained on one."""
    cameras = found.metadata.get("robots", {})
    if not isinstance(cameras, dict):
        raise ValueError(f"metadata.robots must be an object, got {cameras!r}")
    robots = {}
    for name, camera in cameras.items():
        wanted = (*UNITS, *(STATE_UNITS if found.model.config.state_dim else ()))
        held = {key: found.extra.get(f"robots.{name}.{key}") for key in wanted}
        missing = [key for key, value in held.items() if value is None]
        if missing:
            raise ValueError(f"robots.{name}: {missing} are missing")
        units = [cast(Tensor, held[key]).cpu() for key in wanted]
        asdict(from_fields(Camera, camera, f"metadata.robots.{name}", defaults=True))  # refuses what is none
        robots[name] = Robot(units[0], units[1], units[2], (units[3], units[4]) if len(units) > 3 else None, camera)
    return robots
