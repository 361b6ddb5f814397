"""One chunk of a rollout, twice: from the cache of an episode, and as one packed forward."""

from __future__ import annotations

import copy
from typing import TypedDict

import torch
from torch import Tensor

from bench.harness import require_equal
from wam_kernels import compile_plan
from wam_kernels.masks.visibility import ACTION, VIDEO
from wam_models import RolloutConfig, RolloutEngine, WorldActionModel
from wam_models.flow import sigmas, timesteps
from wam_models.objectives import OBJECTIVES, geometry_for
from wam_models.rollout import Episode
from wam_models.rollout.stages import stages

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


def with_compiled_blocks(model: WorldActionModel, backend: str = "inductor") -> WorldActionModel:
    """A model that shares the weights of ``model``, each block under torch.compile, whole."""
    twin = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    for block in twin.packed_block_stack.packed_blocks:
        block.compile(backend=backend, fullgraph=True)
    return twin


class Noise(TypedDict):
    """As ``Episode.propose`` takes it."""

    video_noise: Tensor
    action_noise: Tensor


def noise_for(episode: Episode, grid: tuple[int, int], seed: int) -> Noise:
    c, generator = episode.model.config, torch.Generator().manual_seed(seed)
    chunk = episode.chunk_size
    video, action = (
        torch.randn(shape, generator=generator).to(episode.model.device)
        for shape in ((1, c.latent_channels, chunk, *grid), (1, chunk, c.actions_per_frame, c.action_dim))
    )
    return {"video_noise": video, "action_noise": action}


@torch.no_grad()
def packed_chunk(
    model: WorldActionModel, config: RolloutConfig, history: tuple[Tensor, Tensor], next_frame: int, text: Tensor,
    noise: Noise,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunk after ``history`` (video ``[B, C, T, y, x]``, actions ``[B, T, n, A]``), all of it in every forward."""
    past, chunk = dict(zip((VIDEO, ACTION), history, strict=True)), config.chunk_size
    frames = past[VIDEO].shape[2] + chunk
    if config.cache == "last_frame":  # the first chunk of an episode that begins there
        next_frame = frames - chunk
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


def accepted_history(episode: Episode) -> tuple[Tensor, Tensor]:
    """The accepted frames that the next chunk of a rollout attends to, as a batch of one."""
    video, action = episode.accepted(0)
    assert action is not None
    return video[None], action[None]


def require_equal_chunks(
    model: WorldActionModel, config: RolloutConfig, grid: tuple[int, int], seed: int, rtol: float
) -> None:
    """One chunk after two observed ones against the packed forward; in float64 where the model is bf16."""
    episode, text = make_episode(model, config, grid, 2 * config.chunk_size, seed)
    noise = noise_for(episode, grid, seed)
    got = episode.propose(video_noise=noise["video_noise"], action_noise=noise["action_noise"])
    assert got.video is not None and got.action is not None  # want="both"
    truth_model, history = model, accepted_history(episode)
    if model.dtype == torch.bfloat16:
        truth_model = WorldActionModel(model.config).to(model.device, torch.float64).eval()
        truth_model.load_state_dict(model.state_dict())
        history, text = (history[0].double(), history[1].double()), text.double()
    expected = packed_chunk(truth_model, config, history, episode.next_frame[0], text, noise)
    for name, a, b in zip(("video", "actions"), (got.video, got.action), expected, strict=True):
        require_equal(f"{name} of the {config.program} chunk", a, b, rtol)
