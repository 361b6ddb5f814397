"""The sizes of a chunk and of its history, and which of the history a chunk attends to."""

from __future__ import annotations

from wam_kernels import Attends, Geometry, StreamingCache
from wam_kernels.masks.visibility import ACTION, VIDEO

from ..config import ModelConfig
from ..model.dual_expert import WorldActionModel
from ..objectives import MODEL_PROGRAMS, Objective, geometry_for
from ..runtime.checks import memory
from .config import CONDITIONAL_CHUNK, CONDITIONAL_WINDOW, RolloutConfig, check_full_attention
from .stages import stages


def frames_of_chunk(config: RolloutConfig, objective: Objective, full_attention: bool) -> int:
    """Frames of a chunk: one of the conditional objectives, but for a model with ``full_attention``."""
    return CONDITIONAL_CHUNK if objective.conditional and not full_attention else config.chunk_size


class ChunkLayout:
    """What follows from a config, an objective and the tokens of a frame alone.

    Args:
        config: Program, chunk, window and what is kept.
        objective: Which streams are denoised and which are given.
        batch: Rollouts.
        grid: Rows and columns of a frame's video tokens.
        action_tokens: Of a frame; 0 where the model has no actions.
        context_tokens: Those that every token attends to.
        state_tokens: Those of the state, to which the noisy tokens of the chunk alone attend.
        full_attention: Whether the frame before a chunk and the context attend to the chunk: nothing is cached.

    Raises:
        ValueError: ``full_attention`` with a config of rollouts over a longer history, or of another program.

    Attributes:
        streams: Those that there are.
        chunk_size: Frames of a chunk.
        ring_frames: Accepted frames that are held: of the window and of what may be taken back.
        window: In order blocks.
        reach: Frames of history that a chunk attends to, at most.
        guided: Whether a forward is a batch of two: first all rollouts with their text, then all without.
        samples: Batch of a forward.
        history_streams: The streams whose clean tokens history needs.
        clean_candidates: Whether a later stage attends to clean tokens of its own chunk.
    """

    def __init__(
        self, config: RolloutConfig, objective: Objective, batch: int, grid: tuple[int, int], action_tokens: int,
        context_tokens: int = 0, state_tokens: int = 0, full_attention: bool = False,
    ) -> None:  # fmt: skip
        if full_attention:
            check_full_attention("start: RolloutConfig", config)
        # of one frame behind one frame, as they were trained
        conditional = objective.conditional and not full_attention
        self.full_attention, self.state_tokens = full_attention, state_tokens
        self.config, self.objective = config, objective
        self.batch, self.grid, self.action_tokens, self.context_tokens = batch, grid, action_tokens, context_tokens
        self.streams = (VIDEO, ACTION) if action_tokens else (VIDEO,)
        self.chunk_size = frames_of_chunk(config, objective, full_attention)
        # one that reaches the frame before the chunk
        self.window = CONDITIONAL_WINDOW if conditional or config.cache == "last_frame" else config.window
        self.guided = any(config.guidance_of(s) != 1 for s in self.streams) and not objective.conditional
        self.samples = 2 * batch if self.guided else batch
        # A query of the stream that is resolved first attends to its other stream one order block further back: half a
        # chunk, if the window is odd. OpenWAM's rollouts cut that off.
        order_blocks = self.window + 1 if config.cache == "persistent" else self.window
        self.reach = 1 if config.cache == "last_frame" else order_blocks // 2 * self.chunk_size
        self.ring_frames = self.reach + config.lookahead * self.chunk_size
        # Where later chunks attend to video alone, clean actions matter only to the clean video of their own chunk, in
        # programs in which that attends to them.
        video_only = conditional or config.history == "video_only"
        through_video = Attends.VIDEO_TO_ACTION in MODEL_PROGRAMS[config.program].clean_to_clean
        self.history_streams = (VIDEO,) if video_only and not through_video else self.streams
        loops = stages(config.program, objective, "both", self.streams)
        self.clean_candidates = any(stage.promoted is not None for stage in loops)

    def first_visible(self, frame: int) -> int:
        """First frame that a chunk beginning with ``frame`` may attend to."""
        return max(frame - self.reach, 0)

    def geometry(self, start: int, history: int) -> Geometry:
        """``history`` frames, the first of them frame ``start``, and the chunk after them, as one packed sample."""
        if self.config.cache == "last_frame":
            start = 0  # whose actions nobody attends to
        return geometry_for(
            self.config.program,
            self.objective,
            frames=history + self.chunk_size,
            video_tokens=self.grid[0] * self.grid[1],
            action_tokens=self.action_tokens,
            chunk_size=self.chunk_size,
            window=self.window,
            history=self.config.history,
            start=start,
            chunk_origin=start + history,
        )

    @property
    def cached_frames(self) -> int:
        """Those of the rings, and the chunk at work twice, clean and noisy."""
        return self.ring_frames + 2 * self.chunk_size

    def cache_bytes(self, c: ModelConfig, itemsize: int) -> int:
        """Of the keys and values that :meth:`new_cache` allocates for a model of ``c``."""
        if self.full_attention:
            return 0
        token = 2 * c.layers * c.inner * itemsize
        frames = self.cached_frames
        if self.config.candidates > 1:
            frames += self.config.candidates * self.chunk_size * (1 + self.clean_candidates)
        tokens = frames * (self.grid[0] * self.grid[1] + self.action_tokens) + self.context_tokens + self.state_tokens
        return tokens * token * self.samples

    def new_cache(self, model: WorldActionModel) -> StreamingCache:
        """Keys and values of the window and of what may be taken back, in the model's dtype, on its device.

        Raises:
            ValueError: they exceed the device's memory; nothing was allocated. A window may have meant "everything".
        """
        c, config = model.config, self.config
        needed, frames = self.cache_bytes(c, model.dtype.itemsize), self.cached_frames
        available = memory(model.device)
        if needed > available:
            raise ValueError(
                f"start: RolloutConfig with window={config.window}, chunk_size={config.chunk_size} and "
                f"lookahead={config.lookahead} keeps {frames} frames, whose keys and values take {needed:.3g} bytes, "
                f"more than the {available:.3g} of {model.device}; for a history of n chunks use window=2 * n"
            )
        return StreamingCache(
            layers=c.layers,
            batch=self.samples,
            heads=c.heads,
            head_dim=c.head_dim,
            video_tokens=self.grid[0] * self.grid[1],
            action_tokens=self.action_tokens,
            chunk_size=self.chunk_size,
            frames=self.ring_frames,
            context_tokens=self.context_tokens,
            noisy_context_tokens=self.state_tokens,
            candidates=config.candidates,
            clean_candidates=self.clean_candidates,
            dtype=model.dtype,
            device=model.device,
        )
