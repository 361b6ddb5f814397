"""A robot that asks a policy server, with openpi-client; it tells the server what it did, so its history goes on.

    wam serve --checkpoint runs/mine/checkpoint
    python examples/policy_client.py 127.0.0.1 8000

Without an address it serves a small untrained policy itself. How to install the client: docs/serve.md.
"""

import sys

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy

PROMPT = "reach the target"


class Robot:
    """Yours: a place, and what it should reach."""

    def __init__(self):
        self.state = np.array([0.5, -0.5, 0.0, 0.0], np.float32)

    def act(self, action):
        self.state[:2] += 0.1 * np.clip(action, -1, 1)


def run(host: str, port: int, chunks: int = 3) -> None:
    client, robot = WebsocketClientPolicy(host, port), Robot()
    told = client.get_server_metadata()
    message = {"observation/state": robot.state, "prompt": PROMPT, "seed": 0}  # an episode begins
    for _ in range(chunks):
        answer = client.infer(message)
        frames, n = [], told["actions_per_frame"]
        for tick, action in enumerate(answer["actions"], 1):
            robot.act(action)
            if tick % n == 0:  # once a frame
                frames.append(robot.state.copy())
        message = {"observation/state": np.stack(frames), "prompt": PROMPT, "executed": len(frames) * n}
        print(f"{len(frames) * n} actions in {answer['server_timing']['infer_ms']:.0f} ms, now at {robot.state[:2]}")


if len(sys.argv) == 3:
    run(sys.argv[1], int(sys.argv[2]))
else:
    from dataclasses import replace

    import torch

    from wam_models import Policy, RolloutConfig, WordEmbedding, WorldActionModel, demo_config
    from wam_models.data import StateCodec
    from wam_models.rollout.robots import RobotBatch
    from wam_models.serve import PolicyServer

    codec = StateCodec(torch.zeros(4), torch.ones(4))
    model = WorldActionModel(replace(demo_config(), latent_channels=4, patch=(1, 1, 1), action_dim=2, layers=1)).eval()
    text, units = WordEmbedding.from_instructions([PROMPT], model.config.text_dim), (torch.zeros(2), torch.ones(2))
    policy = Policy(model, text, codec, *units, torch.ones(2, dtype=torch.bool), RolloutConfig(chunk_size=2, steps=2))
    with PolicyServer(RobotBatch(policy, policy.rollout, places=2), port=0) as server:
        run("127.0.0.1", server.port)
