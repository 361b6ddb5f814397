"""How chunks are generated."""

from __future__ import annotations

from dataclasses import dataclass

from wam_kernels import HISTORIES

from ..flow import ACTION_SHIFT, SHIFTS, TRAIN_TIMESTEPS, VIDEO_SHIFT
from ..objectives import GJD, MODEL_PROGRAMS, OBJECTIVES
from ..runtime.checks import check_field, choice, number, switch, whole
from .stages import stages

CACHES = ("persistent", "recomputed")
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
        steps: Denoising steps of a stage, at most 1000.
        video_shift: Shift of the video's noise levels, from 0.001 to 1000.
        action_shift: Shift of the actions' noise levels, likewise.
        guidance: Strength g of classifier-free guidance, ``flow(no text) + g (flow(text) - flow(no text))``; 1 is none
            and costs nothing, else every forward is a batch of two.
        cache: What frames that have left the window leave behind. ``"persistent"``: the keys of the frames in it were
            computed when those were visible, and stay; equals a packed forward over the whole episode, as in
            training. ``"recomputed"``: before each chunk the window is computed anew, as if the episode began with
            it; equals a packed forward over the window, as in OpenWAM's rollouts, and costs a forward for each chunk
            of the window.
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
        check_field(self, "program", _program_with_rollout)
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


def _program_with_rollout(where: str, value: object) -> str:
    program = choice(where, value, MODEL_PROGRAMS)
    try:
        stages(program, OBJECTIVES["joint"], "both")
    except ValueError as error:
        others = tuple(name for name, row in MODEL_PROGRAMS.items() if row.has_rollout)
        raise ValueError(f"{where} must be one that has a rollout, as {others}, got {program!r}; {error}") from None
    return program
