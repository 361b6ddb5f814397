"""What it costs a policy that its robot does not wait: success beside plans that take longer and longer.

    python -m tools.real_time CHECKPOINT EPISODES SIMULATOR...

appends rows to ``docs/results/real_time.jsonl``. Each episode is played once by a simulator that waits for its plans
(delay null), and then in real time with delays of so many seconds in each plan, from the same initial state with the
same noise.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench.harness.recording import record
from wam_models.cli.realtime import play_in_real_time
from wam_models.rollout.policy import Policy
from wam_models.simulator.evaluate import Task, evaluate

DELAYS = (0.0, 0.05, 0.1, 0.15, 0.3)  # s
HORIZON = 200  # actions
RESULTS = Path(__file__).parents[1] / "docs/results"


def main(checkpoint: Path, episodes: int, *simulators: str) -> None:
    policy, _ = Policy.load(checkpoint, training=False)
    config = policy.rollout
    chunks = -(-HORIZON // (config.chunk_size * policy.actions_per_frame))
    tasks = [Task(name, i, i) for name in simulators for i in range(episodes)]
    head = {"what": "real_time", "simulators": list(simulators), "episodes": len(tasks)}
    head |= {"chunk": config.chunk_size, "steps": config.steps, "actions": config.chunk_size * policy.actions_per_frame}
    waits = list(evaluate(policy, config, tasks, batch=1, horizon=HORIZON))
    rows = [head | {"delay": None, "success": sum(result.success for result in waits)}]
    for delay in DELAYS:
        played = [
            play_in_real_time(policy, config, task.simulator, seed=task.seed, delay=delay, chunks=chunks)[:3]
            for task in tqdm(tasks, desc=f"delay {delay:g} s", unit="episode")
        ]
        counts = {
            name: sum(asdict(controller.counts)[name] for controller, _, _ in played)
            for name in ("ticks", "plans", "missed", "late", "held", "stale")
        }
        seconds = float(np.median(np.concatenate([ran.plan_seconds for _, _, ran in played])))
        overruns = sum(ran.overruns for _, _, ran in played)
        success = sum(robot.success for _, robot, _ in played)
        rows.append(head | {"delay": delay, "success": success, "plan_seconds": seconds, "overruns": overruns} | counts)
    record("real_time", rows, "cpu", RESULTS)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
