"""Geometries for tests: one per reason, and a random one for anything else."""

from hypothesis import strategies as st

from wam_kernels import HISTORIES, PROGRAMS, Geometry
from wam_kernels.masks.visibility import CONDITIONAL_HISTORIES


def small(program: str = "joint", **changes) -> Geometry:
    """A few chunks, uneven tokens, a start-up frame: small enough for float64 dense references."""
    fields = dict(
        program=program, video_frames=6, video_tokens=5, action_frames=6, action_tokens=2, chunk_size=2, window=4,
        history="video_only", chunk_origin=1, startup_action_frames=1,
    )  # fmt: skip
    return Geometry(**(fields | changes))


def libero(
    chunk_size: int, window: int, frames: int = 68, program: str = "joint", history: str = "video_only"
) -> Geometry:
    """Two views of 128 x 128: 32 video tokens and 4 actions a frame."""
    return Geometry(
        program=program, video_frames=frames, video_tokens=32, action_frames=frames, action_tokens=4,
        chunk_size=chunk_size, window=window, history=history,
    )  # fmt: skip


@st.composite
def geometries(draw) -> Geometry:
    """Everything a Geometry can say, small."""
    prefix = draw(st.sampled_from([0, 0, 1, 2, 3]))
    action_frames = draw(st.integers(0, 9))
    return Geometry(
        program=draw(st.sampled_from(tuple(PROGRAMS))),
        video_frames=prefix + draw(st.integers(0, 9)),
        video_tokens=draw(st.integers(1, 9)),
        action_frames=action_frames,
        action_tokens=draw(st.integers(1, 5)),
        chunk_size=draw(st.integers(1, 4)),
        window=draw(st.integers(1, 10)),
        history=draw(st.sampled_from(HISTORIES)),
        chunk_origin=draw(st.integers(-3, 4)),
        prefix_frames=prefix,
        singleton_frame=draw(st.sampled_from([None, None, 0, 1, 2, 5])),
        conditional_history=draw(st.sampled_from([None, None, *CONDITIONAL_HISTORIES])),
        startup_action_frames=draw(st.integers(0, min(2, action_frames))),
    )
