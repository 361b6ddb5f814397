"""Where a rollout begins: a model and a config start episodes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from wam_kernels.masks.visibility import VIDEO

from ..bridge import rolls_out
from ..config import ModelConfig
from ..model.dual_expert import WorldActionModel
from ..objectives import GJD, OBJECTIVES
from ..runtime.checks import choice, instance
from .config import RolloutConfig, check_full_attention
from .episode import Episode
from .modes import in_plain_mode


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

    @in_plain_mode
    def start(
        self,
        observation: Tensor,
        text: Tensor,
        *,
        objective: str = "joint",
        context: Mapping[str, Tensor] | None = None,
        state: Tensor | None = None,
        bridge: Tensor | None = None,
    ) -> Episode:
        """A batch of episodes after one observed frame each.

        Args:
            observation: ``[B, C, 1, y, x]`` latents of frame 0.
            text: ``[B, L, text_dim]`` raw embeddings.
            objective: ``"joint"``, or with GJD also ``"forward_dynamics"`` and ``"inverse_dynamics"``: text zeroed,
                and one frame a chunk but for a model with ``full_attention``.
            context: Features ``[B, N, E]`` of each given stream that is made of features, by name.
            state: ``[B, 1, S]``, the robot's state at frame 0, for a model with ``state_dim``.
            bridge: ``[B, N, bridge_dim]``, for a model that has one and no ``bridge_layer``, until
                :meth:`Episode.set_bridge` gives another.

        Raises:
            TypeError: an observation or text that is no tensor.
            ValueError: shapes that do not fit the model or each other, numbers on the CPU that are not finite, an
                objective that the program lacks, or a window whose keys and values exceed the device's memory.
        """
        c, program = self.model.config, self.config.program
        if c.full_attention:
            check_full_attention("start: RolloutConfig", self.config)
        possible = [name for name, o in OBJECTIVES.items() if rolls_out(c, program, o)]
        if not possible:
            raise ValueError(
                f"start: RolloutConfig.program must resolve the video before the actions for bridge_sigma="
                f"{c.bridge_sigma}, as video_then_action does, got {program!r}"
            )
        if c.bridge_layer is not None and c.bridge_sigma < 1 and self.config.trajectory(VIDEO).end:
            raise ValueError(
                f"start: RolloutConfig.video must be denoised to the end for bridge_sigma={c.bridge_sigma}, got "
                f"{self.config.video}"
            )
        if c.bridge_layer is not None and c.bridge_sigma < 1 and self.config.history == "full":
            raise ValueError(
                "start: RolloutConfig.history must be video_only or video_queries_video_only for bridge_sigma="
                f"{c.bridge_sigma}: the video must not attend to actions, which know what it comes to, got 'full'"
            )
        choice(f"start with program {program}: objective", objective, possible if program == GJD else ("joint",))
        if c.state_tokens and self.config.reuse_chunk is not None:
            raise ValueError(
                "start: RolloutConfig.reuse_chunk must be None for a model with state_tokens, whose state is not "
                f"among the tokens that it compares, got {self.config.reuse_chunk}"
            )
        instance("start: observation", observation, Tensor)
        instance("start: text", text, Tensor)
        if observation.ndim != 5 or observation.shape[1:3] != (c.latent_channels, 1) or not observation.shape[0]:
            raise ValueError(
                f"start: observation must be [B >= 1, {c.latent_channels}, 1, y, x], got {list(observation.shape)}"
            )
        self.model.token_grid(*observation.shape[-2:])
        episode = Episode(self.model, self.config, OBJECTIVES[objective], observation, text, context or {})
        episode.restart(range(observation.shape[0]), observation, text, context, state, bridge)
        return episode
