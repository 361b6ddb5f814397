"""A trained model with all it needs to act: words, latent codec, the units of its actions, how to roll it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .data import ClipDataset, LeRobotDataset, PatchPCA
from .data.clips import STRIDE
from .model import WorldActionModel
from .rollout import RolloutConfig
from .text import WordEmbedding

_CODEC = "codec."  # prefix of the codec's tensors in a checkpoint


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
    """

    model: WorldActionModel
    text: WordEmbedding
    codec: PatchPCA
    action_mean: Tensor
    action_std: Tensor
    varying: Tensor
    rollout: RolloutConfig

    @classmethod
    def of(cls, model: WorldActionModel, text: WordEmbedding, data: ClipDataset, rollout: RolloutConfig) -> Policy:
        """With the codec and the action statistics of the data that the model was trained on."""
        units = data.action_mean.clone(), data.action_std.clone(), ~data.constant_actions
        return cls(model.eval(), text.eval(), data.codec, *units, rollout)

    def save(self, folder: str | Path, *, training: Mapping | None = None, training_state: dict | None = None) -> None:
        """Write a checkpoint folder; ``training`` (anything for JSON) and ``training_state`` serve a resume."""
        extra = {_CODEC + k: v for k, v in self.codec.state_dict().items()}
        extra |= {"action_mean": self.action_mean, "action_std": self.action_std, "varying": self.varying}
        metadata = {"rollout": asdict(self.rollout), "training": dict(training or {})}
        save_checkpoint(
            folder, self.model, text=self.text, extra=extra, metadata=metadata, training_state=training_state
        )

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> tuple[Policy, Checkpoint]:
        """The policy of a folder that :meth:`save` wrote, and the checkpoint itself.

        Raises:
            ValueError: a file that is missing, unreadable or lacks an entry; the message names it.
        """
        found = load_checkpoint(folder, device)
        codec = {k.removeprefix(_CODEC): v.cpu() for k, v in found.extra.items() if k.startswith(_CODEC)}
        try:
            units = [found.extra[name].cpu() for name in ("action_mean", "action_std", "varying")]
            rollout = RolloutConfig(**found.metadata["rollout"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{folder}: no checkpoint of wam train, {error} is missing or unknown; train again"
            ) from error
        if found.text is None:
            raise ValueError(f"{folder}: no checkpoint of wam train, it has no vocabulary; train again")
        return cls(found.model, found.text, PatchPCA.from_state_dict(codec), *units, rollout), found

    def clip(self, dataset: LeRobotDataset, episode: int) -> dict:
        """One whole episode in this policy's latents and units; only its own frames are decoded.

        Returns:
            ``frames`` uint8 ``[F, H, W, 3]``, the pictures; ``video`` float32 ``[1, C, F, y, x]``, their latents;
            ``action`` float32 ``[1, F, 4, A]`` normalised, frame 0 zeros; ``text``, the instruction.

        Raises:
            ValueError: an episode that does not exist, or actions of another width.
            FileNotFoundError: a file of the data set is missing.
        """
        if not 0 <= episode < len(dataset.episodes):
            raise ValueError(f"episode must be from 0 to {len(dataset.episodes) - 1}, got {episode}")
        action = torch.from_numpy(dataset.action(episode))
        if action.shape[1:] != self.action_mean.shape:
            raise ValueError(
                f"{dataset.root}: actions have {action.shape[1]} numbers, those of the checkpoint "
                f"{len(self.action_mean)}"
            )
        frames = dataset.frames(episode, STRIDE)
        video = self.codec.encode(frames)
        steps = video.shape[1] - 1
        slots = torch.zeros(1 + steps, STRIDE, action.shape[1])
        slots[1:] = ((action - self.action_mean) / self.action_std)[: STRIDE * steps].unflatten(0, (steps, STRIDE))
        task = dataset.episodes[episode].task
        return {"frames": frames, "video": video[None], "action": slots[None], "text": task}
