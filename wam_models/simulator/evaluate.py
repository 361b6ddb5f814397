"""How often a policy succeeds: what ``wam eval`` does.

All episodes are one batch, each at a frame of its own; where one ends, the next begins in its place. What happens in an
episode depends on its initial state and its noise alone, both of which are functions of its seed, not on the batch.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..rollout import RolloutConfig, RolloutEngine
from ..rollout.episode import Episode
from ..rollout.policy import Policy
from ..runtime.checks import choice, whole
from .process import TIMEOUT, Description, SimulatorFailure, SimulatorPool, SimulatorProcess

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
    want: str = "both",
    instructions: Mapping[str, str] | None = None,
    pool: SimulatorPool | None = None,
) -> Iterator[EpisodeResult]:
    """Play every task; results come as episodes end. What does not fit is refused before the first is asked for.

    Args:
        policy: What acts.
        config: How it rolls out.
        tasks: What is played, in an order that has each process make few simulators.
        batch: Episodes at a time, each with a process of its own.
        horizon: Actions of an episode, in place of the simulator's own.
        timeout: Seconds within which a simulator must answer.
        chunk_seconds: Gets the seconds of each chunk of the whole batch, prediction and the pass over what was
            observed, without simulators.
        want: ``"both"``, or ``"action"``: nothing is imagined that actions do not need, and none of it is returned.
        instructions: By simulator, in place of its own.
        pool: Processes of the policy's cameras that stay for the next call, in place of new ones of ``timeout``.

    Raises:
        ValueError: a simulator that does not fit the policy, or a codec that needs more than one frame each.
        SimulatorFailure: a simulator that cannot be made at all.
    """
    whole("evaluate: batch", batch, 1)
    choice("evaluate: want", want, ("both", "action"))
    batch = min(batch, len(tasks))
    processes = pool or SimulatorPool(batch, policy.cameras, timeout=timeout)
    batch = min(batch, len(processes.processes))
    try:
        described = describe(policy, [task.simulator for task in tasks], processes)
        for name, instruction in (instructions or {}).items():
            described[name] = replace(described[name], instruction=instruction)
    except BaseException:
        processes.close()
        raise
    seconds = [] if chunk_seconds is None else chunk_seconds
    playing = _Batch(policy, config, list(tasks), described, processes.processes[:batch], horizon, seconds, want)
    return playing.run(stay=pool is not None)


def describe(policy: Policy, names: Iterable[str], process: SimulatorProcess | SimulatorPool) -> dict[str, Description]:
    """What simulators say of themselves.

    Args:
        policy: That is to act in them.
        names: Of the simulators.
        process: Asks them; it stays open.

    Raises:
        ValueError: a simulator that does not fit the policy, or a codec that needs more than one frame each.
        SimulatorFailure: a simulator that cannot be made at all.
    """
    if not policy.model.config.has_actions:
        raise ValueError("evaluate: policy must have actions, got one of a video-only model")
    if policy.codec.temporal != 1:
        raise ValueError(f"evaluate: policy.codec must encode frames one by one, got {type(policy.codec).__name__}")
    return {name: _fitting(policy, name, process.describe(name)) for name in dict.fromkeys(names)}


def _fitting(policy: Policy, name: str, described: Description) -> Description:
    width = len(policy.action_mean)
    if len(described.action_names) != width:
        raise ValueError(
            f"--simulator {name}: its actions have {len(described.action_names)} numbers, those of the policy {width}"
        )
    widths = policy.codec.channels if policy.frames_are_states else 0, policy.model.config.state_dim
    for told in (width for width in widths if width and width != len(described.state_names)):
        raise ValueError(
            f"--simulator {name}: its states have {len(described.state_names)} numbers, those of the policy {told}"
        )
    return described


class _Playing:
    """An episode in a row of the batch."""

    def __init__(self, task: Task, horizon: int, process: SimulatorProcess) -> None:
        self.result = EpisodeResult(task.simulator, task.episode, task.seed)
        self.horizon, self.process = horizon, process
        self.noise = torch.Generator().manual_seed(task.seed)
        self.latent = torch.empty(0)  # of the last observed frame, [C, 1, y, x]
        self.states = torch.empty(0)  # [frames, S] of what was observed last, for a policy that is told them
        self.errors: list[tuple[np.ndarray, np.ndarray]] = []

    @property
    def remaining(self) -> int:
        """Actions until the horizon."""
        return self.horizon - self.result.actions

    @property
    def ended(self) -> bool:
        return self.result.success or self.result.failure is not None

    def begin(self, policy: Policy) -> None:
        """Take the answer to ``begin``; a simulator that cannot ends the episode."""
        try:
            begun = self.process.receive()
            frame = policy.frame(begun.observation.state, begun.observation.pictures)
            self.latent = policy.codec.encode(frame[None])
            self._take_states(policy, [begun.observation.state])
        except (SimulatorFailure, ValueError) as error:
            self._broke(error)
            return
        self.result.initial_state, self.result.frames = begun.initial_state, [frame]

    def send(self, policy: Policy, action: Tensor) -> None:
        """Have the actions ``[chunk, n, k A]`` executed; what no robot must get ends the episode."""
        try:
            where = f"evaluate: {self.result.simulator}, episode {self.result.episode}"
            actions = policy.denormalize_action(action, where).reshape(-1, len(policy.action_mean)).numpy()
        except ValueError as error:
            self.result.failure = str(error)
            return
        self.process.send("run", self.result.simulator, actions[: self.remaining], policy.actions_per_frame)

    def receive(self, policy: Policy, imagined: Tensor | None) -> Tensor:
        """The latents ``[C, frames, y, x]`` of what was observed while the actions were executed.

        Args:
            policy: What acts.
            imagined: ``[C, chunk, y, x]``, what it expected; None where it imagined nothing.
        """
        result, latents = self.result, self.latent[:, :0]
        try:
            done = self.process.receive()
            frames = [policy.frame(o.state, o.pictures) for o in done.observations]
            if frames:
                latents = policy.codec.encode(np.stack(frames))
                self._take_states(policy, [o.state for o in done.observations])
        except (SimulatorFailure, ValueError) as error:
            self._broke(error)
            return latents
        result.actions += done.actions
        result.frames += frames
        if imagined is not None:
            result.imagined.append(policy.codec.decode(imagined))
        if frames and imagined is not None:
            own, still = latents - imagined[:, : len(frames)], latents - self.latent
            self.errors.append((own.square().mean((0, 2, 3)).numpy(), still.square().mean((0, 2, 3)).numpy()))
        if frames:
            self.latent = latents[:, -1:]
        result.success = done.outcome.success
        if not result.success:
            result.failure = done.outcome.failure
            if result.failure is None and self.remaining <= 0:
                result.failure = f"not done after {result.actions} actions"
        return latents

    def finished(self) -> EpisodeResult:
        """The result, with the errors of what was imagined."""
        for frame in range(max((len(own) for own, _ in self.errors), default=0)):
            held = [(own[frame], still[frame]) for own, still in self.errors if len(own) > frame]
            imagined, still = np.mean(held, axis=0)
            self.result.imagined_mse.append(float(imagined))
            self.result.still_mse.append(float(still))
        return self.result

    def _take_states(self, policy: Policy, states: list[np.ndarray]) -> None:
        told = policy.state(np.stack(states))
        self.states = self.states if told is None else told

    def _broke(self, error: Exception) -> None:
        self.result.failure, self.result.broken = str(error), True


class _Batch:
    """A row for each process, and which episode it plays."""

    def __init__(
        self,
        policy: Policy,
        config: RolloutConfig,
        tasks: list[Task],
        described: dict[str, Description],
        processes: list[SimulatorProcess],
        horizon: int | None,
        seconds: list[float],
        want: str,
    ) -> None:
        self.want = want
        self.policy, self.config, self.described, self.processes = policy, config, described, processes
        self.horizon, self.seconds = horizon, seconds
        self.waiting: dict[str, deque[Task]] = {}  # simulator -> its episodes that have not begun
        for task in tasks:
            self.waiting.setdefault(task.simulator, deque()).append(task)
        self.playing: dict[int, _Playing] = {}  # row -> its episode

    @torch.no_grad()
    def run(self, *, stay: bool) -> Iterator[EpisodeResult]:
        """Play all; then no process is left, unless they ``stay``."""
        try:
            yield from self._play()
        except BaseException:  # with an answer on its way that the next request would take for its own
            stay = False
            raise
        finally:
            for process in [] if stay else self.processes:
                process.close()

    def _play(self) -> Iterator[EpisodeResult]:
        rows = range(len(self.processes))
        yield from self._begin(rows)
        if not self.playing:
            return
        any_row = next(iter(self.playing.values()))  # stands in for rows without an episode
        beginning = [self.playing.get(b, any_row) for b in rows]
        first, text = torch.stack([p.latent for p in beginning]), self._text(beginning)
        episode = RolloutEngine(self.policy.model, self.config).start(first, text, state=self._states(beginning))
        while self.playing:
            yield from self._chunk(episode)

    def _chunk(self, episode: Episode) -> Iterator[EpisodeResult]:
        """One chunk of every row that plays; the rows whose episodes end begin others."""
        began = time.perf_counter()
        video_noise, action_noise = self._noise(episode)
        candidate = episode.propose(want=self.want, video_noise=video_noise, action_noise=action_noise)
        assert candidate.action is not None
        action = candidate.action.cpu()
        # imagined on the way to actions alone, it is not what the caller asked for
        video = candidate.video.cpu() if self.want == "both" and candidate.video is not None else None
        took = time.perf_counter() - began
        for b, playing in self.playing.items():
            playing.send(self.policy, action[b])
        observed, states = torch.zeros_like(video_noise), self._no_states(episode)
        for b, playing in self.playing.items():
            if not playing.ended:
                latents = playing.receive(self.policy, None if video is None else video[b])
                if not playing.ended:  # so all of the chunk was executed
                    observed[b] = latents
                    if states is not None:
                        states[b] = playing.states
        ended = [b for b, playing in self.playing.items() if playing.ended]
        counts = [episode.chunk_size * (b in self.playing and b not in ended) for b in range(len(self.processes))]
        began = time.perf_counter()
        if any(counts):
            episode.observe(observed, action, frames=counts, state=states)
            self.seconds.append(took + time.perf_counter() - began)
        for b in ended:
            yield self.playing.pop(b).finished()
        yield from self._begin(ended)
        started = [b for b in ended if b in self.playing]
        if started:
            playings = [self.playing[b] for b in started]
            first = torch.stack([p.latent for p in playings])
            episode.restart(started, first, self._text(playings), state=self._states(playings))

    def _begin(self, rows: Iterable[int]) -> Iterator[EpisodeResult]:
        """Begin an episode in each of these rows, as long as there are any; the results of those that cannot begin."""
        waiting = list(rows)
        while waiting:
            begun = {}
            for b in waiting:
                task = self._next_task(b)
                if task is None:  # the row stays empty
                    continue
                horizon = self.horizon or self.described[task.simulator].horizon
                begun[b] = _Playing(task, horizon, self.processes[b])
                self.processes[b].send("begin", task.simulator, task.seed)
            for playing in begun.values():
                playing.begin(self.policy)
            self.playing |= {b: playing for b, playing in begun.items() if not playing.ended}
            waiting = [b for b, playing in begun.items() if playing.ended]
            for b in waiting:
                yield begun[b].finished()

    def _next_task(self, row: int) -> Task | None:
        """Of the simulator that the row's process holds, since another costs a second; else of that with most left."""
        left = {name: tasks for name, tasks in self.waiting.items() if tasks}
        if not left:
            return None
        held = self.processes[row].holds
        name = held if held in left else max(left, key=lambda name: len(left[name]))
        return left[name].popleft()

    def _text(self, playings: Sequence[_Playing]) -> Tensor:
        return self.policy.text([self.described[p.result.simulator].instruction for p in playings])

    def _states(self, playings: Sequence[_Playing]) -> Tensor | None:
        """``[rows, 1, S]`` of episodes that begin."""
        return torch.stack([p.states for p in playings]) if self.policy.state_units is not None else None

    def _no_states(self, episode: Episode) -> Tensor | None:
        """Room for those of a chunk."""
        width = self.policy.model.config.state_dim
        return torch.zeros(len(self.processes), episode.chunk_size, width) if width else None

    def _noise(self, episode: Episode) -> tuple[Tensor, Tensor]:
        """Of video and actions, each row from its own generator: what the other rows do makes no difference."""
        c, chunk = self.policy.model.config, episode.chunk_size
        size = next(iter(self.playing.values())).latent.shape[-2:]
        video = torch.zeros(len(self.processes), c.latent_channels, chunk, *size)
        action = torch.zeros(len(self.processes), chunk, c.actions_per_frame, c.action_dim)
        for b, playing in self.playing.items():
            for noise in (video, action):
                noise[b] = torch.randn(noise.shape[1:], generator=playing.noise)
        return video, action
