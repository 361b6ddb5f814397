"""Every suite at a size of seconds, and one wrong answer for each: ``test_registry.py`` runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module

import pytest

from bench.harness import Options
from bench.rows import Row
from bench.static.kernels import Counted
from bench.static.model import Block, predict
from bench.static.norms import CountedRow
from bench.static.sass import parse, steps
from bench.workloads import attention as workloads
from tests.bench import machine_code
from wam_models import golden_config
from wam_models.rollout.episode import Episode
from wam_models.train.trainer import Trainer

OPTIONS = Options(device="cpu", quick=True, seed=0)
SMALL = replace(golden_config(), text_dim=8, freq_dim=16)
GRID = (2, 4)  # latent rows and columns: 2 video tokens a frame

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Example:
    """``shrink`` makes the suite small, ``spoil`` one of its answers wrong by a thousandth."""

    shrink: Callable[[Patch], None]
    spoil: Callable[[Patch], None] | None  # None: the suite times nothing
    needs: str | None = None  # a package that is no requirement of the tests


def run(name: str) -> list[Row]:
    return list(import_module(f"bench.suites.{name}").rows(OPTIONS))


def _set(name: str, **values: object) -> Callable[[Patch], None]:
    """Set attributes of the suite ``name``."""

    def shrink(patch: Patch) -> None:
        for key, value in values.items():
            patch.setattr(f"bench.suites.{name}.{key}", value)

    return shrink


def _off(name: str, *functions: str) -> Callable[[Patch], None]:
    """What ``functions`` of the suite ``name`` return is off; of an op the reference backend's answer is not."""

    def spoil(patch: Patch) -> None:
        module = import_module(f"bench.suites.{name}")
        for function in functions:
            patch.setattr(module, function, _slightly_off(getattr(module, function)))

    return spoil


def _slightly_off(function: Callable) -> Callable:
    def off(*args, **kwargs):
        answer = function(*args, **kwargs)
        if kwargs.get("impl") == "reference":
            return answer
        return type(answer)(t * 1.001 for t in answer) if isinstance(answer, tuple | list) else answer * 1.001

    return off


def _rollout_is_off(patch: Patch) -> None:
    propose = Episode.propose

    def off(self, *args, **kwargs):
        candidate = propose(self, *args, **kwargs)
        return replace(candidate, action=candidate.action * 1.001)

    patch.setattr(Episode, "propose", off)


def _training_is_off(patch: Patch) -> None:
    module = import_module("bench.suites.train_step")
    loss_of = module.loss_of
    # the reference backend gives the truth
    patch.setattr(module, "loss_of", lambda m, b, s, impl: loss_of(m, b, s, impl) * (1 if impl else 1.001))


def _plan_is_off(patch: Patch) -> None:
    other = workloads.packed(1000, window=8, heads=1, head_dim=64)
    patch.setattr("bench.suites.plan.cold_plan", lambda work, device, impl: other.plan(device))


def _small_openwam(patch: Patch) -> None:
    small = {"hidden": 32, "action_hidden": 16, "ffn": 64, "heads": 4, "layers": 1, "steps": 2}
    for name, value in small.items():
        patch.setitem(import_module("bench.workloads.openwam").SIZES, name, value)
    patch.setattr("bench.workloads.openwam.TEXT_TOKENS", 8)


def _patched_openwam_is_off(patch: Patch) -> None:
    module = import_module("bench.suites.openwam")
    train_step = module.train_step

    def off(pipeline, frames, provider):
        results = train_step(pipeline, frames, provider)
        return {name: t * (1.001 if provider == "wam" else 1) for name, t in results.items()}

    patch.setattr(module, "train_step", off)


def _losses_are_off(patch: Patch) -> None:
    train_step, runs = Trainer.train_step, list[Trainer]()

    def off(self, step):
        row = train_step(self, step)
        if self not in runs:
            runs.append(self)
        return row | {"loss": row["loss"] * (1.001 if self is runs[0] else 1)}

    patch.setattr(Trainer, "train_step", off)


def _demo_without_training(patch: Patch) -> None:
    errors = dict.fromkeys(("action_rmse", "repeat_action_rmse", "psnr", "repeat_frame_psnr"), 0.5)
    report = {
        "config": {"batch": 2, "frames": 9}, "seed": 0, "precision": "float32", "parameters": 10, "steps": 3,
        "training_seconds": 1.0, "total_seconds": 2.0, "losses": {"video": {"first": 1.0, "last": 0.5}}, "beaten": {},
        "episodes": [40], "evaluation": {"rows": [{"objective": "joint", "program": "joint", **errors}]},
    }  # fmt: skip
    patch.setattr("bench.suites.demo.make_demo", lambda *args, **kwargs: report)


def _one_kernel_by_hand(patch: Patch) -> None:
    (loop,) = steps(parse(machine_code.cuobjdump())[machine_code.NAME])
    block = Block(warps=8, threads=384, registers=168, shared=0, copied=16384)
    counted = Counted("an_op", "forward", "cuda", 128, 128, "step", block, loop, predict(loop, block), producer=4)
    row = CountedRow("adaln", "forward", "cuda", 6, loop, {"issue": 90.0, "memory": 100.0})
    for name, found in (("triton_kernels", [counted]), ("triton_rows", [row]), ("cuda_kernels", []), ("cuda_rows", [])):
        patch.setattr(f"bench.suites.static.{name}", lambda *_, found=found: found)
    patch.setattr("bench.suites.static.disassemble", lambda path: {})
    patch.setattr("bench.suites.static.extension_path", lambda: None)


WORK = workloads.packed(150, heads=2, head_dim=16)

EXAMPLES = {
    "rollout": Example(_set("rollout", demo_config=lambda: SMALL, GRIDS={"libero": GRID}), _rollout_is_off),
    "block_attention": Example(
        _set("block_attention", cases=lambda options: [(WORK, ("sdpa_dense_mask",), 2)]),
        _off("block_attention", "block_attention"),
    ),
    "adaln": Example(
        _set("adaln", SIZES=[(64, 64)], TOKENS_A_FRAME=(32,)),
        _off("adaln", "ada_layer_norm", "gate_residual_ada_layer_norm"),
    ),
    "qk_norm_rope": Example(_set("qk_norm_rope", SIZES=[(40, 2, 32)]), _off("qk_norm_rope", "qk_norm_rope")),
    "norm_peers": Example(_set("norm_peers", QUICK_SIZES=[(40, 24 * 8)]), _off("norm_peers", "qk_norm_rope")),
    "block": Example(_set("block", small_model=lambda: SMALL), _off("block", "wam_block")),
    "train_step": Example(
        _set("train_step", demo_config=lambda: SMALL, ROWS=GRID[0], COLUMNS=GRID[1]), _training_is_off
    ),
    "cached_attention": Example(_set("cached_attention", CACHED=(64,)), _off("cached_attention", "cached_attention")),
    "rollout_options": Example(
        _set("rollout_options", demo_config=lambda: SMALL, GRID=GRID, COLD="pass"), _rollout_is_off
    ),
    "streaming": Example(_set("streaming", demo_config=lambda: SMALL, GRID=GRID), _rollout_is_off),
    "plan": Example(_set("plan", LENGTHS=(1000,)), _plan_is_off),
    "short_calls": Example(
        _set("short_calls", CASES=[("fast_wam_joint", 2, 4, 3)]), _off("short_calls", "block_attention")
    ),
    "packed": Example(_set("packed", WIDTH=32, TOKENS=400), _losses_are_off),
    "training_openwam": Example(_small_openwam, _rollout_is_off, needs="open_wam"),
    "openwam": Example(_small_openwam, _patched_openwam_is_off, needs="open_wam"),
    "rollout_openwam": Example(_small_openwam, _rollout_is_off, needs="open_wam"),
    "static": Example(_one_kernel_by_hand, None),
    "stop_gradient": Example(_set("stop_gradient", FRAMES=9), None),
    "demo": Example(_demo_without_training, None),
}
