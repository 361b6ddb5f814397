"""Simulators by name, in this process and in one of their own."""

import sys

import numpy as np
import pytest

from wam_models.simulator import Observation, Outcome, load
from wam_models.simulator.process import SimulatorFailure, SimulatorProcess
from wam_models.simulator.protocol import checked_observation, checked_outcome, execute, lacking

from .conftest import EXAMPLES


def test_the_example_is_short_and_whole(folder):
    assert len((EXAMPLES / "point_simulator.py").read_text().splitlines()) < 80
    point = load("point_simulator:Point")
    assert not lacking(point)
    start = point.initial_state(3)
    assert start == point.initial_state(3) != point.initial_state(4)
    point.reset(start)
    outcome, actions = Outcome(False), 0
    while not outcome.success and actions < point.horizon:
        outcome, actions = point.act(point.expert()), actions + 1
    assert outcome.success and point.picture().shape == (16, 16, 3)
    assert point.act(np.array([1, 1])).failure is None
    point.point[:] = 2
    assert point.act(np.array([1, 1])).failure == "fell off the table"


@pytest.mark.parametrize(
    "name, message",
    [
        ("atari/pong", "there is no suite 'atari'; the suites are metaworld, libero"),
        ("point_simulator", "must be module:factory, or suite/task as metaworld/reach-v3"),
        ("point_simulator:Line", "cannot be loaded: AttributeError"),
        ("point_simulator:Outcome", "cannot be loaded: TypeError"),
        ("collections:OrderedDict", "made a OrderedDict without reset and step"),
        ("halves:Half", "made a Half without initial_state and observe and horizon and action_names"),
    ],
)
def test_what_is_no_simulator_is_refused(name, message, folder):
    half = "class Half:\n    instruction, control_freq, state_names = 'go', 20, ()\n    def act(self, action): ...\n"
    (folder / "halves.py").write_text(half + "    def reset(self, initial_state): ...\n")
    with pytest.raises(ValueError, match=message):
        load(name)


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld.env_dict", None)
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(ModuleNotFoundError, match=r"metaworld/reach-v3 needs .*pip install metaworld==3.1.1"):
        load("metaworld/reach-v3")


@pytest.mark.parametrize(
    "found, message",
    [
        ({}, "must return an Observation, got dict"),
        (Observation(np.zeros((1, 4))), r"must return a state \[4\], one number for each of state_names, got \[1, 4\]"),
        (Observation(np.array([0, np.nan, 0, np.inf])), r"must return a finite state, got nan in its numbers \[1, 3\]"),
        (Observation(np.zeros(4), {"top": np.zeros((3, 8, 8))}), r"uint8 \[H, W, 3\], got float64 \[3, 8, 8\] of top"),
    ],
)
def test_observations_are_checked(found, message):
    with pytest.raises(ValueError, match=message):
        checked_observation("Point.observe", found, 4)


@pytest.mark.parametrize(
    "found, message", [(True, "got bool"), (Outcome(1), "success: bool"), (Outcome(True, 3), "str")]
)
def test_outcomes_are_checked(found, message):
    with pytest.raises(ValueError, match=message):
        checked_outcome("Point.act", found)


def test_what_is_executed_ends_with_the_episode(folder):
    point = load("point_simulator:Point")
    point.reset({"point": [0, 0], "target": [0.31, 0]})
    done = execute(point, np.tile(np.float32([1, 0]), (8, 1)), 2, "Point")
    assert (done.actions, done.outcome.success, len(done.observations)) == (3, True, 1)
    np.testing.assert_allclose(done.observations[0].state, [0.2, 0, 0.31, 0], rtol=1e-6)


def test_a_simulator_elsewhere_is_the_same(folder):
    point = load("point_simulator:Point")
    with SimulatorProcess() as process:
        described = process.describe("point_simulator:Point")
        assert described.instruction == "reach the target" and described.has_expert and described.horizon == 60
        process.send("begin", "point_simulator:Point", 3)
        begun = process.receive()
        assert begun.initial_state == point.initial_state(3)
        point.reset(begun.initial_state)
        np.testing.assert_array_equal(begun.observation.state, point.observe().state)
        actions = np.full((4, 2), 0.5, np.float32)
        process.send("run", "point_simulator:Point", actions, 2)
        here, there = execute(point, actions, 2, "Point"), process.receive()
        np.testing.assert_array_equal([o.state for o in here.observations], [o.state for o in there.observations])
        assert process.describe("broken:NoExpert").has_expert is False  # the same process, another simulator


@pytest.mark.parametrize(
    "kind, message",
    [
        ("Raises", "broken:Raises failed: RuntimeError: the motor is stuck"),
        ("Hangs", "broken:Hangs hung: no answer within 3 s"),
        ("Dies", "broken:Dies died: its process ended with code 3"),
        ("NotFinite", "broken:NotFinite failed: .* finite state, got nan"),
        ("Chatty", "broken:Chatty failed: .* must return an Outcome, got bool"),
    ],
)
def test_a_broken_simulator_is_named_and_another_follows(kind, message, folder):
    with SimulatorProcess(timeout=3) as process:
        for seed in (1, 2):
            process.send("begin", f"broken:{kind}", seed)
            process.receive()
            process.send("run", f"broken:{kind}", np.ones((4, 2), np.float32), 4)
            if seed == 1:
                with pytest.raises(SimulatorFailure, match=message):
                    process.receive()
            else:
                assert process.receive().actions == 4


def test_metaworld():
    """The same start from a stored initial state, whatever was done before; the expert succeeds."""
    pytest.importorskip("metaworld", reason="an optional package")
    reach = load("metaworld/reach-v3")
    assert not lacking(reach) and reach.control_freq == 80 and reach.instruction == "reach"
    start = reach.initial_state(0)

    def states():
        reach.reset(start)
        found, outcome = [reach.observe().state], Outcome(False)
        while not outcome.success and len(found) < reach.horizon:
            outcome = reach.act(reach.expert())
            found.append(checked_observation("reach", reach.observe(), len(reach.state_names)).state)
        assert outcome.success
        return np.stack(found)

    np.testing.assert_array_equal(states(), states())
    with pytest.raises(ValueError, match="metaworld/fly-v3: no such task; tasks are assembly-v3"):
        load("metaworld/fly-v3")
    with pytest.raises(ValueError, match="no camera nowhere; cameras are topview"):
        load("metaworld/reach-v3", {"nowhere": (64, 64)})


def test_what_is_hidden_from_a_policy(folder):
    """The example of late and hidden states, beside the simulator itself; the expert is told everything."""
    pytest.importorskip("metaworld", reason="an optional package")
    (folder / "occluded.py").write_text((EXAMPLES / "occluded.py").read_text())
    shown = load("metaworld/reach-v3")
    late, blinking = (load(f"occluded:{kind}_reach") for kind in ("late", "blinking"))
    start = shown.initial_state(3)
    for simulator in (shown, late, blinking):
        simulator.reset(start)
    states = [shown.state()]
    for count in range(1, 20):
        action = shown.expert()
        for simulator in (late, blinking):
            np.testing.assert_array_equal(simulator.expert(), action)
            simulator.act(action)
        shown.act(action)
        states.append(shown.state())
        np.testing.assert_array_equal(late.observe().state, states[max(0, count - 8)])
        expected = states[-1].copy()
        if count % 16:
            expected[4:] = 0
        np.testing.assert_array_equal(blinking.observe().state, expected)
    with pytest.raises(ValueError, match="occluded has late_TASK and blinking_TASK, not dark_reach"):
        load("occluded:dark_reach")


CARS = """
import gymnasium


class Says(gymnasium.Wrapper):
    def step(self, action):
        observed, reward, terminated, truncated, info = self.env.step(action)
        return observed, reward, terminated, truncated, info | {"is_success": terminated}


gymnasium.register("Uphill-Car-v0", lambda: Says(gymnasium.make("MountainCarContinuous-v0")), max_episode_steps=150)
"""


def test_an_environment_of_gymnasium(folder):
    """Its own car, which swings itself up the hill; success is what info says, and nothing else is taken for it."""
    gymnasium = pytest.importorskip("gymnasium", reason="an optional package")
    (folder / "cars.py").write_text(CARS)
    with SimulatorProcess() as process:
        described = process.describe("gymnasium/cars:Uphill-Car-v0")
        assert (described.instruction, described.horizon, described.control_freq) == ("Uphill Car", 150, 30)
        assert (len(described.action_names), len(described.state_names), described.has_expert) == (1, 2, False)
        process.send("begin", "gymnasium/cars:Uphill-Car-v0", 3)
        begun = process.receive()
        again, env = gymnasium.make("MountainCarContinuous-v0"), []
        first, _ = again.reset(seed=3)
        np.testing.assert_array_equal(begun.observation.state, first)
        states, done = [first], False
        while not done:
            env.append(np.sign(states[-1][1:]) * 5.0)  # with its velocity; the space ends at 1
            found, _, done, _, _ = again.step(np.clip(env[-1], -1, 1))
            states.append(found)
        process.send("run", "gymnasium/cars:Uphill-Car-v0", np.stack(env), 1)
        played = process.receive()
        assert played.outcome == Outcome(True) and played.actions == len(env) < 150
        np.testing.assert_array_equal(np.stack([o.state for o in played.observations]), states[1:])
        process.send("begin", "gymnasium/MountainCarContinuous-v0", 3)
        process.receive()
        process.send("run", "gymnasium/MountainCarContinuous-v0", np.stack(env), 1)
        with pytest.raises(SimulatorFailure, match="info must have is_success or success where an episode ends"):
            process.receive()
    for name, message in (
        ("gymnasium/CartPole-v1", "actions must be a Box of one axis, got Discrete"),
        ("gymnasium/Nowhere-v0", "gymnasium/Nowhere-v0: .*doesn't exist"),
    ):
        with pytest.raises(ValueError, match=message):
            load(name)
    with pytest.raises(ValueError, match="cameras must be left out, got top"):
        load("gymnasium/MountainCarContinuous-v0", {"top": (16, 16)})
