"""Meta-World's tasks (Farama Foundation, ``metaworld`` on PyPI): one Sawyer robot, 50 tasks with scripted experts.

The state needs no renderer. Pictures are rendered by MuJoCo, which needs EGL or OSMesa.
"""

from __future__ import annotations

import atexit
import pickle
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from .protocol import Observation, Outcome
from .rendering import choose_backend, no_renderer

INSTALL = "pip install metaworld==3.1.1 mujoco==3.3.0 packaging, or 'wam-kernels[metaworld]'"
# of Meta-World's observation, which also holds the frame before: hand, gripper, first object, second object, target
KEPT = [*range(14), *range(36, 39)]
STATE_NAMES = (
    *("hand_x", "hand_y", "hand_z", "gripper"),
    *("object_x", "object_y", "object_z", "object_qx", "object_qy", "object_qz", "object_qw"),
    *("second_x", "second_y", "second_z", "target_x", "target_y", "target_z"),
)
UPSIDE_DOWN = {"corner2"}  # cameras that Meta-World mounts so


class MetaWorld:
    """A task of Meta-World as a :class:`~.protocol.Simulator`: 4 numbers an action, 17 a state, 80 actions a second.

    Args:
        task: As ``pick-place-v3``.
        cameras: Of the scene, to (height, width) of their pictures.

    Raises:
        ModuleNotFoundError: the packages are not installed.
        ValueError: an unknown task or camera, or pictures where there is neither EGL nor OSMesa.
    """

    horizon = 200
    action_names = ("dx", "dy", "dz", "gripper")
    state_names = STATE_NAMES

    def __init__(self, task: str, cameras: Mapping[str, tuple[int, int]]) -> None:
        try:
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
            from metaworld.policies import ENV_POLICY_MAP
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"metaworld/{task} needs {error.name}, which is not installed: {INSTALL}", name=error.name
            ) from error
        except Exception as error:  # MuJoCo takes a MUJOCO_GL without its library for whatever that leads to
            raise no_renderer(f"metaworld/{task}", error) from error
        if task not in ALL_V3_ENVIRONMENTS:
            raise ValueError(f"metaworld/{task}: no such task; tasks are {', '.join(sorted(ALL_V3_ENVIRONMENTS))}")
        self.task = task
        self.instruction = task.rpartition("-v")[0].replace("-", " ")
        self.env = ALL_V3_ENVIRONMENTS[task]()
        self.control_freq = 1 / self.env.dt
        # of the experts: the environment clips actions, which they know
        warnings.filterwarnings("ignore", "Constant\\(s\\) may be too high", UserWarning)
        self._policy = ENV_POLICY_MAP[task]()
        self._observed = np.zeros(39)
        self._cameras = dict(cameras)
        known = [self.env.model.camera(i).name for i in range(self.env.model.ncam)]
        if unknown := sorted(set(self._cameras) - set(known)):
            raise ValueError(f"metaworld/{task}: no camera {', '.join(unknown)}; cameras are {', '.join(known)}")
        try:
            if self._cameras:
                choose_backend()
            self._renderers = {size: self._renderer(*size) for size in set(self._cameras.values())}
        except Exception as error:  # PyOpenGL and MuJoCo raise whatever a missing library leads to
            raise no_renderer(f"metaworld/{task}", error) from error
        for renderer in self._renderers.values():
            atexit.register(renderer.close)  # later, EGL is gone before its contexts are

    def initial_state(self, seed: int) -> dict[str, Any]:
        """The places of object and target that Meta-World draws."""
        self.env.seed(seed)
        self.env.seeded_rand_vec, self.env._freeze_rand_vec = True, False
        self.env.reset()  # some tasks draw again until object and target are far enough from each other
        return {"rand_vec": self.env._last_rand_vec.tolist()}

    def reset(self, initial_state: dict[str, Any]) -> None:
        values = {"env_cls": type(self.env), "partially_observable": False}
        data = pickle.dumps(values | {"rand_vec": np.array(initial_state["rand_vec"])})
        self.env.set_task(type("Task", (), {"data": data}))
        self._observed, _ = self.env.reset()
        self._policy = type(self._policy)()

    def observe(self) -> Observation:
        return Observation(self.state(), {name: self._render(name) for name in self._cameras})

    def state(self) -> np.ndarray:
        """That of :meth:`observe`, without rendering."""
        return self._observed[KEPT].astype(np.float32)

    def act(self, action: np.ndarray) -> Outcome:
        self._observed, _, _, _, info = self.env.step(np.clip(action, -1, 1).astype(np.float32))
        return Outcome(info["success"] > 0)

    def expert(self) -> np.ndarray:
        """The next action of Meta-World's scripted policy, within -1 and 1."""
        return np.clip(self._policy.get_action(self._observed), -1, 1).astype(np.float32)

    def _renderer(self, height: int, width: int):
        import mujoco

        visual = self.env.model.vis
        visual.quality.shadowsize = visual.quality.offsamples = 0  # ten times as fast
        # MuJoCo's buffer holds 480 x 640 pixels unless it is told otherwise
        visual.global_.offheight, visual.global_.offwidth = (
            max(sizes) for sizes in zip(*self._cameras.values(), strict=True)
        )
        renderer = mujoco.Renderer(self.env.model, height, width)
        # the ground mirrors the scene, which is then drawn twice; other cameras than corner ones do not show it
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        return renderer

    def _render(self, camera: str) -> np.ndarray:
        renderer = self._renderers[self._cameras[camera]]
        renderer.update_scene(self.env.data, camera=camera)
        picture = renderer.render()
        return picture[::-1].copy() if camera in UPSIDE_DOWN else picture.copy()
