"""``wam serve``: a policy behind a socket, for robots that speak the protocol of openpi-client."""

from __future__ import annotations

import argparse
import signal
from dataclasses import asdict

from ..rollout.config import RolloutConfig
from ..rollout.policy import Policy
from ..rollout.robots import RobotBatch
from ..runtime.checks import check_device, whole
from ..runtime.config_files import with_settings
from ..runtime.json_fields import from_fields
from ..runtime.threads import pick_threads, restores_threads
from .eight_bit import check_eight_bit_flags, with_eight_bits


@restores_threads
def run(args: argparse.Namespace) -> int:
    """``wam serve``."""
    from ..serve import PolicyServer  # needs websockets and msgpack: named before a checkpoint is read

    whole("--port", args.port, 0, 65535)
    check_eight_bit_flags(args)
    device = check_device(args.device)
    policy, _ = Policy.load(args.checkpoint, device, training=False, robot=args.robot)
    config = from_fields(RolloutConfig, with_settings(asdict(policy.rollout), args.set), "--set")
    policy = with_eight_bits(args, policy, config, None)
    robots = RobotBatch(policy, config, places=args.robots, seed=args.seed)
    if device.type == "cpu":
        pick_threads(robots.warm_up)
    server = PolicyServer(robots, host=args.host, port=args.port)
    needs = [f"observation/{name} [{h}, {w}, 3]" for name, (h, w) in policy.cameras.items()]
    needs += [f"observation/state [{robots.width}]"] if robots.width else []
    print(f"serving        ws://{server.host}:{server.port}, health /healthz, counters /metrics")
    print(f"robots         up to {robots.places}, each sends {', '.join(needs)} and a prompt")
    print(f"answers        {robots.horizon} actions of {len(policy.action_mean)} numbers", flush=True)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        server.run()
    except KeyboardInterrupt:
        print("stopped        as it was told")
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _stop(*_: object) -> None:
    raise KeyboardInterrupt
