"""Rollout: denoise one chunk after the other over an immutable history.

    state = engine.start(observation, text)               # one observed frame
    candidate = engine.propose(state, generator=g)        # a chunk of video and actions; state is untouched
    state = engine.commit(state, candidate)               # imagine on: the prediction becomes history
    state = engine.observe(state, video, action)          # or act: what really happened becomes history

A chunk costs one pass over the clean history that it sees (:class:`HistoryCache`), and for each denoising step one pass
over the chunk's own noisy tokens. It equals the packed forward over the same frames, because a clean token never
sees a noisy one: its keys and values do not change while a chunk is denoised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wam_kernels import HISTORIES, Geometry, tokens, visible
from wam_kernels.visibility import ACTION, CLEAN, NOISY, SEGMENTS, VIDEO

from .flow import ACTION_SHIFT, VIDEO_SHIFT, euler_step, sigmas, timesteps
from .model import Attend, WorldActionModel, wide
from .objectives import GJD, OBJECTIVES, Objective, check_program, geometry_for

WANTS = ("both", "video", "action")
# The conditional objectives denoise one frame at a time, over one frame of history.
CONDITIONAL_CHUNK, CONDITIONAL_WINDOW = 1, 3


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How chunks are generated.

    Args:
        program: ``"generalist_joint_denoising"`` or one of ``wam_kernels.PROGRAMS``.
        chunk_size: Frames of a chunk.
        window: In order blocks, two a chunk; a chunk sees the ``window // 2 * chunk_size`` frames before it.
        history: Which earlier clean tokens a query sees, one of ``wam_kernels.HISTORIES``.
        steps: Denoising steps of a stage.
        video_shift: Shift of the video's noise levels.
        action_shift: Shift of the actions' noise levels.

    Raises:
        ValueError: an unknown name or a number outside its range; the message names the field.
    """

    program: str = GJD
    chunk_size: int = 4
    window: int = 30
    history: str = "full"
    steps: int = 10
    video_shift: float = VIDEO_SHIFT
    action_shift: float = ACTION_SHIFT

    def __post_init__(self) -> None:
        check_program(self.program)
        if self.history not in HISTORIES:
            raise ValueError(f"RolloutConfig: history must be one of {HISTORIES}, got {self.history!r}")
        # a window of 1 would hide the chunk before: no frame of history
        for name, low in (("chunk_size", 1), ("window", 2), ("steps", 1)):
            if not getattr(self, name) >= low:
                raise ValueError(f"RolloutConfig: {name} must be at least {low}, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class RolloutState:
    """The accepted history. Never changed in place: every transition returns a new state.

    Holds what the next chunk sees, and what it would see if the predicted frames were discarded.
    """

    video: Tensor  # [B, C, T, y, x] float32, clean latents of frames first_frame .. next_frame - 1
    action: Tensor  # [B, T, n, A] float32, the actions that lead to each of these frames; zeros for frame 0
    text: Tensor  # [B, L, text_dim] raw embeddings
    first_frame: int  # absolute frame of video[:, :, 0]
    observed: int  # frames below this absolute frame are observations, the others predictions

    @property
    def next_frame(self) -> int:
        """Absolute frame at which the next chunk begins."""
        return self.first_frame + self.video.shape[2]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A proposed chunk. A stream that the request did not need is None."""

    video: Tensor | None  # [B, C, chunk, y, x] float32
    action: Tensor | None  # [B, chunk, n, A] float32
    source: RolloutState  # the state it continues


@dataclass(frozen=True)
class Stage:
    """One denoising loop: which streams' noisy slots run through the model, which are updated, what becomes clean."""

    slots: tuple[int, ...]
    denoised: tuple[int, ...]
    promoted: int | None = None


def stages(program: str, objective: Objective, want: str) -> tuple[Stage, ...]:
    """The loops that a request needs, in order; what nothing needs is left out."""
    both = (VIDEO, ACTION)
    if objective.conditional:
        return (Stage(both, (VIDEO,) if objective.video else (ACTION,)),)
    wanted = {"both": both, "video": (VIDEO,), "action": (ACTION,)}[want]
    if program in ("video_then_action", "action_then_video"):
        first, second = both if program == "video_then_action" else both[::-1]
        if second not in wanted:
            return (Stage((first,), (first,)),)
        return Stage((first,), (first,), promoted=first), Stage((second,), (second,))
    if program == "decoupled_same_step":
        return tuple(Stage((s,), (s,)) for s in wanted)
    # one noisy stream that never looks at the other does not need it
    alone = {"video_noisy_to_action": VIDEO, "action_noisy_to_video": ACTION}.get(program)
    if wanted == (alone,):
        return (Stage(wanted, wanted),)
    return (Stage(both, both),)


class HistoryCache:
    """Every layer's keys and values of the clean tokens that one chunk reads.

    Filled by one pass over the visible history, extended by the promoted stream of an ordered program, read by every
    denoising step, and dropped with the chunk: the next chunk's window starts later, and a clean token's keys depend
    on what it saw, so keeping them would no longer equal a packed forward over the window. A streaming cache that
    persists across chunks belongs here, behind the same :meth:`attend`.

    ``held`` are the packed indices (in ``geometry``, the window and the chunk as one sample) of the tokens in
    ``layers``, whose entries are ``(k, v)`` of ``[B, len(held), H, h]``.
    """

    def __init__(self, geometry: Geometry, layers: int, device: torch.device) -> None:
        self.geometry, self.device = geometry, device
        self.tokens = tokens(geometry)
        self.held = np.empty(0, dtype=np.int64)
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def attend(self, rows: np.ndarray, keep: bool = False) -> Attend:
        """Attention of the tokens ``rows`` over the held tokens and each other; ``keep`` adds them to the held."""
        keys = np.concatenate([self.held, rows])
        mask = visible(self.geometry, self.tokens[rows][:, None], self.tokens[keys][None, :])
        blind = None if mask.any(1).all() else torch.from_numpy(~mask.any(1)).to(self.device)[:, None, None]
        mask = torch.from_numpy(mask).to(self.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.layers[layer] is not None:
                k, v = (torch.cat([old, new], 1) for old, new in zip(self.layers[layer], (k, v), strict=True))
            if keep:
                self.layers[layer] = k, v
            out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask).transpose(
                1, 2
            )
            return out if blind is None else out.masked_fill(blind, 0)

        if keep:
            self.held = keys
        return attend


class RolloutEngine:
    """Generates chunks with a model. Keeps no history of its own, so one engine serves any number of episodes.

    Args:
        model: In eval mode, on its device. Latents and actions stay float32 whatever the model's dtype.
        config: Program, chunk, window, steps.
    """

    def __init__(self, model: WorldActionModel, config: RolloutConfig) -> None:
        self.model, self.config = model, config

    def start(self, observation: Tensor, text: Tensor) -> RolloutState:
        """The state after one observed frame: ``observation`` ``[B, C, 1, y, x]``, ``text`` ``[B, L, text_dim]``."""
        c = self.model.config
        if observation.ndim != 5 or observation.shape[1:3] != (c.latent_channels, 1):
            raise ValueError(
                f"start: observation must be [B, {c.latent_channels}, 1, y, x], got {list(observation.shape)}"
            )
        self.model.token_grid(*observation.shape[-2:])
        if text.ndim != 3 or text.shape[0] != observation.shape[0] or text.shape[2] != c.text_dim:
            raise ValueError(f"start: text must be [{observation.shape[0]}, L, {c.text_dim}], got {list(text.shape)}")
        video = self._own(observation)
        action = video.new_zeros(video.shape[0], 1, c.actions_per_frame, c.action_dim)
        return RolloutState(video, action, text.detach().to(self.model.device, copy=True), first_frame=0, observed=1)

    @torch.no_grad()
    def propose(
        self,
        state: RolloutState,
        *,
        objective: str = "joint",
        want: str = "both",
        video_noise: Tensor | None = None,
        action_noise: Tensor | None = None,
        clean_video: Tensor | None = None,
        clean_action: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Candidate:
        """Denoise the chunk that follows ``state``, which stays as it is.

        Args:
            state: The accepted history.
            objective: ``"joint"``, or with GJD also ``"forward_dynamics"`` (needs ``clean_action``) and
                ``"inverse_dynamics"`` (needs ``clean_video``): one frame each, text zeroed.
            want: ``"both"``, ``"video"`` or ``"action"``: what the caller needs. What nothing needs is not computed.
            video_noise: ``[B, C, chunk, y, x]`` to start from; default drawn from ``generator``.
            action_noise: ``[B, chunk, n, A]``; default drawn from ``generator``, after the video's.
            clean_video: ``[B, C, 1, y, x]``, the frame that the actions should reach.
            clean_action: ``[B, 1, n, A]``, the actions whose outcome is asked for.
            generator: Draws the noise that is not given; both streams' always, so ``want`` does not change the numbers.

        Returns:
            The chunk, with every stream that was resolved or given.

        Raises:
            ValueError: an objective or ``want`` that does not fit, a missing or mis-shaped tensor.
        """
        goal = self._goal(objective, want, clean_video, clean_action)
        config = self.config
        chunk, window = config.chunk_size, config.window
        if goal.conditional:
            chunk, window = CONDITIONAL_CHUNK, CONDITIONAL_WINDOW
        loops = stages(config.program, goal, want)
        denoised = {stream for stage in loops for stream in stage.denoised}
        slots = {
            VIDEO: self._slot("video", VIDEO in denoised, state.video, 2, chunk, video_noise, clean_video, generator),
            ACTION: self._slot(
                "action", ACTION in denoised, state.action, 1, chunk, action_noise, clean_action, generator
            ),
        }
        work = _Chunk(self.model, state, config, goal, chunk, window)
        schedules = {VIDEO: self._schedule(config.video_shift), ACTION: self._schedule(config.action_shift)}
        work.read_history()
        for stage in loops:
            run = work.noisy(stage.slots)
            for step in range(config.steps):
                # a stream that is given stays at timestep 0
                now = {s: schedules[s][step] if s in stage.denoised else 0.0 for s in stage.slots}
                flows = run(slots, now)
                for s in stage.denoised:
                    slots[s] = euler_step(slots[s], flows[s], now[s], schedules[s][step + 1])
            if stage.promoted is not None:
                work.promote(stage.promoted, slots)
        done = denoised | {s for stage in loops for s in stage.slots}
        return Candidate(*(slots[s] if s in done else None for s in (VIDEO, ACTION)), source=state)

    def commit(self, state: RolloutState, candidate: Candidate) -> RolloutState:
        """The state with a predicted chunk accepted as history.

        Raises:
            ValueError: a candidate of another state, or one that lacks a stream.
        """
        if candidate.source is not state:
            raise ValueError(
                f"commit: candidate continues another state (to frame {candidate.source.next_frame}) than this one "
                f"(to frame {state.next_frame}); propose again from this state"
            )
        if candidate.video is None or candidate.action is None:
            lacks = "video" if candidate.video is None else "action"
            raise ValueError(
                f"commit: candidate must have video and action, got no {lacks}; propose with want='both', or observe"
            )
        return self._extended(state, candidate.video, candidate.action, observed=state.observed)

    def observe(self, state: RolloutState, video: Tensor, action: Tensor) -> RolloutState:
        """The state after K frames were really executed and seen.

        They follow the last observed frame and replace every prediction after it: of the executed interval because
        the truth is known, of the rest because it was not executed. The next chunk begins after them, so its chunk grid
        starts there, wherever the predicted chunks began.

        Args:
            state: Any state of the episode.
            video: ``[B, C, K, y, x]`` latents of frames ``state.observed`` and following.
            action: ``[B, K, n, A]``, the actions that led to each.

        Raises:
            ValueError: shapes that do not fit the state or each other.
        """
        self._expect("observe: video", video, state.video, 2)
        frames = video.shape[2]
        if frames < 1:
            raise ValueError("observe: video must have at least 1 frame, got 0")
        self._expect("observe: action", action, state.action, 1, frames)
        known = state.observed - state.first_frame
        real = replace(state, video=state.video[:, :, :known], action=state.action[:, :known])
        return self._extended(real, self._own(video), self._own(action), observed=state.observed + frames)

    # ---- inside ----

    def _extended(self, state: RolloutState, video: Tensor, action: Tensor, *, observed: int) -> RolloutState:
        """``state`` and further frames, less the frames that no later chunk can see, predictions discarded or not."""
        reach = max(self.config.window // 2 * self.config.chunk_size, 1)
        first = max(state.first_frame, observed - reach)
        drop = first - state.first_frame
        # clone, so that no state keeps another's frames alive
        return RolloutState(
            torch.cat([state.video, video], 2)[:, :, drop:].clone(),
            torch.cat([state.action, action], 1)[:, drop:].clone(),
            state.text,
            first,
            observed,
        )

    def _goal(self, objective: str, want: str, clean_video: Tensor | None, clean_action: Tensor | None) -> Objective:
        if objective not in OBJECTIVES or (objective != "joint" and self.config.program != GJD):
            choices = tuple(OBJECTIVES) if self.config.program == GJD else ("joint",)
            raise ValueError(
                f"propose: objective must be one of {choices} for {self.config.program}, got {objective!r}"
            )
        if want not in WANTS:
            raise ValueError(f"propose: want must be one of {WANTS}, got {want!r}")
        goal = OBJECTIVES[objective]
        for name, clean, needed in (
            ("clean_video", clean_video, not goal.video),
            ("clean_action", clean_action, not goal.action),
        ):
            if needed != (clean is not None):
                expected, got = ("a tensor", "None") if needed else ("None", "a tensor")
                raise ValueError(f"propose: {name} must be {expected} for objective {objective!r}, got {got}")
        if want in ("video", "action") and not getattr(goal, want):
            raise ValueError(f"propose: want must be 'both' or what objective {objective!r} denoises, got {want!r}")
        return goal

    def _slot(self, name, denoised, like, dim, chunk, noise, clean, generator) -> Tensor | None:
        """What a stream's noisy slot starts from: the given clean tensor, the given noise, or drawn noise."""
        shape = list(like.shape)
        shape[dim] = chunk
        drawn = None
        if generator is not None and noise is None:
            drawn = torch.randn(shape, generator=generator, device=generator.device)
        if clean is not None:
            self._expect(f"propose: clean_{name}", clean, like, dim, chunk)
            return self._own(clean)
        if noise is not None:
            self._expect(f"propose: {name}_noise", noise, like, dim, chunk)
            return self._own(noise)
        if drawn is None and denoised:
            raise ValueError(f"propose: {name}_noise must be a tensor {shape} where no generator is given, got None")
        return None if drawn is None else self._own(drawn)

    def _expect(self, name: str, tensor: Tensor, like: Tensor, dim: int, frames: int | None = None) -> None:
        expected = list(like.shape)
        got = list(tensor.shape)
        if len(got) == len(expected):
            expected[dim] = got[dim] if frames is None else frames
        if got != expected:
            raise ValueError(f"{name} must have shape {expected}, got {got}")

    def _own(self, tensor: Tensor) -> Tensor:
        """A copy on the model's device: what the caller does to its tensor later does not reach a state."""
        return wide(tensor.detach()).to(self.model.device, copy=True)

    def _schedule(self, shift: float) -> list[float]:
        return [*sigmas(self.config.steps, shift).tolist(), 0.0]


class _Chunk:
    """The passes of one chunk: over its visible history, over its noisy slots, over its promoted stream.

    Window and chunk are one packed sample, ``geometry``; each pass runs some of its rows.
    """

    def __init__(
        self, model, state: RolloutState, config: RolloutConfig, goal: Objective, chunk: int, window: int
    ) -> None:
        self.model, self.state = model, state
        seen = min(window // 2 * chunk, state.video.shape[2])
        self.seen, self.chunk = seen, chunk
        self.start = state.next_frame - seen
        self.grid = model.token_grid(*state.video.shape[-2:])
        self.geometry = geometry_for(
            config.program,
            goal,
            frames=seen + chunk,
            video_tokens=self.grid[0] * self.grid[1],
            action_tokens=model.config.actions_per_frame,
            chunk_size=chunk,
            window=window,
            history=config.history,
            start=self.start,
            chunk_origin=state.next_frame,
        )
        self.cache = HistoryCache(self.geometry, model.config.layers, model.device)
        text = torch.zeros_like(state.text) if goal.conditional else state.text
        self.text = model.embed_text(text, keys_values=True)
        # Where only video is read across chunks, clean actions matter only to the clean video of their own chunk, and
        # that looks at them where the program resolves actions first.
        video_only = goal.conditional or config.history == "video_only"
        self.history_streams = (VIDEO,) if video_only and self.geometry.video_rank() == 0 else (VIDEO, ACTION)

    def read_history(self) -> None:
        """One pass over the visible clean frames; a stream that no later token reads is left out."""
        slots = {VIDEO: self.state.video[:, :, -self.seen :], ACTION: self.state.action[:, -self.seen :]}
        run = self._pass(self.history_streams, CLEAN, 0, self.seen, keep=True)
        run(slots, {s: 0.0 for s in self.history_streams})

    def noisy(self, streams: tuple[int, ...]) -> Callable:
        return self._pass(streams, NOISY, self.seen, self.seen + self.chunk)

    def promote(self, stream: int, slots: dict[int, Tensor]) -> None:
        """One pass over a stream that is resolved: later stages read its clean copy."""
        self._pass((stream,), CLEAN, self.seen, self.seen + self.chunk, keep=True)(slots, {stream: 0.0})

    def _pass(self, streams: tuple[int, ...], noise: int, first: int, last: int, keep: bool = False) -> Callable:
        """A function from slots and noise levels to flows, over frames ``first`` to ``last - 1`` of the window.

        What does not change from one denoising step to the next (mask, rope) is computed here.
        """
        streams = tuple(sorted(streams))  # packed order: video before action
        model, device = self.model, self.model.device
        attend = self.cache.attend(np.concatenate([self._rows(s, noise, first, last) for s in streams]), keep)
        frames = torch.arange(self.start + first, self.start + last, device=device)
        rope = model.rope(frames if VIDEO in streams else None, *self.grid, frames if ACTION in streams else None)

        def run(slots: dict[int, Tensor], sigma: dict[int, float]) -> dict[int, Tensor | None]:
            def inputs(stream: int) -> tuple[Tensor | None, Tensor | None]:
                if stream not in streams:
                    return None, None
                x = slots[stream]
                return x, timesteps(x.new_full((x.shape[0], last - first), sigma[stream]))

            embedded = model.embed(*inputs(VIDEO), *inputs(ACTION))
            done = model.blocks(embedded, rope, self.text, attend)
            return {} if keep else dict(zip((VIDEO, ACTION), model.flows(done, last - first, *self.grid), strict=True))

        return run

    def _rows(self, stream: int, noise: int, first: int, last: int) -> np.ndarray:
        """Packed indices of a run of frames of one segment."""
        segment = SEGMENTS.index((stream, noise))
        offset = sum(self.geometry.segment_lengths[:segment])
        per_frame = self.geometry.action_tokens if stream == ACTION else self.geometry.video_tokens
        return np.arange(offset + first * per_frame, offset + last * per_frame)
