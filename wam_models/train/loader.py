"""Packed steps: which clips a step has, what each is trained on, and which process computes it.

Everything about step s follows from the seed and s, so that the position of a run is one number, whatever the
processes, the micro-batches and the threads that read ahead.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wam_kernels import Geometry
from wam_kernels.plan.side_rows import batch_rows

from ..costs import Sizes, packed_products, packed_tokens
from ..data import ClipDataset
from ..data.clips import ACTION_FREE, COUNTERFACTUAL
from ..objectives import GJD, OBJECTIVES, geometry_for
from ..runtime.checks import whole
from .config import StepKind, TrainConfig

LARGEST_SEED = 2**62


class ClipDraw(NamedTuple):
    """One clip of a step, and all that is drawn for it but its noise."""

    episode: int
    start: int  # latent frame
    frames: int
    kind: int  # of TrainConfig.draws
    objective: str
    chunk_size: int
    window: int
    action_free: bool
    seed: int  # of its noise


@dataclass(frozen=True, eq=False)
class Pack:
    """Clips that are computed in one forward, one after another in one sequence.

    Args:
        draws: Of each clip.
        clips: Of each clip ``video`` ``[C, F, y, x]``, ``action`` ``[F, n, A]``, perhaps ``state`` ``[F, S]``.
        tasks: Of each clip its instruction.
        share: What the loss of a clip is multiplied by: 1 / the clips of the step, 0 for a pack that is there only
            because its process must have one.
    """

    draws: Sequence[ClipDraw]
    clips: Sequence[Mapping[str, Tensor]]
    tasks: Sequence[str]
    share: float

    @property
    def frames(self) -> tuple[int, ...]:
        return tuple(draw.frames for draw in self.draws)


class PackedDraws:
    """The clips of every step of a run.

    Args:
        config: ``tokens`` of a step, ``frames`` and ``shortest`` of its clips, and what they are trained on.
        kinds: ``config.draws()``, for what is frozen.
        data: What clips are cut from; they fit the config's model.
        seed: Of all draws.

    Raises:
        ValueError: no episode to draw from for some kind, or a clip that alone has more tokens than a step.
    """

    def __init__(self, config: TrainConfig, kinds: Sequence[StepKind], data: ClipDataset, seed: int) -> None:
        self.config, self.kinds, self.data, self.seed = config, list(kinds), data, seed
        _, rows, columns = data.latent_shape
        grid = rows // config.model.patch[1], columns // config.model.patch[2]
        self.costs = Sizes(config.model, grid, text_tokens=0)
        self.sizes = {
            "video_tokens": grid[0] * grid[1],
            "action_tokens": config.model.actions_per_frame if config.model.has_actions else 0,
        }
        self.context = sum(stream.tokens for stream in config.model.context)
        self.shares = np.cumsum([kind.share for kind in kinds])
        self.sources = [self._sources(kind) for kind in kinds]
        longest = min(config.frames, max(data.length(i) for i in range(len(data))))
        if self.tokens(longest) > config.tokens:
            raise ValueError(
                f"TrainConfig: tokens must be at least {self.tokens(longest)}, those of a clip of {longest} frames, "
                f"got {config.tokens}"
            )

    def _sources(self, kind: StepKind) -> tuple[np.ndarray, list[tuple[str, list[int], np.ndarray]]]:
        """What clips of a kind come from: (split, episodes of one data set, their running weights), and the running
        weights of these."""
        found, shares = [], []
        for split, share in kind.splits.items():
            here = []
            for weight, episodes in self.data.sources(split):
                lengths = np.array([self.data.length(i) for i in episodes], float)
                # as many as there are starts of a shortest clip; one each for whole episodes
                starts = np.maximum(lengths - self.config.shortest, 0) + 1
                starts[lengths < 2] = 0
                if share and starts.sum():
                    here.append((weight, (split, episodes, starts.cumsum())))
            if share and not here:
                raise ValueError(f"TrainConfig: the data has no episode of at least 2 frames in split {split!r}")
            total = sum(weight for weight, _ in here)
            shares += [share * weight / total for weight, _ in here]
            found += [source for _, source in here]
        return np.cumsum(shares), found

    def tokens(self, frames: int) -> int:
        """Of a clip: noisy and clean copies of both streams, and what is given."""
        return packed_tokens(self.costs, 1, frames)

    def step(self, number: int) -> list[ClipDraw]:
        """The clips of step ``number``, from 0: as many as its tokens have room for, in the order of their draws."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, number]))
        clips, used = list[ClipDraw](), 0
        while True:
            clip = self._clip(rng)
            used += self.tokens(clip.frames)
            if clips and used > self.config.tokens:
                return clips
            clips.append(clip)

    def _clip(self, rng: np.random.Generator) -> ClipDraw:
        kind = _drawn(rng, self.shares)
        config, (shares, sources) = self.kinds[kind].config, self.sources[kind]
        split, episodes, starts = sources[_drawn(rng, shares)]
        episode = episodes[_drawn(rng, starts)]
        length = self.data.length(episode)
        longest = min(self.config.frames, length)
        frames = int(rng.integers(min(self.config.shortest, longest), longest + 1))
        objective = "joint"
        if config.program == GJD and split != ACTION_FREE:
            mixture = config.counterfactual if split == COUNTERFACTUAL else config.mixture
            names = list(OBJECTIVES)
            objective = names[_drawn(rng, np.cumsum([mixture.get(name, 0.0) for name in names]))]
        return ClipDraw(
            episode=episode,
            start=int(rng.integers(length - frames + 1)),
            frames=frames,
            kind=kind,
            objective=objective,
            chunk_size=int(rng.integers(config.chunk_sizes[0], config.chunk_sizes[1] + 1)),
            window=int(rng.integers(config.windows[0], config.windows[1] + 1)),
            action_free=split == ACTION_FREE,
            seed=int(rng.integers(LARGEST_SEED)),
        )

    def geometry(self, clip: ClipDraw) -> Geometry:
        """Who attends to whom in a clip, what is given left out."""
        config = self.kinds[clip.kind].config
        found = geometry_for(
            config.program, OBJECTIVES[clip.objective], history=config.history, frames=clip.frames,
            chunk_size=clip.chunk_size, window=clip.window, **self.sizes,
        )  # fmt: skip
        return replace(found, startup_action_frames=found.action_frames) if clip.action_free else found

    def cost(self, clip: ClipDraw) -> float:
        """FLOPs of a clip's forward, the text left out: products of matrices by token, attention by visible pair."""
        model, geometry = self.config.model, self.geometry(clip)
        pairs = visible_pairs(geometry) + self.context * (geometry.length + self.context)
        return packed_products(self.costs, 1, clip.frames).flops + 4 * model.layers * model.inner * pairs

    def pack(self, clips: Sequence[ClipDraw], share: float) -> Pack:
        """The clips with their data."""
        held = [self.data.clip(clip.episode, clip.start, clip.frames) for clip in clips]
        tasks = [self.data.tasks[int(one["task"])] for one in held]
        streams = "video", "action", "action_mask", "state", "episode"
        tensors: list[dict[str, Tensor]] = [{k: torch.as_tensor(one[k]) for k in streams if k in one} for one in held]
        return Pack(clips, tensors, tasks, share)


@lru_cache(maxsize=2**14)
def visible_pairs(geometry: Geometry) -> int:
    """Pairs of a token and one that it attends to."""
    return batch_rows(((geometry,),), (geometry.length, geometry.length)).visible_pairs


def balanced(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Numbers of the items of each part, so that the dearest part costs little more than the mean.

    The dearest item first, each to the part that costs least so far (LPT): at most 4/3 of the best.
    """
    heap = [(0.0, part) for part in range(parts)]
    found: list[list[int]] = [[] for _ in range(parts)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cost, part = heap[0]
        found[part].append(item)
        heapq.heapreplace(heap, (cost + costs[item], part))
    return [sorted(part) for part in found]


class PackLoader:
    """The packs that one process computes, step after step; reads ahead in threads.

    Args:
        draws: The clips of every step.
        step: The first step, from 0: the position of the run, whatever the other arguments are.
        part: Which part of each step, from 0.
        parts: How many there are: processes that have clips of their own.
        accumulation: Packs of a part, one after the other.
        ahead: Steps that are read before they are asked for.
    """

    def __init__(
        self, draws: PackedDraws, step: int = 0, *, part: int = 0, parts: int = 1, accumulation: int = 1, ahead: int = 2
    ) -> None:
        self.draws, self.part, self.parts, self.accumulation = draws, part, parts, accumulation
        self.ahead, self.step = whole("PackLoader: ahead", ahead, 1), whole("PackLoader: step", step, 0)

    def packs(self, step: int) -> list[Pack]:
        """Those of a step, one for each micro-batch."""
        clips = self.draws.step(step)
        costs = [self.draws.cost(clip) for clip in clips]
        every = balanced(costs, self.parts * self.accumulation)
        found = []
        for micro in range(self.accumulation):
            mine = every[micro * self.parts + self.part]
            chosen = [clips[i] for i in mine] or clips[:1]  # every process computes as many forwards as the others
            found.append(self.draws.pack(chosen, 1 / len(clips) if mine else 0.0))
        return found

    def __iter__(self) -> Iterator[list[Pack]]:
        """The packs of step after step, without end."""
        with ThreadPoolExecutor(self.ahead, thread_name_prefix="packs") as pool:
            coming: deque[Future[list[Pack]]] = deque()
            asked = self.step
            try:
                while True:
                    while len(coming) < self.ahead:
                        coming.append(pool.submit(self.packs, asked))
                        asked += 1
                    yield coming.popleft().result()
            finally:
                for future in coming:
                    future.cancel()


def _drawn(rng: np.random.Generator, running: np.ndarray) -> int:
    """A place, with the probabilities whose running sum is given up to a factor."""
    return int(np.searchsorted(running, rng.random() * running[-1], side="right"))
