"""How well a policy predicts recorded episodes: every objective and program, compared with trivial baselines.

The robot of a recording cannot act on the prediction, so after each chunk the recorded frames and actions replace it
(``Episode.observe``): each chunk is predicted from real history, as in a policy that runs closed loop.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wam_kernels import PROGRAMS

from .bridge import rolls_out
from .data import psnr
from .data.latents import pictures_of
from .objectives import GJD, OBJECTIVES
from .rollout import RolloutConfig, RolloutEngine
from .rollout.layout import frames_of_chunk
from .rollout.policy import Policy

RECORDED_CHUNKS = 6  # of each episode at most, where a command gives errors on recorded ones


def fewest_frames(chunk_size: int) -> int:
    """Latent frames of an episode that can be evaluated: one, a chunk to observe and one to predict."""
    return 1 + 2 * chunk_size


def all_cases() -> list[tuple[str, str]]:
    """(objective, program): GJD's conditional objectives, and every program that has a rollout, ``joint`` first.

    The joint objective of GJD is the ``joint`` program.
    """
    programs = sorted((p for p, row in PROGRAMS.items() if row.has_rollout), key=lambda program: program != "joint")
    return [("forward_dynamics", GJD), ("inverse_dynamics", GJD), *(("joint", program) for program in programs)]


@dataclass(frozen=True, eq=False)
class Chunk:
    """One predicted chunk: its first frame, the prediction, and how long that and its way into history took."""

    frame: int
    video: Tensor | None  # [B, C, chunk, y, x]; None where the objective is given it
    action: Tensor | None  # [B, chunk, n, A]; likewise
    seconds: float
    forwards: tuple[int, ...] = ()  # of the denoising, run for each episode


def stream(
    engine: RolloutEngine,
    video: Tensor,
    action: Tensor,
    text: Tensor,
    *,
    objective: str,
    generator: torch.Generator,
    state: Tensor | None = None,
    begin: int = 1,
    end: int | None = None,
    closed_loop: bool = True,
) -> Iterator[Chunk]:
    """Predict the whole chunks that fit between frames ``begin`` and ``end`` of recorded episodes.

    Args:
        engine: Decides program, chunk size and steps.
        video: ``[B, C, F, y, x]`` recorded latents.
        action: ``[B, F, n, A]`` recorded actions, normalised; not read for a model without.
        text: ``[B, L, text_dim]`` raw embeddings.
        objective: One of ``wam_models.OBJECTIVES``. What is given to a conditional objective is the recorded stream.
        generator: Draws the noise.
        state: ``[B, F, S]`` recorded states, normalised, for a model that is told them.
        begin: First frame to predict; the frames before it are observed.
        end: One past the last frame; default F.
        closed_loop: After a chunk the recording becomes history; else the prediction does.

    Raises:
        ValueError: what the engine refuses, or a prediction that is not finite.
    """
    denoises = OBJECTIVES[objective]
    end = video.shape[2] if end is None else end
    acts = engine.model.config.has_actions

    def recorded(first: int, last: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        of_state = None if state is None else state[:, first:last]
        return video[:, :, first:last], action[:, first:last] if acts else None, of_state

    first_frame, _, first_state = recorded(0, 1)
    episode = engine.start(first_frame, text, objective=objective, state=first_state)
    if begin > 1:
        before, actions_before, states_before = recorded(1, begin)
        episode.observe(before, actions_before, state=states_before)
    size = episode.chunk_size
    for frame in range(begin, end - size + 1, size):
        real_video, real_action, real_state = recorded(frame, frame + size)
        start = _now(engine)
        candidate = episode.propose(
            clean_video=None if denoises.video else real_video,
            clean_action=None if denoises.action else real_action,
            generator=generator,
        )
        if closed_loop:
            episode.observe(real_video, real_action, state=real_state)
        else:
            episode.accept(candidate)
        seconds = _now(engine) - start
        for name, found in (("video", candidate.video), ("action", candidate.action)):
            if found is not None and not found.isfinite().all():
                raise ValueError(
                    f"stream: the predicted {name} of the chunk at frame {frame} is not finite; are there such numbers "
                    "in the weights, or do they overflow in half precision?"
                )
        yield Chunk(frame, candidate.video, candidate.action, seconds, candidate.forwards)


@torch.no_grad()
def decisions(
    policy: Policy, config: RolloutConfig, clips: Sequence[Mapping[str, Any]], *, chunks: int, seed: int = 0
) -> dict[str, Tensor]:
    """Actions ``[N, n, k A]`` and video ``[C, N, y, x]`` of the first chunks of every episode, from recorded history.

    The noise is the seed's, whatever the policy and its steps: what differs between two policies is what they decide.

    Args:
        policy: Of what is decided.
        config: How it is rolled out.
        clips: Episodes, from :meth:`Policy.clip`.
        chunks: Of each, or as many as it has.
        seed: Of each episode's noise.

    Raises:
        ValueError: no episode has a whole chunk behind its first frame.
    """
    engine, found = RolloutEngine(policy.model, config), list[dict[str, Tensor]]()
    for clip in clips:
        frames = min(clip["video"].shape[2], 1 + chunks * config.chunk_size)
        parts = stream(
            engine, clip["video"], clip["action"], policy.text([clip["text"]]), objective="joint",
            state=clip["state"], end=frames, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        if done := list(parts):
            found.append({"video": join((c.video for c in done), 2)[0]})
            if policy.model.config.has_actions:
                found[-1]["action"] = join((c.action for c in done), 1)[0]
    if not found:
        raise ValueError(f"decisions: clips must hold a chunk of {config.chunk_size} frames behind their first one")
    return {name: torch.cat([f[name] for f in found], int(name == "video")) for name in found[0]}


def join(parts: Iterable[Tensor | None], dim: int) -> Tensor:
    """A stream of successive chunks, one behind the other, on the CPU.

    Raises:
        ValueError: a chunk without the stream, which its objective is given.
    """
    found = list(parts)
    present = [part.cpu() for part in found if part is not None]
    if len(present) < len(found):
        raise ValueError("join: parts must hold the stream of every chunk, got None; its objective is given the stream")
    return torch.cat(present, dim)


def _now(engine: RolloutEngine) -> float:
    if engine.model.device.type == "cuda":
        torch.cuda.synchronize(engine.model.device)
    return time.perf_counter()


@dataclass(frozen=True)
class Row:
    """One objective under one program. Errors of what the objective does not predict are None.

    Action errors are root mean squares over the varying dimensions in units of their standard deviation in the
    training split, so that predicting the mean action costs about 1. PSNRs are means over frames, in dB, against the
    recorded pictures; where frames are states there are none.
    """

    objective: str
    program: str
    chunk_frames: int
    chunk_actions: int
    action_rmse: float | None
    repeat_action_rmse: float | None  # the last action before the chunk, through the chunk
    mean_action_rmse: float | None  # the mean action of the training split
    psnr: float | None
    repeat_frame_psnr: float | None  # the last frame before the chunk, through the same latent transform
    repeat_picture_psnr: float | None  # the same as pictures, which no latent transform has touched
    ceiling_psnr: float | None  # the recorded frames through the latent transform
    seconds: float  # median time of one chunk of one episode
    frame_rmse: float | None = None  # of latent frames, in their units: of states, standard deviations
    repeat_frame_rmse: float | None = None  # the last frame before the chunk


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured, and on what."""

    rows: tuple[Row, ...]
    episodes: int
    frames: tuple[int, int]  # predicted: from, to (one past the last)
    steps: int

    def row(self, objective: str, program: str) -> Row:
        return next(r for r in self.rows if (r.objective, r.program) == (objective, program))

    def to_dict(self) -> dict:
        return asdict(self)


@torch.no_grad()
def evaluate(
    policy: Policy,
    clips: Sequence[dict],
    *,
    chunks: int = 6,
    steps: int | None = None,
    samples: int = 1,
    seed: int = 0,
    cases: Sequence[tuple[str, str]] | None = None,
    timed: int = 5,
    progress: bool = True,
) -> Evaluation:
    """Errors of every case over the same frames of the same episodes.

    The first chunk of frames is observed, so that there is a last action to repeat; then ``chunks`` chunks follow,
    or as many as the shortest episode has.

    Args:
        policy: What to evaluate.
        clips: Episodes, from :meth:`Policy.clip`.
        chunks: Chunks of each, of the size in ``policy.rollout``.
        steps: Denoising steps; default ``policy.rollout.steps``.
        samples: Predictions, each from its own noise, whose mean is compared: squared errors are least at the mean.
        seed: Of the noise; the same for every case.
        cases: Pairs of objective and program; default those of :func:`all_cases` that the model can roll out.
        timed: Chunks to time, of the first episode alone.
        progress: Show a progress bar.

    Raises:
        ValueError: no clips, or one that is too short for a single chunk.
    """
    config = policy.rollout if steps is None else replace(policy.rollout, steps=steps)
    size = config.chunk_size
    begin = 1 + size
    shortest = min((c["video"].shape[2] for c in clips), default=0)
    chunks = min(chunks, (shortest - begin) // size)
    if chunks < 1:
        raise ValueError(
            f"evaluate: episodes must have at least {fewest_frames(size)} latent frames, the shortest has {shortest}"
        )
    end = begin + chunks * size
    video = torch.cat([c["video"][:, :, :end] for c in clips])
    action = torch.cat([c["action"][:, :end] for c in clips])
    text = policy.text([c["text"] for c in clips])
    state = torch.cat([c["state"][:, :end] for c in clips]) if policy.state_units is not None else None
    pictures = np.stack([c["frames"][:end] for c in clips])

    rows = []
    c = policy.model.config
    if cases is None:
        cases = [case for case in all_cases() if rolls_out(c, case[1], OBJECTIVES[case[0]])]
    for objective, program in tqdm(cases, desc="evaluate", unit="case", disable=not progress, dynamic_ncols=True):
        denoises = OBJECTIVES[objective]
        engine = RolloutEngine(policy.model, replace(config, program=program))
        rng = torch.Generator().manual_seed(seed)
        repeated = (t.repeat_interleave(samples, 0) for t in (video, action, text))
        states = None if state is None else state.repeat_interleave(samples, 0)
        done = list(stream(engine, *repeated, objective=objective, generator=rng, begin=begin, state=states))
        step = frames_of_chunk(config, denoises, c.full_attention)
        before = np.repeat(np.arange(begin, end, step) - 1, step)  # the last frame before each frame's chunk
        timed_end = min(end, begin + timed * step)
        timed_chunks = stream(
            engine, video[:1], action[:1], text[:1], objective=objective, generator=rng, begin=begin, end=timed_end,
            state=None if state is None else state[:1],
        )  # fmt: skip
        seconds = statistics.median(c.seconds for c in timed_chunks)
        errors: dict[str, float | None] = dict.fromkeys(
            ("action_rmse", "repeat_action_rmse", "mean_action_rmse")
            + ("psnr", "repeat_frame_psnr", "repeat_picture_psnr", "ceiling_psnr")
        )
        if denoises.action and c.has_actions:
            real = action[:, begin:end]
            guess = join((c.action for c in done), 1).unflatten(0, (-1, samples)).mean(1)
            last = action[:, before, -1:, -len(policy.varying) :].repeat(1, 1, 1, policy.actions_per_token)
            last = last.expand_as(real)
            errors["action_rmse"] = rmse(guess, real, policy.varying)
            errors["repeat_action_rmse"] = rmse(last, real, policy.varying)
            errors["mean_action_rmse"] = rmse(torch.zeros_like(real), real, policy.varying)
        if denoises.video:
            guess = join((c.video for c in done), 2).unflatten(0, (-1, samples)).mean(1)
            real = video[:, :, begin:]
            errors["frame_rmse"] = (guess - real).double().square().mean().sqrt().item()
            errors["repeat_frame_rmse"] = (video[:, :, before] - real).double().square().mean().sqrt().item()
            if not policy.frames_are_states:
                errors |= _psnrs(policy, video, guess, pictures, begin, before)
        rows.append(Row(objective, program, step, step * policy.actions_per_frame, **errors, seconds=seconds))
    return Evaluation(tuple(rows), len(clips), (begin, end), config.steps)


def joint_errors(policy: Policy, clips: Sequence[dict], *, chunks: int) -> dict[str, float | int | None]:
    """Errors of actions and frames of the policy's own program, each chunk from the real history: the numbers of a
    :class:`Row` by name, and ``episodes``. Arguments as of :func:`evaluate`."""
    found = evaluate(policy, clips, chunks=chunks, cases=[("joint", policy.rollout.program)], timed=1, progress=False)
    names = ("action_rmse", "repeat_action_rmse", "mean_action_rmse", "frame_rmse", "repeat_frame_rmse")
    return {"episodes": len(clips)} | {name: getattr(found.rows[0], name) for name in names}


def _psnrs(
    policy: Policy, video: Tensor, guess: Tensor, pictures: np.ndarray, begin: int, before: np.ndarray
) -> dict[str, float]:
    """PSNRs of a :class:`Row`, of the frames from ``begin`` on.

    Args:
        policy: Whose codec decodes.
        video: ``[E, C, F, y, x]``, the recorded latents.
        guess: ``[E, C, F - begin, y, x]``, the predicted ones.
        pictures: uint8 ``[E, F, H, W, 3]``, as recorded.
        begin: First predicted frame.
        before: The last frame before the chunk of each predicted one.
    """
    decoded = np.stack([pictures_of(policy.codec, v) for v in video])
    # behind the frames before them, which a codec that compresses time looks back to
    whole = torch.cat([video[:, :, :begin], guess], 2)
    imagined = np.stack([pictures_of(policy.codec, v)[begin:] for v in whole])
    real = pictures[:, begin:]
    return {
        "psnr": mean_psnr(imagined, real),
        "repeat_frame_psnr": mean_psnr(decoded[:, before], real),
        "repeat_picture_psnr": mean_psnr(pictures[:, before], real),
        "ceiling_psnr": mean_psnr(real, decoded[:, begin:]),
    }


def rmse(guess: Tensor, real: Tensor, varying: Tensor) -> float:
    """Root mean square error of actions ``[..., A]`` over the dimensions marked in the bool ``[A]``; or of tokens
    ``[..., k A]`` of k actions each."""
    error = (guess - real).unflatten(-1, (-1, len(varying)))  # several actions, where one token holds them
    return error[..., varying].double().square().mean().sqrt().item()


def mean_psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over frames of the PSNR of uint8 videos ``[E, F, H, W, 3]``, in dB."""
    pairs = zip(a.reshape(-1, *a.shape[2:]), b.reshape(-1, *b.shape[2:]), strict=True)
    # equal frames have no finite PSNR; 99 dB is beyond any codec
    return float(np.mean([min(psnr(x, y), 99.0) for x, y in pairs]))


def table(evaluation: Evaluation) -> str:
    """The rows as text, one line each, aligned; also valid Markdown."""
    head = ["objective", "program", "action RMSE", "repeat last", "mean action"]
    pictures = any(r.psnr is not None for r in evaluation.rows)
    head += ["PSNR dB", "repeat last", "ceiling"] if pictures else ["frame RMSE", "repeat last"]
    head += ["s / chunk"]
    lines = []
    for r in evaluation.rows:
        numbers = [_number(x, 3) for x in (r.action_rmse, r.repeat_action_rmse, r.mean_action_rmse)]
        if pictures:
            numbers += [_number(x, 2) for x in (r.psnr, r.repeat_frame_psnr, r.ceiling_psnr)]
        else:
            numbers += [_number(x, 3) for x in (r.frame_rmse, r.repeat_frame_rmse)]
        program = "joint" if r.program == GJD else r.program
        lines.append((r.objective, program, *numbers, f"{r.seconds:.3f}"))
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]

    def row(cells: Sequence[str]) -> str:
        columns = enumerate(zip(cells, widths, strict=True))
        return "| " + " | ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in columns) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i < 2 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([row(head), rule, *map(row, lines)])


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def imagine(
    policy: Policy, clip: dict, *, objective: str, chunks: int, steps: int | None = None, seed: int = 0
) -> np.ndarray:
    """Open loop from the first frame alone: pictures uint8 ``[1 + frames, H, W, 3]`` of ``chunks`` chunks on end.

    ``objective`` ``"joint"`` imagines actions and video; ``"forward_dynamics"`` is given the recorded actions and
    takes as many single-frame chunks as needed for the same frames.
    """
    config = replace(policy.rollout, program=GJD, steps=steps or policy.rollout.steps)
    end = min(1 + chunks * config.chunk_size, clip["video"].shape[2])
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        text = policy.text([clip["text"]])
    done = stream(
        RolloutEngine(policy.model, config), clip["video"], clip["action"], text,
        objective=objective, generator=rng, end=end, closed_loop=False, state=clip["state"],
    )  # fmt: skip
    frames = join((clip["video"][:, :, :1], *(c.video for c in done)), 2)
    return pictures_of(policy.codec, frames[0])
