"""What a call of an episode was given: checked before anything of the episode changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from wam_kernels.masks.programs import STREAMS
from wam_kernels.masks.visibility import ACTION, VIDEO

from ..config import STATE_STREAM
from ..model.dual_expert import WorldActionModel
from ..objectives import Objective
from ..runtime.checks import instance, whole, wholes
from .candidates import Candidate
from .frames import FRAME_DIM, STATE, check_finite, check_frames
from .latent_ring import LatentRing
from .layout import ChunkLayout
from .stages import WANTS


def one_per_rollout(name: str, given: int | Sequence[int], batch: int) -> list[int]:
    """A number of each rollout; one number stands for all."""
    if not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0:
        return [whole(name, given, 0)] * batch
    numbers = wholes(name, given, 0)
    if len(numbers) != batch:
        raise ValueError(f"{name} must be a number or {batch} of them, got {len(numbers)}")
    return numbers


def checked_state(call: str, state: Tensor | None, width: int, batch: int, frames: int) -> dict[int, Tensor]:
    """States ``[batch, frames, width]`` by stream; none for a model that is told none, whose ``width`` is 0."""
    if (state is None) != (width == 0):
        raise ValueError(
            f"{call}: state must be {f'[B, frames, {width}]' if width else 'None for a model without state_dim'}, "
            f"got {None if state is None else list(state.shape)}"
        )
    if state is None:
        return {}
    check_frames(f"{call}: state", state, STATE, frames, torch.empty(batch, frames, width, device="meta"))
    check_finite(f"{call}: state", state, STATE)
    return {STATE: state}


def context_tokens(model: WorldActionModel, context: Mapping[str, Tensor], rollouts: int) -> int:
    """Tokens of a context that fits the model's streams, that of the state left out."""
    if STATE_STREAM in context:
        raise ValueError(f"context must not hold {STATE_STREAM!r}, which is made of the state; give state")
    c = model.config
    state = {STATE_STREAM: torch.zeros(rollouts, 1, c.state_dim, device=model.device)} if c.state_tokens else {}
    given = model.embed_context({**context, **state}, rollouts)
    return sum(stream.x.shape[1] for stream in given if stream is not None) - int(c.state_tokens)


def check_context(model: WorldActionModel, context: Mapping[str, Tensor], rollouts: int, tokens: int) -> None:
    """Features fit the model's streams, and have as many tokens as the cache has room for."""
    for name, features in context.items():
        instance(f"context[{name!r}]", features, Tensor)
        check_finite(f"context[{name!r}]", features[:, None])
    found = context_tokens(model, context, rollouts)
    if found != tokens:
        raise ValueError(f"context must have {tokens} tokens as at the start, got {found}")


def check_request(
    objective: Objective, streams: Sequence[int], video_stays: bool, want: str, noise: Sequence[Tensor | None],
    clean: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """What :meth:`Episode.propose` is asked for and given fits the objective.

    Args:
        objective: The episode's.
        streams: Of the chunk.
        video_stays: Whether the config denoises no video.
        want: As there.
        noise: Of video and actions.
        clean: Likewise.
    """
    if want not in WANTS:
        raise ValueError(f"propose: want must be one of {tuple(WANTS)}, got {want!r}")
    for name, given, needed in (
        ("clean_video", clean[VIDEO], not objective.video),
        ("clean_action", clean[ACTION], not objective.action),
    ):
        if needed != (given is not None):
            expected, got = ("a tensor", "None") if needed else ("None", "a tensor")
            raise ValueError(f"propose: {name} must be {expected} for objective {objective.name!r}, got {got}")
    if want in ("video", "action") and not getattr(objective, want):
        raise ValueError(f"propose: want must be 'both' or what objective {objective.name!r} denoises, got {want!r}")
    has_action = objective.action and ACTION in streams
    if video_stays and (want == "video" or not has_action):
        raise ValueError(
            "propose: want must not ask for video alone where RolloutConfig.video.steps is 0, so that it is not "
            "denoised"
        )
    if ACTION not in streams and (want == "action" or noise[ACTION] is not None):
        raise ValueError("propose: want and action_noise must not ask for actions of a model that has none")


def checked_committed(
    objective: Objective, chunk: Mapping[int, Tensor], committed: Tensor | None, tokens: int | Sequence[int] | None
) -> tuple[Tensor, Tensor] | None:
    """Actions as the chunk's, and which of them are committed; None where none are."""
    if committed is None:
        if tokens is not None:
            raise ValueError(f"propose: committed_tokens must be None without committed, got {tokens}")
        return None
    if not objective.action or ACTION not in chunk:
        raise ValueError(
            f"propose: committed must be None where no actions are denoised, as for objective {objective.name!r}, got "
            "a tensor"
        )
    instance("propose: committed", committed, Tensor)
    shape = chunk[ACTION].shape
    batch, most, width = shape[0], shape[1] * shape[2], shape[3]
    m = committed.shape[1] if committed.ndim == 3 else -1
    if [*committed.shape] != [batch, m, width] or not 1 <= m <= most:
        raise ValueError(f"propose: committed must be [{batch}, 1 to {most}, {width}], got {list(committed.shape)}")
    counts = one_per_rollout("propose: committed_tokens", m if tokens is None else tokens, batch)
    if max(counts) > m:
        raise ValueError(f"propose: committed_tokens must be at most {m}, as committed has, got {counts}")
    check_finite("propose: committed", committed[:, :, None], ACTION, counts)
    padded = torch.zeros(batch, most, width, dtype=chunk[ACTION].dtype, device=committed.device)
    padded[:, :m] = committed
    places = torch.arange(most, device="cpu") < torch.tensor(counts, device="cpu")[:, None]
    which = places[:, :, None].expand(-1, -1, width).to(committed.device)
    # what is not committed may be no number
    known = torch.where(which, padded, 0).reshape(shape)
    return known, which.reshape(shape)


def initial_latents(
    stream: int, denoised: bool, noise: Tensor | None, clean: Tensor | None, generator: torch.Generator | None,
    chunk: Tensor,
) -> Tensor | None:  # fmt: skip
    """What a stream's noisy copy starts from, of the shape of ``chunk``: the given clean tensor, the given noise, or
    drawn noise."""
    name, shape = STREAMS[stream], list(chunk.shape)
    drawn = None
    if generator is not None and noise is None:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device=generator.device)
    for where, given in ((f"propose: clean_{name}", clean), (f"propose: {name}_noise", noise)):
        if given is not None:
            check_frames(where, given, stream, shape[FRAME_DIM[stream]], chunk)
            check_finite(where, given)
            return given
    if drawn is None and denoised:
        raise ValueError(f"propose: {name}_noise must be a tensor {shape} where no generator is given, got None")
    return drawn


def accepted_frames(candidate: Candidate, chunk: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The streams of a candidate, each of the shape of the ``chunk``'s, all of them denoised to the end."""
    if candidate.video_level:
        raise ValueError(
            f"accept: candidate.video must be denoised to the end, got one that was stopped at noise level "
            f"{candidate.video_level:.3g}; observe, or leave RolloutConfig.video.stop at 0"
        )
    held = {s: (candidate.video, candidate.action)[s] for s in chunk}
    frames = {s: t for s, t in held.items() if t is not None}
    if len(frames) < len(held):
        lacks = next(STREAMS[s] for s in held if s not in frames)
        raise ValueError(
            f"accept: candidate must have {' and '.join(STREAMS[s] for s in held)}, got no {lacks}; propose with "
            "want='both', or observe"
        )
    for s, t in frames.items():
        check_frames(f"accept: candidate.{STREAMS[s]}", t, s, chunk[s].shape[FRAME_DIM[s]], chunk[s])
        check_finite(f"accept: candidate.{STREAMS[s]}", t)
    return frames


def observed_frames(
    chunk: Mapping[int, Tensor], video: Tensor, action: Tensor | None, state: Tensor | None, state_dim: int,
    frames: int | Sequence[int] | None,
) -> tuple[dict[int, Tensor], list[int]]:  # fmt: skip
    """What :meth:`Episode.observe` was given, by stream, and how many frames of it each rollout brings."""
    count, batch = video.shape[2] if getattr(video, "ndim", 0) == 5 else -1, chunk[VIDEO].shape[0]
    if ACTION not in chunk and action is not None:
        raise ValueError("observe: action must be None for a model without actions, got a tensor")
    given = {s: cast(Tensor, (video, action)[s]) for s in chunk}
    for s, t in given.items():
        check_frames(f"observe: {STREAMS[s]}", t, s, count, chunk[s])
    given |= checked_state("observe", state, state_dim, batch, count)
    counts = one_per_rollout("observe: frames", count if frames is None else frames, batch)
    if max(counts) > count or not max(counts):
        raise ValueError(f"observe: frames must be numbers from 0 to K={count}, not all 0, got {counts}")
    for s, t in given.items():
        check_finite(f"observe: {(*STREAMS, 'state')[s]}", t, s, counts)
    return given, counts


def check_continues(
    ring: LatentRing, layout: ChunkLayout, lookahead: int, counts: list[int], first_frame: int | Sequence[int] | None
) -> None:
    """Observed frames follow what was observed before, whose keys and values are still there."""
    given = ring.observed
    if first_frame is not None:
        given = one_per_rollout("observe: first_frame", first_frame, layout.batch)
    for b, (count, first) in enumerate(zip(counts, given, strict=True)):
        known, reached = ring.observed[b], ring.next_frame[b]
        if count and first != known:
            what = "was observed already" if first < known else "has a gap before it"
            raise ValueError(
                f"observe: first_frame[{b}] must be {known}, the frame after the last observed one, "
                f"got {first}, which {what}"
            )
        if count and reached - ring.frames > layout.first_visible(known):
            raise ValueError(
                f"observe: rollout {b} was predicted to frame {reached}, so the history before frame {known} has "
                f"left the cache; restart it, or raise RolloutConfig.lookahead, now {lookahead} chunks"
            )
