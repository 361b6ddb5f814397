"""Training clips: latent pictures and the normalised actions that lead from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..runtime.checks import whole
from .codec import Codec
from .latents import PATCH, PatchPCA
from .lerobot import Episode, LeRobotDataset
from .states import StateCodec

__all__ = ["ClipDataset", "reaching_actions", "episode_frames"]

# mean and std of an action, float32 [A], and bool [A], which of its numbers vary
Units = tuple[Tensor, Tensor, Tensor]

LEAST_STD = 1e-6  # an action dimension below this is constant
STRIDE = 4  # video frames, and so actions, per latent frame, unless told otherwise
# Splits of info.json that clips to train on are drawn from; every other is held out. Actions of the second kind did not
# come from a demonstration, those of the third say nothing.
TRAIN, COUNTERFACTUAL, ACTION_FREE = TRAINED = ("train", "counterfactual", "action_free")
FIT_FRAMES = 256  # 32,768 patches of 128 x 256 pictures: plenty for 768 dimensions, fitted in a second or two


def episode_frames(
    dataset: LeRobotDataset, episode: Episode | int, codec: Codec | type[Codec], actions_per_frame: int = STRIDE
) -> np.ndarray:
    """The frames of an episode that a codec encodes, one way for training and rollout.

    These are the video frames n f, n = actions_per_frame, that latent frames f stand for and, for a codec that
    compresses time, those between:
    uint8 [1 + temporal * (F - 1), H, W, 3] for F latent frames, of which every `temporal`-th is the picture of one.

    Raises ValueError for a codec whose `temporal` does not divide n, for frames between two pictures of the camera, and
    what the reader raises.
    """
    if actions_per_frame % codec.temporal:
        raise ValueError(
            f"episode_frames: codec.temporal is {codec.temporal}, expected a divisor of {actions_per_frame}, the "
            "actions of a frame"
        )
    every = actions_per_frame // codec.temporal
    if every % dataset.picture_every:
        raise ValueError(
            f"episode_frames: {dataset.root} has a picture of {dataset.camera} every {dataset.picture_every} actions, "
            f"expected a divisor of {every}, the actions from one frame to the next; train with actions_per_frame a "
            "multiple of it, or record with another --picture-every"
        )
    frames = dataset.frames(episode, every)
    return frames[: 1 + (len(frames) - 1) // codec.temporal * codec.temporal]


def reaching_actions(
    action: Tensor, frames: int, actions_per_frame: int = STRIDE, actions_per_token: int = 1
) -> Tensor:
    """float [T, A] -> float [frames, n, k A]: the actions that lead to each latent frame, k of them in each of n tokens
    (n k = actions_per_frame); zeros for frame 0."""
    steps, tokens = frames - 1, actions_per_frame // actions_per_token
    tokens_of_frames = action.new_zeros(frames, tokens, actions_per_token * action.shape[1])
    tokens_of_frames[1:] = action[: actions_per_frame * steps].reshape(steps, *tokens_of_frames.shape[1:])
    return tokens_of_frames


class ClipDataset:
    """A whole LeRobot data set as latents in memory, cut into clips.

    Latent frame f stands for video frame n f, n = actions_per_frame, so the action tokens of frame f >= 1 hold the n
    actions t = n (f - 1) .. n f - 1 that lead from latent frame f - 1 to f. Frame 0 of a clip has no reaching action:
    its action tokens are zeros, wherever the clip starts. The mean and std of actions and the default codec come from
    the training split alone.

    Attributes:
        tasks: list of instructions; `task` in a clip indexes it.
        train, held_out: lists of episode numbers. Splits "counterfactual" and "action_free" are neither; any other but
            "train" counts as held out.
        codec: see Codec of wam_models.data.codec.
        action_mean, action_std: float32 [A]; std below LEAST_STD is replaced by 1.
        constant_actions: bool [A], dimensions that never vary in the training split; leave them out of error averages.
        own_units: mean, std and which dimensions vary, of this training split even where `units` are others.
        state_units: mean and std of the states, float32 [S] each, as `units` of actions; None without `states`.
        latent_shape: (channels, rows, columns) of one latent frame.
        camera, picture_size: as of LeRobotDataset.
        actions_per_frame, actions_per_token: as given.

    Args:
        dataset: a LeRobotDataset, or the folder of one, which is then read from its only camera.
        codec: the codec to use; None fits PatchPCA, or StateCodec where frames are states.
        units: (action_mean, action_std, bool [A] which dimensions vary) in place of the training split's own, such as
            `Policy.units` for a policy that is to be trained on.
        progress: called with an iterable of episodes and returning it, such as tqdm.
        actions_per_frame: video frames, and so actions, from one latent frame to the next.
        actions_per_token: actions that one action token holds, a divisor of that.
        channels, cell: of the PatchPCA that is fitted where `codec` is None: numbers and pixels of a latent cell.
        states: whether clips have the robot's state at each frame, `observation.state`; or the units of it, such as
            `Policy.state_units`.

    Raises:
        ValueError: no training episode, pictures that the codec's cells do not divide, episodes whose actions differ in
            width from each other or from the units, or what the reader and the codec raise.
        FileNotFoundError: what the reader raises.
    """

    def __init__(
        self,
        dataset: LeRobotDataset | str | Path,
        codec: Codec | None = None,
        progress: Callable[[Iterable[Episode]], Iterable[Episode]] = iter,
        units: Units | None = None,
        actions_per_frame: int = STRIDE,
        actions_per_token: int = 1,
        channels: int = 48,
        cell: int = PATCH,
        states: bool | tuple[Tensor, Tensor] = False,
    ) -> None:
        self.actions_per_frame = whole("ClipDataset: actions_per_frame", actions_per_frame, 1)
        self.actions_per_token = whole("ClipDataset: actions_per_token", actions_per_token, 1)
        if actions_per_frame % actions_per_token:
            raise ValueError(
                f"ClipDataset: actions_per_token must divide actions_per_frame, {actions_per_frame}, got "
                f"{actions_per_token}"
            )
        if not isinstance(dataset, LeRobotDataset):
            dataset = LeRobotDataset(dataset)
        episodes = dataset.episodes
        self.fps = dataset.fps
        self._splits = {name: [e.index for e in episodes if e.split == name] for name in TRAINED}
        self.train = self._splits[TRAIN]
        self.held_out = self._splits["held_out"] = [e.index for e in episodes if e.split and e.split not in TRAINED]
        if not self.train:
            raise ValueError(f'{dataset.root / "meta/info.json"}: splits has no episode in "train"')
        self.tasks = list(dict.fromkeys(e.task for e in episodes))
        self._task = [self.tasks.index(e.task) for e in episodes]

        info = dataset.root / "meta/info.json"
        self.camera, self.picture_size = dataset.camera, dataset.picture_size
        if codec is None:
            default = StateCodec if dataset.has_states_as_frames else PatchPCA
            cell = 1 if dataset.has_states_as_frames else whole("ClipDataset: cell", cell, 1)
        else:
            cell = codec.spatial
        if any(n % cell for n in self.picture_size):
            size = " x ".join(map(str, self.picture_size))
            raise ValueError(
                f"{info}: pictures of {self.camera} are {size}, expected multiples of {cell}, the codec's cells; crop "
                "or scale them, or pass a codec with smaller cells"
            )
        # before the pictures, which take far longer to read
        actions = [torch.from_numpy(dataset.action(e)) for e in episodes]
        for episode, action in zip(episodes, actions, strict=True):
            if action.shape[1] != actions[0].shape[1]:
                raise ValueError(
                    f"{dataset.root}: action of episode {episode.index} has {action.shape[1]} numbers, of episode 0 "
                    f"{actions[0].shape[1]}; expected one width"
                )
        if units is not None and len(units[0]) != actions[0].shape[1]:
            raise ValueError(f"{dataset.root}: actions have {actions[0].shape[1]} numbers, the units {len(units[0])}")

        # a generator: with a codec at hand, one episode's pictures are in memory at a time
        frames = (episode_frames(dataset, e, codec or default, actions_per_frame) for e in progress(episodes))
        if codec is None:
            known_frames = list(frames)
            pool = [(i, t) for i in self.train for t in range(len(known_frames[i]))]
            most = len(pool) if dataset.has_states_as_frames else FIT_FRAMES
            chosen = np.linspace(0, len(pool) - 1, min(most, len(pool))).round().astype(int)
            sample = np.stack([known_frames[pool[c][0]][pool[c][1]] for c in chosen])
            codec = StateCodec.fit(sample) if default is StateCodec else PatchPCA.fit(sample, channels, cell)
            frames = (pictures for pictures in known_frames)
        self.codec = codec
        # Clips are cut with NumPy: copies this small cost torch's thread pool far more than the copy itself when the
        # cores are busy (0.25 s a batch, against 1 ms).
        self._video = [codec.encode(pictures).numpy() for pictures in frames]
        channels, _, rows, columns = self._video[0].shape
        self.latent_shape = (channels, rows, columns)

        known = torch.cat([actions[i] for i in self.train]).to(torch.float64)
        std = known.std(0, correction=0)
        varying = std >= LEAST_STD
        self.own_units = known.mean(0).to(torch.float32), torch.where(varying, std, 1.0).to(torch.float32), varying
        self.action_mean, self.action_std, varying = units or self.own_units
        self.constant_actions = ~varying
        self._action = [
            reaching_actions(
                self.normalize_action(action), video.shape[1], actions_per_frame, actions_per_token
            ).numpy()
            for video, action in zip(self._video, actions, strict=True)
        ]
        self.state_units: tuple[Tensor, Tensor] | None = None
        self._state: list[np.ndarray] = []
        if states is not False:
            self._read_states([dataset.state(e) for e in episodes], None if states is True else states)

    def _read_states(self, states: list[np.ndarray], units: tuple[Tensor, Tensor] | None) -> None:
        widths = sorted({state.shape[1] for state in states} | ({len(units[0])} if units else set()))
        if len(widths) != 1:
            raise ValueError(f"ClipDataset: states must be of one width, that of the units, got {widths}")
        if units is None:
            known = torch.from_numpy(np.concatenate([states[i] for i in self.train])).double()
            std = known.std(0, correction=0)
            units = known.mean(0).float(), torch.where(std >= LEAST_STD, std, 1.0).float()
        self.state_units = units
        of_all = [unit.numpy() for unit in units]
        # frames of the latents: a last one may be cut off
        for state, video in zip(states, self._video, strict=True):
            self._state.append((state[:: self.actions_per_frame][: video.shape[1]] - of_all[0]) / of_all[1])

    def episodes_of(self, split: str) -> list[int]:
        """Numbers of the episodes of "train", "counterfactual", "action_free" or "held_out".

        Raises ValueError for another name.
        """
        if split not in self._splits:
            raise ValueError(f"ClipDataset: split must be one of {tuple(self._splits)}, got {split!r}")
        return self._splits[split]

    def normalize_action(self, action: Tensor) -> Tensor:
        """float [..., A] in the data set's units -> the same shape in units of the training split's std."""
        return (action - self.action_mean.to(action.device)) / self.action_std.to(action.device)

    def denormalize_action(self, action: Tensor) -> Tensor:
        """The reverse of normalize_action."""
        return action * self.action_std.to(action.device) + self.action_mean.to(action.device)

    def length(self, index: int) -> int:
        """Latent frames of episode `index`."""
        return self._video[index].shape[1]

    def sample(
        self, batch: int, frames: int, generator: torch.Generator, split: str | Mapping[str, float] = TRAIN
    ) -> dict[str, Tensor]:
        """Draws clips, uniformly over all clips of `frames` latent frames in the split.

        Args:
            batch: number of clips. frames: latent frames in each. generator: a CPU torch.Generator.
            split: as of `episodes_of`, or several of them with weights, drawn for each clip.

        Returns a dict of
            video: float32 [batch, C, frames, h, w]; action: float32 [batch, frames, n, k A], n tokens of k
            actions, normalised, frame 0 zeros;
            task: int64 [batch]; episode: int64 [batch]; start: int64 [batch], the latent frame that the clip starts at;
            counterfactual, action_free: bool [batch], whether the clip is of that split;
            state: float32 [batch, frames, S], normalised, where the data set was made with `states`.

        Raises ValueError if no episode of the split has so many frames.
        """
        batch, frames = (whole(f"ClipDataset.sample: {n}", v, 1) for n, v in (("batch", batch), ("frames", frames)))
        weights = {split: 1.0} if isinstance(split, str) else {name: w for name, w in split.items() if w}
        names = list(weights)
        of_clip = [0] * batch
        if len(names) > 1:
            shares = torch.tensor(list(weights.values()))
            of_clip = torch.multinomial(shares, batch, replacement=True, generator=generator).tolist()
        drawn = {name: self._drawn(name, of_clip.count(i), frames, generator) for i, name in enumerate(names)}
        places = [drawn[names[i]].pop() for i in of_clip]
        clips = [self._clip(episode, start, frames) for episode, start in places]
        return {key: torch.from_numpy(np.stack([clip[key] for clip in clips])) for key in clips[0]}

    def _drawn(self, split: str, count: int, frames: int, generator: torch.Generator) -> list[tuple[int, int]]:
        """Episode and start of so many clips, the first one last."""
        numbers = self.episodes_of(split)
        starts = torch.tensor([max(0, self.length(i) - frames + 1) for i in numbers], dtype=torch.int64)
        ends = starts.cumsum(0)
        if not numbers or ends[-1] == 0:
            longest = max((self.length(i) for i in numbers), default=0)
            raise ValueError(f"ClipDataset.sample: frames is {frames}, but the longest {split} episode has {longest}")
        drawn = torch.randint(int(ends[-1]), (count,), generator=generator)
        rows = torch.searchsorted(ends, drawn, right=True)
        offsets = drawn - (ends - starts)[rows]
        return [(numbers[row], start) for row, start in zip(rows.tolist(), offsets.tolist(), strict=True)][::-1]

    def episode(self, index: int) -> dict[str, Tensor]:
        """Episode number `index` (see `held_out`) as a batch of one clip, from its first latent frame to its last.

        Raises IndexError for an unknown episode.
        """
        index = whole("ClipDataset.episode: index", index, 0)
        if index >= len(self._video):
            raise IndexError(f"episode {index} does not exist; the data set has {len(self._video)}")
        clip = self._clip(index, 0, self.length(index))
        return {key: torch.from_numpy(np.stack([value])) for key, value in clip.items()}

    def _clip(self, index: int, start: int, frames: int) -> dict[str, np.ndarray | np.int64 | np.bool_]:
        action = self._action[index][start : start + frames].copy()
        action[0] = 0
        clip: dict[str, np.ndarray | np.int64 | np.bool_] = {
            "video": self._video[index][:, start : start + frames],
            "action": action,
            "task": np.int64(self._task[index]),
            "episode": np.int64(index),
            "start": np.int64(start),
        }
        clip |= {name: np.bool_(index in self._splits[name]) for name in (COUNTERFACTUAL, ACTION_FREE)}
        return clip | ({"state": self._state[index][start : start + frames]} if self._state else {})
