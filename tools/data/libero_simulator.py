"""A LIBERO task for ``wam rollout --simulator``, in the pictures and units of data/libero_demo.

    libero-venv/bin/pip install -r requirements/runtime.txt && libero-venv/bin/pip install --no-deps .
    cd tools/data && LIBERO_TASK=libero_object:3 LIBERO_STATE=40 ../../libero-venv/bin/wam rollout \\
        --checkpoint ../../runs/demo/checkpoint --simulator libero_simulator:make --chunks 12

The environment is that of make_libero_demo.py (libero-venv, see there). ``LIBERO_TASK`` is suite:number,
``LIBERO_STATE`` one of the benchmark's 50 initial states; the demonstrations for training use 0 to 19, the held-out
ones 40 to 49.
"""

import os
from pathlib import Path

import make_libero_demo as demo
import numpy as np

EVERY = 4  # actions between two pictures


class Libero:
    """Physics without a renderer; pictures are drawn from its states, as those of the data set were."""

    def __init__(self, suite, number, state):
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs.env_wrapper import ControlEnv

        tasks = benchmark.get_benchmark(suite)(task_order_index=0)
        task = tasks.get_task(number)
        self.instruction, self.state = task.language, tasks.get_task_init_states(number)[state]
        bddl = Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
        self.env = ControlEnv(
            bddl_file_name=str(bddl), has_offscreen_renderer=False, use_camera_obs=False, hard_reset=False
        )
        self.control_freq = self.env.env.control_freq  # of robosuite's environment, which LIBERO's wraps

    def _picture(self):
        sim = self.env.sim
        return demo.draw(sim.model._model, sim.data.qpos[None].copy())[0]

    def reset(self):
        self.env.seed(demo.SEED)
        np.random.seed(demo.SEED)
        self.env.reset()
        self.env.set_init_state(self.state)
        for _ in range(demo.SETTLE_STEPS):
            self.env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
        return self._picture(), self.instruction

    def step(self, actions):
        pictures: list[np.ndarray] = []
        for i, action in enumerate(np.clip(actions, -1, 1)):
            self.env.step(action)
            if self.env.check_success():
                return np.array(pictures, np.uint8).reshape(-1, demo.SIDE, 2 * demo.SIDE, 3), True
            if i % EVERY == EVERY - 1:
                pictures.append(self._picture())
        return np.stack(pictures), False


def make():
    suite, _, number = os.environ.get("LIBERO_TASK", "libero_object:3").partition(":")
    return Libero(suite, int(number), int(os.environ.get("LIBERO_STATE", "40")))
