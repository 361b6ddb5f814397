"""Model sizes: frozen dataclasses, one function per size, JSON in and out.

A model is a list of streams around one attention (``ModelConfig.streams``): video, action where there is one, and
whatever further ones give context. Everything that depends on how many there are is a loop over that list: blocks
(``model/blocks.py``), embeddings and text (``model/streams.py``), the packed forward, plans, rollouts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from wam_kernels.qk_norm_rope.table import default_split
from wam_kernels.runtime.checks import identifier

from .runtime.checks import check_field, choice, number, switch, whole, wholes
from .runtime.json_fields import from_fields
from .runtime.limits import LARGEST_SIZE

TOPOLOGIES = ("dual_expert", "parallel_stream", "video_only")
STATE_STREAM = "proprioception"  # of the tokens of ``ModelConfig.state_tokens``


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One kind of tokens of a model, and the expert that they run through.

    Args:
        name: An identifier.
        width: Of its tokens between the blocks.
        ffn: Feed-forward width of its expert.
        features: Numbers that a token is made of, by one linear map; 0 for learned tokens.
        tokens: How many learned tokens there are, such as registers or queries; 0 where they are made of features.
        aligned: Numbers of an embedding that each token is read out to behind the last block, to be trained towards
            one that is known later, such as of a future frame; 0 for none.
        expert: Name of the stream whose expert the tokens run through; default its own.

    Raises:
        ValueError: a value of the wrong type or outside its range; the message names the field.
    """

    name: str
    width: int
    ffn: int
    features: int = 0
    tokens: int = 0
    aligned: int = 0
    expert: str = ""

    def __post_init__(self) -> None:
        identifier("Stream", self.name)
        if self.name in ("text", "state", "task", "episode"):
            raise ValueError(f"Stream: name must not be one of a batch's other entries, got {self.name!r}")
        for name, low in (("width", 1), ("ffn", 1), ("features", 0), ("tokens", 0), ("aligned", 0)):
            check_field(self, name, whole, low, LARGEST_SIZE)
        if bool(self.features) == bool(self.tokens):
            raise ValueError(
                f"Stream: {self.name} must have either features or tokens above 0, got features={self.features} and "
                f"tokens={self.tokens}"
            )
        object.__setattr__(self, "expert", self.expert or self.name)

    @property
    def owns_expert(self) -> bool:
        """Whether it has one of its own."""
        return self.expert == self.name


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a world-action model.

    All experts project into the same ``heads * head_dim`` wide attention, whatever their own width, so that the tokens
    of all streams attend to each other.

    Args:
        hidden: Width of the video expert.
        heads: Attention heads, of both experts.
        head_dim: Width of one head; even. Rope gives ``2 * (head_dim // 6)`` to row and to column, the rest to frame.
        layers: Blocks, of both experts.
        ffn: Feed-forward width of the video expert.
        action_hidden: Width of the action expert.
        action_ffn: Feed-forward width of the action expert.
        action_dim: Numbers in one action.
        actions_per_frame: Action tokens that lead from one latent frame to the next.
        latent_channels: Channels of a video latent.
        text_dim: Width of the raw text embeddings.
        patch: ``(frames, rows, columns)`` of latent pixels in one video token; frames must be 1.
        freq_dim: Width of the sinusoidal timestep embedding; even.
        rope_theta: Base of the rope frequencies.
        eps: Added to the variance in every norm.
        topology: ``"dual_expert"``; ``"parallel_stream"``, in which video and action share one expert, text and head
            (``action_hidden`` and ``action_ffn`` are then those of the video); or ``"video_only"``, without actions
            (the four sizes of actions then say nothing).
        context: Further streams, which are given and not denoised, such as a third expert's tokens or registers. One
            that shares an expert has its width and ffn.
        state_dim: Numbers of the robot's state that the action tokens of a chunk are told, that of the frame before the
            chunk: one linear map to ``hidden``, one from there to ``action_hidden`` where that differs, added to the
            tokens. 0 for none.
        state_tokens: Whether the state is a token of its own instead, one for each chunk, that runs through the expert
            of the actions: the noisy tokens of its chunk attend to it, and it to itself alone (DreamZero); with
            ``full_attention`` all to all (Motus).
        mode_token: Whether a learned token behind the text says which objective a sample has.
        bridge_dim: Numbers of one feature of another network, or of a layer of this one's video expert, that the action
            tokens cross-attend to beside the text; 0 for none. For ``"dual_expert"``.
        bridge_layer: Number of the block, from 0, after which this model's own video gives those features; None where
            the caller gives them. They are of the frame before a chunk, clean, and the chunk's frames, noised to
            ``bridge_sigma``, which attend to each other and to nothing else; ``bridge_dim`` is then ``hidden``.
        bridge_sigma: Noise level of these frames: at 1 they are the noise that a rollout begins with; below, a program
            must resolve the video before the actions, and the video must not attend to earlier actions, which would
            tell it what it comes to: ``history`` is ``"video_only"`` or ``"video_queries_video_only"``.

    Raises:
        ValueError: a value of the wrong type or outside its range; the message names the field.
    """

    hidden: int
    heads: int
    head_dim: int
    layers: int
    ffn: int
    action_hidden: int
    action_ffn: int
    action_dim: int
    actions_per_frame: int
    latent_channels: int = 48
    text_dim: int = 4096
    patch: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    rope_theta: float = 10000.0
    eps: float = 1e-6
    topology: str = "dual_expert"
    context: tuple[Stream, ...] = ()
    state_dim: int = 0
    mode_token: bool = False
    bridge_dim: int = 0
    bridge_layer: int | None = None
    bridge_sigma: float = 1.0
    full_attention: bool = False
    state_tokens: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int" and field.name not in _ADDED:
                check_field(self, field.name, whole, 1, 1000 if field.name == "layers" else LARGEST_SIZE)
        for name in ("head_dim", "freq_dim"):
            if getattr(self, name) % 2:
                raise ValueError(f"ModelConfig: {name} must be even, got {getattr(self, name)}")
        check_field(self, "patch", _patch)
        check_field(self, "rope_theta", number, 1, 1e12)
        check_field(self, "eps", number, 1e-12, 1)
        check_field(self, "topology", choice, TOPOLOGIES)
        check_field(self, "state_dim", whole, 0, LARGEST_SIZE)
        check_field(self, "bridge_dim", whole, 0, LARGEST_SIZE)
        check_field(self, "mode_token", switch)
        if self.bridge_dim and self.topology != "dual_expert":
            raise ValueError(
                f"ModelConfig: bridge_dim must be 0 without an action expert of its own, got {self.bridge_dim} with "
                f"topology={self.topology!r}"
            )
        if self.bridge_layer is not None:
            check_field(self, "bridge_layer", whole, 0, self.layers - 1)
            if self.bridge_dim != self.hidden:
                raise ValueError(
                    f"ModelConfig: bridge_dim must be hidden, {self.hidden}, with bridge_layer, got {self.bridge_dim}"
                )
        check_field(self, "bridge_sigma", number, 0, 1)
        check_field(self, "full_attention", switch)
        check_field(self, "state_tokens", switch)
        if self.state_tokens and not self.state_dim:
            raise ValueError("ModelConfig: state_dim must be at least 1 with state_tokens, got 0")
        if self.state_tokens and self.bridge_layer is not None:
            raise ValueError(
                "ModelConfig: bridge_layer must be None with state_tokens, which would attend to the features of one "
                f"chunk, got {self.bridge_layer}; leave state_tokens out, and the state is added to the actions"
            )
        if self.full_attention and self.bridge_layer is not None:
            raise ValueError(
                "ModelConfig: bridge_layer must be None with full_attention, in which no frame has features of its "
                f"own: all attend to the whole chunk; got {self.bridge_layer}"
            )
        if self.state_dim and not self.has_actions:
            raise ValueError(f"ModelConfig: state_dim must be 0 without actions to tell it, got {self.state_dim}")
        check_field(self, "context", _context)
        experts: dict[str, Stream] = {}
        for stream in self.streams:
            if [*(s.name for s in self.context), "video", "action"].count(stream.name) > 1:
                raise ValueError(f"ModelConfig: streams must have different names, got {stream.name!r} twice")
            own = experts.setdefault(stream.name, stream) if stream.owns_expert else experts.get(stream.expert)
            if own is None:
                raise ValueError(
                    f"ModelConfig: expert of stream {stream.name} must be its own or one of {tuple(experts)}, got "
                    f"{stream.expert!r}"
                )
            if (own.width, own.ffn) != (stream.width, stream.ffn):
                raise ValueError(
                    f"ModelConfig: stream {stream.name} must have the width and ffn of the expert {own.name}, "
                    f"{(own.width, own.ffn)}, got {(stream.width, stream.ffn)}"
                )

    @cached_property
    def streams(self) -> tuple[Stream, ...]:
        """Video, then action where there is one, then those that are given: in the order of their packed tokens."""
        shared = "video" if self.topology == "parallel_stream" else "action"
        video = Stream(name="video", width=self.hidden, ffn=self.ffn, features=self.patch_width)
        action = Stream(
            name="action", width=self.action_hidden, ffn=self.action_ffn, features=self.action_dim, expert=shared
        )
        denoised = (video,) if self.topology == "video_only" else (video, action)
        if not self.state_tokens:
            return *denoised, *self.context
        state = Stream(
            name=STATE_STREAM, width=action.width, ffn=action.ffn, features=self.state_dim, expert=action.expert
        )
        return *denoised, *self.context, state

    @property
    def given(self) -> tuple[Stream, ...]:
        """Those that are not denoised: of ``context``, and that of the state's tokens."""
        return self.streams[1 + self.has_actions :]

    @property
    def adds_state(self) -> bool:
        """Whether the state is added to the action tokens."""
        return bool(self.state_dim) and not self.state_tokens

    @property
    def has_actions(self) -> bool:
        """Whether there is an action stream, the second one."""
        return self.topology != "video_only"

    @property
    def inner(self) -> int:
        """Width of q, k and v: the same for both experts."""
        return self.heads * self.head_dim

    @property
    def patch_width(self) -> int:
        """Numbers in one video patch."""
        return self.latent_channels * self.patch[0] * self.patch[1] * self.patch[2]

    @property
    def matrices(self) -> int:
        """Numbers in the large matrices: of the blocks, of timesteps and text. Nearly all that the model has."""
        experts = [stream for stream in self.streams if stream.owns_expert]
        blocks = sum(8 * s.width * self.inner + 2 * s.width * s.ffn for s in experts)
        return self.layers * blocks + sum((7 * s.width + self.text_dim) * s.width for s in experts)

    @property
    def rope_split(self) -> tuple[int, int, int]:
        """Head dimensions of frame, row and column; each even."""
        return default_split(self.head_dim)

    def to_dict(self) -> dict:
        """A dict that ``json.dumps`` takes; fields that later versions added are in it where they say something."""
        held = asdict(self) | {"patch": list(self.patch), "context": [asdict(stream) for stream in self.context]}
        return {name: value for name, value in held.items() if name not in _ADDED or value != _ADDED[name]}

    @classmethod
    def from_dict(cls, values: Any, source: str = "ModelConfig") -> ModelConfig:
        """The inverse of :meth:`to_dict`; ``source`` says in messages where the values are from.

        Raises:
            ValueError: unknown or missing fields, by name, or a value that the class refuses.
        """
        if isinstance(values, dict):
            values = _ADDED | values
            if isinstance(values["context"], list):
                made = (
                    s if isinstance(s, Stream) else from_fields(Stream, s, f"{source}: context", defaults=True)
                    for s in values["context"]
                )
                values |= {"context": tuple(made)}
        return from_fields(cls, values, source)


# fields that older checkpoints lack, and what they mean there
_ADDED: dict[str, Any] = {
    "topology": "dual_expert",
    "context": [],
    "state_dim": 0,
    "mode_token": False,
    "bridge_dim": 0,
    "bridge_layer": None,
    "bridge_sigma": 1.0,
    "full_attention": False,
    "state_tokens": False,
}


def _context(where: str, value: Any) -> tuple[Stream, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(stream, Stream) for stream in value):
        raise ValueError(f"{where} must be a list of Stream, got {value!r}")
    return tuple(value)


def _patch(where: str, value: Any) -> tuple[int, ...]:
    patch = tuple(wholes(where, value, 1, 256))
    if len(patch) != 3 or patch[0] != 1:
        raise ValueError(f"{where} must be (1, rows, columns), got {value!r}")
    return patch


def golden_config() -> ModelConfig:
    """The size of ``tests/golden``."""
    return ModelConfig(
        hidden=64,
        heads=2,
        head_dim=32,
        layers=2,
        ffn=128,
        action_hidden=48,
        action_ffn=96,
        action_dim=7,
        actions_per_frame=2,
    )


def demo_config() -> ModelConfig:
    """About 3 million parameters: trains on a laptop-sized data set in minutes, with the word-level text slot."""
    return ModelConfig(
        hidden=128,
        heads=4,
        head_dim=32,
        layers=6,
        ffn=512,
        action_hidden=96,
        action_ffn=384,
        action_dim=7,
        actions_per_frame=4,
        text_dim=64,
    )


def wan_5b_config() -> ModelConfig:
    """A 5-billion video expert with a 2048 wide action expert."""
    return ModelConfig(
        hidden=3072,
        heads=24,
        head_dim=128,
        layers=30,
        ffn=14336,
        action_hidden=2048,
        action_ffn=8192,
        action_dim=7,
        actions_per_frame=4,
    )


def wan_5b_small_action_config() -> ModelConfig:
    """A 5-billion video expert with a 576 wide action expert."""
    return ModelConfig.from_dict(wan_5b_config().to_dict() | {"action_hidden": 576, "action_ffn": 2048})
