"""LIBERO as a simulator, against a stand-in with its awkward ways; with LIBERO installed, against itself."""

import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from wam_models.simulator import load
from wam_models.simulator.libero import AT_REST, SETTLE_ACTIONS, rotation_vector
from wam_models.simulator.process import SimulatorFailure, SimulatorProcess
from wam_models.simulator.protocol import execute, lacking

NAME = "libero/libero_object/1"
SCENE = """
<mujoco>
  <worldbody>
    <light pos="0 0 3"/>
    <camera name="agentview" pos="0 -2 0" xyaxes="1 0 0 0 0 1"/>
    <camera name="robot0_eye_in_hand" pos="0 2 0" xyaxes="-1 0 0 0 0 1"/>
    <body name="box"><freejoint/><geom type="box" size=".2 .2 .2" rgba="1 0 0 1" group="1"/></body>
    <geom type="box" size="3 .1 3" pos="0 -1 0" group="0"/>
  </worldbody>
</mujoco>
"""


class Environment:
    """What of LIBERO's ControlEnv is used: ``done`` is success, the generator is NumPy's own, a soft reset leaves a
    trace, quaternions are x, y, z, w of either sign, and without ``ignore_done`` the end of 1000 actions raises."""

    made = 0

    def __init__(self, bddl_file_name, has_offscreen_renderer, use_camera_obs, hard_reset, ignore_done=False):
        assert not has_offscreen_renderer and not use_camera_obs and bddl_file_name.startswith("bddl/objects/")
        type(self).made += 1
        self.hard_reset, self.ignore_done, self.count = hard_reset, ignore_done, 0
        self.robots = [SimpleNamespace(gripper=SimpleNamespace(dof=1, current_action=np.zeros(1)))]
        self.sim = SimpleNamespace(model=SimpleNamespace(_model=None), data=SimpleNamespace(qpos=np.zeros(7)))
        if mujoco := sys.modules.get("mujoco"):
            self.sim.model._model = mujoco.MjModel.from_xml_string(SCENE)
        else:
            self.sim.model._model = SimpleNamespace(ncam=0)
        self.hand, self.trace = np.zeros(3), 0.0

    def seed(self, seed):
        np.random.seed(seed)

    def reset(self):
        self.count, self.trace = 0, np.random.rand()
        return self._observed()

    def set_init_state(self, state):
        self.hand = state[:3].copy()
        self.sim.data.qpos = np.concatenate([self.hand, [1, 0, 0, 0]])
        return self._observed()

    def step(self, action):
        assert action.dtype == np.float64 and action.shape == (7,) and np.abs(action).max() <= 1
        if self.count >= 1000 and not self.ignore_done:
            raise ValueError("executing action in terminated episode")
        self.count += 1
        gripper = self.robots[0].gripper
        gripper.current_action = np.clip(gripper.current_action + 0.1 * action[-1:], -1, 1)
        self.hand = self.hand + 0.05 * action[:3] + 1e-4 * self.trace
        self.sim.data.qpos[:3] = self.hand
        return self._observed(), 0.0, self.hand[0] > 0.3, {}

    def _observed(self):
        sign = -1 if self.count % 2 else 1
        quaternion = sign * np.array([0.8, 0, 0, 0.6])
        fingers = self.robots[0].gripper.current_action * [1, -1]
        return {"robot0_eef_pos": self.hand, "robot0_eef_quat": quaternion, "robot0_gripper_qpos": fingers}


class Suite:
    def __init__(self, task_order_index):
        assert task_order_index == 0
        print("[info] Applying task order index 0")

    def get_num_tasks(self):
        return 3

    def get_task(self, number):
        return SimpleNamespace(language=f"do {number}", problem_folder="objects", bddl_file=f"task{number}.bddl")

    def get_task_init_states(self, number):
        return np.linspace(-1, 0, 50)[:, None] * np.ones(9)


@pytest.fixture
def stand_in(monkeypatch):
    """The modules of LIBERO in this process."""
    modules = {name: ModuleType(name) for name in ("libero", "libero.libero", "libero.libero.envs")}
    wrapper = ModuleType("libero.libero.envs.env_wrapper")
    wrapper.ControlEnv = Environment
    modules["libero.libero"].benchmark = SimpleNamespace(
        get_benchmark_dict=lambda: {"libero_object": Suite, "mine": Suite}
    )
    modules["libero.libero"].get_libero_path = lambda what: {"bddl_files": "bddl"}[what]
    for name, module in {**modules, wrapper.__name__: wrapper}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("MUJOCO_GL", "egl")


def test_an_episode_is_a_function_of_its_initial_state(stand_in, capsys):
    simulator = load(NAME)
    assert capsys.readouterr().out == "" and not lacking(simulator)
    assert (simulator.instruction, simulator.horizon, load("libero/mine/0").horizon) == ("do 1", 280, 600)
    assert simulator.initial_state(7) == simulator.initial_state(57) == {"number": 7}
    rng = np.random.default_rng(0)
    actions = rng.uniform(-2, 0.5, (12, 7)).astype(np.float32)

    def states():
        np.random.rand(3)
        simulator.reset({"number": 7})
        assert simulator.env.count == SETTLE_ACTIONS
        return np.stack([o.state for o in execute(simulator, actions, 3, "libero").observations])

    first = states()
    assert first.dtype == np.float32 and first.shape == (4, 8)
    np.testing.assert_array_equal(first, states())
    with pytest.raises(ValueError, match="a number from 0 to 49, got 50"):
        simulator.reset({"number": 50})


def test_success_is_done_and_nothing_else_ends_an_episode(stand_in):
    simulator = load(NAME)
    simulator.reset({"number": 49})
    forward, rest = np.float32([1, 0, 0, 0, 0, 0, 1]), AT_REST.astype(np.float32)
    done = execute(simulator, np.tile(rest, (1100, 1)), 100, "libero")
    assert done.actions == 1100 and not done.outcome.success and done.outcome.failure is None
    done = execute(simulator, np.tile(forward, (20, 1)), 4, "libero")
    assert done.outcome.success and done.actions == 5
    assert not hasattr(simulator, "expert")  # which wam record refuses


@pytest.mark.parametrize("sign", [1, -1])
def test_a_quaternion_has_its_w_last_and_either_sign(sign):
    """A quarter turn about y, with x a little above 0 so that its sign counts; and half a turn about x."""
    half = np.pi / 4
    turned = rotation_vector(sign * np.array([1e-6, np.sin(half), 0, np.cos(half)]))
    np.testing.assert_allclose(turned, [0, np.pi / 2, 0], atol=1e-5)
    down = [rotation_vector(sign * np.array([1, 0, 0, w])) for w in (1e-4, -1e-4)]  # no jump where w changes its sign
    np.testing.assert_allclose(down, [[np.pi, 0, 0]] * 2, atol=1e-3)
    np.testing.assert_array_equal(rotation_vector(np.array([0.0, 0, 0, sign])), 0)


@pytest.mark.parametrize(
    "name, cameras, message",
    [
        ("libero/libero_objects/1", {}, "there is no suite 'libero_objects'; suites are libero_object, mine"),
        ("libero/libero_object/3", {}, "tasks of libero_object are libero_object/0 to libero_object/2"),
        ("libero/libero_object", {}, "tasks of libero_object are"),
    ],
)
def test_names_are_checked(name, cameras, message, stand_in):
    with pytest.raises(ValueError, match=message):
        load(name, cameras)


def test_a_missing_package_says_what_to_install(monkeypatch):
    for name in ("libero", "libero.libero"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(ModuleNotFoundError, match="libero/libero_object/1 needs .*requirements/libero.txt"):
        load(NAME)


def test_pictures_are_right_way_up_and_of_the_state(stand_in, monkeypatch):
    """The box, red, is above and to the right for one camera, and so to the left for the other, behind it; shapes of
    collision, which hide it, are not drawn."""
    pytest.importorskip("mujoco", reason="an optional package")
    monkeypatch.delenv("MUJOCO_GL")
    try:
        simulator = load(NAME, {"tiled": (32, 64), "agentview": (24, 48)})
    except ValueError as error:
        pytest.skip(f"no renderer: {error}")
    simulator.env.sim.data.qpos = np.array([0.5, 0, 0.4, 1, 0, 0, 0])
    simulator._observed = simulator.env._observed()
    pictures = simulator.observe().pictures
    assert pictures["tiled"].shape == (32, 64, 3) and pictures["agentview"].shape == (24, 48, 3)

    def middle(picture):
        red = (picture[..., 0].astype(int) - picture[..., 1]) > 40
        row, column = np.argwhere(red).mean(0) / picture.shape[:2]
        return row, column

    for picture, right in ((pictures["tiled"][:, :32], True), (pictures["tiled"][:, 32:], False)):
        row, column = middle(picture)
        assert row < 0.45 and (column > 0.55) == right
    with pytest.raises(ValueError, match="no camera wrist; cameras are tiled, agentview, robot0_eye_in_hand"):
        load(NAME, {"wrist": (8, 8)})
    with pytest.raises(ValueError, match="the width of tiled must be even, got 63"):
        load(NAME, {"tiled": (32, 63)})


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libero") is None, reason="LIBERO is not installed")
def test_libero_itself():
    with SimulatorProcess(timeout=600) as process:
        assert process.describe(NAME).instruction.startswith("pick up the")
        found = []
        for _ in range(2):
            process.send("begin", NAME, {"number": 3})
            begun = process.receive()
            process.send("run", NAME, np.full((4, 7), 0.3, np.float32), 4)
            found.append((begun.observation.state, process.receive().observations[0].state))
        np.testing.assert_array_equal(found[0], found[1])
        process.send("describe", "libero/libero_object/99")
        with pytest.raises(SimulatorFailure, match="tasks of libero_object are"):
            process.receive()
