"""Training on episodes that are stored otherwise: the protocol ``Source``, of a folder of ``.npz`` files.

Each file is an episode: ``pictures`` uint8 ``[T, H, W, 3]``, ``state`` float ``[T, S]``, ``action`` float ``[T, A]``
and ``task``, a string. Files whose names begin with ``held_out`` are not trained on.

    python examples/npz_source.py FOLDER RUN
"""

import sys
from functools import cached_property
from pathlib import Path

import numpy as np

from wam_models.data import ClipDataset, Episode
from wam_models.train import TrainConfig, train


class NpzSource:
    """See ``wam_models.data.source.Source``."""

    fps = 20.0
    camera = "observation.images.front"
    canvas, picture_every, has_states_as_frames = None, 1, False

    def __init__(self, folder: str | Path) -> None:
        self.root = Path(folder)
        self.files = sorted(self.root.glob("*.npz"))
        if not self.files:
            raise ValueError(f"{self.root}: holds no .npz files")

    @cached_property
    def episodes(self) -> list[Episode]:
        found = []
        for number, file in enumerate(self.files):
            with np.load(file) as held:  # reads what is asked for alone
                split = "held_out" if file.name.startswith("held_out") else "train"
                found.append(Episode(number, len(held["action"]), str(held["task"]), split))
        return found

    @cached_property
    def picture_size(self) -> tuple[int, int]:
        height, width, _ = self._read(0, "pictures").shape[1:]
        return height, width

    def frames(self, episode: Episode | int, every: int = 1) -> np.ndarray:
        return self._read(episode, "pictures")[::every]

    def action(self, episode: Episode | int) -> np.ndarray:
        return self._read(episode, "action").astype(np.float32)

    def state(self, episode: Episode | int) -> np.ndarray:
        return self._read(episode, "state").astype(np.float32)

    def instructions(self, episode: Episode | int) -> list[str]:
        number = episode.index if isinstance(episode, Episode) else episode
        return [self.episodes[number].task] * self.episodes[number].length

    def _read(self, episode: Episode | int, name: str) -> np.ndarray:
        number = episode.index if isinstance(episode, Episode) else episode
        with np.load(self.files[number]) as held:
            return held[name]


def main(folder: str, run: str) -> None:
    data = ClipDataset(NpzSource(folder))
    config = TrainConfig.from_dict({"model": {"action_dim": len(data.action_mean)}, "frames": 4, "steps": 100})
    done = train(config, data, out=run)
    print(f"step {done.step}; act with it: wam_models.Policy.load('{run}/checkpoint')")


if __name__ == "__main__":
    main(*sys.argv[1:])
