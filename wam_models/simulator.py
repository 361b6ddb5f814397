"""Acting in a simulator, closed loop: predict a chunk, execute it, look, go on from what was seen.

An adapter is any object with the two methods of :class:`Simulator`; ``wam rollout --simulator module:factory`` calls
the factory without arguments. ``scripts/libero_simulator.py`` is one for LIBERO.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from ._checks import whole
from .data.clips import STRIDE
from .data.lerobot import FREQUENCIES
from .rollout.episode import RolloutConfig, RolloutEngine
from .rollout.policy import Policy

CONTROL_FREQ = 20.0  # Hz, of an adapter that does not say: LIBERO's, and so that of the training data


class Simulator(Protocol):
    """What an adapter does. Pictures are as in the training data, uint8 ``[H, W, 3]``, of the same size; they are
    copied, so an adapter may return the same memory each time.

    It may also have ``control_freq``, the actions that its robot takes in a second of simulated time; without it, 20.
    The film of ``wam rollout`` is played at that speed.
    """

    def reset(self) -> tuple[np.ndarray, str]:
        """Begin an episode: the first picture, and the instruction."""
        ...

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, bool]:
        """Execute float32 ``[K, A]`` actions in the units of the training data, K a multiple of 4.

        Returns:
            The picture after every 4th action, uint8 ``[K / 4, H, W, 3]``, fewer if not all were executed, none if the
            episode ended before; and whether the task is done, a bool of Python or NumPy.
        """
        ...


@dataclass(frozen=True, eq=False)
class Played:
    """One episode in a simulator."""

    instruction: str
    done: bool
    pictures: np.ndarray  # uint8 [1 + F, H, W, 3], what the robot saw
    imagined: np.ndarray  # uint8 [1 + F', H, W, 3], what it expected to see, chunk after chunk
    actions: np.ndarray  # float32 [F', 4, A], what it was told to do, in the units of the training data
    frames: np.ndarray  # int64 [F'], the frame that each four actions lead to; what was cut short comes again
    chunk_seconds: list[float]  # of prediction and of the pass over what was seen, without the simulator


def load(name: str) -> Simulator:
    """The adapter that ``module:factory`` makes; modules of the working directory are found too.

    Raises:
        ValueError: no such name, or what it makes is no adapter, or one with a ``control_freq`` that is no frequency.
    """
    module, _, factory = name.partition(":")
    if not module or not factory:
        raise ValueError(f"--simulator must be module:factory, got {name!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(import_module(module), factory)()
    except Exception as error:
        raise ValueError(f"--simulator {name} cannot be loaded: {_said(error)}") from error
    finally:
        sys.path.pop(0)
    lacks = [method for method in ("reset", "step") if not callable(getattr(made, method, None))]
    if lacks:
        raise ValueError(f"--simulator {name} made a {type(made).__name__} without {' and '.join(lacks)}")
    control_freq(made)
    return made


def control_freq(simulator: Simulator) -> float:
    """Actions a second, in simulated time.

    Raises:
        ValueError: what the adapter says is not a positive number, or asking it raises.
    """
    try:
        freq = getattr(simulator, "control_freq", CONTROL_FREQ)
    except Exception as error:
        raise ValueError(f"simulator: control_freq raised {_said(error)}") from error
    if not isinstance(freq, Real) or isinstance(freq, bool) or not FREQUENCIES[0] <= freq <= FREQUENCIES[1]:
        raise ValueError(
            f"simulator: control_freq must be actions a second, a positive number, got {freq!r}; between "
            f"{FREQUENCIES[0]:g} and {FREQUENCIES[1]:g}"
        )
    return float(freq)


def play(
    policy: Policy,
    config: RolloutConfig,
    simulator: Simulator,
    *,
    chunks: int,
    generator: torch.Generator,
    progress: bool = True,
) -> Played:
    """At most ``chunks`` chunks of an episode; each is executed as far as the simulator goes, and observed.

    Raises:
        ValueError: a codec that needs more pictures than a simulator gives; actions that are not finite, before they
            are executed; whatever the simulator raises, as the cause; no pair where one is due, pictures of another
            size or dtype than the policy's, or more of them than actions allow. The message names the chunk, from 1.
    """
    chunks = whole("play: chunks", chunks, 1)
    if policy.codec.temporal != 1:
        raise ValueError(
            f"play: policy.codec must encode pictures one by one, but a {type(policy.codec).__name__} takes "
            f"{policy.codec.temporal} for each latent frame, and a simulator gives one"
        )
    where, returned = _call(simulator, "reset", "", "picture, instruction")
    picture, instruction = _pictures(where, returned[0], 3, policy), returned[1]
    if not isinstance(instruction, str):
        raise ValueError(f"{where} must return an instruction that is a string, got {instruction!r}")
    pictures, imagined, actions, frames, seconds = [picture[None]], [picture[None]], [], [], []
    with torch.no_grad():
        text = policy.text([instruction])
    episode = RolloutEngine(policy.model, config).start(policy.codec.encode(picture[None])[None], text)
    done = False
    for chunk in tqdm(range(1, chunks + 1), desc="play", unit="chunk", disable=not progress, dynamic_ncols=True):
        began = time.perf_counter()
        frames += range(episode.next_frame[0], episode.next_frame[0] + episode.chunk_size)
        candidate = episode.propose(generator=generator)
        action = candidate.action.cpu()
        predicted = time.perf_counter() - began
        imagined.append(policy.codec.decode(candidate.video[0].cpu()))
        executed = policy.denormalize_action(action[0].flatten(0, 1), f"play: chunk {chunk}").numpy()
        actions.append(executed.reshape(episode.chunk_size, STRIDE, -1).copy())
        where, returned = _call(simulator, "step", f" of chunk {chunk}", "pictures, done", executed)
        seen, done = _pictures(where, returned[0], 4, policy, like=picture), _flag(where, returned[1])
        if len(seen) > episode.chunk_size:
            raise ValueError(
                f"{where} must return at most {episode.chunk_size} pictures for {len(executed)} actions, one every "
                f"{STRIDE}, got {len(seen)}"
            )
        pictures.append(seen)
        if done or not len(seen):
            seconds.append(predicted)
            break
        began = time.perf_counter()
        episode.observe(policy.codec.encode(seen)[None], action[:, : len(seen)])
        seconds.append(predicted + time.perf_counter() - began)
    films = np.concatenate(pictures), np.concatenate(imagined)
    return Played(instruction, done, *films, np.concatenate(actions), np.array(frames), seconds)


def _call(simulator: Simulator, method: str, when: str, expected: str, *args) -> tuple[str, Sequence]:
    """What begins a message about this call, and the pair that it returns."""
    where = f"simulator: {type(simulator).__name__}.{method}{when}"
    try:
        returned = getattr(simulator, method)(*args)
    except Exception as error:
        raise ValueError(f"{where} raised {_said(error)}") from error
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        got = f"{len(returned)} values" if isinstance(returned, tuple | list) else f"a {type(returned).__name__}"
        raise ValueError(f"{where} must return ({expected}), got {got}")
    return where, returned


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}; WAM_TRACEBACK=1 shows where"


def _pictures(where: str, given: object, ndim: int, policy: Policy, like: np.ndarray | None = None) -> np.ndarray:
    """A copy of a picture ``[H, W, 3]`` or of several, after what an adapter can get wrong was looked for."""
    try:
        found = np.array(given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else given)
    except Exception as error:  # pictures of different sizes, dtypes that NumPy does not have, memory that is gone
        raise ValueError(f"{where} must return pictures of one size, as uint8: {_said(error)}") from error
    if ndim == 4 and len(np.atleast_1d(found)) == 0:
        return np.empty((0, *like.shape), np.uint8)
    if found.dtype != np.uint8 or found.ndim != ndim or found.shape[-1] != 3:
        shape = "[H, W, 3]" if ndim == 3 else "[F, H, W, 3]"
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
        raise ValueError(f"{where} must return done as a bool: {_said(error)}") from error
    if found.size != 1 or found.dtype != bool:
        raise ValueError(f"{where} must return done as a bool, got {given!r}")
    return found.item()
