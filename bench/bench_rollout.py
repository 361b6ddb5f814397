"""Milliseconds of one rollout chunk, every program, beside the machine's floor.   python -m bench.bench_rollout

The episode's window is full (observed frames, random latents), the chunk is 4 frames, 4 actions a frame. CUDA: the full
size (``wan_5b_config``) with random bf16 weights, 20 denoising steps, LIBERO (32 video tokens a frame) and RoboTwin
geometry (128), with guidance 5 (a batch of two) for ``joint``. CPU: the demo's model in float32, 5 steps, LIBERO.

Arms: ``wam`` is ``Episode.propose`` + ``accept``: history from the cache, on CUDA a captured graph for each step
(``wam_eager``: the same without graphs); ``packed`` runs window and chunk as one packed forward at every step,
as a rollout without a cache does, on CUDA also under torch.compile (``packed_compiled``; not with --quick, 30 layers
take minutes to compile). The chunk of ``wam`` is compared with that of ``packed`` before a speed is printed: in float32
with the model itself on a CPU, in float64 with 2 layers of full width on CUDA.

The floor of a step is the larger of two times: every weight it needs read once at this machine's copy speed, and its
matrix products at this machine's bf16 (float32) speed; ``x_floor`` is the measured chunk over the floors of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from bench import harness
from bench.bench_train_step import make_model
from wam_kernels import PROGRAMS, compile_plan
from wam_kernels.visibility import ACTION, VIDEO
from wam_models import RolloutConfig, RolloutEngine, WorldActionModel
from wam_models.config import ModelConfig, demo_config, wan_5b_config
from wam_models.flow import sigmas, timesteps
from wam_models.objectives import OBJECTIVES, geometry_for
from wam_models.rollout.episode import Episode, stages

GRIDS = {"libero": (8, 16), "robotwin": (16, 32)}  # latent rows and columns of a frame: 32 and 128 tokens
TEXT_TOKENS = {"cpu": 8, "cuda": 64}


def make_episode(
    model: WorldActionModel, config: RolloutConfig, grid: tuple[int, int], frames: int, seed: int
) -> tuple[Episode, Tensor]:
    """An episode that has observed ``frames`` frames beyond its first, and its text."""
    c, generator = model.config, torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(model.device)

    observation = randn(1, c.latent_channels, 1, *grid)
    text = randn(1, TEXT_TOKENS[model.device.type], c.text_dim)
    episode = RolloutEngine(model, config).start(observation, text)
    if frames:
        episode.observe(randn(1, c.latent_channels, frames, *grid), randn(1, frames, c.actions_per_frame, c.action_dim))
    return episode, text


def noise_for(episode: Episode, grid: tuple[int, int], seed: int) -> dict[str, Tensor]:
    c, generator = episode.model.config, torch.Generator().manual_seed(seed)
    chunk = episode.chunk_size
    shapes = {
        "video_noise": (1, c.latent_channels, chunk, *grid),
        "action_noise": (1, chunk, c.actions_per_frame, c.action_dim),
    }
    return {name: torch.randn(shape, generator=generator).to(episode.model.device) for name, shape in shapes.items()}


@torch.no_grad()
def packed_chunk(
    model: WorldActionModel, config: RolloutConfig, history: tuple[Tensor, Tensor], next_frame: int, text: Tensor,
    noise: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunk after ``history`` (video ``[B, C, T, y, x]``, actions ``[B, T, n, A]``), all of it in every forward."""
    past, chunk = dict(zip((VIDEO, ACTION), history, strict=True)), config.chunk_size
    frames = past[VIDEO].shape[2] + chunk
    rows, columns = model.token_grid(*past[VIDEO].shape[-2:])
    geometry = geometry_for(
        config.program, OBJECTIVES["joint"], frames=frames, video_tokens=rows * columns,
        action_tokens=model.config.actions_per_frame, chunk_size=chunk, window=config.window, history=config.history,
        start=next_frame + chunk - frames, chunk_origin=next_frame,
    )  # fmt: skip
    plan = compile_plan(geometry, device=model.device)
    noisy = {VIDEO: noise["video_noise"].to(past[VIDEO]), ACTION: noise["action_noise"].to(past[ACTION])}
    clean = {stream: torch.zeros_like(t) for stream, t in noisy.items()}  # of the chunk: read once it is promoted
    schedule = {
        VIDEO: [*sigmas(config.steps, config.video_shift).tolist(), 0.0],
        ACTION: [*sigmas(config.steps, config.action_shift).tolist(), 0.0],
    }
    frame_dim = {VIDEO: 2, ACTION: 1}
    for stage in stages(config.program, OBJECTIVES["joint"], "both"):
        for step in range(config.steps):
            full = [torch.cat([past[s], x[s]], frame_dim[s]) for s in (VIDEO, ACTION) for x in (noisy, clean)]
            level = (past[s].new_full((past[s].shape[0], frames), schedule[s][step]) for s in (VIDEO, ACTION))
            flows = model(*full, *map(timesteps, level), text, plan, frame_start=next_frame + chunk - frames)
            for stream in stage.denoised:
                flow = flows[stream].narrow(frame_dim[stream], frames - chunk, chunk).to(noisy[stream].dtype)
                noisy[stream] = noisy[stream] + flow * (schedule[stream][step + 1] - schedule[stream][step])
        if stage.promoted is not None:
            clean[stage.promoted] = noisy[stage.promoted]
    return noisy[VIDEO], noisy[ACTION]


def held(episode: Episode) -> tuple[Tensor, Tensor]:
    """The accepted frames that the next chunk of a rollout sees, as a batch of one."""
    video, action = episode.accepted(0)
    return video[None], action[None]


def check(model: WorldActionModel, config: RolloutConfig, grid: tuple[int, int], seed: int, rtol: float) -> None:
    """One chunk after two observed ones against the packed forward; in float64 where the model is bf16."""
    episode, text = make_episode(model, config, grid, 2 * config.chunk_size, seed)
    noise = noise_for(episode, grid, seed)
    got = episode.propose(**noise)
    truth_model, history = model, held(episode)
    if model.dtype == torch.bfloat16:
        truth_model = WorldActionModel(model.config).to(model.device, torch.float64).eval()
        truth_model.load_state_dict(model.state_dict())
        history, text = tuple(t.double() for t in history), text.double()
    expected = packed_chunk(truth_model, config, history, episode.next_frame[0], text, noise)
    for name, a, b in zip(("video", "actions"), (got.video, got.action), expected, strict=True):
        harness.require_equal(f"{name} of the {config.program} chunk", a, b, rtol)


@dataclass(frozen=True)
class Floor:
    """Least milliseconds of one chunk."""

    weights_ms: float
    products_ms: float

    @property
    def ms(self) -> float:
        return max(self.weights_ms, self.products_ms)


def floor(model: WorldActionModel, config: RolloutConfig, grid: tuple[int, int], limits: dict[str, float]) -> Floor:
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
    rows, columns = model.token_grid(*grid)
    tokens = {VIDEO: rows * columns * config.chunk_size, ACTION: model.config.actions_per_frame * config.chunk_size}
    samples = 2 if config.guidance != 1 else 1
    width = 2 if model.dtype == torch.bfloat16 else 4
    speed = limits["bf16_GFLOP/s" if width == 2 else "float32_GFLOP/s"]
    slots = [s for stage in stages(config.program, OBJECTIVES["joint"], "both") for s in stage.slots]
    read = config.steps * sum(weights[s] for s in slots) * width / limits["copy_GB/s"] / 1e6
    products = config.steps * sum(2 * weights[s] * tokens[s] * samples for s in slots) / speed / 1e6
    return Floor(read, products)


def calls_of(
    episode: Episode, text: Tensor, grid: tuple[int, int], window: int, packed: bool, compiled: bool
) -> dict[str, Callable[[], object]]:
    turn = iter(range(1 << 30))

    def wam() -> None:
        episode.accept(episode.propose(**noise_for(episode, grid, next(turn))))

    history = tuple(t[:, :, -window:] if i == 0 else t[:, -window:] for i, t in enumerate(held(episode)))
    at = episode.next_frame[0]

    def without_cache() -> None:
        packed_chunk(episode.model, episode.config, history, at, text, noise_for(episode, grid, next(turn)))

    calls = {"wam": wam}
    if packed:
        calls["packed"] = without_cache
        if episode.model.device.type == "cuda":
            eager = make_episode(
                episode.model, replace(episode.config, cuda_graphs=False), grid, window + episode.chunk_size, seed=0
            )[0]
            calls["wam_eager"] = lambda: eager.accept(eager.propose(**noise_for(eager, grid, next(turn))))
            if compiled:
                model = torch.compile(episode.model)
                calls["packed_compiled"] = lambda: packed_chunk(
                    model, episode.config, history, at, text, noise_for(episode, grid, next(turn))
                )
    return calls


def bench(
    model: WorldActionModel, config: RolloutConfig, place: str, packed: bool, compiled: bool, repeats: int
) -> list[dict]:
    grid, limits = GRIDS[place], harness.ceilings(model.device.type)
    window = config.window // 2 * config.chunk_size
    episode, text = make_episode(model, config, grid, window + config.chunk_size, seed=0)
    calls = calls_of(episode, text, grid, window, packed and config.guidance == 1, compiled)
    least = floor(model, config, grid, limits)
    times = harness.measure(calls, model.device.type, repeats)
    actions = config.chunk_size * model.config.actions_per_frame
    return [{
        "what": place, "program": config.program, "arm": arm, "steps": config.steps, "guidance": config.guidance,
        "window": config.window, "parameters": sum(p.numel() for p in model.parameters()), "dtype": str(model.dtype),
        **{key: round(value, 3) for key, value in t.items()},
        "ms_step": round(t["ms"] / (config.steps * len(stages(config.program, OBJECTIVES["joint"], "both"))), 3),
        "actions/s": round(1e3 * actions / t["ms"], 1), "weights_floor_ms": round(least.weights_ms, 3),
        "products_floor_ms": round(least.products_ms, 3), "x_floor": round(t["ms"] / least.ms, 2),
        "ratio": round(times["packed"]["ms"] / t["ms"], 2) if "packed" in times else None,
        "peak_MB": round(harness.peak_megabytes(calls[arm], model.device.type), 1),
    } for arm, t in times.items()]  # fmt: skip


def suite(options: harness.Options) -> Iterable[dict]:
    if options.device == "cuda":
        config, dtype, steps, window, repeats = wan_5b_config(), torch.bfloat16, 20, 30, 5 if options.quick else 20
        small: ModelConfig = replace(config, layers=2)
    else:
        small = config = demo_config()
        dtype, steps, window, repeats = torch.float32, 5, 8 if options.quick else 30, 2 if options.quick else 5
    checked = make_model(small, options.device, dtype, options.seed).eval().requires_grad_(False)
    # bf16: a few roundings for each of 2 layers, 2 steps
    rtol = 1e-4 if dtype == torch.float32 else 3e-2
    programs = [p for p, row in PROGRAMS.items() if row.has_rollout]
    programs = ("joint", "video_then_action") if options.quick else programs
    places = ("libero", "robotwin") if options.device == "cuda" else ("libero",)
    configs = [RolloutConfig(program=p, window=window, steps=steps, history="video_only") for p in programs]
    for c in tqdm(configs, desc="rollout, checks", unit="program"):
        check(checked, replace(c, steps=2), GRIDS["libero"], options.seed, rtol)
    guided = [replace(configs[0], program="joint", guidance=5.0)] if options.device == "cuda" else []
    model = checked if small == config else make_model(config, options.device, dtype, options.seed).eval()
    model.requires_grad_(False)
    for place in places:
        for c in tqdm([*configs, *guided], desc=f"rollout, {place}", unit="program"):
            packed = c.program == "joint" and place == "libero"
            yield from bench(model, c, place, packed, not options.quick, repeats)


def main(argv: list[str] | None = None) -> None:
    harness.main("rollout", __doc__, suite, argv)


if __name__ == "__main__":
    main()
