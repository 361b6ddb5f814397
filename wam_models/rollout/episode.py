"""Streaming rollout: denoise one chunk after the other; what is accepted becomes history, once.

    episode = engine.start(observation, text)        # one observed frame; all memory is allocated here
    candidate = episode.propose(generator=g)         # a chunk of video and actions; the episode is as it was
    episode.accept(candidate)                        # imagine on: the prediction becomes history
    episode.observe(video, action)                   # or act: what really happened becomes history

A denoising step runs the noisy tokens of its chunk and nothing else. A clean token never attends to a noisy one, so its
keys and values are computed once, by one forward when its chunk is accepted, and stay in the slots of a
:class:`wam_kernels.StreamingCache`; those of the text are computed once an episode. A chunk therefore costs the same
at the end of an hour as at the beginning, and equals the packed forward over the whole episode, which is what training
had.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from wam_kernels.masks.programs import STREAMS
from wam_kernels.masks.visibility import ACTION, VIDEO

from ..bridge import bridge_video
from ..flow import add_noise
from ..model.blocks import at_least_float32
from ..model.dual_expert import WorldActionModel
from ..objectives import Objective
from ..runtime.checks import instance, whole, wholes
from .candidates import Candidate
from .chunk_forward import ChunkForward
from .config import RolloutConfig
from .frames import FRAME_DIM, STATE, check_finite, to_device, with_frames
from .full_forward import FullForward
from .latent_ring import LatentRing
from .layout import ChunkLayout
from .modes import in_plain_mode
from .requests import (
    accepted_frames,
    check_context,
    check_continues,
    check_request,
    checked_committed,
    checked_state,
    context_tokens,
    initial_latents,
    observed_frames,
)
from .solver import Solver
from .stages import stages

_Given = tuple[tuple[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]  # noise, clean


class Episode:
    """A batch of B rollouts, each at a frame of its own. Made by :meth:`RolloutEngine.start`.

    A call that raises leaves what was accepted as it was. Not for several threads at once. The model keeps its dtype
    and device as long as the episode lasts: calls after ``model.half()`` or ``model.to(...)`` raise ValueError.

    To choose the best of N chunks, :meth:`propose_many` and accept the :func:`best` one. To look further ahead,
    :meth:`fork`: what is accepted then is taken back, and nothing is copied for it::

        candidates = episode.propose_many(generator=g)
        for candidate in candidates:
            with episode.fork():
                episode.accept(candidate)  # imagine on, and judge what comes of it
                later = episode.propose(generator=g)

    For branches that live side by side, ``copy.deepcopy`` gives an episode that shares nothing but the model, equal
    from there on, with a cache and CUDA graphs of its own. A candidate continues every episode whose history is the one
    that it was proposed for, so it may be given to copies that were made after it.

    A pickled episode holds its model.

    No number that is not finite becomes history or leaves as an action, as far as that can be told without waiting for
    a GPU: tensors on the CPU are checked, on their way in and out. Those on a GPU are not; look at actions when they
    are on the host, before a robot gets them. Such numbers stay in their own rollout until it is restarted, or with
    ``cache="recomputed"`` until they have left its window.

    Attributes:
        next_frame: For each rollout, the frame at which its next chunk begins.
        observed: For each rollout, the frame up to which its history was observed; the rest is predicted.
        chunk_size: Frames of a chunk: of the config, or 1 for a conditional objective.
        objective: Which streams are denoised and which are given.
        cache: Keys and values of its history; None of a model with ``full_attention``.
        ring: Its accepted frames.
        chunk: The chunk at work, noisy or clean: ``[B, C, chunk, y, x]`` and ``[B, chunk, n, A]``.
        layout, forward, solver: What computes a chunk.
        many: The solver of candidates, once there were any.
    """

    def __init__(
        self, model: WorldActionModel, config: RolloutConfig, objective: Objective, observation: Tensor, text: Tensor,
        context: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        c, batch = model.config, observation.shape[0]
        self.model, self.config, self.objective = model, config, objective
        grid = model.token_grid(*observation.shape[-2:])
        actions = c.actions_per_frame if c.has_actions else 0
        self.layout = ChunkLayout(
            config,
            objective,
            batch,
            grid,
            actions,
            context_tokens(model, context, batch),
            int(c.state_tokens),
            c.full_attention,
        )
        self.chunk_size = self.layout.chunk_size
        self.cache = None if c.full_attention else self.layout.new_cache(model)
        self._made_for = model.dtype, model.device
        dtype = at_least_float32(observation).dtype
        shapes = {VIDEO: observation.shape}
        if c.has_actions:
            shapes[ACTION] = torch.Size((batch, 1, c.actions_per_frame, c.action_dim))
        self.chunk = {
            s: torch.zeros(with_frames(s, shape, self.chunk_size), dtype=dtype, device=model.device)
            for s, shape in shapes.items()
        }
        states = {STATE: torch.zeros(batch, 1, c.state_dim, dtype=dtype, device=model.device)} if c.state_dim else {}
        self.ring = LatentRing(self.chunk | states, self.layout.ring_frames)  # the same places as their keys
        if c.full_attention:
            self.forward: ChunkForward = FullForward(model, self.layout, self.chunk)
        else:
            self.forward = ChunkForward(model, self.layout, self.cache, self.chunk)
        self.solver = Solver(self.forward, config)
        self.many: Solver | None = None
        self._text, self._bridge_length = text.clone(), cast(int | None, None)
        self._text_length = text.shape[1] if text.ndim == 3 else "L"
        self._moment = uuid.uuid4()
        self._stale = False  # the keys and values must be computed anew before they are read
        self._needed: list[int] | None = None  # in a fork: the first frame that each rollout needs after it

    @property
    def next_frame(self) -> list[int]:
        return self.ring.next_frame

    @property
    def observed(self) -> list[int]:
        return self.ring.observed

    # ---- copies ----

    def __setstate__(self, state: dict) -> None:
        if state["chunk"][VIDEO].is_inference():
            # loaded in inference mode: no later call in another mode could write to such tensors
            with torch.inference_mode(False), torch.no_grad():
                state = copy.deepcopy(state, {id(state["model"]): state["model"]})
        vars(self).update(state)

    def __copy__(self) -> Episode:
        raise TypeError(
            "Episode: copy.copy would share the history's memory; use copy.deepcopy, which shares the model"
        )

    @in_plain_mode
    def __deepcopy__(self, memo: dict) -> Episode:
        memo.setdefault(id(self.model), self.model)
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self) | {"_needed": None}, memo))
        return copied

    def __getstate__(self) -> dict:
        return vars(self) | {"_needed": None}  # a copy of a fork is an episode

    # ---- planning ----

    @contextmanager
    def fork(self) -> Iterator[Episode]:
        """Look ahead: what is accepted within the ``with`` block is taken back at its end, whatever ends it.

        In the block the episode proposes and accepts as ever; it cannot observe, begin anew or be told another bridge
        or context. Nothing is copied: what is accepted takes the places of frames that have left the window, of which
        there are ``RolloutConfig.lookahead`` chunks beyond the last observation. Forks may be nested.

        Returns:
            This episode, for ``with episode.fork() as branch``. Candidates from before the block are still good after
            it; those of chunks that were taken back are not.
        """
        outermost, ring, skipping = self._needed is None, self.ring, self.solver.skipping
        before = list(ring.next_frame), list(ring.observed), self._moment, self._stale
        known = None if skipping is None else skipping.state()
        if outermost:
            self._needed = [self.layout.first_visible(f) for f in self.observed]
        try:
            yield self
        finally:
            (ring.next_frame, ring.observed, moment, stale), accepted = before, self._moment != before[2]
            self._moment = moment
            # what was computed anew for the window of a chunk that is taken back is not that of this one
            anew = self.config.cache == "recomputed" or self.cache is None
            self._stale = stale or (accepted and anew)
            if skipping is not None and known is not None:
                skipping.restore(known)
            if outermost:
                self._needed = None

    def _refuse_in_fork(self, call: str) -> None:
        if self._needed is not None:
            raise ValueError(
                f"{call}: the episode must not be in a fork, which only proposes and accepts; leave the with block, or "
                "use copy.deepcopy"
            )

    # ---- requests ----

    @in_plain_mode
    def propose(
        self,
        *,
        want: str = "both",
        video_noise: Tensor | None = None,
        action_noise: Tensor | None = None,
        clean_video: Tensor | None = None,
        clean_action: Tensor | None = None,
        generator: torch.Generator | None = None,
        full: bool = False,
        committed: Tensor | None = None,
        committed_tokens: int | Sequence[int] | None = None,
    ) -> Candidate:
        """Denoise the chunk that comes next. What was accepted stays as it is.

        Args:
            want: ``"both"``, ``"video"`` or ``"action"``: what the caller needs. What nothing needs is not computed.
            video_noise: ``[B, C, chunk, y, x]`` to start from; default drawn from ``generator``.
            action_noise: ``[B, chunk, n, A]``; default drawn from ``generator``, after the video's.
            clean_video: ``[B, C, chunk, y, x]``, the frames that the actions should reach; for inverse dynamics alone.
            clean_action: ``[B, chunk, n, A]``, the actions whose outcome is asked for; for forward dynamics alone.
            generator: Draws the noise that is not given; both streams' always, so ``want`` does not change the numbers.
            full: Leave nothing out, whatever ``reuse_flow``, ``reuse_chunk`` and ``reuse_keys`` say: what their error
                is against.
            committed: ``[B, m, A]``, actions that are executed already or will be before this chunk is there, the first
                ones of it. They come out as they are, and the others follow from them: at every noise level they are
                what the denoising would have made of them, ``(1 - s) action + s noise``.
            committed_tokens: How many of the m action tokens each rollout holds fixed, or all of them; default m.

        Returns:
            The chunk, with every stream that was resolved or given.

        Raises:
            ValueError: ``want`` that does not fit the objective; a tensor that is missing, mis-shaped or on the CPU and
                not finite; or a chunk on the CPU that is not finite.
        """
        given = ((video_noise, action_noise), (clean_video, clean_action))
        held = checked_committed(self.objective, self.chunk, committed, committed_tokens)
        return self._propose(self.solver, want, [given], generator, full, held)[0]

    @in_plain_mode
    def propose_many(
        self,
        *,
        want: str = "both",
        video_noise: Sequence[Tensor] | None = None,
        action_noise: Sequence[Tensor] | None = None,
        clean_video: Sequence[Tensor] | None = None,
        clean_action: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Candidate]:
        """``RolloutConfig.candidates`` chunks at once, as so many calls of :meth:`propose` on end would give them.

        All read the one history where it is; only their own keys and values are kept for each. Choose with
        :func:`best`, accept one, and the others leave no trace.

        Args:
            want: As in :meth:`propose`.
            video_noise: Of each candidate, as there; or ``[k, B, C, chunk, y, x]``.
            action_noise: Likewise.
            clean_video: Likewise.
            clean_action: Likewise.
            generator: Draws what is not given, candidate after candidate.

        Raises:
            ValueError: as :meth:`propose` does; another number of tensors than candidates.
        """
        count, layer = self.config.candidates, self.model.config.bridge_layer
        if count > 1 and layer is not None:
            raise ValueError(
                f"propose_many: RolloutConfig.candidates must be 1 for a model with bridge_layer={layer}, which makes "
                f"a bridge of each chunk's own video, got {count}; propose one after the other"
            )
        if count == 1:
            solver = self.solver
        else:
            if self.many is None:
                chunk = {s: t.new_zeros(t.shape[0] * count, *t.shape[1:]) for s, t in self.chunk.items()}
                self.many = Solver(self.forward.of_candidates(chunk), self.config)
            solver = self.many
        named = {"video_noise": video_noise, "action_noise": action_noise}
        named |= {"clean_video": clean_video, "clean_action": clean_action}
        for name, tensors in named.items():
            if tensors is not None and len(tensors) != count:
                raise ValueError(
                    f"propose_many: {name} must be {count} tensors, one of each of RolloutConfig.candidates, got "
                    f"{len(tensors)}"
                )
        each = [[None if t is None else t[i] for t in named.values()] for i in range(count)]
        return self._propose(solver, want, [((v, a), (cv, ca)) for v, a, cv, ca in each], generator, False)

    def _propose(
        self, solver: Solver, want: str, given: Sequence[_Given], generator: torch.Generator | None, full: bool,
        committed: tuple[Tensor, Tensor] | None = None,
    ) -> list[Candidate]:  # fmt: skip
        """A candidate for each (noise, clean) in ``given``; ``committed`` as ``checked_committed`` gives it."""
        self._check_model("propose")
        video_stays = not self.solver.trajectories[VIDEO].forwards
        for noise, clean in given:
            check_request(self.objective, self.layout.streams, video_stays, want, noise, clean)
        if generator is not None:
            instance("propose: generator", generator, torch.Generator)
        own = self.model.config.bridge_layer is not None and want != "video"
        early = self.model.config.bridge_sigma == 1
        needed = "both" if own and not early else want
        loops = stages(self.config.program, self.objective, needed, self.layout.streams)
        denoised = {stream for stage in loops for stream in stage.denoised} | ({VIDEO} if own else set())
        starts = [
            {s: initial_latents(s, s in denoised, noise[s], clean[s], generator, t) for s, t in self.chunk.items()}
            for noise, clean in given
        ]
        if own and early:
            self._set_own_bridge(starts[0][VIDEO])
        if self._stale:
            self._recompute_history()
        # [B, k, ...]
        chunks = {s: t.unflatten(0, (-1, len(given))) for s, t in solver.forward.latents.items()}
        for i, of_candidate in enumerate(starts):
            for s, start in of_candidate.items():
                if start is not None:
                    level = solver.trajectories[s].levels[0].item() if s in denoised else 1.0
                    chunks[s][:, i].copy_(self._begun(s, to_device(start, self.model.device), level))
        holds = committed is not None
        if committed is not None:
            actions, which = (to_device(t, self.model.device) for t in committed)
            solver.hold(actions, to_device(cast(Tensor, starts[0][ACTION]), self.model.device), which)
        self._tell_state(self.next_frame, denoises=True)
        parts = [loops[:1], loops[1:]] if own and not early else [loops]
        ran = solver.denoise(parts[0], self.next_frame, full, holds)
        if own and not early:
            self._set_own_bridge(starts[0][VIDEO])
            if self._stale:  # so are the keys of earlier actions, which know the bridge of the chunk before
                held = {s: t.clone() for s, t in self.chunk.items()}
                self._recompute_history()
                for s, t in held.items():
                    self.chunk[s].copy_(t)
                self._tell_state(self.next_frame, denoises=True)
                solver.promote(loops[0], self.next_frame)
            ran = [a + b for a, b in zip(ran, solver.denoise(parts[1], self.next_frame, full, holds), strict=True)]
        left = {s: solver.level_left(stage, s) for stage in loops for s in stage.streams}
        candidates = []
        for i in range(len(given)):
            found = {s: chunks[s][:, i].clone() for s, level in left.items() if level is not None}
            for s, latents in found.items():
                where = f"propose: {STREAMS[s]} of the chunk at frames {self.next_frame}"
                check_finite(where, latents, hint="; are there such numbers in the weights, or do they overflow?")
            streams, level = (found.get(VIDEO), found.get(ACTION)), left.get(VIDEO) or 0.0
            candidates.append(Candidate(*streams, self._moment, level, tuple(ran[i :: len(given)])))
        return candidates

    @in_plain_mode
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
        frames = accepted_frames(candidate, self.chunk)
        lost = zip(self.next_frame, self._needed or (), strict=False)
        if any(f + self.chunk_size - self.ring.frames > needed for f, needed in lost):
            raise ValueError(
                f"accept: in a fork at most RolloutConfig.lookahead={self.config.lookahead} chunks beyond the last "
                "observation, whose history must stay; raise lookahead"
            )
        if STATE in self.ring.latents:  # the last one that is known
            states = [self.ring.frame(STATE, b, f - 1) for b, f in enumerate(self.next_frame)]
            frames[STATE] = torch.stack(states)[:, None].expand(-1, self.chunk_size, -1)
        self._append(frames, [self.chunk_size] * self.layout.batch, self.next_frame)

    @in_plain_mode
    def observe(
        self,
        video: Tensor,
        action: Tensor | None,
        *,
        frames: int | Sequence[int] | None = None,
        first_frame: int | Sequence[int] | None = None,
        state: Tensor | None = None,
    ) -> None:
        """What was really executed and observed becomes history.

        It follows the last observed frame and replaces every prediction after it: of the executed interval because the
        truth is known, of the rest because it was not executed. The next chunk begins after it, so its chunk
        grid starts there, wherever the predicted chunks began.

        Args:
            video: ``[B, C, K, y, x]`` latents of the frames ``observed`` and following.
            action: ``[B, K, n, A]``, the actions that led to each; None for a model that has none.
            frames: How many of the K frames each rollout brings, or all of them; 0 leaves that rollout alone,
                predictions included. Default K for all.
            first_frame: The frame, of each rollout or of all, that the caller takes the first one for. Give it where
                observations can come late, twice or not at all.
            state: ``[B, K, S]``, the robot's state at each frame, for a model with ``state_dim``.

        Raises:
            ValueError: shapes that do not fit; frames on the CPU that are not finite; an observation that was there
                already or that has a gap before it; or the history before it has left the rings.
        """
        self._refuse_in_fork("observe")
        self._check_model("observe")
        state_dim = self.model.config.state_dim
        observed, counts = observed_frames(self.chunk, video, action, state, state_dim, frames)
        check_continues(self.ring, self.layout, self.config.lookahead, counts, first_frame)
        self._append_observed(observed, counts)

    @in_plain_mode
    def restart(
        self,
        rollouts: Sequence[int],
        observation: Tensor,
        text: Tensor,
        context: Mapping[str, Tensor] | None = None,
        state: Tensor | None = None,
        bridge: Tensor | None = None,
    ) -> None:
        """Begin anew with some rollouts of the batch; the others go on.

        Args:
            rollouts: Which, from 0 to B - 1; the tensors are in this order.
            observation: ``[len(rollouts), C, 1, y, x]``.
            text: ``[len(rollouts), L, text_dim]``; L as at the start.
            context: Features ``[len(rollouts), N, E]`` of each given stream that has any; N as at the start.
            state: ``[len(rollouts), 1, S]``, for a model with ``state_dim``.
            bridge: ``[len(rollouts), N, bridge_dim]``, for a model that has one; N as at the start.

        Raises:
            ValueError: rollouts that do not exist or repeat, shapes that do not fit, or numbers on the CPU that are not
                finite.
        """
        self._refuse_in_fork("restart")
        self._check_model("restart")
        rollouts = wholes("restart: rollouts", rollouts, 0)
        batch = self.layout.batch
        if len(set(rollouts)) != len(rollouts) or not set(rollouts) <= set(range(batch)) or not rollouts:
            raise ValueError(f"restart: rollouts must be different numbers from 0 to {batch - 1}, got {rollouts}")
        instance("restart: observation", observation, Tensor)
        instance("restart: text", text, Tensor)
        shape = [len(rollouts), *with_frames(VIDEO, self.chunk[VIDEO].shape, 1)[1:]]
        if list(observation.shape) != shape:
            raise ValueError(f"restart: observation must have shape {shape}, got {list(observation.shape)}")
        want = [len(rollouts), self._text_length, self.model.config.text_dim]
        if list(text.shape) != want:
            raise ValueError(f"text must have shape [B, L, text_dim] = {want}, got {list(text.shape)}")
        check_finite("observation", observation)
        check_finite("text", text)
        context = dict(context or {})
        check_context(self.model, context, len(rollouts), self.layout.context_tokens)
        states = checked_state("restart", state, self.model.config.state_dim, len(rollouts), 1)
        self._set_text(rollouts, text, self._first_bridge(bridge, len(rollouts)))
        self.forward.set_context(rollouts, context)
        # no action leads to frame 0: its slots are never a key
        frames = {s: torch.zeros_like(t.narrow(FRAME_DIM[s], 0, 1)) for s, t in self.chunk.items()}
        for b, frame in zip(rollouts, to_device(observation, self.model.device), strict=True):
            frames[VIDEO][b].copy_(frame)
        for s, given in states.items():
            frames[s] = torch.zeros_like(self.ring.latents[s][:, :1])
            frames[s][list(rollouts)] = to_device(given, self.model.device).to(frames[s].dtype)
        self.ring.restart(rollouts)
        self._append_observed(frames, [int(b in rollouts) for b in range(batch)])

    @in_plain_mode
    def set_bridge(self, bridge: Tensor) -> None:
        """What the action tokens of all rollouts cross-attend to from now on, beside the text.

        Its keys and values are computed here, once for all denoising steps. Those of accepted chunks stay as they are.

        Args:
            bridge: ``[B, N, bridge_dim]``; N as at the start.
        """
        self._refuse_in_fork("set_bridge")
        self._check_model("set_bridge")
        instance("set_bridge: bridge", bridge, Tensor)
        self._first_bridge(bridge, self.layout.batch)
        self._set_text(range(self.layout.batch), self._text, bridge)

    @in_plain_mode
    def set_context(self, context: Mapping[str, Tensor]) -> None:
        """Features of the given streams of all rollouts from now on, such as those of the frame that is observed now.

        Keys and values of accepted chunks stay as they are with ``cache="persistent"`` alone.

        Args:
            context: ``[B, N, E]`` of each given stream that is made of features, by name; N as at the start.

        Raises:
            ValueError: streams that the model does not have, other shapes, or numbers on the CPU that are not finite.
        """
        self._refuse_in_fork("set_context")
        self._check_model("set_context")
        check_context(self.model, context, self.layout.batch, self.layout.context_tokens)
        self.forward.set_context(range(self.layout.batch), context)
        self._stale |= self.config.cache != "persistent"

    def _first_bridge(self, given: Tensor | None, rollouts: int) -> Tensor | None:
        """That of a new rollout: of a model that makes its own, room for it."""
        c, (rows, columns) = self.model.config, self.layout.grid
        if c.bridge_layer is None:
            return given
        if given is not None:
            raise ValueError(f"bridge must be None for a model with bridge_layer={c.bridge_layer}, which makes its own")
        return torch.zeros(rollouts, (1 + self.chunk_size) * rows * columns, c.bridge_dim)

    def _set_own_bridge(self, noise: Tensor | None) -> None:
        """Of the last frame and the chunk's, which are ``noise`` or, below the first level, what was denoised."""
        c, device = self.model.config, self.model.device
        started = to_device(cast(Tensor, noise), device).to(self.chunk[VIDEO].dtype)
        last = torch.stack([self.ring.frame(VIDEO, b, f - 1) for b, f in enumerate(self.next_frame)])[:, :, None]
        chunk = started if c.bridge_sigma == 1 else self.chunk[VIDEO]
        video = bridge_video(c, torch.cat([last, chunk], 2), torch.cat([last, started], 2))
        self.forward.set_text(range(self.layout.batch), self._text, video)
        self._stale |= self.config.cache != "persistent"

    def _set_text(self, rollouts: Sequence[int], text: Tensor, bridge: Tensor | None) -> None:
        if bridge is not None:
            check_finite("bridge", bridge[:, None])
            if self._bridge_length not in (None, bridge.shape[1]):
                raise ValueError(
                    f"bridge must have {self._bridge_length} features as at the start, got {bridge.shape[1]}"
                )
        if self.solver.skipping is not None:
            self.solver.skipping.forget(rollouts)
        self.forward.set_text(rollouts, text, bridge)
        self._bridge_length = None if bridge is None else bridge.shape[1]
        for b, new in zip(rollouts, text, strict=True):
            self._text[b].copy_(new)

    @in_plain_mode
    def accepted(self, rollout: int = 0) -> tuple[Tensor, Tensor | None]:
        """Copies of the accepted frames that are still held: video ``[C, T, y, x]`` and actions ``[T, n, A]``, if any.

        They are the T frames before ``next_frame``, which are all that the next chunk can attend to.
        """
        rollout = whole("accepted: rollout", rollout, 0, self.layout.batch - 1)
        held = self.ring.last(rollout, self.layout.first_visible(self.next_frame[rollout]))
        return held[VIDEO], held.get(ACTION)

    # ---- history ----

    def _append(self, frames: dict[int, Tensor], counts: list[int], starts: list[int]) -> None:
        """``counts[b]`` frames of each rollout become history from frame ``starts[b]`` on, chunk by chunk."""
        frames = {s: to_device(t, self.model.device) for s, t in frames.items()}
        for first in range(0, max(counts), self.chunk_size):
            size = min(self.chunk_size, max(counts) - first)
            now = [min(max(n - first, 0), self.chunk_size) for n in counts]
            chunk = {s: t.narrow(FRAME_DIM[s], first, size) for s, t in frames.items()}
            if self.config.cache == "persistent":
                self._tell_state(starts)
                self.forward.write_history(chunk, starts, now)
            starts = self.ring.write(chunk, starts, now)
            self._moment = uuid.uuid4()
        if self.solver.skipping is not None:
            self.solver.skipping.remember_chunk()
        self._stale = self.config.cache != "persistent"

    def _append_observed(self, frames: dict[int, Tensor], counts: list[int]) -> None:
        """As :meth:`_append`, in place of all predictions of the rollouts that bring any frame."""
        now = zip(self.next_frame, self.observed, counts, strict=True)
        self._append(frames, counts, [known if count else reached for reached, known, count in now])
        self.ring.mark_observed(counts)

    def _recompute_history(self) -> None:
        """All keys and values that the next chunk attends to, as if its window were the whole episode.

        Of a model with ``full_attention`` the frame that runs with the chunk.
        """
        if isinstance(self.forward, FullForward):
            for b, first in enumerate(self.next_frame):
                self.forward.observed[b, :, 0].copy_(self.ring.frame(VIDEO, b, first - 1))
            self._stale = False
            return
        lows = [self.layout.first_visible(f) for f in self.next_frame]
        for back in range(self.layout.reach, 0, -self.chunk_size):
            firsts = [max(f - back, low) for f, low in zip(self.next_frame, lows, strict=True)]
            ends = [max(min(f - back + self.chunk_size, f), low) for f, low in zip(self.next_frame, lows, strict=True)]
            counts = [end - first for first, end in zip(firsts, ends, strict=True)]
            if max(counts):
                self._tell_state(firsts)
                self.forward.write_history(
                    self.ring.read(firsts, counts, self.chunk_size), firsts, counts, visible_from=lows
                )
        self._stale = False

    def _tell_state(self, firsts: Sequence[int], denoises: bool = False) -> None:
        """The next chunk to run begins with these frames: it is told the state of the frame before."""
        if self.forward.state is not None:
            states = {b: self.ring.frame(STATE, b, max(first - 1, 0)) for b, first in enumerate(firsts)}
            self.forward.set_state(states, denoises)

    def _begun(self, stream: int, noise: Tensor, level: float) -> Tensor:
        """What a chunk of so much noise begins as: below level 1 there is the last accepted frame under it."""
        if level == 1:
            return noise
        lasts = [self.ring.frame(stream, b, f - 1) for b, f in enumerate(self.next_frame)]
        return add_noise(torch.stack(lasts).unsqueeze(FRAME_DIM[stream]), noise, noise.new_tensor(level))

    def _check_model(self, call: str) -> None:
        model, (dtype, device) = self.model, self._made_for
        if model.dtype != dtype or model.device != device:
            raise ValueError(
                f"{call}: model must be {dtype} on {device}, as the episode's keys and values are, got "
                f"{model.dtype} on {model.device}; start an episode after the model was moved or cast"
            )
