"""8-bit weights for rollouts, by ``torchao``: calibrated layer by layer, refused where decisions change too much.

The linear maps of the blocks, which hold nearly all of a model, get weights of 8 bits with a scale for each output;
what enters them is scaled token by token as it comes, so that the products are of 8 bits too. FP8 on GPUs that multiply
it (compute capability 8.9 and above), INT8 elsewhere. The rest of the model stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .evaluate import decisions, rmse
from .model.dual_expert import WorldActionModel
from .rollout import RolloutConfig
from .rollout.policy import Policy
from .runtime.checks import number

FP8, INT8 = "fp8", "int8"
FP8_CAPABILITY = (8, 9)
MULTIPLE = 16  # of both widths of a matrix that FP8 multiplies
LAYER_ERROR = 0.1  # relative, of a layer's outputs, from which on it keeps its weights
DECISION_ERROR = 0.05  # of actions, in standard deviations of the training split; of latents, relative
WORST = 3  # layers that a refusal names


@dataclass(frozen=True)
class LayerError:
    """One linear map: ||difference|| / ||output|| of its outputs on the calibration frames, and whether it is kept."""

    name: str
    numbers: int  # of its weight
    error: float
    kept: bool


@dataclass(frozen=True)
class ErrorTable:
    """What 8 bits change.

    Args:
        kind: ``"fp8"`` or ``"int8"``.
        layers: Of each linear map of the blocks, in order.
        action_error: Root mean square difference of the actions on held-out frames, from the same noise and history,
            in standard deviations of the training split; None for a model without actions.
        video_error: ||difference|| / ||latents|| of the video there; None for an objective that is given it.
        chunks: Decisions that these are of.
        bytes: Of the model's weights, before and after.
    """

    kind: str
    layers: tuple[LayerError, ...]
    action_error: float | None
    video_error: float | None
    chunks: int
    bytes: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """A dict that ``json.dumps`` takes."""
        return asdict(self)

    def __str__(self) -> str:
        before, after = (f"{size / 1e6:.2f}" for size in self.bytes)
        lines = [f"8-bit weights  {self.kind}, {before} MB of weights became {after}"]
        lines += [f"  {'kept ' if layer.kept else ''}{layer.name}  {layer.error:.4f}" for layer in self.layers]
        of = [f"{e:.4f} {what}" for what, e in (("of actions", self.action_error), ("of video", self.video_error)) if e]
        return "\n".join([*lines, f"error          {', '.join(of) or 0} in {self.chunks} held-out chunks"])


def kind_on(device: torch.device) -> str:
    """``"fp8"`` where the hardware multiplies it, else ``"int8"``."""
    has = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    return FP8 if has else INT8


def eight_bit(
    policy: Policy,
    calibration: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    config: RolloutConfig | None = None,
    *,
    keep: Collection[str] = (),
    layer_error: float = LAYER_ERROR,
    decision_error: float = DECISION_ERROR,
    chunks: int = 2,
    seed: int = 0,
) -> tuple[Policy, ErrorTable]:
    """A policy with 8-bit weights, and what they change.

    Every linear map of the blocks is tried alone on the inputs that it has in rollouts of ``calibration``; one whose
    outputs err by more than ``layer_error`` keeps its weights. Then all together decide what the policy decides on
    ``held_out``, from the same noise and history. The given policy stays as it is; both share what is not quantised.

    Args:
        policy: In the dtype that it would be rolled out in.
        calibration: Episodes of the training split, from :meth:`Policy.clip`.
        held_out: Episodes that it was not trained on.
        config: How it is rolled out; default the policy's.
        keep: Linear maps that keep their weights, by the beginning of their name in the model.
        layer_error: Largest relative error of a layer.
        decision_error: Largest error of the actions, in standard deviations, and relative error of the video.
        chunks: Of each episode.
        seed: Of the noise.

    Raises:
        ValueError: decisions that change by more than ``decision_error``, the layers that err most named; names in
            ``keep`` of no layer; adapters, which must be merged before; no episode that has a whole chunk.
        ModuleNotFoundError: torchao is not installed.
    """
    config = policy.rollout if config is None else config
    for name, value in (("layer_error", layer_error), ("decision_error", decision_error)):
        number(f"eight_bit: {name}", value, 0)
    kind = kind_on(policy.model.device)
    quantise, linears = _quantiser(kind), _linears(policy.model, kind)
    lost = [k for k in keep if not any(name.startswith(k) for name in linears)]
    if lost:
        raise ValueError(f"eight_bit: keep must begin names of linear maps, as {next(iter(linears))!r}, got {lost}")
    quantised = {name: quantise(linear) for name, linear in linears.items()}
    errors = _layer_errors(policy, config, calibration, linears, quantised, chunks, seed)
    layers = tuple(
        LayerError(name, linear.weight.numel(), errors[name], _named(name, keep) or errors[name] > layer_error)
        for name, linear in linears.items()
    )
    chosen = {layer.name: quantised[layer.name] for layer in layers if not layer.kept}
    if not chosen:
        raise ValueError(f"eight_bit: no layer has an error of at most layer_error={layer_error}; raise it")
    found = replace(policy, model=_with(policy.model, chosen))
    want, got = (decisions(p, config, held_out, chunks=chunks, seed=seed) for p in (policy, found))
    action = rmse(got["action"], want["action"], policy.varying) if "action" in want else None
    video = _relative(got["video"], want["video"]) if "video" in want else None
    sizes = _bytes(policy.model), _bytes(found.model)
    table = ErrorTable(kind, layers, action, video, chunks * len(held_out), sizes)
    if max(action or 0, video or 0) > decision_error:
        worst = sorted((x for x in layers if not x.kept), key=lambda x: -x.error)[:WORST]
        raise ValueError(
            f"eight_bit: decisions on held-out frames must change by at most {decision_error:g}, actions changed by "
            f"{action or 0:.4f} standard deviations and video by {video or 0:.4f}; keep the weights of the layers that "
            f"err most, {[x.name for x in worst]}, or roll out without"
        )
    return found, table


def with_eight_bits(model: WorldActionModel) -> WorldActionModel:
    """A model that shares all but the linear maps of its blocks, which have 8-bit weights, all and uncalibrated.

    Raises:
        ValueError: adapters, which must be merged before.
        ModuleNotFoundError: torchao is not installed.
    """
    kind = kind_on(model.device)
    quantise = _quantiser(kind)
    return _with(model, {name: quantise(linear) for name, linear in _linears(model, kind).items()})


def _quantiser(kind: str) -> Callable[[nn.Linear], nn.Linear]:
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            PerRow,
            quantize_,
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "eight_bit needs the package torchao; pip install 'wam-kernels[eight-bit]'", name="torchao"
        ) from error
    fp8, int8 = Float8DynamicActivationFloat8WeightConfig, Int8DynamicActivationInt8WeightConfig
    how = fp8(granularity=PerRow()) if kind == FP8 else int8()

    def quantise(linear: nn.Linear) -> nn.Linear:
        held = copy.deepcopy(linear).requires_grad_(False)
        quantize_(held, how)
        return held

    return quantise


def _linears(model: WorldActionModel, kind: str) -> dict[str, nn.Linear]:
    adapters = [name for name, _ in model.named_parameters() if ".lora_" in name]
    if adapters:
        raise ValueError(f"eight_bit: adapters must be merged, as in wam train's checkpoints, got {adapters[0]}")
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("packed_block_stack.")}
    if kind == FP8:
        found = {n: m for n, m in found.items() if not (m.in_features % MULTIPLE or m.out_features % MULTIPLE)}
    return found


def _named(name: str, keep: Collection[str]) -> bool:
    return any(name.startswith(k) for k in keep)


def _with(model: WorldActionModel, layers: Mapping[str, nn.Linear]) -> WorldActionModel:
    """A model that shares all tensors but those of these layers."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    shared |= {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    return copy.deepcopy(model, shared)


def _layer_errors(
    policy: Policy,
    config: RolloutConfig,
    clips: Sequence[Mapping[str, Any]],
    linears: Mapping[str, nn.Linear],
    quantised: Mapping[str, nn.Linear],
    chunks: int,
    seed: int,
) -> dict[str, float]:
    sums = {name: torch.zeros(2, dtype=torch.float64, device=policy.model.device) for name in linears}

    def measured(name: str) -> Callable[..., None]:
        def measure(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            wrong = quantised[name](args[0]) - out
            sums[name] += torch.stack([t.double().square().sum() for t in (wrong, out)])

        return measure

    hooks = [linear.register_forward_hook(measured(name)) for name, linear in linears.items()]
    try:
        # a captured graph would replay no hook
        decisions(policy, replace(config, cuda_graphs=False), clips, chunks=chunks, seed=seed)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: float((s[0] / s[1].clamp_min(1e-300)).sqrt()) for name, s in sums.items()}


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def _bytes(model: nn.Module) -> int:
    """Of all weights; of quantised ones, of the tensors that they are made of."""
    total = 0
    for p in model.parameters():
        parts = p.__tensor_flatten__()[0] if hasattr(p, "__tensor_flatten__") else ()
        tensors = [getattr(p, name) for name in parts] or [p]
        total += sum(t.numel() * t.element_size() for t in tensors)
    return total
