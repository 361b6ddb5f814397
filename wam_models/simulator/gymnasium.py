"""Environments of Gymnasium (Farama Foundation, ``gymnasium`` on PyPI) by ID, where its API says what is needed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np

from .protocol import Observation, Outcome

FLAGS = ("is_success", "success")  # of info: Gymnasium-Robotics' name, Meta-World's


class Gymnasium:
    """An environment as a :class:`~.protocol.Simulator`; frames are states.

    Its actions must be a Box of one axis, in its own units; observations that ``gymnasium.spaces.utils.flatten`` makes
    a Box of, such as a Dict of Boxes, are the state. The horizon is its ``max_episode_steps``, the rate its
    ``render_fps``. An initial state is the seed of ``reset``. Whether an episode succeeded, ``info`` must say, under
    one of ``FLAGS``: an end alone can be either.

    Args:
        task: Its ID, as ``FetchReach-v4``, or ``module:ID``, whose module registers it.
        cameras: None.

    Raises:
        ModuleNotFoundError: Gymnasium is not installed.
        ValueError: no such ID, cameras, or an environment that does not fit; the message says in what.
    """

    def __init__(self, task: str, cameras: Mapping[str, tuple[int, int]]) -> None:
        self.name = f"gymnasium/{task}"
        try:
            gymnasium = import_module("gymnasium")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{self.name} needs gymnasium: pip install gymnasium", name=error.name) from error
        if cameras:
            raise ValueError(
                f"{self.name}: cameras must be left out, got {', '.join(cameras)}; for pictures write a factory that "
                "renders, see docs/closed_loop.md"
            )
        try:
            self.env = gymnasium.make(task)
        except (gymnasium.error.Error, ModuleNotFoundError) as error:
            raise ValueError(f"{self.name}: {error}") from error
        utils = gymnasium.spaces.utils
        self._flatten = lambda found: np.asarray(utils.flatten(self.env.observation_space, found), np.float32)
        actions, states = self.env.action_space, utils.flatten_space(self.env.observation_space)
        for what, space in (("actions", actions), ("observations", states)):
            if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
                raise ValueError(f"{self.name}: {what} must be a Box of one axis, got {space}; write a factory")
        spec, fps = self.env.spec, self.env.metadata.get("render_fps")
        for what, value in (("max_episode_steps", spec and spec.max_episode_steps), ("metadata render_fps", fps)):
            if not value:
                raise ValueError(f"{self.name}: {what} must be there, got {value}; write a factory that says it")
        self.horizon, self.control_freq = int(spec.max_episode_steps), float(fps)
        self.instruction = task.rpartition(":")[2].rpartition("/")[2].rpartition("-v")[0].replace("-", " ")
        self.action_names = tuple(f"action_{i}" for i in range(actions.shape[0]))
        self.state_names = tuple(f"number_{i}" for i in range(states.shape[0]))
        self._low, self._high = actions.low, actions.high
        self._observed = np.zeros(states.shape, np.float32)

    def initial_state(self, seed: int) -> dict[str, Any]:
        """What ``reset`` draws it from."""
        return {"seed": seed}

    def reset(self, initial_state: dict[str, Any]) -> None:
        found, _ = self.env.reset(seed=initial_state["seed"])
        self._observed = self._flatten(found)

    def observe(self) -> Observation:
        return Observation(self._observed)

    def act(self, action: np.ndarray) -> Outcome:
        """Execute an action, clipped to its space. Raises ValueError where the episode ends and nothing says how."""
        found, _, terminated, _, info = self.env.step(np.clip(action, self._low, self._high))
        self._observed = self._flatten(found)
        success = next((bool(info[flag]) for flag in FLAGS if flag in info), None)
        if terminated and success is None:
            raise ValueError(
                f"{self.name}: info must have {' or '.join(FLAGS)} where an episode ends, got {sorted(info)}; register "
                "a wrapper that adds it, or write a factory"
            )
        return Outcome(bool(success), "the environment ended the episode" if terminated and not success else None)
