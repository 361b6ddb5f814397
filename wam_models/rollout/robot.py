"""Robots of several widths that one model was trained on, side by side, and the model of one of them.

In training, actions and states are filled up with zeros to the model's widths; of actions neither noise nor loss is in
what is filled up. So the weights of these numbers take part in nothing that a narrower robot does, and without them the
model is, for this robot, the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..model.dual_expert import WorldActionModel

UNITS = ("action_mean", "action_std", "varying")
STATE_UNITS = ("state_mean", "state_std")


@dataclass(frozen=True, eq=False)
class Robot:
    """One of several that a policy was trained on.

    Args:
        action_mean, action_std: float32 ``[A]``, in its own units.
        varying: bool ``[A]``.
        state_units: Mean and std of its states, float32 ``[S]`` each; None for a model that is told none.
        camera: Of its pictures: name, height, width and cells, as a ``Camera``.
    """

    action_mean: Tensor
    action_std: Tensor
    varying: Tensor
    state_units: tuple[Tensor, Tensor] | None
    camera: dict

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What a checkpoint stores of it."""
        held = dict(zip(UNITS, (self.action_mean, self.action_std, self.varying), strict=True))
        held |= zip(STATE_UNITS, self.state_units or (), strict=False)
        return {f"robots.{name}.{key}": value for key, value in held.items()}


def model_of(robot: Robot, model: WorldActionModel, actions_per_token: int) -> WorldActionModel:
    """The model without the numbers of actions and states that a robot does not have."""
    c, width = model.config, len(robot.action_mean)
    actions = torch.arange(c.action_dim).reshape(actions_per_token, -1)[:, :width].flatten()
    states = 0 if robot.state_units is None else len(robot.state_units[0])
    config = replace(c, action_dim=actions_per_token * width, state_dim=states)
    if config == c:
        return model
    weights = dict(model.state_dict())
    name = "action_expert.action_embedder.weight"
    weights[name] = weights[name][:, actions.to(model.device)]
    for name in ("action_expert.action_proj_out.weight", "action_expert.action_proj_out.bias"):
        weights[name] = weights[name][actions.to(model.device)]
    if states:
        name = "core.proprio_hidden_context_encoder.proj.weight"
        weights[name] = weights[name][:, :states]
    found = WorldActionModel(config).to(model.device, model.dtype)
    found.load_state_dict(weights)
    return found.train(model.training).requires_grad_(False)
