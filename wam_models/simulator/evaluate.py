"""How often a policy succeeds: what ``wam eval`` does.

All episodes are one batch, each at a frame of its own; where one ends, the next begins in its place. What happens in an
episode depends on its initial state and its noise alone, both of which are functions of its seed, not on the batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import whole
from ..rollout.episode import Episode, RolloutConfig, RolloutEngine
from ..rollout.policy import Policy
from .process import TIMEOUT, Description, SimulatorFailure, SimulatorProcess

Z = 1.959964  # of the normal distribution, two-sided 95 %


def wilson(successes: int, episodes: int) -> tuple[float, float]:
    """95 % confidence interval of a success rate: Wilson's, which holds near 0 and 1 and for few episodes too."""
    rate, ratio = successes / episodes, Z * Z / episodes
    middle = (rate + ratio / 2) / (1 + ratio)
    half = Z * math.sqrt(rate * (1 - rate) / episodes + ratio / (4 * episodes)) / (1 + ratio)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Task:
    """One episode that is to be played."""

    simulator: str
    episode: int
    seed: int  # of its initial state and its noise


@dataclass(eq=False)
class EpisodeResult:
    """What happened in one episode.

    Attributes:
        simulator: Its name.
        episode: Its number among those of the simulator.
        seed: Of its initial state and noise.
        success: Whether the task was done within the horizon.
        failure: Why not: the simulator's reason, the horizon, or what went wrong with the simulator.
        broken: Whether the simulator went wrong: it raised, hung, died or returned what is no observation.
        actions: Executed.
        initial_state: As the simulator stores it; None where it could not be drawn.
        imagined_mse: Of each frame of a chunk, the mean square error of the imagined latents, over all chunks that were
            executed so far.
        still_mse: The same of the last observed frame, repeated.
        frames: What was observed: states ``[1 + F, S]`` or pictures ``[1 + F, H, W, 3]``.
        imagined: ``[chunks, chunk, S]`` or ``[chunks, chunk, H, W, 3]``, decoded.
    """

    simulator: str
    episode: int
    seed: int
    success: bool = False
    failure: str | None = None
    broken: bool = False
    actions: int = 0
    initial_state: dict[str, Any] | None = None
    imagined_mse: list[float | None] = field(default_factory=list)
    still_mse: list[float | None] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    imagined: list[np.ndarray] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """What JSON holds of it: all but the frames."""
        return {k: v for k, v in vars(self).items() if k not in ("frames", "imagined")}


@dataclass(frozen=True)
class Rate:
    """Successes of some episodes."""

    successes: int
    episodes: int
    broken: int
    low: float
    high: float

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> Rate:
        """Of the rows of :meth:`EpisodeResult.row`. A broken episode is no success."""
        successes = sum(row["success"] for row in rows)
        return cls(successes, len(rows), sum(row["broken"] for row in rows), *wilson(successes, len(rows)))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Success of each simulator and of all, and the imagined frames beside standing still."""
    names = dict.fromkeys(row["simulator"] for row in rows)
    rates = {name: asdict(Rate.of([row for row in rows if row["simulator"] == name])) for name in names}
    chunk = max(len(row["imagined_mse"]) for row in rows)

    def mean(key: str, frame: int) -> float | None:
        values = [row[key][frame] for row in rows if len(row[key]) > frame and row[key][frame] is not None]
        return float(np.mean(values)) if values else None

    errors = {key: [mean(key, frame) for frame in range(chunk)] for key in ("imagined_mse", "still_mse")}
    return {"simulators": rates, "all": asdict(Rate.of(rows)), **errors}


def evaluate(
    policy: Policy,
    config: RolloutConfig,
    tasks: Sequence[Task],
    *,
    batch: int = 16,
    horizon: int | None = None,
    timeout: float = TIMEOUT,
    chunk_seconds: list[float] | None = None,
) -> Iterator[EpisodeResult]:
    """Play every task; results come as episodes end. What does not fit is refused before the first is asked for.

    Args:
        policy: What acts.
        config: How it rolls out.
        tasks: What is played; those of one simulator one after the other are cheapest.
        batch: Episodes at a time, each with a process of its own.
        horizon: Actions of an episode, in place of the simulator's own.
        timeout: Seconds within which a simulator must answer.
        chunk_seconds: Gets the seconds of each chunk of the whole batch, prediction and the pass over what was
            observed, without simulators.

    Raises:
        ValueError: a simulator that does not fit the policy, or a codec that needs more than one frame each.
        SimulatorFailure: a simulator that cannot be made at all.
    """
    whole("evaluate: batch", batch, 1)
    if policy.codec.temporal != 1:
        raise ValueError(f"evaluate: policy.codec must encode frames one by one, got {type(policy.codec).__name__}")
    batch = min(batch, len(tasks))
    processes = [SimulatorProcess(policy.cameras, timeout=timeout) for _ in range(batch)]
    try:
        described = {}
        for name in dict.fromkeys(task.simulator for task in tasks):
            described[name] = _fitting(policy, name, processes[0].describe(name))
    except BaseException:
        processes[0].close()
        raise
    seconds = [] if chunk_seconds is None else chunk_seconds
    return _Batch(policy, config, list(tasks), described, processes, horizon, seconds).run()


def _fitting(policy: Policy, name: str, described: Description) -> Description:
    width = len(policy.action_mean)
    if len(described.action_names) != width:
        raise ValueError(
            f"--simulator {name}: its actions have {len(described.action_names)} numbers, those of the policy {width}"
        )
    if policy.frames_are_states and len(described.state_names) != policy.codec.channels:
        raise ValueError(
            f"--simulator {name}: its states have {len(described.state_names)} numbers, those of the policy "
            f"{policy.codec.channels}"
        )
    return described


class _Batch:
    """The rows of a batch: which episode each of them plays, and its process."""

    def __init__(
        self,
        policy: Policy,
        config: RolloutConfig,
        tasks: list[Task],
        described: dict[str, Description],
        processes: list[SimulatorProcess],
        horizon: int | None,
        seconds: list[float],
    ) -> None:
        self.policy, self.config, self.described, self.processes = policy, config, described, processes
        self.horizon, self.seconds, self.tasks = horizon, seconds, iter(tasks)
        count = len(processes)
        self.results: list[EpisodeResult | None] = [None] * count
        self.noise = [torch.Generator() for _ in range(count)]
        self.latents: list[Tensor | None] = [None] * count  # of the last observed frame, [C, 1, y, x]
        self.errors: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(count)]

    @torch.no_grad()
    def run(self) -> Iterator[EpisodeResult]:
        """Play all; then no process is left."""
        try:
            yield from self._play()
        finally:
            for process in self.processes:
                process.close()

    def _play(self) -> Iterator[EpisodeResult]:
        ended, started = self._begin(range(len(self.processes)))
        yield from ended
        if not started:
            return
        fill = self.latents[started[0]]
        first = torch.stack([fill if latent is None else latent for latent in self.latents])
        names = [self.results[started[0]] if r is None else r for r in self.results]
        text = self.policy.text([self.described[r.simulator].instruction for r in names])
        episode = RolloutEngine(self.policy.model, self.config).start(first, text)
        while any(self.results):
            yield from self._chunk(episode)

    def _chunk(self, episode: Episode) -> Iterator[EpisodeResult]:
        """One chunk of every row that plays; the rows whose episodes end begin others."""
        size = episode.chunk_size
        began = time.perf_counter()
        candidate = episode.propose(**self._drawn(episode))
        video, action = candidate.video.cpu(), candidate.action.cpu()
        took = time.perf_counter() - began
        playing = [b for b, result in enumerate(self.results) if result is not None]
        executed: dict[int, Tensor] = {}
        ended: list[int] = []
        for b in playing:
            try:
                where = f"evaluate: {self.results[b].simulator}, episode {self.results[b].episode}"
                actions = self.policy.denormalize_action(action[b].flatten(0, 1), where).numpy()
            except ValueError as error:
                self._end(b, str(error))
                ended.append(b)
                continue
            actions = actions.reshape(size * self.policy.actions_per_frame, -1)[: self._left(b)]
            self.processes[b].send("run", self.results[b].simulator, actions, self.policy.actions_per_frame)
        for b in playing:
            if b not in ended:
                observed = self._received(b, video[b], size)
                if observed is None:
                    ended.append(b)
                else:
                    executed[b] = observed
        began = time.perf_counter()
        if executed:
            frames = torch.zeros_like(video)
            for b, latents in executed.items():
                frames[b] = latents
            episode.observe(frames, action, frames=[size * (b in executed) for b in range(len(self.results))])
            self.seconds.append(took + time.perf_counter() - began)
        yield from self._finish(ended)
        results, started = self._begin(ended)
        yield from results
        if started:
            text = self.policy.text([self.described[self.results[b].simulator].instruction for b in started])
            episode.restart(started, torch.stack([self.latents[b] for b in started]), text)

    def _begin(self, rows: Sequence[int]) -> tuple[list[EpisodeResult], list[int]]:
        """Begin an episode in each of these rows, as long as there are any: those that failed at once, and the rows
        that play."""
        failed, started = [], []
        waiting = list(rows)
        while waiting:
            asked = []
            for b in waiting:
                task = next(self.tasks, None)
                self.results[b] = task and EpisodeResult(task.simulator, task.episode, task.seed)
                if task is not None:
                    self.processes[b].send("begin", task.simulator, task.seed)
                    asked.append(b)
            waiting = []
            for b in asked:
                result = self.results[b]
                try:
                    begun = self.processes[b].receive()
                    frame = self.policy.frame(begun.observation.state, begun.observation.pictures)
                    self.latents[b] = self.policy.codec.encode(frame[None])
                except (SimulatorFailure, ValueError) as error:
                    result.failure, result.broken = str(error), True
                    failed.append(result)
                    waiting.append(b)
                    continue
                result.initial_state, result.frames = begun.initial_state, [frame]
                self.noise[b].manual_seed(result.seed)
                self.errors[b] = []
                started.append(b)
        return failed, started

    def _received(self, b: int, imagined: Tensor, size: int) -> Tensor | None:
        """The latents ``[C, chunk, y, x]`` of what a row observed; None where its episode ended."""
        result = self.results[b]
        try:
            done = self.processes[b].receive()
            frames = [self.policy.frame(o.state, o.pictures) for o in done.observations]
            latents = self.policy.codec.encode(np.stack(frames)) if frames else imagined[:, :0]
        except (SimulatorFailure, ValueError) as error:
            result.broken = True
            self._end(b, str(error))
            return None
        result.actions += done.actions
        result.frames += frames
        result.imagined.append(self.policy.codec.decode(imagined))
        count = latents.shape[1]
        if count:
            still = (latents - self.latents[b]).square().mean((0, 2, 3)).numpy()
            self.errors[b].append(((latents - imagined[:, :count]).square().mean((0, 2, 3)).numpy(), still))
            self.latents[b] = latents[:, -1:]
        if done.outcome.success:
            result.success = True
        elif done.outcome.failure:
            self._end(b, done.outcome.failure)
        elif self._left(b) <= 0:
            self._end(b, f"not done after {result.actions} actions")
        ended = result.success or result.failure is not None
        return None if ended else latents

    def _end(self, b: int, failure: str) -> None:
        self.results[b].failure = failure

    def _left(self, b: int) -> int:
        """Actions until the horizon."""
        result = self.results[b]
        return (self.horizon or self.described[result.simulator].horizon) - result.actions

    def _finish(self, rows: Sequence[int]) -> Iterator[EpisodeResult]:
        for b in rows:
            result, errors = self.results[b], self.errors[b]
            for frame in range(max((len(own) for own, _ in errors), default=0)):
                held = [(own[frame], still[frame]) for own, still in errors if len(own) > frame]
                imagined, still = np.mean(held, axis=0)
                result.imagined_mse.append(float(imagined))
                result.still_mse.append(float(still))
            self.results[b] = None
            yield result

    def _drawn(self, episode: Episode) -> dict[str, Tensor]:
        """Noise of each row from its own generator: what the other rows do makes no difference."""
        drawn = []
        c, chunk = self.policy.model.config, episode.chunk_size
        video = (c.latent_channels, chunk, *self.latents_shape())
        for b, generator in enumerate(self.noise):
            if self.results[b] is None:
                drawn.append((torch.zeros(video), torch.zeros(chunk, c.actions_per_frame, c.action_dim)))
            else:
                shapes = video, (chunk, c.actions_per_frame, c.action_dim)
                drawn.append(tuple(torch.randn(shape, generator=generator) for shape in shapes))
        videos, actions = zip(*drawn, strict=True)
        return {"video_noise": torch.stack(videos), "action_noise": torch.stack(actions)}

    def latents_shape(self) -> tuple[int, int]:
        """Rows and columns of a latent frame."""
        known = next(latent for latent in self.latents if latent is not None)
        return known.shape[-2], known.shape[-1]
