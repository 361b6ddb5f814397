"""Robots that ask one policy for actions, whenever each of them likes: a rollout each, in one batch.

    robots = RobotBatch(policy, config, places=2)
    answers = robots.act({0: Request(prompt="lift", states=state[None]), 1: other})   # [F n, A] each, or its error

A prediction leaves an episode as it was, so the rollouts of those that do not ask just now are run along and thrown
away. What a robot gets depends on what it sent and on its seed, not on who else asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..runtime.checks import whole
from .config import RolloutConfig
from .engine import RolloutEngine
from .policy import Policy

# Standard deviations from the mean of the training data: no robot is there, and beyond it a half-precision model
# overflows, which would take the other rollouts' answers along.
FARTHEST = 1e4


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What a robot asks for: the actions after its newest observation.

    Args:
        prompt: The instruction, in words of the training data.
        states: Floats ``[K, S]``, of K observations, the newest last; None for a policy that is told none.
        pictures: Camera to uint8 ``[K, H, W, 3]``.
        executed: Floats ``[K n, A]`` in the units of the data set, n a frame: the actions that led to these K
            observations from the last one that was sent. None: an episode begins, with one observation.
        committed: Floats ``[m, A]``, m a multiple of the actions of a token and at most F n: the first actions of the
            answer, because they are executed already or will be before it is there. The others follow from them.
        seed: Of the noise of an episode that begins; None: drawn.
    """

    prompt: str
    states: np.ndarray | None = None
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)
    executed: np.ndarray | None = None
    committed: np.ndarray | None = None
    seed: int | None = None


class _Encoded(NamedTuple):
    latents: Tensor  # [C, K, y, x]
    states: Tensor | None  # [K, S]
    text: Tensor  # [L, text_dim]
    executed: Tensor | None  # [K, tokens, k A], normalised
    committed: Tensor | None  # [m / k, k A], normalised


class RobotBatch:
    """Rollouts of a policy, one for each robot.

    What is compiled or captured at first use is when this returns: no request waits for it.

    Args:
        policy: What acts.
        config: How it rolls out.
        places: Robots at a time.
        seed: Of the seeds that requests do not name.

    Attributes:
        horizon: Actions of an answer, F n.
        width: Numbers of a state that a request must bring; 0: none.

    Raises:
        ValueError: a policy without actions, or whose codec takes several frames for one.
    """

    def __init__(self, policy: Policy, config: RolloutConfig, *, places: int = 1, seed: int = 0) -> None:
        if not policy.model.config.has_actions:
            raise ValueError("RobotBatch: policy must have actions, got one of a video-only model")
        if policy.codec.temporal != 1:
            raise ValueError(
                f"RobotBatch: policy.codec must encode frames one by one, got {type(policy.codec).__name__}"
            )
        if not policy.frames_are_states and not policy.cameras:
            raise ValueError("RobotBatch: policy.camera must be known, got a checkpoint that does not say; train again")
        self.policy, self.config = policy, config
        self.places = whole("RobotBatch: places", places, 1)
        self._seeds = torch.Generator().manual_seed(seed)
        self._noise = [torch.Generator() for _ in range(places)]
        self._begun: set[int] = set()
        self.horizon = config.chunk_size * policy.actions_per_frame
        self.width = policy.codec.channels if policy.frames_are_states else policy.model.config.state_dim
        states = np.zeros((1, self.width), np.float32) if self.width else None
        pictures = {name: np.zeros((1, *size, 3), np.uint8) for name, size in policy.cameras.items()}
        self._nothing = self._encoded(Request(prompt="", states=states, pictures=pictures))
        first, told, text, *_ = (None if t is None else torch.stack([t] * places) for t in self._nothing)
        self.episode = RolloutEngine(policy.model, config).start(_given(first), _given(text), state=told)
        self.warm_up()

    def warm_up(self) -> None:
        """An episode of nothing in place 0: begun, observed and asked, as requests will do it."""
        c = self.policy.model.config
        executed = torch.zeros(1, c.actions_per_frame, c.action_dim)
        self._act({0: self._nothing})
        self._act({0: self._nothing._replace(executed=executed, committed=executed[0, :1])})
        self.leave(0)

    def leave(self, place: int) -> None:
        """The robot has gone; whoever comes next begins an episode."""
        self._begun.discard(place)

    def act(self, requests: Mapping[int, Request]) -> dict[int, np.ndarray | ValueError]:
        """The next actions of the robots in these places.

        Args:
            requests: By place, from 0.

        Returns:
            float32 ``[F n, A]`` in the units of the data set, finite; or why there are none, for that robot alone.
        """
        prepared: dict[int, _Encoded] = {}
        answers: dict[int, np.ndarray | ValueError] = {}
        for place, request in requests.items():
            whole("RobotBatch.act: place", place, 0, self.places - 1)
            try:
                prepared[place] = self._encoded(request)
                if request.executed is not None and place not in self._begun:
                    raise ValueError("request: executed must be None where no observation was sent before")
            except ValueError as error:
                prepared.pop(place, None)
                answers[place] = error
                continue
            if request.executed is None:
                drawn = torch.randint(2**31, (), generator=self._seeds).item() if request.seed is None else request.seed
                self._noise[place].manual_seed(int(drawn))
        return answers | (self._act(prepared) if prepared else {})

    # ---- what a robot sent ----

    def _encoded(self, request: Request) -> _Encoded:
        """As the episode takes it. Raises ValueError, naming what does not fit."""
        policy, n = self.policy, self.policy.actions_per_frame
        states = None
        if self.width:
            states = _floats("states", request.states, (None, self.width))
        pictures = {name: np.asarray(p) for name, p in request.pictures.items() if name in policy.cameras}
        missing = [name for name in policy.cameras if name not in pictures]
        if missing:
            raise ValueError(f"request: pictures must have {sorted(policy.cameras)}, got none of {missing}")
        for name, found in pictures.items():
            height, width = policy.cameras[name]
            if found.dtype != np.uint8 or found.ndim != 4 or found.shape[1:] != (height, width, 3):
                raise ValueError(
                    f"request: pictures of {name} must be uint8 [K, {height}, {width}, 3], got {found.dtype} "
                    f"{list(found.shape)}"
                )
        counts = {name: len(p) for name, p in pictures.items()} | ({} if states is None else {"states": len(states)})
        K = next(iter(counts.values()))
        if len(set(counts.values())) > 1 or K < 1:
            raise ValueError(f"request: states and pictures must be of equally many observations, got {counts}")
        executed = committed = None
        if request.executed is not None:
            executed = self._normalised("executed", request.executed, K * n)
            executed = executed.reshape(K, policy.model.config.actions_per_frame, -1)
        elif K != 1:
            raise ValueError(f"request: an episode begins with 1 observation, got {K}; give executed to go on")
        if request.committed is not None and len(request.committed):
            committed = self._normalised("committed", request.committed, None)
            m, k = len(committed), policy.actions_per_token
            if m % k or m > self.horizon:
                raise ValueError(
                    f"request: committed must be a multiple of {k} actions, at most {self.horizon}, got {m}"
                )
            committed = committed.reshape(m // k, -1)
        if request.seed is not None:
            whole("request: seed", request.seed, 0, 2**63 - 1)
        none = np.empty(0, np.float32)
        frames = [
            policy.frame(none if states is None else states[i], {k: p[i] for k, p in pictures.items()})
            for i in range(K)
        ]
        told = None if states is None else policy.state(states)
        if told is not None:
            _near("states", told)
        with torch.no_grad():
            text = policy.text([request.prompt])[0]
        latents = policy.codec.encode(np.stack(frames))
        _near("states", latents)
        return _Encoded(latents, told, text, executed, committed)

    def _normalised(self, name: str, given: object, count: int | None) -> Tensor:
        """Actions ``[K, A]`` in the model's units."""
        policy = self.policy
        found = torch.from_numpy(_floats(name, given, (count, len(policy.action_mean))))
        normalised = (found - policy.action_mean) / policy.action_std
        _near(name, normalised)
        return normalised

    # ---- the episode ----

    def _act(self, requests: Mapping[int, _Encoded]) -> dict[int, np.ndarray | ValueError]:
        self._begin({b: r for b, r in requests.items() if r.executed is None})
        self._observe({b: r for b, r in requests.items() if r.executed is not None})
        video, action = self._room(self.episode.chunk_size)
        for b in requests:
            for noise in (video, action):
                noise[b] = torch.randn(noise.shape[1:], generator=self._noise[b])
        counts = [0 if b not in requests or requests[b].committed is None else len(_given(requests[b].committed))
                  for b in range(self.places)]  # fmt: skip
        options: dict[str, Any] = {}
        if max(counts):
            known = torch.zeros(self.places, max(counts), action.shape[-1])
            for b, count in enumerate(counts):
                if count:
                    known[b, :count] = _given(requests[b].committed)
            options = {"committed": known, "committed_tokens": counts}
        found = self.episode.propose(want="action", video_noise=video, action_noise=action, **options).action
        assert found is not None
        found = found.cpu()
        answers: dict[int, np.ndarray | ValueError] = {}
        for b in requests:
            try:
                units = self.policy.denormalize_action(found[b], "answer")
            except ValueError as error:
                answers[b] = error
                continue
            answers[b] = units.reshape(self.horizon, -1).numpy()
        return answers

    def _room(self, frames: int) -> tuple[Tensor, Tensor]:
        """Zeros for so many frames of every place."""
        c, grid = self.policy.model.config, self._nothing.latents.shape[-2:]
        video = torch.zeros(self.places, c.latent_channels, frames, *grid)
        return video, torch.zeros(self.places, frames, c.actions_per_frame, c.action_dim)

    def _begin(self, requests: Mapping[int, _Encoded]) -> None:
        if requests:
            rows = list(requests.values())
            states = None if rows[0].states is None else torch.stack([_given(r.states) for r in rows])
            first, text = torch.stack([r.latents for r in rows]), torch.stack([r.text for r in rows])
            self.episode.restart(list(requests), first, text, state=states)
            self._begun |= set(requests)

    def _observe(self, requests: Mapping[int, _Encoded]) -> None:
        if not requests:
            return
        counts = [requests[b].latents.shape[1] if b in requests else 0 for b in range(self.places)]
        K = max(counts)
        video, action = self._room(K)
        width = self.policy.model.config.state_dim
        state = torch.zeros(self.places, K, width) if width else None
        for b, r in requests.items():
            video[b, :, : counts[b]], action[b, : counts[b]] = r.latents, _given(r.executed)
            if state is not None:
                state[b, : counts[b]] = _given(r.states)
        self.episode.observe(video, action, frames=counts, state=state)


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _floats(name: str, given: object, shape: tuple[int | None, int]) -> np.ndarray:
    """float32 ``[K, width]``, finite."""
    found = np.asarray(given) if isinstance(given, np.ndarray | list | tuple) else np.empty(0)
    fits = found.ndim == 2 and found.dtype.kind in "fiu" and found.shape[1] == shape[1]
    if not fits or shape[0] not in (None, len(found)):
        expected = ["K" if n is None else n for n in shape]
        got = f"{found.dtype} {list(found.shape)}" if isinstance(given, np.ndarray) else type(given).__name__
        raise ValueError(f"request: {name} must be floats {expected}, got {got}".replace("'", ""))
    if not np.isfinite(found).all():
        raise ValueError(f"request: {name} must be finite, got NaN or infinity")
    return np.array(found, dtype=np.float32)


def _near(name: str, normalised: Tensor) -> None:
    """Within what a model can take."""
    if not (normalised.abs() <= FARTHEST).all():
        raise ValueError(
            f"request: {name} must be within {FARTHEST:g} standard deviations of the training data, got one "
            f"{normalised.abs().max():.3g} away; are the units those of the data set?"
        )
