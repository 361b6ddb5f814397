"""How chunks are generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wam_kernels import HISTORIES, Attends
from wam_kernels.masks.visibility import VIDEO

from ..flow import ACTION_SHIFT, SHIFTS, TRAIN_TIMESTEPS, VIDEO_SHIFT
from ..objectives import GJD, MODEL_PROGRAMS, OBJECTIVES
from ..runtime.checks import check_field, choice, number, switch, whole
from ..runtime.json_fields import from_fields
from .schedule import Schedule, Trajectory, trajectory
from .stages import stages

CACHES = ("persistent", "recomputed", "last_frame")
# The conditional objectives denoise one frame at a time, over one frame of history.
CONDITIONAL_CHUNK, CONDITIONAL_WINDOW = 1, 3


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How chunks are generated.

    Args:
        program: ``"generalist_joint_denoising"`` or one of ``wam_kernels.PROGRAMS``.
        chunk_size: Frames of a chunk.
        window: In order blocks, two a chunk; a chunk attends to the ``window // 2`` chunks before it.
        history: Which earlier clean tokens a query attends to, one of ``wam_kernels.HISTORIES``.
        steps: Denoising steps of a stream, at most 1000, unless its schedule has a number of its own.
        video: Solver, steps and noise levels of the video; a :class:`Schedule`, or its fields.
        action: The same of the actions, which must be denoised to the end.
        video_shift: Shift of the video's noise levels, from 0.001 to 1000.
        action_shift: Shift of the actions' noise levels, likewise.
        guidance: Strength g of classifier-free guidance, ``flow(no text) + g (flow(text) - flow(no text))``, of a
            stream whose schedule has none of its own; 1 is none. Unless both streams have none, which costs nothing,
            every forward is a batch of two.
        cache: What frames that have left the window leave behind. ``"persistent"``: the keys of the frames in it were
            computed when those were visible, and stay; equals a packed forward over the whole episode, as in
            training. ``"recomputed"``: before each chunk the window is computed anew, as if the episode began with
            it; equals a packed forward over the window, as in OpenWAM's rollouts, and costs a forward for each chunk
            of the window. ``"last_frame"``: the same of the frame before the chunk alone, whatever the window: each
            chunk is the first of an episode that begins with that frame, as of a policy that is given one observation
            (Fast-WAM). Models with ``full_attention`` have no other; they keep no keys, and the frame runs with the
            chunk in every forward.
        interleave: In a stage of both streams, the one of fewer steps takes them evenly among the other's, and between
            two of them stays as it was at the first; else it takes them in the first forwards.
        reuse_keys: In a stage of both streams, one that takes no step at a forward does not run, and the other attends
            to its last keys and values, which come from an earlier state of the other. Changes nothing where the
            program has it attend to itself alone.
        reuse_flow: Cosine from -1 to 1 of the flows of two successive forwards, from which on the next forward is left
            out and the last flow used again; None: never. See ``wam_models/rollout/skipping.py``.
        reuse_chunk: Relative change, at least 0, against the same forward of the last chunk, up to which what the
            blocks added there is added again: of the tokens that enter, and of what the blocks add in the first
            forward; None: never. Not with ``candidates``. A chunk that leaves forwards out is no CUDA graph, because
            the host asks after each forward.
        candidates: Chunks that :meth:`Episode.propose_many` proposes at once from one history; the cache has room for
            the keys and values of so many.
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
    video: Schedule = Schedule()
    action: Schedule = Schedule()
    video_shift: float = VIDEO_SHIFT
    action_shift: float = ACTION_SHIFT
    guidance: float = 1.0
    cache: str = "persistent"
    interleave: bool = False
    reuse_keys: bool = False
    reuse_flow: float | None = None
    reuse_chunk: float | None = None
    candidates: int = 1
    lookahead: int = 1
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        check_field(self, "program", _program_with_rollout)
        check_field(self, "history", choice, HISTORIES)
        check_field(self, "cache", choice, CACHES)
        check_field(self, "chunk_size", whole, 1)
        # a window of 1 would hide the chunk before: no frame of history
        check_field(self, "window", whole, 2)
        check_field(self, "steps", whole, 1, TRAIN_TIMESTEPS)
        for name in ("video", "action"):
            check_field(self, name, _schedule)
        if self.action.stop or self.action.steps == 0:
            raise ValueError(
                "RolloutConfig: action must have stop=0 and at least 1 step, because no robot must get actions that "
                f"are noise, got {self.action}"
            )
        for name, bounds in (("reuse_flow", (-1, 1)), ("reuse_chunk", (0,))):
            if getattr(self, name) is not None:
                check_field(self, name, number, *bounds)
        check_field(self, "candidates", whole, 1)
        if self.reuse_chunk is not None and self.candidates > 1:
            raise ValueError(
                f"RolloutConfig: reuse_chunk must be None with candidates={self.candidates}, of which only one becomes "
                f"history, got {self.reuse_chunk}"
            )
        check_field(self, "lookahead", whole, 1)
        check_field(self, "video_shift", number, *SHIFTS)
        check_field(self, "action_shift", number, *SHIFTS)
        check_field(self, "guidance", number, 0)
        for name in ("interleave", "reuse_keys", "cuda_graphs"):
            check_field(self, name, switch)

    @property
    def skips(self) -> bool:
        """Whether forwards may be left out."""
        return self.reuse_flow is not None or self.reuse_chunk is not None

    def trajectory(self, stream: int) -> Trajectory:
        """What the loop runs of a stream."""
        shift = self.video_shift if stream == VIDEO else self.action_shift
        return trajectory(self.schedule(stream), self.steps, shift)

    def schedule(self, stream: int) -> Schedule:
        """That of a stream."""
        return self.video if stream == VIDEO else self.action

    def guidance_of(self, stream: int) -> float:
        """Strength of a stream's guidance."""
        own = self.schedule(stream).guidance
        return self.guidance if own is None else own


def check_full_attention(where: str, config: RolloutConfig) -> None:
    """Whether a model with ``full_attention`` can be rolled out like that.

    Raises:
        ValueError: it cannot; the message names the field.
    """
    if config.cache != "last_frame":
        raise ValueError(
            f"{where}: cache must be 'last_frame' for a model with full_attention, whose chunk has the frame before it "
            f"and no other history, got {config.cache!r}"
        )
    if config.reuse_keys:
        raise ValueError(
            f"{where}: reuse_keys must be False for a model with full_attention, which keeps no keys, got True"
        )
    if MODEL_PROGRAMS[config.program].noisy_to_noisy != Attends.ALL:
        dense = tuple(name for name, row in MODEL_PROGRAMS.items() if row.noisy_to_noisy == Attends.ALL)
        raise ValueError(
            f"{where}: program must be one in which noisy tokens attend to all noisy ones for a model with "
            f"full_attention, {dense}, got {config.program!r}"
        )


def _schedule(where: str, value: object) -> Schedule:
    if isinstance(value, Mapping):  # as JSON has it
        return from_fields(Schedule, dict(value), where, defaults=True)
    if not isinstance(value, Schedule):
        raise ValueError(f"{where} must be a Schedule, got {value!r}")
    return value


def _program_with_rollout(where: str, value: object) -> str:
    program = choice(where, value, MODEL_PROGRAMS)
    try:
        stages(program, OBJECTIVES["joint"], "both")
    except ValueError as error:
        others = tuple(name for name, row in MODEL_PROGRAMS.items() if row.has_rollout)
        raise ValueError(f"{where} must be one that has a rollout, as {others}, got {program!r}; {error}") from None
    return program
