"""A simulator of your own: a point on a table that must reach a target.

    cd examples
    wam record --simulator point_simulator:Point --episodes 40 --out point_data
    wam train point_train.json --data point_data --seconds 30 --out point_run
    wam eval --checkpoint point_run/checkpoint --simulator point_simulator:Point --episodes 20

The four methods and five attributes of ``wam_models.simulator.Simulator`` are all that ``wam rollout`` and ``wam eval``
need; ``expert`` is for ``wam record``.
"""

import numpy as np

from wam_models.simulator import Observation, Outcome

SIDE = 16  # pixels of the picture, where there is a camera


class Point:
    instruction = "reach the target"
    horizon = 60  # actions
    control_freq = 20.0  # actions a second
    action_names = ("dx", "dy")
    state_names = ("x", "y", "target_x", "target_y")

    def __init__(self):
        self.point, self.target = np.zeros(2), np.ones(2)

    def initial_state(self, seed):
        """What JSON holds, drawn from the seed: an evaluation stores it, and any other can begin there."""
        point, target = np.random.default_rng(seed).uniform(-1, 1, (2, 2))
        return {"point": point.tolist(), "target": target.tolist()}

    def reset(self, initial_state):
        self.point, self.target = (np.array(initial_state[name]) for name in ("point", "target"))

    def observe(self):
        """Add ``pictures={"top": self.picture()}`` for a camera; frames are then read from observation.images.top."""
        return Observation(state=np.concatenate([self.point, self.target]).astype(np.float32))

    def act(self, action):
        self.point = self.point + 0.1 * np.clip(action, -1, 1)
        if np.abs(self.point).max() > 2:
            return Outcome(success=False, failure="fell off the table")
        return Outcome(success=bool(np.linalg.norm(self.target - self.point) < 0.05))

    def expert(self):
        """The scripted expert's next action."""
        return np.clip((self.target - self.point) / 0.1, -1, 1).astype(np.float32)

    def picture(self):
        image = np.full((SIDE, SIDE, 3), 255, np.uint8)
        for place, colour in ((self.target, (0, 160, 0)), (self.point, (200, 0, 0))):
            column, row = ((np.clip(place, -1, 1) + 1) / 2 * (SIDE - 1)).round().astype(int)
            image[row, column] = colour
        return image
