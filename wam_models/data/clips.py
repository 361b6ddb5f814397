"""Training clips: latent pictures and the normalised actions that lead from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..runtime.checks import choice, whole
from .codec import Codec
from .latents import PATCH, PatchPCA
from .lerobot import Episode, LeRobotDataset
from .source import Source
from .states import StateCodec

__all__ = ["ClipDataset", "filled_up", "reaching_actions", "episode_frames"]

# mean and std of an action, float32 [A], and bool [A], which of its numbers vary
Units = tuple[Tensor, Tensor, Tensor]

NORMALIZATIONS = ("mean_std", "min_max", "quantile", "none")
LEAST_STD = 1e-6  # an action dimension below this is constant
STRIDE = 4  # video frames, and so actions, per latent frame, unless told otherwise
# Splits of info.json that clips to train on are drawn from; every other is held out. Actions of the second kind did not
# come from a demonstration, those of the third say nothing.
TRAIN, COUNTERFACTUAL, ACTION_FREE = TRAINED = ("train", "counterfactual", "action_free")
FIT_FRAMES = 256  # 32,768 patches of 128 x 256 pictures: plenty for 768 dimensions, fitted in a second or two


def episode_frames(
    dataset: Source, episode: Episode | int, codec: Codec | type[Codec], actions_per_frame: int = STRIDE
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


def units_of(values: Tensor, normalization: str = "mean_std") -> Units:
    """float32 [A] each of numbers [N, A]: what is taken off each, what it is divided by, and whether it varies.

    "mean_std": mean and standard deviation; "min_max": the range becomes -1 to 1; "quantile": that from the 1st to the
    99th percentile does, and what is outside stays outside; "none": units as they are.
    """
    values = values.double()
    varying = values.std(0, correction=0) >= LEAST_STD
    if normalization == "mean_std":
        middle, size = values.mean(0), values.std(0, correction=0)
    elif normalization == "none":
        middle, size = torch.zeros(values.shape[1]), torch.ones(values.shape[1])
    else:
        ends = (0.01, 0.99) if normalization == "quantile" else (0.0, 1.0)
        low, high = (torch.from_numpy(np.quantile(values.numpy(), end, 0)) for end in ends)
        middle, size = (low + high) / 2, (high - low) / 2
    return middle.float(), torch.where(size >= LEAST_STD, size, 1.0).float(), varying


class Latents(Protocol):
    """Latents of a data set that were made before; see EncodedLatents of wam_models.data.encoded.

    Attributes:
        codec: What made them.
    """

    @property
    def codec(self) -> Codec: ...

    def check(self, dataset: Source, actions_per_frame: int, codec: Codec | None) -> None:
        """Raises ValueError where they are not of this data set, so many actions a frame, and this codec."""

    def episode(self, number: int) -> Any:
        """Something of `shape` [C, F, h, w] that is sliced as an array."""


def _actions_of(dataset: Source) -> list[Tensor]:
    actions = [torch.from_numpy(dataset.action(e)) for e in dataset.episodes]
    for episode, action in zip(dataset.episodes, actions, strict=True):
        if action.shape[1] != actions[0].shape[1]:
            raise ValueError(
                f"{dataset.root}: action of episode {episode.index} has {action.shape[1]} numbers, of episode 0 "
                f"{actions[0].shape[1]}; expected one width"
            )
    return actions


def filled_up(values: Tensor, width: int, value: float = 0.0) -> Tensor:
    """[..., A] with further numbers, up to so many.

    Raises:
        ValueError: there are more.
    """
    more = width - values.shape[-1]
    if more < 0:
        raise ValueError(f"ClipDataset: widths must be at least {values.shape[-1]}, the data's, got {width}")
    return torch.cat([values, torch.full((*values.shape[:-1], more), value).to(values.dtype)], -1) if more else values


def _some_frames(episodes: list[np.ndarray], every: bool) -> np.ndarray:
    """Frames [N, ...] that a codec is fitted to, spread evenly over those of all episodes, or all of them."""
    pool = [(i, t) for i, frames in enumerate(episodes) for t in range(len(frames))]
    chosen = np.linspace(0, len(pool) - 1, len(pool) if every else min(FIT_FRAMES, len(pool))).round().astype(int)
    return np.stack([episodes[pool[c][0]][pool[c][1]] for c in chosen])


class ClipDataset:
    """A whole LeRobot data set as latents in memory, cut into clips.

    Latent frame f stands for video frame n f, n = actions_per_frame, so the action tokens of frame f >= 1 hold the n
    actions t = n (f - 1) .. n f - 1 that lead from latent frame f - 1 to f. Frame 0 of a clip has no reaching action:
    its action tokens are zeros, wherever the clip starts. The mean and std of actions and the default codec come from
    the training split alone.

    Attributes:
        tasks: list of instructions; `task` in a clip indexes it. Of several in an episode it is that at the clip's
            first frame.
        train, held_out: lists of episode numbers. Splits "counterfactual" and "action_free" are neither; any other but
            "train" counts as held out.
        codec: see Codec of wam_models.data.codec.
        action_mean, action_std: float32 [A]; std below LEAST_STD is replaced by 1.
        constant_actions: bool [A], dimensions that never vary in the training split; leave them out of error averages.
        own_units: mean, std and which dimensions vary, of this training split even where `units` are others.
        state_units: mean and std of the states, float32 [S] each, as `units` of actions; None without `states`.
        own_widths: numbers of an action and of a state, without what they are filled up with.
        robots: the first data set of each of several robots, by name; see ClipMix.
        latent_shape: (channels, rows, columns) of one latent frame.
        camera, picture_size, canvas: as of LeRobotDataset.
        actions_per_frame, actions_per_token: as given.

    Args:
        dataset: a LeRobotDataset or any other Source, or the folder of the former, which is then read from its only
            camera.
        codec: the codec to use; None fits PatchPCA, or StateCodec where frames are states.
        units: (action_mean, action_std, bool [A] which dimensions vary) in place of the training split's own, such as
            `Policy.units` for a policy that is to be trained on.
        progress: called with an iterable of episodes and returning it, such as tqdm.
        actions_per_frame: video frames, and so actions, from one latent frame to the next.
        actions_per_token: actions that one action token holds, a divisor of that.
        channels, cell: of the PatchPCA that is fitted where `codec` is None: numbers and pixels of a latent cell.
        states: whether clips have the robot's state at each frame, `observation.state`; or the units of it, such as
            `Policy.state_units`.

        latents: latents on disk of this data set, EncodedLatents, in place of encoding its pictures; `codec` is then
            theirs.
        normalization: units of actions and states, one of NORMALIZATIONS, where they are not given.
        widths: numbers of an action and of a state that these are filled up to with zeros; default: as they are.

    Raises:
        ValueError: no training episode, pictures that the codec's cells do not divide, episodes whose actions differ in
            width from each other or from the units, or what the reader and the codec raise.
        FileNotFoundError: what the reader raises.
    """

    def __init__(
        self,
        dataset: Source | str | Path,
        codec: Codec | None = None,
        progress: Callable[[Iterable[Episode]], Iterable[Episode]] = iter,
        units: Units | None = None,
        actions_per_frame: int = STRIDE,
        actions_per_token: int = 1,
        channels: int = 48,
        cell: int = PATCH,
        states: bool | tuple[Tensor, Tensor] = False,
        latents: Latents | None = None,
        normalization: str = "mean_std",
        widths: tuple[int, int] | None = None,
    ) -> None:
        self.actions_per_frame = whole("ClipDataset: actions_per_frame", actions_per_frame, 1)
        self.actions_per_token = whole("ClipDataset: actions_per_token", actions_per_token, 1)
        if actions_per_frame % actions_per_token:
            raise ValueError(
                f"ClipDataset: actions_per_token must divide actions_per_frame, {actions_per_frame}, got "
                f"{actions_per_token}"
            )
        if isinstance(dataset, str | Path):
            dataset = LeRobotDataset(dataset)
        self.normalization = choice("ClipDataset: normalization", normalization, NORMALIZATIONS)
        episodes = dataset.episodes
        self.fps = dataset.fps
        self._splits = {name: [e.index for e in episodes if e.split == name] for name in TRAINED}
        self.train = self._splits[TRAIN]
        self.robots = dict[str, ClipDataset]()
        self._weights, self._sources = [1.0], list[dict[str, list[int]]]()  # of several data sets: see ClipMix
        self.held_out = self._splits["held_out"] = [e.index for e in episodes if e.split and e.split not in TRAINED]
        if not self.train:
            raise ValueError(f'{dataset.root / "meta/info.json"}: splits has no episode in "train"')
        self.tasks = list(dict.fromkeys(task for e in episodes for task in e.tasks))
        self._task = self._tasks_of(dataset)
        info = dataset.root / "meta/info.json"
        self.camera, self.picture_size, self.canvas = dataset.camera, dataset.picture_size, dataset.canvas
        if latents is not None:
            latents.check(dataset, actions_per_frame, codec)
            codec = latents.codec
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
        actions = _actions_of(dataset)  # before the pictures, which take far longer to read
        self.own_widths = [actions[0].shape[1], 0]  # of an action and, where there are any, of a state
        if widths is not None:
            actions = [filled_up(action, widths[0]) for action in actions]
        if units is not None and len(units[0]) != actions[0].shape[1]:
            raise ValueError(f"{dataset.root}: actions have {actions[0].shape[1]} numbers, the units {len(units[0])}")

        # a generator: with a codec at hand, one episode's pictures are in memory at a time
        frames = (episode_frames(dataset, e, codec or default, actions_per_frame) for e in progress(episodes))
        if codec is None:
            known_frames = list(frames)
            sample = _some_frames([known_frames[i] for i in self.train], dataset.has_states_as_frames)
            codec = StateCodec.fit(sample) if default is StateCodec else PatchPCA.fit(sample, channels, cell)
            frames = (pictures for pictures in known_frames)
        self.codec = codec
        # Clips are cut with NumPy: copies this small cost torch's thread pool far more than the copy itself when the
        # cores are busy (0.25 s a batch, against 1 ms).
        self._video: list[Any]
        if latents is not None:
            self._video = [latents.episode(e.index) for e in episodes]
        else:
            self._video = [codec.encode(pictures).numpy() for pictures in frames]
        channels, _, rows, columns = self._video[0].shape
        self.latent_shape = (channels, rows, columns)

        self.own_units = units_of(torch.cat([actions[i] for i in self.train]), normalization)
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
            self._read_states([dataset.state(e) for e in episodes], None if states is True else states, widths)

    def _tasks_of(self, dataset: Source) -> list[int | np.ndarray]:
        """Of each episode the number of its task, or of several that at each latent frame."""
        return [
            self.tasks.index(e.task)
            if len(e.tasks) == 1
            else np.array([self.tasks.index(t) for t in dataset.instructions(e)[:: self.actions_per_frame]])
            for e in dataset.episodes
        ]

    def _read_states(
        self, states: list[np.ndarray], units: tuple[Tensor, Tensor] | None, filled: tuple[int, int] | None
    ) -> None:
        self.own_widths[1] = states[0].shape[1]
        if filled is not None:
            states = [filled_up(torch.from_numpy(state), filled[1]).numpy() for state in states]
        widths = sorted({state.shape[1] for state in states} | ({len(units[0])} if units else set()))
        if len(widths) != 1:
            raise ValueError(f"ClipDataset: states must be of one width, that of the units, got {widths}")
        if units is None:
            units = units_of(torch.from_numpy(np.concatenate([states[i] for i in self.train])), self.normalization)[:2]
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

    @property
    def splits(self) -> tuple[str, ...]:
        """Names that `episodes_of` takes."""
        return tuple(self._splits)

    def sources(self, split: str) -> list[tuple[float, list[int]]]:
        """Of each data set its weight and its episodes of the split; here of the one that there is."""
        self.episodes_of(split)  # refuses another name
        own = self._sources or [self._splits]
        return [(weight, of[split]) for weight, of in zip(self._weights, own, strict=True)]

    def normalize_action(self, action: Tensor) -> Tensor:
        """float [..., A] in the data set's units -> the same shape in units of the training split's std."""
        return (action - self.action_mean.to(action.device)) / self.action_std.to(action.device)

    def denormalize_action(self, action: Tensor) -> Tensor:
        """The reverse of normalize_action."""
        return action * self.action_std.to(action.device) + self.action_mean.to(action.device)

    def __len__(self) -> int:
        """Episodes, of all splits."""
        return len(self._video)

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
        clips = [self.clip(episode, start, frames) for episode, start in places]
        return {key: torch.from_numpy(np.stack([clip[key] for clip in clips])) for key in clips[0]}

    def _drawn(self, split: str, count: int, frames: int, generator: torch.Generator) -> list[tuple[int, int]]:
        """Episode and start of so many clips, the first one last."""
        places: list[tuple[int, int]] = []
        sources = [(w, n) for w, n in self.sources(split) if any(self.length(i) >= frames for i in n)]
        if not sources:
            longest = max(map(self.length, self.episodes_of(split)), default=0)
            raise ValueError(f"ClipDataset.sample: frames is {frames}, but the longest {split} episode has {longest}")
        counts = [count]
        if len(sources) > 1:
            shares = torch.tensor([weight for weight, _ in sources])
            of = torch.multinomial(shares, max(count, 1), replacement=True, generator=generator)[:count]
            counts = torch.bincount(of, minlength=len(sources)).tolist()
        for (_, numbers), few in zip(sources, counts, strict=True):
            starts = torch.tensor([max(0, self.length(i) - frames + 1) for i in numbers], dtype=torch.int64)
            ends = starts.cumsum(0)
            drawn = torch.randint(int(ends[-1]), (few,), generator=generator)
            rows = torch.searchsorted(ends, drawn, right=True)
            offsets = drawn - (ends - starts)[rows]
            places += [(numbers[row], start) for row, start in zip(rows.tolist(), offsets.tolist(), strict=True)]
        return places[::-1]

    def episode(self, index: int) -> dict[str, Tensor]:
        """Episode number `index` (see `held_out`) as a batch of one clip, from its first latent frame to its last.

        Raises IndexError for an unknown episode.
        """
        index = whole("ClipDataset.episode: index", index, 0)
        if index >= len(self._video):
            raise IndexError(f"episode {index} does not exist; the data set has {len(self._video)}")
        clip = self.clip(index, 0, self.length(index))
        return {key: torch.from_numpy(np.stack([value])) for key, value in clip.items()}

    def clip(self, index: int, start: int, frames: int) -> dict[str, Any]:
        """`frames` latent frames of episode `index` from `start` on: arrays as those of `sample`, without
        the dim of a batch."""
        action = self._action[index][start : start + frames].copy()
        action[0] = 0
        clip: dict[str, Any] = {
            "video": self._video[index][:, start : start + frames],
            "action": action,
            "task": np.int64(task if isinstance(task := self._task[index], int) else task[start]),
            "episode": np.int64(index),
            "start": np.int64(start),
        }
        clip |= {name: np.bool_(index in self._splits[name]) for name in (COUNTERFACTUAL, ACTION_FREE)}
        return clip | ({"state": self._state[index][start : start + frames]} if self._state else {})
