"""What the attention benchmarks run on: who is packed with whom, and the truth that every provider must give.

    LIBERO    2 views of 128 x 128: 32 video tokens and 4 actions a frame, whole trajectories of up to 130 frames
    RoboTwin  3 views: 120 video tokens and 8 actions a frame, up to 64 frames
    dense     documents without a mask, and documents that are block-causal: for comparison with published figures

Longer sequences pack several samples one after another, as training does. FLOPs count visible pairs only:
4 H D a pair forward, 10 H D backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from wam_kernels import PROGRAMS, Geometry, Plan, compile_plan, tokens, visible
from wam_kernels.plan.compile import forget_plans
from wam_models.objectives import GJD_MIXTURE, OBJECTIVES, geometry_for

LIBERO, ROBOTWIN = (32, 4, 130), (120, 8, 64)  # video tokens and actions of a frame, most frames of a sample
LENGTHS = (1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000)
CHUNKS, WINDOWS = (1, 2, 4), (8, 30, 64)


@dataclass(frozen=True)
class Workload:
    """Samples that are packed into one batch element."""

    name: str
    samples: tuple[Geometry, ...]
    heads: int
    head_dim: int
    document: int | None = (
        None  # tokens of each of the equal documents that attend to all of themselves, where that is all
    )

    @property
    def tokens(self) -> int:
        return sum(g.length for g in self.samples)

    @cached_property
    def starts(self) -> list[int]:
        return np.cumsum([0, *(g.length for g in self.samples)]).tolist()

    def plan(self, device: str, impl: str | None = None) -> Plan:
        return compile_plan([self.samples], device=device, impl=impl)

    def flops(self, pairs: int, backward: bool = False) -> int:
        """Of the forward over ``pairs`` (query, key) pairs, or of the backward."""
        return (10 if backward else 4) * self.heads * self.head_dim * pairs

    def inputs(self, device: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
        """q, k, v and dout ``[1, S, H, D]``, drawn on the CPU: every device gets the same numbers."""
        generator = torch.Generator().manual_seed(seed)
        shape = (1, self.tokens, self.heads, self.head_dim)
        return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]


def _frames(target: int, per_frame: tuple[int, int, int]) -> list[int]:
    """Frames of the samples that fill about ``target`` tokens, as equal as they come."""
    video, action, most = per_frame
    frames = max(1, round(target / (2 * (video + action))))
    samples = -(-frames // most)
    return [frames // samples + (i < frames % samples) for i in range(samples)]


def packed(
    target: int,
    *,
    program: str = "joint",
    history: str = "video_only",
    chunk: int = 4,
    window: int = 64,
    per_frame: tuple[int, int, int] = LIBERO,
    heads: int,
    head_dim: int,
) -> Workload:
    """About ``target`` packed tokens of one program."""
    place = {LIBERO: "libero", ROBOTWIN: "robotwin"}[per_frame]
    samples = tuple(
        Geometry(
            program=program, video_frames=n, video_tokens=per_frame[0], action_frames=n, action_tokens=per_frame[1],
            chunk_size=chunk, window=window, history=history,
        )
        for n in _frames(target, per_frame)
    )  # fmt: skip
    return Workload(f"{place} {program} c{chunk} w{window}", samples, heads, head_dim)


def gjd(target: int, *, chunk: int = 4, window: int = 64, heads: int, head_dim: int) -> Workload:
    """Generalist joint denoising: five samples whose objectives are mixed 3 : 1 : 1, LIBERO geometry."""
    names = [name for name, share in GJD_MIXTURE.items() for _ in range(round(5 * share))]
    frames = max(2, round(target / (2 * (LIBERO[0] + LIBERO[1]) * len(names))))
    samples = tuple(
        geometry_for(
            "generalist_joint_denoising", OBJECTIVES[name], frames=frames, video_tokens=LIBERO[0],
            action_tokens=LIBERO[1], chunk_size=chunk, window=window, history="video_only",
        )
        for name in names
    )  # fmt: skip
    return Workload(f"libero gjd c{chunk} w{window}", samples, heads, head_dim)


def dense(length: int, *, heads: int, head_dim: int) -> Workload:
    """Two documents of ``length`` tokens that each attend to all of themselves.

    A sample with one chunk and no actions is that: its noisy video attends to its noisy video, its clean video to
    itself.
    """
    return Workload(f"dense {length}", (_video(1, length, 1),), heads, head_dim, document=length)


def block_causal(length: int, documents: int, *, block: int = 256, heads: int, head_dim: int) -> Workload:
    """``documents`` block-causal documents that share ``length`` tokens; blocks of 256.

    Half of them are noisy videos over the clean history, which attend to as many tokens as the clean ones do.
    """
    frames = max(1, length // (documents * block))
    samples = (_video(frames, block, 1),) * max(1, documents // 2)
    return Workload(f"block-causal {length} in {documents}", samples, heads, head_dim)


def _video(frames: int, per_frame: int, chunk: int) -> Geometry:
    return Geometry(
        program="joint", video_frames=frames, video_tokens=per_frame, action_frames=0, action_tokens=1,
        chunk_size=chunk, window=2 * frames + 2, history="full",
    )  # fmt: skip


def all_programs(target: int, make: Callable[..., Workload] = packed, **sizes) -> list[Workload]:
    """The six programs and GJD at one length."""
    return [*(make(target, program=program, **sizes) for program in PROGRAMS), gjd(target, **sizes)]


# ---- the truth ----


def truth(work: Workload, inputs: list[Tensor], heads: list[int], rows: int = 1024) -> list[Tensor]:
    """out, dq, dk, dv ``[1, S, len(heads), D]`` of some heads in float64, straight from the predicate.

    Heads are independent, so some of them stand for all. ``rows`` queries at a time: memory stays linear in the tokens.
    """
    q, k, v, dout = (t[0, :, heads].double().transpose(0, 1) for t in inputs)  # [h, S, D]
    out, dq, dk, dv = (torch.zeros_like(q) for _ in range(4))
    scale = q.shape[-1] ** -0.5
    for start, geometry in zip(work.starts, work.samples, strict=False):
        attends, kind = visible_kinds(geometry, q.device)
        keys = slice(start, start + geometry.length)
        for first in range(0, geometry.length, rows):
            block = slice(start + first, start + min(first + rows, geometry.length))
            mask = attends[kind[first : first + rows]][:, kind]
            s = (q[:, block] * scale @ k[:, keys].mT).masked_fill_(~mask, float("-inf"))
            p = s.softmax(-1).nan_to_num_(0.0)  # a fully masked row gives 0
            out[:, block] = p @ v[:, keys]
            dv[:, keys] += p.mT @ dout[:, block]
            dp = dout[:, block] @ v[:, keys].mT
            ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
            dq[:, block] = ds @ k[:, keys]
            dk[:, keys] += ds.mT @ q[:, block]
    return [t.transpose(0, 1)[None] for t in (out, dq, dk, dv)]


def visible_kinds(geometry: Geometry, device: torch.device) -> tuple[Tensor, Tensor]:
    """The predicate on every pair of kinds of token, bool ``[K, K]``, and the kind of every token ``[S]``.

    The tokens of one frame of one segment are of one kind: K is a few hundred where S is thousands.
    """
    t = tokens(geometry)
    columns = np.stack([t.stream, t.noise, t.frame, t.chunk, t.block, t.is_key])
    _, first, kind = np.unique(columns, axis=1, return_index=True, return_inverse=True)
    some = t[first]
    attends = visible(geometry, some[:, None], some[None, :])
    return torch.from_numpy(attends).to(device), torch.from_numpy(kind.ravel()).to(device)


def count_pairs(geometry: Geometry) -> int:
    """(query, key) pairs of a sample that the predicate holds for."""
    attends, kind = visible_kinds(geometry, torch.device("cpu"))
    tokens_of_kind = torch.bincount(kind, minlength=len(attends))
    return int(tokens_of_kind @ attends.long() @ tokens_of_kind)


# ---- plans, cold ----


def cold_plan(work: Workload, device: str, impl: str | None = None) -> Plan:
    """The plan as the first call for a geometry builds it, for one backend: nothing of it is cached."""
    forget_plans()
    return work.plan(device, impl)
