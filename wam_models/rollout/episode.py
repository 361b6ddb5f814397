"""Streaming rollout: denoise one chunk after the other; what is accepted becomes history, once.

    episode = engine.start(observation, text)        # one observed frame; all memory is allocated here
    candidate = episode.propose(generator=g)         # a chunk of video and actions; the episode is as it was
    episode.accept(candidate)                        # imagine on: the prediction becomes history
    episode.observe(video, action)                   # or act: what really happened becomes history

A denoising step runs the noisy tokens of its chunk and nothing else. A clean token never sees a noisy one, so its keys
and values are computed once, by one pass when its chunk is accepted, and stay in the slots of a
:class:`wam_kernels.StreamingCache`; those of the text are computed once an episode. A chunk therefore costs the same
at the end of an hour as at the beginning, and equals the packed forward over the whole episode, which is what training
saw.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor

from wam_kernels import HISTORIES, Attends, FrameIndex, Geometry, StreamingCache, cached_attention
from wam_kernels.programs import STREAMS
from wam_kernels.streaming_cache import MAX_RANGES
from wam_kernels.visibility import ACTION, CLEAN, NOISY, VIDEO

from .._checks import check_field, choice, instance, memory, number, switch, whole, wholes
from ..config import ModelConfig
from ..flow import ACTION_SHIFT, SHIFTS, TRAIN_TIMESTEPS, VIDEO_SHIFT, sigmas, timesteps
from ..model.dual_expert import Exact, Slots, WorldActionModel, wide
from ..objectives import GJD, MODEL_PROGRAMS, OBJECTIVES, Objective, geometry_for

WANTS = ("both", "video", "action")
FRAME_DIM = {VIDEO: 2, ACTION: 1}  # of [B, C, F, y, x] and [B, F, n, A]
CACHES = ("persistent", "recomputed")
# The conditional objectives denoise one frame at a time, over one frame of history.
CONDITIONAL_CHUNK, CONDITIONAL_WINDOW = 1, 3


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How chunks are generated.

    Args:
        program: ``"generalist_joint_denoising"`` or one of ``wam_kernels.PROGRAMS``.
        chunk_size: Frames of a chunk.
        window: In order blocks, two a chunk; a chunk sees the ``window // 2`` chunks before it.
        history: Which earlier clean tokens a query sees, one of ``wam_kernels.HISTORIES``.
        steps: Denoising steps of a stage, at most 1000.
        video_shift: Shift of the video's noise levels, from 0.001 to 1000.
        action_shift: Shift of the actions' noise levels, likewise.
        guidance: Strength g of classifier-free guidance, ``flow(no text) + g (flow(text) - flow(no text))``; 1 is none
            and costs nothing, else every pass is a batch of two.
        cache: What frames that have left the window leave behind. ``"persistent"``: the keys of the frames in it were
            computed when those were visible, and stay; equals a packed forward over the whole episode, as in
            training. ``"recomputed"``: before each chunk the window is computed anew, as if the episode began with
            it; equals a packed forward over the window, as in rollouts of the reference system, and costs a pass
            for each chunk of the window.
        lookahead: Chunks that may be accepted beyond the last observation and still be replaced by one: the rings
            keep so many chunks more than the window.
        cuda_graphs: On a GPU, capture a denoising step of each stage once and replay it; False launches every kernel.

    Raises:
        ValueError: an unknown name, a program that has no rollout, a value of the wrong type or outside its range; the
            message names the field.
    """

    program: str = GJD
    chunk_size: int = 4
    window: int = 30
    history: str = "full"
    steps: int = 10
    video_shift: float = VIDEO_SHIFT
    action_shift: float = ACTION_SHIFT
    guidance: float = 1.0
    cache: str = "persistent"
    lookahead: int = 1
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        check_field(self, "program", _with_rollout)
        check_field(self, "history", choice, HISTORIES)
        check_field(self, "cache", choice, CACHES)
        check_field(self, "chunk_size", whole, 1)
        # a window of 1 would hide the chunk before: no frame of history
        check_field(self, "window", whole, 2)
        check_field(self, "steps", whole, 1, TRAIN_TIMESTEPS)
        check_field(self, "lookahead", whole, 1)
        check_field(self, "video_shift", number, *SHIFTS)
        check_field(self, "action_shift", number, *SHIFTS)
        check_field(self, "guidance", number, 0)
        check_field(self, "cuda_graphs", switch)


def _with_rollout(where: str, program: object) -> str:
    """``program``, one that has a rollout."""
    choice(where, program, MODEL_PROGRAMS)
    try:
        stages(program, OBJECTIVES["joint"], "both")
    except ValueError as error:
        others = tuple(name for name, row in MODEL_PROGRAMS.items() if row.has_rollout)
        raise ValueError(f"{where} must be one that has a rollout, as {others}, got {program!r}; {error}") from None
    return program


@dataclass(frozen=True, eq=False)
class Candidate:
    """A proposed chunk. A stream that the request did not need is None."""

    video: Tensor | None  # [B, C, chunk, y, x] float32
    action: Tensor | None  # [B, chunk, n, A] float32
    moment: uuid.UUID  # what it continues: an episode as it was between two changes, and its copies


@dataclass(frozen=True)
class Stage:
    """One denoising loop: which streams' noisy slots run through the model, which are updated, what becomes clean."""

    slots: tuple[int, ...]
    denoised: tuple[int, ...]
    promoted: int | None = None


def stages(program: str, objective: Objective, want: str) -> tuple[Stage, ...]:
    """The loops that a request needs, in order; what nothing needs is left out.

    Raises:
        ValueError: an unknown program, or one that has no rollout; the message says why.
    """
    row = MODEL_PROGRAMS[choice("stages: program", program, MODEL_PROGRAMS)]
    needed = row.needed({"both": (VIDEO, ACTION), "video": (VIDEO,), "action": (ACTION,)}[want])
    found: list[Stage] = []
    # from the last one back: a stream becomes clean if a later stage attends to its clean copy
    for streams in reversed(row.stages):
        slots = tuple(s for s in streams if s in needed)
        if slots:
            denoised = tuple(s for s in slots if getattr(objective, STREAMS[s]))
            read = {k for q, k in row.noisy_to_clean.pairs if any(q in later.slots for later in found)}
            found.insert(0, Stage(slots, denoised, next((s for s in slots if s in read), None)))
    return tuple(found)


def _apart(method: Callable) -> Callable:
    """Out of reach of the caller's grad mode, inference mode and autocast: what it makes serves calls in any mode."""

    @wraps(method)
    def run(self, *args, **kwargs):
        autocast = torch.autocast(self.model.device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), autocast:
            return method(self, *args, **kwargs)

    return run


class RolloutEngine:
    """Starts episodes of a model.

    Args:
        model: In eval mode, on its device. Its dtype is that of the computation, under autocast too; latents and
            actions stay float32.
        config: Program, chunk, window, steps.

    Raises:
        TypeError: another model or config than these classes.
        ValueError: a model that is sharded, or on the meta device.
    """

    def __init__(self, model: WorldActionModel, config: RolloutConfig) -> None:
        if not isinstance(getattr(model, "config", None), ModelConfig):
            inside = "; give its .module" if hasattr(model, "module") else ""
            raise TypeError(f"RolloutEngine: model must be a WorldActionModel, got {type(model).__name__}{inside}")
        if any(hasattr(p, "full_tensor") for p in model.parameters()):
            raise ValueError(
                "RolloutEngine: model must not be sharded, got DTensor parameters; load what "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict gives with full_state_dict=True into a "
                "WorldActionModel"
            )
        if model.device.type == "meta":
            raise ValueError("RolloutEngine: model must have weights, got one on the meta device; load them before")
        instance("RolloutEngine: config", config, RolloutConfig)
        self.model, self.config = model, config

    @_apart
    def start(self, observation: Tensor, text: Tensor, *, objective: str = "joint") -> Episode:
        """A batch of episodes after one observed frame each.

        Args:
            observation: ``[B, C, 1, y, x]`` latents of frame 0.
            text: ``[B, L, text_dim]`` raw embeddings.
            objective: ``"joint"``, or with GJD also ``"forward_dynamics"`` and ``"inverse_dynamics"``: one frame a
                chunk, text zeroed.

        Raises:
            TypeError: an observation or text that is no tensor.
            ValueError: shapes that do not fit the model or each other, numbers on the CPU that are not finite, an
                objective that the program lacks, or a window whose keys and values exceed the device's memory.
        """
        c = self.model.config
        choice(
            f"start with program {self.config.program}: objective",
            objective,
            tuple(OBJECTIVES) if self.config.program == GJD else ("joint",),
        )
        instance("start: observation", observation, Tensor)
        instance("start: text", text, Tensor)
        if observation.ndim != 5 or observation.shape[1:3] != (c.latent_channels, 1) or not observation.shape[0]:
            raise ValueError(
                f"start: observation must be [B >= 1, {c.latent_channels}, 1, y, x], got {list(observation.shape)}"
            )
        self.model.token_grid(*observation.shape[-2:])
        episode = Episode(self.model, self.config, OBJECTIVES[objective], observation, text)
        episode.restart(range(observation.shape[0]), observation, text)
        return episode


class Episode:
    """A batch of B rollouts, each at a frame of its own. Made by :meth:`RolloutEngine.start`.

    A call that raises leaves what was accepted as it was. Not for several threads at once. The model keeps its dtype
    and device as long as the episode lasts: calls after ``model.half()`` or ``model.to(...)`` raise ValueError.

    To choose the best of N chunks, propose N times and accept one. To look further ahead, branch: ``copy.deepcopy``
    gives an episode that shares nothing but the model, equal from there on, with a cache and CUDA graphs of its own. A
    candidate continues every episode whose history is the one that it was proposed for, so it may be given to copies
    that were made after it::

        candidates = [episode.propose(generator=g) for _ in range(n)]
        branches = [copy.deepcopy(episode) for _ in candidates]
        for branch, candidate in zip(branches, candidates):
            branch.accept(candidate)  # imagine on, and judge what comes of it

    A pickled episode holds its model.

    No number that is not finite becomes history or leaves as an action, as far as that can be told without waiting for
    a GPU: tensors on the CPU are checked, on their way in and out. Those on a GPU are not; look at actions when they
    are on the host, before a robot gets them. Such numbers stay in their own rollout until it is restarted, or with
    ``cache="recomputed"`` until they have left its window.

    Attributes:
        next_frame: For each rollout, the frame at which its next chunk begins.
        observed: For each rollout, the frame up to which its history was observed; the rest is predicted.
        chunk_size: Frames of a chunk: of the config, or 1 for a conditional objective.
    """

    def __init__(
        self, model: WorldActionModel, config: RolloutConfig, goal: Objective, observation: Tensor, text: Tensor
    ) -> None:
        c = model.config
        self.model, self.config, self.goal = model, config, goal
        self.chunk_size = CONDITIONAL_CHUNK if goal.conditional else config.chunk_size
        self._window = CONDITIONAL_WINDOW if goal.conditional else config.window
        self._batch, self._grid = observation.shape[0], model.token_grid(*observation.shape[-2:])
        self._guided = config.guidance != 1 and not goal.conditional
        samples = 2 if self._guided else 1  # with and without text
        # A query of the stream resolved first sees its other stream one block further back: half a chunk, if the window
        # is odd. Rollouts of the reference system cut that off.
        chunks = (self._window + 1) // 2 if config.cache == "persistent" else self._window // 2
        self._reach = chunks * self.chunk_size
        tokens = {VIDEO: self._grid[0] * self._grid[1], ACTION: c.actions_per_frame}
        self._check_memory(samples, sum(tokens.values()))
        self.cache = StreamingCache(
            layers=c.layers,
            batch=self._batch * samples,
            heads=c.heads,
            head_dim=c.head_dim,
            video_tokens=tokens[VIDEO],
            action_tokens=tokens[ACTION],
            chunk_size=self.chunk_size,
            frames=self._reach + config.lookahead * self.chunk_size,
            dtype=model.dtype,
            device=model.device,
        )
        # Where only video is read across chunks, clean actions matter only to the clean video of their own chunk, in
        # programs in which that attends to them.
        video_only = goal.conditional or config.history == "video_only"
        read = Attends.VIDEO_TO_ACTION in self._geometry(0, 0).interaction.clean_to_clean
        self._history_streams = (VIDEO,) if video_only and not read else (VIDEO, ACTION)
        kind = {"device": model.device, "dtype": wide(observation).dtype}
        frames = {VIDEO: observation.shape, ACTION: (self._batch, 1, c.actions_per_frame, c.action_dim)}
        # accepted frames, in the same places as their keys; and the chunk at work, clean or noisy
        self._accepted = {
            s: torch.zeros(_with_frames(s, shape, self.cache.frames), **kind) for s, shape in frames.items()
        }
        self._chunk = {s: torch.zeros(_with_frames(s, shape, self.chunk_size), **kind) for s, shape in frames.items()}
        self._step = torch.zeros(1, dtype=torch.int64, device=model.device)
        shifts = {VIDEO: config.video_shift, ACTION: config.action_shift}
        self._sigmas = {s: F.pad(sigmas(config.steps, shift), (0, 1)).to(**kind) for s, shift in shifts.items()}
        self._passes: dict[tuple, _Pass] = {}
        self._loops: dict[Stage, Callable[[], None]] = {}
        self._text: list | None = None
        self._text_length = text.shape[1] if text.ndim == 3 else "L"
        self._moment = uuid.uuid4()
        self._stale = False  # the rings must be computed anew before they are read
        self.next_frame, self.observed = [0] * self._batch, [0] * self._batch

    # ---- copies ----

    def __getstate__(self) -> dict:
        # both are made anew where they are needed; loops are closures, or CUDA graphs over this episode's memory
        return vars(self) | {"_passes": {}, "_loops": {}}

    def __setstate__(self, state: dict) -> None:
        if state["_step"].is_inference():
            # loaded in inference mode: no later call in another mode could write to such tensors
            with torch.inference_mode(False), torch.no_grad():
                state = copy.deepcopy(state, {id(state["model"]): state["model"]})
        vars(self).update(state)

    def __copy__(self) -> Episode:
        raise TypeError(
            "Episode: copy.copy would share the history's memory; use copy.deepcopy, which shares the model"
        )

    @_apart
    def __deepcopy__(self, memo: dict) -> Episode:
        memo.setdefault(id(self.model), self.model)
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    # ---- requests ----

    @_apart
    def propose(
        self,
        *,
        want: str = "both",
        video_noise: Tensor | None = None,
        action_noise: Tensor | None = None,
        clean_video: Tensor | None = None,
        clean_action: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Candidate:
        """Denoise the chunk that comes next. What was accepted stays as it is.

        Args:
            want: ``"both"``, ``"video"`` or ``"action"``: what the caller needs. What nothing needs is not computed.
            video_noise: ``[B, C, chunk, y, x]`` to start from; default drawn from ``generator``.
            action_noise: ``[B, chunk, n, A]``; default drawn from ``generator``, after the video's.
            clean_video: ``[B, C, 1, y, x]``, the frame that the actions should reach; for inverse dynamics alone.
            clean_action: ``[B, 1, n, A]``, the actions whose outcome is asked for; for forward dynamics alone.
            generator: Draws the noise that is not given; both streams' always, so ``want`` does not change the numbers.

        Returns:
            The chunk, with every stream that was resolved or given.

        Raises:
            ValueError: ``want`` that does not fit the objective; a tensor that is missing, mis-shaped or on the CPU and
                not finite; or a chunk on the CPU that is not finite.
        """
        self._check_model("propose")
        self._check_request(want, clean_video, clean_action)
        if generator is not None:
            instance("propose: generator", generator, torch.Generator)
        loops = stages(self.config.program, self.goal, want)
        denoised = {stream for stage in loops for stream in stage.denoised}
        starts = {
            VIDEO: self._start_of(VIDEO, VIDEO in denoised, video_noise, clean_video, generator),
            ACTION: self._start_of(ACTION, ACTION in denoised, action_noise, clean_action, generator),
        }
        if self._stale:
            self._recompute()
        for stream, start in starts.items():
            if start is not None:
                self._chunk[stream].copy_(self._here(start))
        for stage in loops:
            self._pass(stage.slots, NOISY).aim(self.next_frame, [self.chunk_size] * self._batch)
            self._step.zero_()
            loop = self._loop(stage)
            for _ in range(self.config.steps):
                loop()
            if stage.promoted is not None:
                promotion = self._pass((stage.promoted,), CLEAN)
                promotion.aim(self.next_frame, [self.chunk_size] * self._batch)
                promotion.run()
        done = denoised | {s for stage in loops for s in stage.slots}
        for s in done:
            where = f"propose: {STREAMS[s]} of the chunk at frames {self.next_frame}"
            _check_finite(where, self._chunk[s], hint="; are there such numbers in the weights, or do they overflow?")
        chunk = (self._chunk[s].clone() if s in done else None for s in (VIDEO, ACTION))
        return Candidate(*chunk, moment=self._moment)

    @_apart
    def accept(self, candidate: Candidate) -> None:
        """The predicted chunk becomes history, until an observation replaces it.

        Raises:
            ValueError: a candidate of another episode or of an earlier moment of this one; one that lacks a stream or
                was changed to another shape, or to numbers on the CPU that are not finite.
        """
        self._check_model("accept")
        instance("accept: candidate", candidate, Candidate)
        if candidate.moment != self._moment:
            raise ValueError(
                "accept: candidate must continue the episode as it is now, got one of an earlier moment or of another "
                "episode; propose again"
            )
        if candidate.video is None or candidate.action is None:
            lacks = "video" if candidate.video is None else "action"
            raise ValueError(
                f"accept: candidate must have video and action, got no {lacks}; propose with want='both', or observe"
            )
        frames = {VIDEO: candidate.video, ACTION: candidate.action}
        for s, t in frames.items():
            self._expect(f"accept: candidate.{STREAMS[s]}", t, s, self.chunk_size)
            _check_finite(f"accept: candidate.{STREAMS[s]}", t)
        self._append(frames, [self.chunk_size] * self._batch)

    @_apart
    def observe(
        self,
        video: Tensor,
        action: Tensor,
        *,
        frames: int | Sequence[int] | None = None,
        first_frame: int | Sequence[int] | None = None,
    ) -> None:
        """What was really executed and seen becomes history.

        It follows the last observed frame and replaces every prediction after it: of the executed interval because the
        truth is known, of the rest because it was not executed. The next chunk begins after it, so its chunk
        grid starts there, wherever the predicted chunks began.

        Args:
            video: ``[B, C, K, y, x]`` latents of the frames ``observed`` and following.
            action: ``[B, K, n, A]``, the actions that led to each.
            frames: How many of the K frames each rollout brings, or all of them; 0 leaves that rollout alone,
                predictions included. Default K for all.
            first_frame: The frame, of each rollout or of all, that the caller takes the first one for. Give it where
                observations can come late, twice or not at all.

        Raises:
            ValueError: shapes that do not fit; frames on the CPU that are not finite; an observation that was there
                already or that has a gap before it; or the history before it has left the rings.
        """
        self._check_model("observe")
        K = video.shape[2] if getattr(video, "ndim", 0) == 5 else -1
        self._expect("observe: video", video, VIDEO, K)
        self._expect("observe: action", action, ACTION, K)
        counts = self._each("observe: frames", K if frames is None else frames)
        if max(counts) > K or not max(counts):
            raise ValueError(f"observe: frames must be numbers from 0 to K={K}, not all 0, got {counts}")
        for s, t in ((VIDEO, video), (ACTION, action)):
            _check_finite(f"observe: {STREAMS[s]}", t, s, counts)
        given = [None] * self._batch if first_frame is None else self._each("observe: first_frame", first_frame)
        for b, count in enumerate(counts):
            if not count:
                continue
            known, reached = self.observed[b], self.next_frame[b]
            if given[b] is not None and given[b] != known:
                what = "was observed already" if given[b] < known else "has a gap before it"
                raise ValueError(
                    f"observe: first_frame[{b}] must be {known}, the frame after the last observed one, "
                    f"got {given[b]}, which {what}"
                )
            if reached - self.cache.frames > max(known - self._reach, 0):
                raise ValueError(
                    f"observe: rollout {b} was predicted to frame {reached}, so the history before frame {known} has "
                    f"left the cache; restart it, or raise RolloutConfig.lookahead, now {self.config.lookahead} chunks"
                )
        self._replace({VIDEO: video, ACTION: action}, counts)

    @_apart
    def restart(self, rollouts: Sequence[int], observation: Tensor, text: Tensor) -> None:
        """Begin anew with some rollouts of the batch; the others go on.

        Args:
            rollouts: Which, from 0 to B - 1; the tensors are in this order.
            observation: ``[len(rollouts), C, 1, y, x]``.
            text: ``[len(rollouts), L, text_dim]``; L as at the start.

        Raises:
            ValueError: rollouts that do not exist or repeat, shapes that do not fit, or numbers on the CPU that are not
                finite.
        """
        self._check_model("restart")
        rollouts = wholes("restart: rollouts", rollouts, 0)
        if len(set(rollouts)) != len(rollouts) or not set(rollouts) <= set(range(self._batch)) or not rollouts:
            raise ValueError(f"restart: rollouts must be different numbers from 0 to {self._batch - 1}, got {rollouts}")
        instance("restart: observation", observation, Tensor)
        instance("restart: text", text, Tensor)
        shape = [len(rollouts), *_with_frames(VIDEO, self._chunk[VIDEO].shape, 1)[1:]]
        if list(observation.shape) != shape:
            raise ValueError(f"restart: observation must have shape {shape}, got {list(observation.shape)}")
        want = [len(rollouts), self._text_length, self.model.config.text_dim]
        if list(text.shape) != want:
            raise ValueError(f"text must have shape [B, L, text_dim] = {want}, got {list(text.shape)}")
        _check_finite("observation", observation)
        _check_finite("text", text)
        self._set_text(rollouts, text)
        # no action leads to frame 0: its slots are never a key
        video, action = (torch.zeros_like(t.narrow(FRAME_DIM[s], 0, 1)) for s, t in self._chunk.items())
        for b, frame in zip(rollouts, self._here(observation), strict=True):
            video[b].copy_(frame)
        for b in rollouts:
            self.next_frame[b] = self.observed[b] = 0
        self._replace({VIDEO: video, ACTION: action}, [int(b in rollouts) for b in range(self._batch)])

    @_apart
    def accepted(self, rollout: int = 0) -> tuple[Tensor, Tensor]:
        """Copies of the accepted frames that are still held: video ``[C, T, y, x]`` and actions ``[T, n, A]``.

        They are the T frames before ``next_frame``, which are all that the next chunk can see.
        """
        rollout = whole("accepted: rollout", rollout, 0, self._batch - 1)
        end = self.next_frame[rollout]
        places = torch.arange(max(end - self._reach, 0), end, device=self.model.device) % self.cache.frames
        video, action = (self._accepted[s][rollout] for s in (VIDEO, ACTION))
        return video[:, places], action[places]

    # ---- transitions ----

    def _append(self, frames: dict[int, Tensor], counts: list[int]) -> None:
        """``counts[b]`` further frames of each rollout, chunk by chunk."""
        longest, frames = max(counts), {s: self._here(t) for s, t in frames.items()}
        for first in range(0, longest, self.chunk_size):
            size = min(self.chunk_size, longest - first)
            now = [min(max(n - first, 0), self.chunk_size) for n in counts]
            piece = {s: t.narrow(FRAME_DIM[s], first, size) for s, t in frames.items()}
            if self.config.cache == "persistent":
                self._remember(piece, self.next_frame, now, [self._first_seen(f) for f in self.next_frame])
            for s, t in piece.items():
                for b, count in enumerate(now):
                    for i in range(count):
                        self._held(s, b, self.next_frame[b] + i).copy_(t[b].select(FRAME_DIM[s] - 1, i))
            self.next_frame = [f + n for f, n in zip(self.next_frame, now, strict=True)]
            self._moment = uuid.uuid4()
        self._stale = self.config.cache == "recomputed"

    def _replace(self, frames: dict[int, Tensor], counts: list[int]) -> None:
        """Observed frames in place of all predictions of the rollouts that bring any."""
        before = self.next_frame
        self.next_frame = anew = [o if n else f for f, o, n in zip(before, self.observed, counts, strict=True)]
        try:
            self._append(frames, counts)
        except BaseException:
            if self.next_frame is anew:
                # no frame was replaced
                self.next_frame = before
            raise
        self.observed = [f if n else o for f, o, n in zip(self.next_frame, self.observed, counts, strict=True)]

    def _remember(self, frames: dict[int, Tensor], firsts: list[int], counts: list[int], seen_from: list[int]) -> None:
        """Compute the keys and values of clean frames, and put them into the rings."""
        for s, t in frames.items():
            self._chunk[s].narrow(FRAME_DIM[s], 0, t.shape[FRAME_DIM[s]]).copy_(t)
        work = self._pass(self._history_streams, CLEAN)
        work.aim(firsts, counts, seen_from)
        work.run()
        self.cache.keep(self._history_streams, firsts, counts)

    def _recompute(self) -> None:
        """All keys and values that the next chunk sees, as if its window were the whole episode."""
        lows = [self._first_seen(f) for f in self.next_frame]
        for back in range(self._reach, 0, -self.chunk_size):
            firsts = [max(f - back, low) for f, low in zip(self.next_frame, lows, strict=True)]
            ends = [max(f - back + self.chunk_size, low) for f, low in zip(self.next_frame, lows, strict=True)]
            counts = [end - first for first, end in zip(firsts, ends, strict=True)]
            if not max(counts):
                continue
            frames = {s: torch.zeros_like(t) for s, t in self._chunk.items()}
            for s, t in frames.items():
                for b, (first, count) in enumerate(zip(firsts, counts, strict=True)):
                    for i in range(count):
                        t[b].select(FRAME_DIM[s] - 1, i).copy_(self._held(s, b, first + i))
            self._remember(frames, firsts, counts, lows)
        self._stale = False

    def _held(self, stream: int, rollout: int, frame: int) -> Tensor:
        """Where an accepted frame of a rollout lies, a view."""
        return self._accepted[stream][rollout].select(FRAME_DIM[stream] - 1, frame % self.cache.frames)

    def _set_text(self, rollouts: list[int], text: Tensor) -> None:
        """Text keys and values of every block, once an episode. With guidance the second half has none."""
        text = torch.zeros_like(text) if self.goal.conditional else text
        text = torch.cat([text, torch.zeros_like(text)]) if self._guided else text
        fresh = self.model.embed_text(self._here(text), keys_values=True)
        if self._text is None:
            # all rollouts at once, in order: from start
            self._text = fresh
            return
        for old, new in zip(self._text, fresh, strict=True):
            for old_stream, new_stream in zip(old, new, strict=True):
                for old_tensor, new_tensor in zip(old_stream, new_stream, strict=True):
                    for i, b in enumerate(rollouts):
                        old_tensor[b].copy_(new_tensor[i])
                        if self._guided:
                            old_tensor[self._batch + b].copy_(new_tensor[len(rollouts) + i])

    # ---- passes ----

    def _geometry(self, start: int, seen: int) -> Geometry:
        """The frames from ``start``, ``seen`` of them history, then a chunk, as one packed sample."""
        return geometry_for(
            self.config.program,
            self.goal,
            frames=seen + self.chunk_size,
            video_tokens=self._grid[0] * self._grid[1],
            action_tokens=self.model.config.actions_per_frame,
            chunk_size=self.chunk_size,
            window=self._window,
            history=self.config.history,
            start=start,
            chunk_origin=start + seen,
        )

    def _first_seen(self, frame: int) -> int:
        """First frame that a chunk beginning with ``frame`` may see."""
        return max(frame - self._reach, 0)

    def _pass(self, streams: tuple[int, ...], noise: int) -> _Pass:
        streams = tuple(sorted(streams))
        if (streams, noise) not in self._passes:
            self._passes[streams, noise] = _Pass(self, streams, noise)
        return self._passes[streams, noise]

    def _loop(self, stage: Stage) -> Callable[[], None]:
        """One denoising step of a stage; on a GPU a CUDA graph, captured once and replayed from then on."""
        if stage not in self._loops:
            work = self._pass(stage.slots, NOISY)

            def step() -> None:
                now = {s: self._sigmas[s].index_select(0, self._step) for s in stage.denoised}
                flows = work.flows(stage.denoised, now)
                for s in stage.denoised:
                    after = self._sigmas[s].index_select(0, self._step + 1)
                    self._chunk[s] += flows[s].to(after.dtype) * (after - now[s])
                self._step += 1

            changed = [self._step, *(self._chunk[s] for s in stage.denoised)]
            graphs = self.config.cuda_graphs and self.model.device.type == "cuda"
            self._loops[stage] = _replayed(step, self.model.device, changed) if graphs else step
        return self._loops[stage]

    def _here(self, tensor: Tensor) -> Tensor:
        """``tensor`` on the model's device, without waiting: from pageable memory a copy may wait for the GPU."""
        if self.model.device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(self.model.device, non_blocking=True)

    # ---- checks ----

    def _check_memory(self, samples: int, tokens: int) -> None:
        """Refuse rings that cannot fit, before anything is allocated: a window may have meant "everything"."""
        config, c, device = self.config, self.model.config, self.model.device
        frames = self._reach + (config.lookahead + 2) * self.chunk_size
        slot = 2 * c.layers * c.inner * self.model.dtype.itemsize
        needed, there = frames * tokens * slot * samples * self._batch, memory(device)
        if needed > there:
            raise ValueError(
                f"start: RolloutConfig with window={config.window}, chunk_size={config.chunk_size} and "
                f"lookahead={config.lookahead} keeps {frames} frames, whose keys and values take {needed:.3g} bytes, "
                f"more than the {there:.3g} of {device}; for a history of n chunks use window=2 * n"
            )

    def _each(self, name: str, given: int | Sequence[int]) -> list[int]:
        """A number of each rollout; one number stands for all."""
        if not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0:
            return [whole(name, given, 0)] * self._batch
        numbers = wholes(name, given, 0)
        if len(numbers) != self._batch:
            raise ValueError(f"{name} must be a number or {self._batch} of them, got {len(numbers)}")
        return numbers

    def _check_request(self, want: str, clean_video: Tensor | None, clean_action: Tensor | None) -> None:
        goal = self.goal
        if want not in WANTS:
            raise ValueError(f"propose: want must be one of {WANTS}, got {want!r}")
        for name, clean, needed in (
            ("clean_video", clean_video, not goal.video),
            ("clean_action", clean_action, not goal.action),
        ):
            if needed != (clean is not None):
                expected, got = ("a tensor", "None") if needed else ("None", "a tensor")
                raise ValueError(f"propose: {name} must be {expected} for objective {goal.name!r}, got {got}")
        if want in ("video", "action") and not getattr(goal, want):
            raise ValueError(f"propose: want must be 'both' or what objective {goal.name!r} denoises, got {want!r}")

    def _start_of(self, stream, denoised, noise, clean, generator) -> Tensor | None:
        """What a stream's noisy slot starts from: the given clean tensor, the given noise, or drawn noise."""
        name, shape = STREAMS[stream], list(self._chunk[stream].shape)
        drawn = None
        if generator is not None and noise is None:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device=generator.device)
        if clean is not None:
            self._expect(f"propose: clean_{name}", clean, stream, self.chunk_size)
            _check_finite(f"propose: clean_{name}", clean)
            return clean
        if noise is not None:
            self._expect(f"propose: {name}_noise", noise, stream, self.chunk_size)
            _check_finite(f"propose: {name}_noise", noise)
            return noise
        if drawn is None and denoised:
            raise ValueError(f"propose: {name}_noise must be a tensor {shape} where no generator is given, got None")
        return drawn

    def _check_model(self, call: str) -> None:
        model, kept = self.model, self.cache.buffer
        if model.dtype != kept.dtype or model.device != kept.device:
            raise ValueError(
                f"{call}: model must be {kept.dtype} on {kept.device}, as the episode's keys and values are, got "
                f"{model.dtype} on {model.device}; start an episode after the model was moved or cast"
            )

    def _expect(self, name: str, tensor: Tensor, stream: int, frames: int) -> None:
        instance(name, tensor, Tensor)
        expected = _with_frames(stream, self._chunk[stream].shape, frames)
        if frames < 1 or list(tensor.shape) != expected:
            expected[FRAME_DIM[stream]] = frames if frames > 0 else "at least 1 frame"
            raise ValueError(f"{name} must have shape {expected}, got {list(tensor.shape)}")


def _check_finite(
    name: str, tensor: Tensor, stream: int = VIDEO, counts: Sequence[int] | None = None, hint: str = ""
) -> None:
    """A tensor on the CPU is finite, of each rollout its first ``counts[b]`` frames; one on a GPU is not looked at."""
    if tensor.device.type != "cpu" or tensor.isfinite().all():
        return
    frames = tensor.isfinite().movedim(FRAME_DIM[stream], 1).flatten(2).all(2).tolist()
    counts = [tensor.shape[FRAME_DIM[stream]]] * len(frames) if counts is None else counts
    bad = [b for b, (row, count) in enumerate(zip(frames, counts, strict=True)) if not all(row[:count])]
    if bad:
        raise ValueError(f"{name} must be finite, got NaN or infinity in samples {bad}{hint}")


class _Pass:
    """The forward of one chunk's tokens over the cache: which streams, noisy or clean. All its inputs stay in place.

    Built once; :meth:`aim` points it at a frame of each rollout, :meth:`run` fills the chunk's slots, and
    :meth:`flows` also gives what the heads say.
    """

    def __init__(self, episode: Episode, streams: tuple[int, ...], noise: int) -> None:
        self.episode, self.streams, self.noise = episode, streams, noise
        cache, model = episode.cache, episode.model
        device, c = model.device, model.config
        self.rows, self.slots = cache.rows(streams), cache.chunk_slots(streams, noise)
        self.queries = torch.empty(cache.batch, sum(self.rows), c.heads, c.head_dim, dtype=model.dtype, device=device)
        self.ranges = torch.zeros(cache.batch, len(streams), MAX_RANGES, 2, dtype=torch.int32, device=device)
        self.rope: list[Tensor | None] = [None, None]
        # held here, because a captured graph reads their memory
        self.indices: list[FrameIndex | None] = [None, None]
        dtype = torch.promote_types(model.dtype, torch.float32)
        for stream, rows in zip(streams, self.rows, strict=True):
            self.rope[stream] = torch.empty(cache.batch, rows, c.head_dim // 2, 2, dtype=dtype, device=device)
        self.frames = torch.arange(cache.chunk_size, device=device)
        self.zero = torch.zeros(1, dtype=episode._chunk[VIDEO].dtype, device=device)

    def aim(self, firsts: Sequence[int], counts: Sequence[int], seen_from: Sequence[int] | None = None) -> None:
        """At the chunks that begin with frames ``firsts`` and have ``counts`` frames, of each rollout.

        They see no frame before ``seen_from``; default the window's first.
        """
        e, model = self.episode, self.episode.model
        starts = [e._first_seen(f) for f in firsts] if seen_from is None else list(seen_from)
        seen = [f - s for f, s in zip(firsts, starts, strict=True)]
        copies = e.cache.batch // len(firsts)
        geometries = [e._geometry(s, n) for s, n in zip(starts, seen, strict=True)]
        table = e.cache.ranges(
            *(list(x) * copies for x in (geometries, starts, seen, counts)), self.streams, self.noise
        )
        self.ranges.copy_(e._here(table))
        frames = e._here(torch.tensor(list(firsts) * copies, device="cpu"))[:, None] + self.frames
        video, action = (frames if s in self.streams else None for s in (VIDEO, ACTION))
        for kept, table in zip(self.rope, model.rope(video, *e._grid, action), strict=True):
            if kept is not None:
                kept.copy_(table)

    def run(self) -> None:
        """Keys and values of the chunk's clean tokens, at timestep 0, into its slots."""
        self._forward({}, ())

    def flows(self, denoised: Sequence[int], sigma: dict[int, Tensor]) -> dict[int, Tensor]:
        """Flow of each denoised stream at its noise level ``[1]``; a stream that is given stays at timestep 0."""
        e = self.episode
        done = self._forward(sigma, denoised)
        flows = e.model.flows(done, e.chunk_size, *e._grid)
        flows = {s: flows[s] for s in denoised}
        if e._guided:
            halves = {s: flow.chunk(2) for s, flow in flows.items()}
            flows = {s: without + e.config.guidance * (text - without) for s, (text, without) in halves.items()}
        return flows

    def _forward(self, sigma: dict[int, Tensor], wanted: Sequence[int]) -> tuple:
        e, model, cache = self.episode, self.episode.model, self.episode.cache

        def inputs(stream: int) -> tuple[Tensor | None, Tensor | None]:
            if stream not in self.streams:
                return None, None
            x, s = e._chunk[stream], sigma.get(stream, self.zero)
            x = torch.cat([x, x]) if e._guided else x
            return x, timesteps(s).expand(cache.batch, e.chunk_size)

        def slots(layer: int) -> Slots:
            return Slots(self.queries, cache.keys(layer)[:, self.slots], cache.values(layer)[:, self.slots])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # k and v stand in the cache already
            return cached_attention(q, cache.keys(layer), cache.values(layer), self.ranges, group_rows=self.rows)

        streams = model.embed(*inputs(VIDEO), *inputs(ACTION))
        self.indices = [None if s is None else s.index for s in streams]
        return model.packed_block_stack(streams, Exact(*self.rope), e._text, attend, slots, wanted)


def _with_frames(stream: int, shape: Sequence[int], frames: int) -> list[int]:
    """``shape`` with so many frames."""
    shape = list(shape)
    shape[FRAME_DIM[stream]] = frames
    return shape


def _replayed(step: Callable[[], None], device: torch.device, changed: Sequence[Tensor]) -> Callable[[], None]:
    """``step`` as a CUDA graph that is captured at the first call.

    Args:
        step: Reads and writes tensors that stay where they are, and never waits for the device.
        device: Where they are.
        changed: The tensors whose values it changes.
    """
    graph: torch.cuda.CUDAGraph | None = None

    def replay() -> None:
        nonlocal graph
        if graph is None:
            # kernels compile and libraries set up in a run that does not count
            before = [t.clone() for t in changed]
            captured, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream(device).wait_stream(side)
            for t, value in zip(changed, before, strict=True):
                t.copy_(value)
            # on a stream of this device: the default one of torch.cuda.graph belongs to whichever captured first
            with torch.cuda.graph(captured, stream=side):
                step()
            graph = captured
        graph.replay()

    return replay
