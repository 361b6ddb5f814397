"""Milliseconds of one rollout chunk, every program, beside the machine's roofline.   python -m bench.suites rollout

The episode's window is full (observed frames, random latents), the chunk is 4 frames, 4 actions a frame. CUDA: the full
size (``wan_5b_config``) with random bf16 weights, 20 denoising steps, LIBERO (32 video tokens a frame) and RoboTwin
geometry (128), with guidance 5 (a batch of two) for ``joint``. CPU: the demo's model in float32, 5 steps, LIBERO.

Providers: ``wam`` is ``Episode.propose`` + ``accept``: history from the cache, on CUDA a captured graph for each step
(``wam_eager``: the same without graphs; ``wam_compiled``: with them, each block under torch.compile); ``packed`` runs
window and chunk as one packed forward at every step, as a rollout without a cache does, on CUDA also under
torch.compile (``packed_compiled``; not with --quick, 30 layers take minutes to compile). The chunk of ``wam`` is
compared with that of ``packed`` before a speed is printed: in float32 with the model itself on a CPU, in float64 with 2
layers of full width on CUDA.

The roofline of a step is the larger of two times: every weight it needs read once at this machine's copy speed, and its
matrix products at this machine's bf16 (float32) speed; ``x_roofline`` is the measured chunk over the rooflines of its
steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from tqdm import tqdm

from bench import harness
from bench.harness import Options
from bench.rows import Row
from bench.workloads.models import make_model
from bench.workloads.rollout import (
    GRIDS,
    accepted_history,
    make_episode,
    noise_for,
    packed_chunk,
    require_equal_chunks,
    with_compiled_blocks,
)
from wam_kernels import PROGRAMS
from wam_kernels.masks.visibility import ACTION, VIDEO
from wam_models import RolloutConfig, WorldActionModel
from wam_models.config import ModelConfig, demo_config, wan_5b_config
from wam_models.objectives import OBJECTIVES
from wam_models.rollout import Episode
from wam_models.rollout.stages import stages


@dataclass(frozen=True)
class Roofline:
    """Least milliseconds of one chunk."""

    weights_ms: float
    products_ms: float

    @property
    def ms(self) -> float:
        return max(self.weights_ms, self.products_ms)


def roofline(
    model: WorldActionModel, config: RolloutConfig, grid: tuple[int, int], limits: dict[str, float]
) -> Roofline:
    """Weights and products of the denoising steps; the passes over clean tokens, heads and embeddings are left out."""
    blocks = model.packed_block_stack.packed_blocks
    # text keys and values are computed once an episode
    weights = {
        stream: sum(
            p.numel() for block in blocks for name, p in getattr(block, attribute).named_parameters()
            if p.ndim == 2 and "attn2.to_k" not in name and "attn2.to_v" not in name
        )
        for stream, attribute in ((VIDEO, "video_block"), (ACTION, "action_block"))
    }  # fmt: skip
    token_rows, token_columns = model.token_grid(*grid)
    tokens = {
        VIDEO: token_rows * token_columns * config.chunk_size,
        ACTION: model.config.actions_per_frame * config.chunk_size,
    }
    samples = 2 if config.guidance != 1 else 1
    width = 2 if model.dtype == torch.bfloat16 else 4
    speed = limits["bf16_GFLOP/s" if width == 2 else "float32_GFLOP/s"]
    streams = [s for stage in stages(config.program, OBJECTIVES["joint"], "both") for s in stage.streams]
    read = config.steps * sum(weights[s] for s in streams) * width / limits["copy_GB/s"] / 1e6
    products = config.steps * sum(2 * weights[s] * tokens[s] * samples for s in streams) / speed / 1e6
    return Roofline(read, products)


def calls_of(
    episode: Episode, text: Tensor, grid: tuple[int, int], window: int, packed: bool, compiled: bool
) -> dict[str, Callable[[], object]]:
    turn = iter(range(1 << 30))

    def wam() -> None:
        episode.accept(episode.propose(**noise_for(episode, grid, next(turn))))

    video, action = accepted_history(episode)
    history = video[:, :, -window:], action[:, -window:]
    next_frame = episode.next_frame[0]

    def without_cache() -> None:
        packed_chunk(episode.model, episode.config, history, next_frame, text, noise_for(episode, grid, next(turn)))

    calls: dict[str, Callable[[], object]] = {"wam": wam}
    if packed:
        calls["packed"] = without_cache
        if episode.model.device.type == "cuda":
            eager = make_episode(
                episode.model, replace(episode.config, cuda_graphs=False), grid, window + episode.chunk_size, seed=0
            )[0]
            calls["wam_eager"] = lambda: eager.accept(eager.propose(**noise_for(eager, grid, next(turn))))
            compiled_episode = make_episode(
                with_compiled_blocks(episode.model), episode.config, grid, window + episode.chunk_size, seed=0
            )[0]
            calls["wam_compiled"] = lambda: compiled_episode.accept(
                compiled_episode.propose(**noise_for(compiled_episode, grid, next(turn)))
            )
            if compiled:
                model = cast(WorldActionModel, torch.compile(episode.model))
                calls["packed_compiled"] = lambda: packed_chunk(
                    model, episode.config, history, next_frame, text, noise_for(episode, grid, next(turn))
                )
    return calls


def bench(
    model: WorldActionModel, config: RolloutConfig, place: str, packed: bool, compiled: bool, repeats: int
) -> list[Row]:
    grid, limits = GRIDS[place], harness.ceilings(model.device.type)
    window = config.window // 2 * config.chunk_size
    episode, text = make_episode(model, config, grid, window + config.chunk_size, seed=0)
    calls = calls_of(episode, text, grid, window, packed and config.guidance == 1, compiled)
    least = roofline(model, config, grid, limits)
    times = harness.measure(calls, model.device.type, repeats)
    actions = config.chunk_size * model.config.actions_per_frame
    return [{
        "what": place, "program": config.program, "provider": name, "steps": config.steps, "guidance": config.guidance,
        "window": config.window, "parameters": sum(p.numel() for p in model.parameters()), "dtype": str(model.dtype),
        **{key: round(value, 3) for key, value in t.items()},
        "ms_step": round(t["ms"] / (config.steps * len(stages(config.program, OBJECTIVES["joint"], "both"))), 3),
        "actions/s": round(1e3 * actions / t["ms"], 1), "weights_roofline_ms": round(least.weights_ms, 3),
        "products_roofline_ms": round(least.products_ms, 3), "x_roofline": round(t["ms"] / least.ms, 2),
        "ratio": round(times["packed"]["ms"] / t["ms"], 2) if "packed" in times else None,
        "peak_MB": round(harness.peak_megabytes(calls[name], model.device.type), 1),
    } for name, t in times.items()]  # fmt: skip


def rows(options: Options) -> Iterable[Row]:
    if options.device == "cuda":
        config, dtype, steps, window, repeats = wan_5b_config(), torch.bfloat16, 20, 30, 5 if options.quick else 20
        small: ModelConfig = replace(config, layers=2)
    else:
        small = config = demo_config()
        dtype, steps, window, repeats = torch.float32, 5, 8 if options.quick else 30, 2 if options.quick else 5
    checked = make_model(small, options.device, dtype, options.seed).eval().requires_grad_(False)
    # bf16: a few roundings for each of 2 layers, 2 steps
    rtol = 1e-4 if dtype == torch.float32 else 3e-2
    every = [p for p, row in PROGRAMS.items() if row.has_rollout]
    programs = ["joint", "video_then_action"] if options.quick else every
    places = ("libero", "robotwin") if options.device == "cuda" else ("libero",)
    configs = [RolloutConfig(program=p, window=window, steps=steps, history="video_only") for p in programs]
    for c in tqdm(configs, desc="rollout, checks", unit="program"):
        require_equal_chunks(checked, replace(c, steps=2), GRIDS["libero"], options.seed, rtol)
    if options.device == "cuda":  # the compiled blocks' numbers too, before their speed
        joint = replace(configs[0], program="joint", steps=2)
        require_equal_chunks(with_compiled_blocks(checked), joint, GRIDS["libero"], options.seed, rtol)
    guided = [replace(configs[0], program="joint", guidance=5.0)] if options.device == "cuda" else []
    model = checked if small == config else make_model(config, options.device, dtype, options.seed).eval()
    model.requires_grad_(False)
    for place in places:
        for c in tqdm([*configs, *guided], desc=f"rollout, {place}", unit="program"):
            packed = c.program == "joint" and place == "libero"
            yield from bench(model, c, place, packed, not options.quick, repeats)
