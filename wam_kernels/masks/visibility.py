"""Who attends to whom: the one predicate that every mask, plan and kernel of this library answers to.

A sample is described by a :class:`Geometry`; :func:`tokens` lists its tokens with integer attributes, and
:func:`visible` decides one (query, key) pair from those attributes alone. Plans compute the same relation as
key intervals (``wam_kernels.plan``) and are tested against this file; this file is tested against masks
recorded from OpenWAM (``tests/golden/visibility.json``).

Terms: a *chunk* is the group of latent frames denoised together; an *order block* is one stream of one chunk,
``2 * chunk + rank``, in the order in which the program resolves the streams; the *window* counts order blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from ..runtime.checks import MAX_INT, integer
from .programs import ACTION, VIDEO, Attends, InteractionProgram
from .registry import PROGRAMS, interaction_program

HISTORIES = ("full", "video_only", "video_queries_video_only")
CONDITIONAL_HISTORIES = ("previous_boundary_video_only",)

NOISY, CLEAN = 0, 1
# The four segments of a sample in packed order, each (stream, noise).
SEGMENTS = ((VIDEO, NOISY), (VIDEO, CLEAN), (ACTION, NOISY), (ACTION, CLEAN))


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """One sample of a packed sequence ``[V_noisy | V_clean | A_noisy | A_clean]``, frame-major in each segment.

    Args:
        program: Interaction program, one of ``PROGRAMS``. Generalist joint denoising uses ``"joint"``.
        video_frames: Latent frames of each video segment, an external prefix included.
        video_tokens: Tokens of one video frame.
        action_frames: Frames of each action segment (a prefix has no actions); may differ from ``video_frames``.
        action_tokens: Action tokens of one frame.
        chunk_size: Frames of one chunk. From 2^31 - 1 on there is no limit, as for the window.
        window: Largest distance of a query's order block and its key's; two order blocks make a chunk.
        history: Which earlier clean tokens a query attends to, one of ``HISTORIES``.
        chunk_origin: First frame of chunk 0. 1 makes frame 0 chunk -1: the observed start-up frame.
        prefix_frames: Leading video frames that are an external clean prefix.
        singleton_frame: Queries at or after this frame attend to no key before it (``None``: no such cut).
        conditional_history: ``"previous_boundary_video_only"`` limits history to the clean video of the last
            frame before the query's chunk; ``None`` leaves ``history`` in charge.
        startup_action_frames: Leading action frames that no action reaches; their tokens query but are never keys.

    Raises:
        ValueError: an unknown name or a number outside its range; the message names the field.

    Source: the packed coupling profile of OpenWAM, recorded in ``tests/golden/visibility.json``.
    """

    program: str
    video_frames: int
    video_tokens: int
    action_frames: int
    action_tokens: int
    chunk_size: int
    window: int
    history: str = "full"
    chunk_origin: int = 0
    prefix_frames: int = 0
    singleton_frame: int | None = None
    conditional_history: str | None = None
    startup_action_frames: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("program", PROGRAMS),
            ("history", HISTORIES),
            ("conditional_history", (None, *CONDITIONAL_HISTORIES)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"Geometry: {name} must be one of {tuple(choices)}, got {getattr(self, name)!r}")
        least = {"video_frames": 0, "video_tokens": 1, "action_frames": 0, "action_tokens": 1, "chunk_size": 1}
        least |= {"window": 1, "prefix_frames": 0, "startup_action_frames": 0}
        least |= {"chunk_origin": -MAX_INT, "singleton_frame": -MAX_INT}
        for name, low in least.items():
            value = getattr(self, name)
            if name == "singleton_frame" and value is None:
                continue
            if name in ("chunk_size", "window"):
                # beyond all tokens the number makes no difference, so sums of it need not fit either
                value = min(integer("Geometry", name, value, low, most=None), MAX_INT)
            object.__setattr__(self, name, integer("Geometry", name, value, low))
        for name, most in (
            ("prefix_frames", self.video_frames),
            ("startup_action_frames", self.action_frames),
        ):
            if getattr(self, name) > most:
                raise ValueError(f"Geometry: {name} must be at most {most}, got {getattr(self, name)}")
        if self.length > MAX_INT:
            raise ValueError(f"Geometry: a sample must have at most {MAX_INT} tokens, got {self.length}")

    @property
    def segment_lengths(self) -> tuple[int, int, int, int]:
        """Tokens of V_noisy, V_clean, A_noisy, A_clean."""
        video, action = self.video_frames * self.video_tokens, self.action_frames * self.action_tokens
        return video, video, action, action

    @property
    def length(self) -> int:
        """Tokens of the whole sample."""
        return sum(self.segment_lengths)

    @property
    def key_length(self) -> int:
        """Every token is a query and a key."""
        return self.length

    @property
    def interaction(self) -> InteractionProgram:
        """The row of the program, or what an external prefix makes of it."""
        row = interaction_program(self.program)
        return row.prefixed if self.prefix_frames else row

    def chunk_of(self, frame):
        """Chunk of a target frame (int or integer array), the singleton cut included."""
        chunk = (frame - self.chunk_origin) // self.chunk_size + bool(self.prefix_frames)
        if self.singleton_frame is None:
            return chunk
        s = self.singleton_frame
        of_s = (s - self.chunk_origin) // self.chunk_size + bool(self.prefix_frames)
        # a frame before s that would share the chunk of s moves to the chunk before
        return chunk - ((frame < s) & (chunk == of_s))

    def frames(self, stream: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``(frame, chunk, block)`` of every frame of a stream, int64 ``[frames]`` each.

        Frames count from the first target frame; all prefix frames share one number below the targets.
        """
        if stream == ACTION:
            frame = np.arange(self.action_frames)
            chunk = self.chunk_of(frame)
            return frame, chunk, 2 * chunk + self.interaction.rank[ACTION]
        p, s = self.prefix_frames, self.singleton_frame
        frame = np.arange(self.video_frames) - p
        in_prefix = frame < 0
        frame = np.where(in_prefix, -1 if s is None else s - 1, frame)
        prefix_chunk = 0 if s is None else self.chunk_of(max(0, s - 1))
        chunk = np.where(in_prefix, prefix_chunk, self.chunk_of(frame))
        return frame, chunk, 2 * chunk + self.interaction.rank[VIDEO]

    def boundary_frame(self, chunk):
        """Last frame before a chunk: all the history that ``previous_boundary_video_only`` leaves."""
        return self.chunk_origin + (chunk - bool(self.prefix_frames)) * self.chunk_size - 1


@dataclass(frozen=True, eq=False)
class Tokens:
    """Integer attributes of tokens, ``[n]`` each; indexing indexes every attribute."""

    stream: np.ndarray
    noise: np.ndarray
    frame: np.ndarray
    chunk: np.ndarray
    block: np.ndarray
    is_key: np.ndarray  # bool; False: a start-up action token, which queries but is never a key

    def __getitem__(self, index) -> Tokens:
        return Tokens(*(getattr(self, field.name)[index] for field in fields(self)))


def tokens(geometry: Geometry) -> Tokens:
    """Attributes of all ``geometry.length`` tokens, in packed order."""
    parts = []
    for stream, noise in SEGMENTS:
        # action frames count from 0, so the start-up test below reads the frame itself
        per_frame = geometry.action_tokens if stream == ACTION else geometry.video_tokens
        frame, chunk, block = (np.repeat(a, per_frame) for a in geometry.frames(stream))
        is_key = (stream == VIDEO) | (frame >= geometry.startup_action_frames)
        parts.append((np.full(frame.size, stream), np.full(frame.size, noise), frame, chunk, block, is_key))
    return Tokens(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def visible(geometry: Geometry, q: Tokens, k: Tokens) -> np.ndarray:
    """May query token ``q`` attend to key token ``k`` of the same sample? Broadcasts; returns bool.

    Plain integer arithmetic and logic, so the attributes may be NumPy arrays or torch tensors.
    """
    row = geometry.interaction
    q_clean, k_clean = q.noise == CLEAN, k.noise == CLEAN

    if geometry.conditional_history is not None:
        history = (k.stream == VIDEO) & (k.frame == geometry.boundary_frame(q.chunk))
    elif geometry.history == "video_only":
        history = k.stream == VIDEO
    elif geometry.history == "video_queries_video_only":
        history = (q.stream == k.stream) | (q.stream == ACTION)
    else:
        history = True
    history = (k.chunk < q.chunk) & history

    def holds(relation: Attends) -> np.ndarray | bool:
        any_pair = False
        for query, key in relation.pairs:
            any_pair = any_pair | ((q.stream == query) & (k.stream == key))
        return any_pair

    clean_keys = (q_clean & holds(row.clean_to_clean)) | (~q_clean & holds(row.noisy_to_clean))
    same_chunk = q.chunk == k.chunk
    found = k_clean & (history | (same_chunk & clean_keys))
    found = found | (~k_clean & ~q_clean & same_chunk & holds(row.noisy_to_noisy))
    found = found & k.is_key & (abs(q.block - k.block) <= geometry.window)
    if geometry.singleton_frame is not None:
        found = found & ~((q.frame >= geometry.singleton_frame) & (k.frame < geometry.singleton_frame))
    return found


def dense_mask(geometry: Geometry) -> np.ndarray:
    """The predicate on every pair, bool ``[length, length]``: for tests, pictures and the reference backend."""
    t = tokens(geometry)
    return visible(geometry, t[:, None], t[None, :])
