"""Options of a rollout, each alone and together, against the full schedule; candidates against as many episodes.

python -m bench.suites rollout_options

One episode of ``joint``, chunk 4, window 8, whose observed frames are random latents; every option denoises the same
chunks from the same noise with the same weights, in one run. CPU: two layers of the demo's model in float32, 8 tokens
a frame, one thread; CUDA: the full size in bf16. The weights are random, so the errors show what an option changes, not
what a trained policy loses; times are the thread's own on a CPU, ratios of one run.

``8-bit weights`` is the full schedule with weights and products of 8 bits, where torchao is installed; the last option
is all of them together. Of two rates in one stage, ``2 video steps`` are as in Efficient-WAM and ``2 action steps`` as
in X-WAM.

``what``: ``option`` (``error``: ||a - b|| / ||b|| against ``full``, 8 Euler steps; ``GFLOP`` and ``MB`` are estimated,
with the forwards that ran), ``candidates`` (k at once, k proposals on end, and k episodes in a batch, of which
``held_MB`` is what stays in memory: keys, values and latents), ``same`` (largest difference of an action from that of
an episode alone, in ``gap``) and ``cold start`` (process start to the first chunk; ``cpu_ms`` is the processor time of
it, which does not depend on what else the machine does).
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bench import harness
from bench.harness import Options
from bench.rows import ROOT, Row
from bench.workloads.models import make_model
from bench.workloads.rollout import require_equal_chunks
from wam_models import RolloutConfig, RolloutEngine, Schedule, WorldActionModel
from wam_models.config import demo_config, wan_5b_config
from wam_models.eight_bit import with_eight_bits
from wam_models.estimate import Sizes, rollout_chunk, total
from wam_models.rollout import Candidate, Episode

GRID = (4, 8)  # latent rows and columns of a frame
TEXT_TOKENS, STEPS, CHUNKS = 8, 8, 5
FULL = RolloutConfig(program="joint", history="video_only", window=8, steps=STEPS)
HALF: dict[str, Any] = {"steps": STEPS // 2}
UNIPC, HEUN = ({s: Schedule(solver=solver) for s in ("video", "action")} for solver in ("unipc", "heun"))
FEW_VIDEO, FEW_ACTION = ({s: Schedule(steps=2)} for s in ("video", "action"))
BOTH_RATES, REUSE = {"interleave": True, "reuse_keys": True}, {"reuse_flow": 0.9, "reuse_chunk": 0.9}
TOGETHER = "UniPC, 2 video steps of 4, interleaved, all reuse"
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "full": ({}, "both"),
    "action alone": ({}, "action"),
    "video shift 2": ({"video_shift": 2.0}, "both"),
    "half the steps": (HALF, "both"),
    "half the steps, UniPC": (HALF | UNIPC, "both"),
    "as many forwards, Heun": (HALF | HEUN, "both"),
    "2 video steps": (FEW_VIDEO, "both"),
    "2 video steps, reuse_keys": (FEW_VIDEO | {"reuse_keys": True}, "both"),
    "2 video steps, interleaved": (FEW_VIDEO | {"interleave": True}, "both"),
    "2 video steps, interleaved, reuse_keys": (FEW_VIDEO | BOTH_RATES, "both"),
    "2 action steps": (FEW_ACTION, "both"),
    "2 action steps, interleaved, reuse_keys": (FEW_ACTION | BOTH_RATES, "both"),
    "video stops at 0.5": ({"video": Schedule(stop=0.5)}, "both"),
    "2 action steps, action alone": (FEW_ACTION, "action"),
    "from the observation, 0.7": ({"video": Schedule(steps=STEPS // 2, start=0.7)}, "both"),
    "reuse_flow": ({"reuse_flow": 0.9}, "both"),
    "reuse_chunk": ({"reuse_chunk": 0.9}, "both"),
    "UniPC and reuse_flow": (HALF | UNIPC | {"reuse_flow": 0.9}, "both"),
    TOGETHER: (
        HALF | UNIPC | BOTH_RATES | REUSE | {"video": Schedule(steps=2, solver="unipc")}, "both",
    ),
    # one forward of video, and from then on action tokens alone
    "video features once": ({"program": "video_noisy_to_action", "video": Schedule(steps=0)}, "action"),
}  # fmt: skip
EIGHT_BIT = "8-bit weights"
TINY = ", 32 wide, 1 token a frame, chunk 2"
COLD = f"""
from dataclasses import replace
import torch
from wam_models import RolloutConfig, RolloutEngine, WorldActionModel, demo_config
model = WorldActionModel(replace(demo_config(), layers=2)).eval().requires_grad_(False)
c = model.config
first, text = torch.randn(1, c.latent_channels, 1, *{GRID}), torch.randn(1, {TEXT_TOKENS}, c.text_dim)
episode = RolloutEngine(model, RolloutConfig(program="joint", window=8, steps={STEPS})).start(first, text)
episode.propose(generator=torch.Generator().manual_seed(0))
"""


def model_of(device: str, seed: int) -> WorldActionModel:
    config, dtype = (wan_5b_config(), torch.bfloat16) if device == "cuda" else (demo_config(), torch.float32)
    config = config if device == "cuda" else replace(config, layers=2)
    model = make_model(config, device, dtype, seed).eval().requires_grad_(False)
    for head in (model.core.proj_out, model.action_expert.action_proj_out):
        head.weight *= 10  # flows as large as noise
    return model


def tiny_model(seed: int) -> WorldActionModel:
    """So small that products have few rows where a rollout is alone: other routines than those of many rows."""
    config = replace(
        demo_config(), hidden=32, heads=2, head_dim=16, ffn=32, action_hidden=32, action_ffn=32, text_dim=8, layers=2,
        actions_per_frame=1, patch=(1, 2, 2),
    )  # fmt: skip
    return make_model(config, "cpu", torch.float32, seed).eval().requires_grad_(False)


def randn(model: WorldActionModel, seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(model.device)


def episode_of(model: WorldActionModel, config: RolloutConfig, batch: int, seed: int) -> Episode:
    c = model.config
    first, text = randn(model, seed, 1, c.latent_channels, 1, *GRID), randn(model, seed + 1, 1, TEXT_TOKENS, c.text_dim)
    return RolloutEngine(model, config).start(first.repeat(batch, 1, 1, 1, 1), text.repeat(batch, 1, 1))


def observed(model: WorldActionModel, seed: int, chunk: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """A chunk of a slow scene: neighbouring ones are alike."""
    c, frames = model.config, FULL.chunk_size
    still, moved = (randn(model, seed + 2 + s, 1, c.latent_channels, frames, *GRID) for s in (0, 10 + chunk))
    action = randn(model, seed + 100 + chunk, 1, frames, c.actions_per_frame, c.action_dim)
    return (still + 0.1 * moved).repeat(batch, 1, 1, 1, 1), action.repeat(batch, 1, 1, 1)


def play(model: WorldActionModel, config: RolloutConfig, want: str, seed: int, chunks: int) -> dict[str, list[Any]]:
    """Actions, videos, forwards and milliseconds of the chunks of an episode."""
    episode, clock = episode_of(model, config, 1, seed), time.thread_time if model.device.type == "cpu" else None
    found: dict[str, list[Any]] = {"action": [], "video": [], "forwards": [], "ms": []}
    for chunk in range(chunks):
        generator = torch.Generator().manual_seed(seed)  # the same noise, which reuse_chunk needs
        if clock is None:
            torch.cuda.synchronize()
        begin = (clock or time.perf_counter)()
        candidate = episode.propose(want=want, generator=generator)
        episode.observe(*observed(model, seed, chunk))
        if clock is None:
            torch.cuda.synchronize()
        found["ms"].append(1e3 * ((clock or time.perf_counter)() - begin))
        for name in ("action", "video"):
            found[name].append(getattr(candidate, name))
        found["forwards"].append(candidate.forwards[0])
    return found


def error(got: list[Tensor | None], want: list[Tensor | None]) -> float | None:
    if any(t is None for t in got):
        return None
    a, b = (torch.stack([t for t in ts if t is not None]).double() for ts in (got, want))
    return round(((a - b).norm() / b.norm()).item(), 4)


def option_rows(model: WorldActionModel, seed: int, chunks: int) -> Iterator[Row]:
    full: dict[str, dict[str, list[Any]]] = {}
    base = 0.0
    sizes = Sizes(model.config, (GRID[0] // 2, GRID[1] // 2), TEXT_TOKENS, model.dtype.itemsize)
    variants = dict(VARIANTS)
    if find_spec("torchao") is not None:
        variants |= {EIGHT_BIT: ({}, "both"), f"{TOGETHER}, {EIGHT_BIT}": VARIANTS[TOGETHER]}
    for name, (options, want) in variants.items():
        config = replace(FULL, **options)
        if config.program not in full:
            full[config.program] = play(model, replace(FULL, program=config.program), "both", seed, chunks)
        truth = full[config.program]
        quantised = name.endswith(EIGHT_BIT)
        again = play(with_eight_bits(model) if quantised else model, config, want, seed, chunks)
        ms = statistics.median(again["ms"][1:])
        base = base or ms
        parts = rollout_chunk(replace(sizes, block_itemsize=1 if quantised else None), config, want=want)
        steps = [part for part in parts if part.name.startswith("denoising")]
        ran = statistics.mean(again["forwards"])
        left_out = 1 - ran / sum(part.times for part in steps)
        cost, denoising = total(parts), total(steps)
        yield {
            "what": "option", "option": name, "program": config.program, "provider": "wam", "want": want,
            "forwards": round(ran, 2), "ms": round(ms, 2), "ratio": round(base / ms, 2),
            "GFLOP": round((cost.flops - left_out * denoising.flops) / 1e9, 4),
            "MB": round((cost.bytes - left_out * denoising.bytes) / 1e6, 2),
            "action_error": error(again["action"], truth["action"]),
            "video_error": error(again["video"], truth["video"]),
        }  # fmt: skip


def held(episode: Episode) -> float:
    """Megabytes of keys, values and latents, in use of an episode and its candidates."""
    assert episode.cache is not None
    tensors = [episode.cache.buffer, *episode.chunk.values(), *episode.ring.latents.values()]
    tensors += [] if episode.many is None else episode.many.forward.latents.values()
    return round(sum(t.numel() * t.element_size() for t in tensors) / 1e6, 3)


def _drawn(propose: Callable[..., Any], seed: int) -> Any:
    return propose(generator=torch.Generator().manual_seed(seed))


def _one_after_another(episode: Episode, k: int, seed: int) -> list[Candidate]:
    generator = torch.Generator().manual_seed(seed)
    return [episode.propose(generator=generator) for _ in range(k)]


def candidate_rows(model: WorldActionModel, seed: int, counts: Iterable[int], repeats: int) -> Iterator[Row]:
    for k in counts:
        one = replace(FULL, steps=2)
        many, single = (episode_of(model, c, 1, seed) for c in (replace(one, candidates=k), one))
        batch = episode_of(model, one, k, seed)
        for episode, rollouts in ((many, 1), (single, 1), (batch, k)):
            episode.observe(*observed(model, seed, 0, rollouts))
        calls: dict[str, Callable[[], Any]] = {
            "candidates": partial(_drawn, many.propose_many, seed),
            "on end": partial(_one_after_another, single, k, seed),
            "episodes": partial(_drawn, batch.propose, seed),
        }
        device = model.device.type
        clock = time.thread_time if device == "cpu" else time.perf_counter
        times = harness.measure(calls, device, repeats, clock)
        for (name, t), episode in zip(times.items(), (many, single, batch), strict=True):
            yield {
                "what": "candidates", "option": f"k = {k}", "program": FULL.program, "provider": name,
                "ms": round(t["ms"], 2), "ratio": round(times["episodes"]["ms"] / t["ms"], 2), "held_MB": held(episode),
            }  # fmt: skip
        together, alone = calls["candidates"](), calls["on end"]()
        gap = max((a.action - b.action).abs().max().item() for a, b in zip(together, alone, strict=True))
        same: Row = {"what": "same", "program": FULL.program, "provider": "wam"}
        yield same | {"option": f"one of {k} candidates", "gap": gap}


def same_rows(
    model: WorldActionModel, what: str, grid: tuple[int, int], frames: int, seed: int, batch: int
) -> Iterator[Row]:
    """Rollouts of chunks of so many frames alone and in a batch of others: the first, the middle and the last of it."""
    c = model.config
    first = randn(model, seed + 20, batch, c.latent_channels, 1, *grid)
    text = randn(model, seed + 21, batch, TEXT_TOKENS, c.text_dim)
    shapes = (c.latent_channels, frames, *grid), (frames, c.actions_per_frame, c.action_dim)
    frame, acted, video, action = (randn(model, seed + 22 + i, batch, *shape) for i, shape in enumerate(shapes * 2))

    def actions(rollouts: list[int]) -> Tensor:
        episode = RolloutEngine(model, replace(FULL, chunk_size=frames, steps=2)).start(first[rollouts], text[rollouts])
        episode.observe(frame[rollouts], acted[rollouts])
        found = episode.propose(video_noise=video[rollouts], action_noise=action[rollouts]).action
        assert found is not None
        return found

    together = actions(list(range(batch)))
    gap = max((actions([b])[0] - together[b]).abs().max().item() for b in (0, batch // 2, batch - 1))
    yield {"what": "same", "program": FULL.program, "provider": "wam", "option": f"in a batch of {batch}{what}",
           "gap": gap}  # fmt: skip


def rows(options: Options) -> Iterable[Row]:
    model = model_of(options.device, options.seed)
    chunks = 2 if options.quick else CHUNKS
    require_equal_chunks(model, replace(FULL, steps=2), GRID, options.seed, 1e-4 if options.device == "cpu" else 3e-2)
    yield from option_rows(model, options.seed, chunks)
    yield from candidate_rows(model, options.seed, (1, 4) if options.quick else (1, 4, 16), 2 if options.quick else 3)
    yield from same_rows(model, "", GRID, FULL.chunk_size, options.seed, 4 if options.quick else 120)
    if options.device == "cpu":
        yield from same_rows(tiny_model(options.seed), TINY, (2, 2), 2, options.seed, 4 if options.quick else 120)
    if options.device == "cpu":
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", COLD], check=True, cwd=ROOT)
        ms, after = 1e3 * (time.perf_counter() - begin), resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_ms = 1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        yield {"what": "cold start", "option": "process to first chunk", "program": FULL.program, "provider": "wam",
               "ms": round(ms, 1), "cpu_ms": round(cpu_ms, 1)}  # fmt: skip
