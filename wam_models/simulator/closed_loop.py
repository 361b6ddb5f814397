"""Acting in a simulator, closed loop: predict a chunk, execute it, look, go on from what was observed.

What is acted in is a :class:`~.protocol.Simulator`, or an :class:`Adapter`, any object with two methods that gives
pictures chunk by chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from tqdm import tqdm

from ..rollout import RolloutConfig, RolloutEngine
from ..rollout.policy import Policy
from ..runtime.checks import whole
from .named import is_adapter
from .protocol import Simulator, checked_observation, execute, raised


class Adapter(Protocol):
    """The least that can be acted in. Pictures are as in the training data, uint8 ``[H, W, 3]``, of the same size; they
    are copied, so an adapter may return the same memory each time.

    It may also have ``control_freq``, the actions that its robot takes in a second of simulated time; without it, 20.
    The film of ``wam rollout`` is played at that speed.
    """

    def reset(self) -> tuple[np.ndarray, str]:
        """Begin an episode: the first picture, and the instruction."""
        ...

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, bool]:
        """Execute float32 ``[K, A]`` actions in the units of the training data, K a multiple of those of a frame, n.

        Returns:
            The picture after every n-th action, uint8 ``[K / n, H, W, 3]``, fewer if not all were executed, none if the
            episode ended before; and whether the task is done, a bool of Python or NumPy.
        """
        ...


class _Adapted:
    """A :class:`Simulator` as an adapter, of frames as a policy takes them."""

    def __init__(self, simulator: Simulator, policy: Policy, seed: int) -> None:
        self.simulator, self.policy, self.seed = simulator, policy, seed
        self.name = type(simulator).__name__
        self.failure: str | None = None
        self.actions = 0
        self.states = np.empty((0,))  # of what was observed in the last call, [frames, S]

    def reset(self) -> tuple[np.ndarray, str]:
        self.simulator.reset(self.simulator.initial_state(self.seed))
        first = checked_observation(f"{self.name}.observe", self.simulator.observe(), len(self.simulator.state_names))
        self.states = first.state[None]
        return self.policy.frame(first.state, first.pictures), self.simulator.instruction

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, bool]:
        done = execute(
            self.simulator, actions[: self.simulator.horizon - self.actions], self.policy.actions_per_frame, self.name
        )
        self.actions += done.actions
        self.failure = done.outcome.failure
        if not done.outcome.success and self.failure is None and self.actions >= self.simulator.horizon:
            self.failure = f"not done after {self.actions} actions"
        frames = [self.policy.frame(o.state, o.pictures) for o in done.observations]
        self.states = np.stack([o.state for o in done.observations]) if frames else self.states[:0]
        return (np.stack(frames) if frames else np.empty((0,))), done.outcome.success


@dataclass(frozen=True, eq=False)
class Played:
    """One episode in a simulator. Of a policy whose frames are states, ``pictures`` and ``imagined`` are float32
    ``[1 + F, S]``."""

    instruction: str
    done: bool
    pictures: np.ndarray  # uint8 [1 + F, H, W, 3], what the robot observed
    imagined: np.ndarray  # uint8 [1 + F', H, W, 3], what it expected to observe, chunk after chunk
    actions: np.ndarray  # float32 [F', n, A], what it was told to do, in the units of the training data
    frames: np.ndarray  # int64 [F'], the frame that each n actions lead to; what was cut short comes again
    chunk_seconds: list[float]  # of prediction and of the pass over what was observed, without the simulator
    failure: str | None = None  # why the episode ended without success, where the simulator says so


def imagined_of_frames(imagined: np.ndarray, frames: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """What was expected of each of the first ``count`` frames that were observed.

    Args:
        imagined: ``[1 + F', ...]``, the first frame and what was expected, chunk after chunk.
        frames: The frame of each of the F'; what was cut short comes again, and the last expectation counts.
        count: At most so many.
    """
    of_frame = {0: imagined[0], **dict(zip(map(int, frames), imagined[1:], strict=True))}
    return np.stack([of_frame[frame] for frame in range(count)])


def play(
    policy: Policy,
    config: RolloutConfig,
    simulator: Simulator | Adapter,
    *,
    chunks: int,
    generator: torch.Generator,
    seed: int = 0,
    progress: bool = True,
    watch: Callable[[np.ndarray, np.ndarray], None] = lambda observed, imagined: None,
) -> Played:
    """At most ``chunks`` chunks of an episode; each is executed as far as the simulator goes, and observed.

    Args:
        policy: What acts.
        config: How it rolls out.
        simulator: What it acts in.
        chunks: At most so many.
        generator: Draws the noise.
        seed: Of the initial state, which an adapter of two methods chooses itself.
        progress: Show a progress bar.
        watch: Called after every chunk with all frames that were observed, and with what was expected of each.

    Raises:
        ValueError: a policy without actions, one that is told states of an adapter, which has none, or a codec that
            needs more pictures than a simulator gives; actions that are not finite, before they
            are executed; whatever the simulator raises, as the cause; no pair where one is due, pictures of another
            size or dtype than the policy's, or more of them than actions allow. The message names the chunk, from 1.
    """
    chunks = whole("play: chunks", chunks, 1)
    if policy.codec.temporal != 1:
        raise ValueError(
            f"play: policy.codec must encode pictures one by one, but a {type(policy.codec).__name__} takes "
            f"{policy.codec.temporal} for each latent frame, and a simulator gives one"
        )
    if not policy.model.config.has_actions:
        raise ValueError("play: policy must have actions, got one of a video-only model; wam rollout imagines with it")
    told = policy.state_units is not None and not policy.frames_are_states
    if told and is_adapter(simulator):
        raise ValueError(
            f"play: policy is told {policy.model.config.state_dim} numbers of the robot's state, which an adapter of "
            "two methods does not give; give a Simulator, whose observe() does"
        )
    adapter: Any = simulator if is_adapter(simulator) else _Adapted(cast(Simulator, simulator), policy, seed)
    per_frame, look = policy.actions_per_frame, _states if policy.frames_are_states else _pictures
    where, returned = _call(adapter, "reset", "", "picture, instruction")
    picture, instruction = look(where, returned[0], 1, policy), returned[1]
    if not isinstance(instruction, str):
        raise ValueError(f"{where} must return an instruction that is a string, got {instruction!r}")
    pictures, imagined, actions, seconds = [picture[None]], [picture[None]], [], []
    frames: list[int] = []
    with torch.no_grad():
        text = policy.text([instruction])
    first_state = policy.state(adapter.states[None] if told else picture[None, None])
    first = policy.codec.encode(picture[None])[None]
    episode = RolloutEngine(policy.model, config).start(first, text, state=first_state)
    done, failure = False, None
    for chunk in tqdm(range(1, chunks + 1), desc="play", unit="chunk", disable=not progress, dynamic_ncols=True):
        began = time.perf_counter()
        frames += range(episode.next_frame[0], episode.next_frame[0] + episode.chunk_size)
        candidate = episode.propose(generator=generator)
        assert candidate.video is not None and candidate.action is not None
        action = candidate.action.cpu()
        predicted = time.perf_counter() - began
        imagined.append(policy.codec.decode(candidate.video[0].cpu()))
        executed = policy.denormalize_action(action[0].flatten(0, 1), f"play: chunk {chunk}").numpy()
        executed = executed.reshape(episode.chunk_size * per_frame, -1)
        actions.append(executed.reshape(episode.chunk_size, per_frame, -1).copy())
        where, returned = _call(adapter, "step", f" of chunk {chunk}", "pictures, done", executed)
        observed, done = look(where, returned[0], 2, policy, like=picture), _flag(where, returned[1])
        if len(observed) > episode.chunk_size:
            raise ValueError(
                f"{where} must return at most {episode.chunk_size} pictures for {len(executed)} actions, one every "
                f"{per_frame}, got {len(observed)}"
            )
        pictures.append(observed)
        count = sum(map(len, pictures))
        watch(np.concatenate(pictures), imagined_of_frames(np.concatenate(imagined), frames, count))
        failure = getattr(adapter, "failure", None)
        if done or not len(observed) or failure:
            seconds.append(predicted)
            break
        began = time.perf_counter()
        state = policy.state((adapter.states if told else observed)[None])
        episode.observe(policy.codec.encode(observed)[None], action[:, : len(observed)], state=state)
        seconds.append(predicted + time.perf_counter() - began)
    films = np.concatenate(pictures), np.concatenate(imagined)
    return Played(instruction, done, *films, np.concatenate(actions), np.array(frames), seconds, failure)


def _call(simulator: Any, method: str, when: str, expected: str, *args) -> tuple[str, Sequence]:
    """What begins a message about this call, and the pair that it returns."""
    where = f"simulator: {getattr(simulator, 'name', type(simulator).__name__)}.{method}{when}"
    try:
        returned = getattr(simulator, method)(*args)
    except Exception as error:
        raise ValueError(f"{where} raised {raised(error)}") from error
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        got = f"{len(returned)} values" if isinstance(returned, tuple | list) else f"a {type(returned).__name__}"
        raise ValueError(f"{where} must return ({expected}), got {got}")
    return where, returned


def _states(where: str, given: object, ndim: int, policy: Policy, like: np.ndarray | None = None) -> np.ndarray:
    """A state ``[S]`` or several."""
    found = np.array(given, dtype=np.float32)
    if ndim == 2 and not len(found):
        assert like is not None
        return np.empty((0, *like.shape), np.float32)
    if found.ndim != ndim or found.shape[-1] != policy.codec.channels:
        raise ValueError(
            f"{where} must return states of {policy.codec.channels} numbers, as the policy was trained on, got "
            f"{found.dtype} {list(found.shape)}"
        )
    return found


def _pictures(where: str, given: object, ndim: int, policy: Policy, like: np.ndarray | None = None) -> np.ndarray:
    """A copy of a picture ``[H, W, 3]`` (``ndim`` 1) or of several (2), after a look for what adapters get wrong."""
    try:
        found = np.array(given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else given)
    except Exception as error:  # pictures of different sizes, dtypes that NumPy does not have, memory that is gone
        raise ValueError(f"{where} must return pictures of one size, as uint8: {raised(error)}") from error
    if ndim == 2 and len(np.atleast_1d(found)) == 0:
        assert like is not None
        return np.empty((0, *like.shape), np.uint8)
    if found.dtype != np.uint8 or found.ndim != ndim + 2 or found.shape[-1] != 3:
        shape = "[H, W, 3]" if ndim == 1 else "[F, H, W, 3]"
        raise ValueError(
            f"{where} must return pictures as uint8 {shape}, got {found.dtype} {list(found.shape)}; colours come last, "
            "from 0 to 255"
        )
    if policy.camera is not None:
        policy.camera.check(where, *found.shape[-3:-1])
    if like is not None and found.shape[1:] != like.shape:
        raise ValueError(f"{where} must return pictures as reset does, {list(like.shape)}, got {list(found.shape[1:])}")
    return found


def _flag(where: str, given: object) -> bool:
    try:
        found = np.asarray(given.cpu().numpy() if isinstance(given, torch.Tensor) else given)
    except Exception as error:  # as for pictures
        raise ValueError(f"{where} must return done as a bool: {raised(error)}") from error
    if found.size != 1 or found.dtype != bool:
        raise ValueError(f"{where} must return done as a bool, got {given!r}")
    return found.item()
