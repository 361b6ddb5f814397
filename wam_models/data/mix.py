"""Several data sets as one, each with its share of the clips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .clips import TRAIN, ClipDataset, Units, units_of
from .source import Source


class ClipMix(ClipDataset):
    """The episodes of several data sets, one set after the other.

    What a policy is made with (codec, units, camera, picture size) is that of the first; the codec and the units of the
    others must be the same, see :func:`pooled_units`.

    Args:
        parts: The data sets.
        weights: Of each, its share of the clips that are drawn, whatever its length.
        robots: Of each the name of its robot; data sets of one share units. Clips then have ``action_mask``, bool
            ``[k A]``: the numbers that the robot has. None for one robot.

    Raises:
        ValueError: data sets that differ in latents, codec, actions of a frame or, of one robot, units.
    """

    def __init__(
        self, parts: Sequence[ClipDataset], weights: Sequence[float], robots: Sequence[str] | None = None
    ) -> None:
        first = parts[0]
        vars(self).update(vars(first))
        names = ["" for _ in parts] if robots is None else list(robots)
        firsts_of = {name: parts[names.index(name)] for name in names}
        self.robots = {} if robots is None else firsts_of
        self._masks: list[np.ndarray] = []
        for part in parts if robots is not None else ():
            mask = np.arange(len(part.action_mean)) < part.own_widths[0]
            self._masks += [np.tile(mask, part.actions_per_token)] * len(part)
        for i, part in enumerate(parts):
            for name in ("latent_shape", "actions_per_frame", "actions_per_token"):
                ours, theirs = getattr(first, name), getattr(part, name)
                if ours != theirs:
                    raise ValueError(f"ClipMix: {name} of data set {i} must be that of the first, {ours}, got {theirs}")
            whose = firsts_of[names[i]]
            same = part.codec is first.codec and all(
                torch.equal(a, b) for a, b in zip(_units(part), _units(whose), strict=True)
            )
            if not same:
                of = "the first" if robots is None else f"the first of robot {names[i]!r}"
                raise ValueError(f"ClipMix: data set {i} must be made with the codec and the units of {of}")
        self.tasks = list(dict.fromkeys(task for part in parts for task in part.tasks))
        firsts = np.cumsum([0, *(len(part) for part in parts)]).tolist()
        self._weights = [float(weight) for weight in weights]
        self._sources, self._splits = [], {name: [] for name in first.splits}
        self._video, self._action, self._state, self._task = [], [], [], []
        for part, begin in zip(parts, firsts, strict=False):
            self._video += part._video
            self._action += part._action
            self._state += part._state
            places = np.array([self.tasks.index(task) for task in part.tasks])
            self._task += [int(places[i]) if isinstance(i, int) else places[i] for i in part._task]
            own = {name: [begin + i for i in part.episodes_of(name)] for name in part.splits}
            self._sources.append(own)
            for name, episodes in own.items():
                self._splits[name] += episodes
        self.train, self.held_out = self._splits[TRAIN], self._splits["held_out"]

    def clip(self, index: int, start: int, frames: int) -> dict[str, Any]:
        found = super().clip(index, start, frames)
        return found | ({"action_mask": self._masks[index]} if self._masks else {})


def _units(data: ClipDataset) -> list[Tensor]:
    return [data.action_mean, data.action_std, data.constant_actions, *(data.state_units or ())]


def pooled_units(
    datasets: Sequence[Source], states: bool = False, normalization: str = "mean_std"
) -> tuple[Units, tuple[Tensor, Tensor] | None]:
    """Units of the actions, and with ``states`` of the states, over the training episodes of several data sets.

    Raises:
        ValueError: numbers of different widths, or what the reader raises.
    """
    found = []
    for name in ("action", "state") if states else ("action",):
        rows = [getattr(d, name)(e) for d in datasets for e in d.episodes if e.split == TRAIN]
        widths = sorted({row.shape[1] for row in rows})
        if len(widths) != 1:
            raise ValueError(f"pooled_units: {name}s of the data sets must have one width, got {widths}")
        found.append(units_of(torch.from_numpy(np.concatenate(rows)), normalization))
    return found[0], found[1][:2] if states else None
