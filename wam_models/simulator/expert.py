"""One demonstration of a simulator's scripted expert, disturbed on the way."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from .protocol import Observation, checked_outcome, observed


def demonstrate(simulator: Any, name: str, attempt: int, config: dict[str, Any]) -> tuple[bool, dict, list[dict]]:
    """One attempt: whether it succeeded, its initial state, and the pieces between interruptions.

    A piece holds ``state`` float32 ``[T, S]``, ``action`` float32 ``[T, A]`` and ``pictures/CAMERA`` uint8
    ``[T, H, W, 3]``, of which those between two pictures repeat the first of them. The same attempt of the same config,
    ``asdict`` of a :class:`~.record.RecordConfig`, is the same in any process.
    """
    rng = np.random.default_rng([config["seed"], zlib.crc32(name.encode()), attempt])
    initial_state = simulator.initial_state(int(rng.integers(2**31)))
    simulator.reset(initial_state)
    where = type(simulator).__name__

    def disturb(most: tuple[int, int]) -> None:
        action = rng.uniform(-1, 1, len(simulator.action_names)).astype(np.float32)
        for _ in range(rng.integers(most[0], most[1] + 1)):
            simulator.act(action)

    disturb(config["start"])
    stop = int(rng.integers(config["interrupt_after"][0], config["interrupt_after"][1] + 1))
    stop = stop if rng.random() < config["interrupted"] else -1
    pieces: list[list[tuple[Observation, np.ndarray]]] = [[]]
    left = None  # actions after success
    for count in range(simulator.horizon):
        if count == stop and left is None:
            disturb(config["interruption"])
            pieces.append([])
        pictured = len(pieces[-1]) % config["picture_every"] == 0
        observation = observed(simulator, where, pictures=pictured)
        if not pictured:
            observation = Observation(observation.state, pieces[-1][-1][0].pictures)
        action = np.asarray(simulator.expert(), np.float32)
        pieces[-1].append((observation, action))
        outcome = checked_outcome(f"{where}.act", simulator.act(action.copy()))
        if outcome.failure:
            break
        if outcome.success and left is None:
            left = config["tail"]
        elif left is not None:
            left -= 1
        if left == 0:
            break
    return left is not None and not outcome.failure, initial_state, [_stacked(piece) for piece in pieces if piece]


def _stacked(piece: list) -> dict[str, np.ndarray]:
    observations, actions = zip(*piece, strict=True)
    found = {"state": np.stack([o.state for o in observations]), "action": np.stack(actions)}
    cameras = observations[0].pictures
    return found | {f"pictures/{c}": np.stack([o.pictures[c] for o in observations]) for c in cameras}
