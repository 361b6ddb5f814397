"""Acting in a simulator, closed loop: predict a chunk, execute it, look, go on from what was seen.

An adapter is any object with the two methods of :class:`Simulator`; ``wam rollout --simulator module:factory`` calls
the factory without arguments. ``scripts/libero_simulator.py`` is one for LIBERO.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from .data.clips import STRIDE
from .policy import Policy
from .rollout import RolloutConfig, RolloutEngine

CONTROL_FREQ = 20.0  # Hz, of an adapter that does not say: LIBERO's, and so that of the training data


class Simulator(Protocol):
    """What an adapter does. Pictures are as in the training data, uint8 ``[H, W, 3]``.

    It may also have ``control_freq``, the actions that its robot takes in a second of simulated time; without it, 20.
    The film of ``wam rollout`` is played at that speed.
    """

    def reset(self) -> tuple[np.ndarray, str]:
        """Begin an episode: the first picture, and the instruction."""
        ...

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, bool]:
        """Execute float32 ``[K, A]`` actions in the units of the training data, K a multiple of 4.

        Returns:
            The picture after every 4th action, uint8 ``[K / 4, H, W, 3]``, fewer if the episode ended before; and
            whether the task is done.
        """
        ...


@dataclass(frozen=True, eq=False)
class Played:
    """One episode in a simulator."""

    instruction: str
    done: bool
    pictures: np.ndarray  # uint8 [1 + F, H, W, 3], what the robot saw
    imagined: np.ndarray  # uint8 [1 + F', H, W, 3], what it expected to see, chunk after chunk
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
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"--simulator {name} cannot be loaded: {error}") from error
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
        ValueError: what the adapter says is not a positive number.
    """
    freq = getattr(simulator, "control_freq", CONTROL_FREQ)
    if not isinstance(freq, int | float) or not 0 < freq < math.inf:
        raise ValueError(f"simulator: control_freq must be actions a second, a positive number, got {freq!r}")
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
        ValueError: pictures of another size or dtype than the policy's, or more of them than actions allow.
    """
    picture, instruction = simulator.reset()
    pictures, imagined, seconds = [picture[None]], [picture[None]], []
    with torch.no_grad():
        text = policy.text([instruction])
    episode = RolloutEngine(policy.model, config).start(policy.codec.encode(picture[None])[None], text)
    done = False
    for _ in tqdm(range(chunks), desc="play", unit="chunk", disable=not progress, dynamic_ncols=True):
        began = time.perf_counter()
        candidate = episode.propose(generator=generator)
        action = candidate.action.cpu()
        predicted = time.perf_counter() - began
        imagined.append(policy.codec.decode(candidate.video[0].cpu()))
        executed = (action[0].flatten(0, 1) * policy.action_std + policy.action_mean).numpy()
        seen, done = simulator.step(executed)
        if len(seen) > episode.chunk_size:
            raise ValueError(
                f"simulator: step must return at most {episode.chunk_size} pictures for {len(executed)} actions, "
                f"one every {STRIDE}, got {len(seen)}"
            )
        pictures.append(seen)
        if done or not len(seen):
            seconds.append(predicted)
            break
        began = time.perf_counter()
        episode.observe(policy.codec.encode(seen)[None], action[:, : len(seen)])
        seconds.append(predicted + time.perf_counter() - began)
    return Played(instruction, done, np.concatenate(pictures), np.concatenate(imagined), seconds)
