"""Kernels and masks of this library beside the sources of other systems, which are run and never copied.

    python -m tools.compare_systems uwm=DIR x_wam=DIR giga_world_policy=DIR seer=DIR dream_vla=DIR \
        > docs/results/systems.jsonl

Each DIR is a checkout of the system's repository, at the commit that is recorded. ``uwm`` (which has PAD too) and
``x_wam`` are forwards of the real classes at a small size with random weights, once as they are and once over
``block_attention``; the others are masks, pair by pair. Needs diffusers and einops.
"""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from wam_kernels import RULE_PROGRAMS, FrameIndex, Plan, ada_layer_norm, block_attention, compile_plan

Row = dict[str, Any]


def plan_of(program: str, **sizes: int) -> Plan:
    return compile_plan(RULE_PROGRAMS[program](**sizes))


def function_of(path: Path, name: str, **names: Any) -> Callable[..., Any]:
    """One function of a file, without what else it imports."""
    tree = ast.parse(path.read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    held: dict[str, Any] = {"torch": torch, **names}
    exec(compile(ast.Module([found], []), str(path), "exec"), held)
    return held[name]


def drawn(model: nn.Module) -> nn.Module:
    """With random weights, those that begin as 0 included."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.eval().requires_grad_(False).parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=p.dtype) * 0.2)
    return model


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


# ---- forwards ----


def _over_kernels(net: nn.Module, plan: Plan) -> None:
    """The blocks' attention and adaptive norms by ``block_attention`` and ``ada_layer_norm``."""

    def block(module: Any, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = (t[:, None] for t in module.adaLN_modulation(cond).chunk(6, 1))
        index = FrameIndex.per_sample(x.shape[1], device=x.device)
        h = ada_layer_norm(x, shift, scale, index, eps=1e-6)
        q, k, v = module.attn.qkv(h).unflatten(-1, (3, module.attn.num_heads, -1)).unbind(2)
        x = x + gate * module.attn.proj(block_attention(q, k, v, plan).flatten(2))
        return x + gate2 * module.mlp(ada_layer_norm(x, shift2, scale2, index, eps=1e-6))

    for module in net.blocks:
        module.forward = lambda x, cond, attn_mask=None, module=module: block(module, x, cond)


def uwm(root: Path) -> Iterator[Row]:
    """The noise prediction nets of UWM and of its PAD: dense attention of [actions | video | registers]."""
    sys.path.insert(0, str(root))
    torch.set_default_dtype(torch.float64)
    for name, encoder in (("uwm", "UWMObservationEncoder"), ("pad", "PADObservationEncoder")):
        held: Any = ModuleType(f"models.{name}.obs_encoder")
        setattr(held, encoder, nn.Module)
        package = ModuleType(f"models.{name}")
        package.__path__ = [str(root / "models" / name)]
        sys.modules |= {held.__name__: held, package.__name__: package}
    sizes = dict(image_shape=(2, 8, 8), patch_shape=(1, 4, 4), num_chans=4, num_views=2, action_len=6, action_dim=5)
    sizes |= dict(embed_dim=64, timestep_embed_dim=32, depth=3, num_heads=4)
    action, video = randn(2, 6, 5, seed=1), randn(2, 2, 4, 2, 8, 8, seed=2)
    made = importlib.import_module("models.uwm.uwm").DualNoisePredictionNet(global_cond_dim=7, num_registers=8, **sizes)
    levels = torch.tensor([3, 90]), torch.tensor([50, 7])
    inputs = randn(2, 7, seed=3), action, levels[0], video, levels[1]
    tokens = {"video": 2 * 2 * 2 * 2, "actions": 6}
    yield _forward("UWM", made, inputs, plan_of("tri_tower", understanding=8, **tokens))
    made = importlib.import_module("models.pad.pad").NoisePredictionNet(**sizes)
    inputs = randn(2, 2, 4, 2, 8, 8, seed=4), action, video, levels[0]
    yield _forward("PAD", made, inputs, plan_of("tri_tower", understanding=0, **tokens))


def _forward(system: str, made: nn.Module, inputs: tuple[Tensor, ...], plan: Plan) -> Row:
    net = drawn(made)
    wanted = net(*inputs)
    _over_kernels(net, plan)
    found = net(*inputs)
    row = {"system": system, "what": "forward", "dtype": "float64", "program": "tri_tower", "tokens": plan.length}
    return row | {"error": max(error(a, b) for a, b in zip(found, wanted, strict=True))}


def x_wam(root: Path) -> Iterator[Row]:
    """X-WAM with its branch of depth: main tokens and, beside the last blocks, those of depth under one plan.

    In float32, to which it casts.
    """
    torch.set_default_dtype(torch.float32)
    sys.path.insert(0, str(root))
    package = ModuleType("modules")
    package.__path__ = [str(root / "modules")]
    sys.modules["modules"] = package
    wan: Any = importlib.import_module("modules.wan_model")
    sizes = dict(num_views=2, in_dim=4, dim=64, ffn_dim=96, freq_dim=32, text_dim=12, action_dim=5, proprio_dim=3)
    net: Any = drawn(wan.XWAMModel(out_dim=4, num_heads=4, num_layers=3, num_extra_layers=2, **sizes))
    real, calls = wan.attention, []

    def recorded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = real(q, k, v, dtype=q.dtype)
        calls.append((q, k, v, out))
        return out

    wan.attention = recorded
    t = torch.tensor([300.0, 900.0])
    video, text = randn(2, 4, 3, 2, 4, 4, seed=1), randn(2, 6, 12, seed=2)
    net._forward_single(video, t, text, randn(2, 8, 5, seed=3), t, randn(2, 3, 3, seed=4), t)
    depth = 3 * 2 * 2 * 2  # frames, views, rows and columns of patches
    main = depth + 8 + 3
    plan, errors = plan_of("x_wam", main=main, depth=depth), []
    of_main = {k.data_ptr(): (q, k, v, out) for q, k, v, out in calls if q.shape[1] == k.shape[1] == main}
    for q, k, v, out in calls:
        if (q.shape[1], k.shape[1]) != (depth, depth + main):
            continue
        # its own keys, then those of the main tokens
        (beside,) = [held for held in of_main.values() if torch.equal(held[1].to(k.dtype), k[:, depth:])]
        joined = (torch.cat([a, b[:, :depth]], 1) for a, b in zip(beside[:3], (q, k, v), strict=True))
        found = block_attention(*(x.to(v.dtype).contiguous() for x in joined), plan)
        errors.append(error(found, torch.cat([beside[3], out], 1).to(found.dtype)))
    assert len(errors) == 2, "of both blocks beside which depth runs"
    row = {"system": "X-WAM", "what": "attention of its forward", "dtype": "float32", "program": "x_wam"}
    row |= {"tokens": plan.length}
    yield row | {"error": max(errors)}


# ---- masks ----


def _same(system: str, program: str, mask: Tensor, **sizes: int) -> Row:
    """``mask`` is what is added to scores, 0 or -inf."""
    rule = RULE_PROGRAMS[program](**sizes).dense_mask()
    wrong = int((rule != (mask == 0).numpy()).sum())
    return {"system": system, "what": "mask", "program": program, "pairs": rule.size, "pairs_that_differ": wrong}


def giga_world_policy(root: Path) -> Iterator[Row]:
    path = root / "world_action_model/models/transformer_wa_casual_mot.py"
    build = function_of(path, "build_mot_attention_mask")
    mask = build(2, 8, 9, 27, 1, 1, torch.device("cpu"), torch.float32)[0, 0]
    yield _same("GigaWorld-Policy", "giga_world_policy", mask, states=2, actions=8, reference=9, future=27)


def seer(root: Path, system: str = "Seer", file: str = "seer_model.py") -> Iterator[Row]:
    """By its default flags: scripts have others, by which action queries attend to less, foresight to a later state."""
    build = function_of(root / "models" / file, "generate_attention_mask")
    mask = build(3, 12, 9 + 3, 0, False, False, False, 0.0, 9, 3)
    yield _same(system, "seer", mask, steps=3, context=12, foresight=9, actions=3)


def dream_vla(root: Path) -> Iterator[Row]:
    """All its kinds of queries as one: in its code none attends to its own kind."""
    yield from seer(root, "DreamVLA", "dreamvla_model.py")


SYSTEMS = {"uwm": uwm, "x_wam": x_wam, "giga_world_policy": giga_world_policy, "seer": seer, "dream_vla": dream_vla}


def main(arguments: list[str]) -> None:
    for argument in arguments:
        name, _, folder = argument.partition("=")
        if name not in SYSTEMS or not Path(folder).is_dir():
            raise SystemExit(f"compare_systems: arguments must be SYSTEM=DIR of {tuple(SYSTEMS)}, got {argument!r}")
        git = ["git", "-C", folder, "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
        for row in SYSTEMS[name](Path(folder)):
            print(json.dumps({"date": date.today().isoformat(), "of": commit} | row))


if __name__ == "__main__":
    main(sys.argv[1:])
