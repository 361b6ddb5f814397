"""The key layouts of other systems, as data: a row says which module of theirs is which of ours.

Letters in a row: ``#`` is the number of a block. A row names a module, or a parameter, and stands for all that lies
under it; the longest row that fits counts. Rows run both ways. What a system has and our model has no place for is an
:class:`Absent` row, with the reason: nothing is left out unless it is named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_BLOCKS = "packed_block_stack.packed_blocks.#."
_VIDEO, _ACTION = _BLOCKS + "video_block", _BLOCKS + "action_block"
PATCHES = "core.patch_embedding_mlp.weight"
STATE = "core.proprio_hidden_context_encoder.proj.weight"

_NUMBER = re.compile(r"(?<=blocks\.)\d+(?=\.)")


@dataclass(frozen=True)
class Absent:
    """A part of another system that our model has no place for.

    Args:
        part: Its name: what ``without`` takes.
        keys: Modules or parameters, with ``#`` for the number of a block, or beginnings of their names.
        why: What it is, for messages.
        runs: Whether the system ever runs it; what it does not is left out without being asked.
    """

    part: str
    keys: tuple[str, ...]
    why: str
    runs: bool = True


@dataclass(frozen=True)
class Layout:
    """The keys of one system.

    Args:
        name: What a user calls it.
        system: For messages.
        rows: Their module to ours.
        absent: What our model has no place for.
        prefixes: ``{"core.": "visual_tower."}``: names of ours that begin so are written behind that; read with or
            without it.
        topology: Of our models that have a place for its actions.
        convolution: Whether the patch embedding is a convolution, whose stride is its kernel, in place of a linear map.
        file: How its file of weights is called, without ``.safetensors``.
    """

    name: str
    system: str
    rows: Mapping[str, str]
    absent: tuple[Absent, ...] = ()
    prefixes: Mapping[str, str] | None = None
    topology: str = "dual_expert"
    convolution: bool = True
    file: str = "model"

    @property
    def parts(self) -> tuple[str, ...]:
        """Streams of ours that it holds: ``video``, ``action``."""
        held = {part_of(f"{ours}.") for ours in self.rows.values()}
        return tuple(part for part in PARTS if part in held)

    def ours(self, key: str) -> str | None:
        """Our name of a key of theirs; None where no row fits."""
        for _, prefix in (self.prefixes or {}).items():
            key = key.removeprefix(prefix)
        return _renamed(key, self.rows)

    def theirs(self, name: str) -> str | None:
        """Their name of a key of ours; None where no row fits."""
        key = _renamed(name, {ours: theirs for theirs, ours in self.rows.items()})
        if key is not None:
            for begin, prefix in (self.prefixes or {}).items():
                if key.startswith(begin):
                    return prefix + key
        return key

    def absent_part(self, key: str) -> Absent | None:
        """The part of theirs that a key is of, where our model has no place for it."""
        for prefix in (self.prefixes or {}).values():
            key = key.removeprefix(prefix)
        key = _NUMBER.sub("#", key)
        return next((a for a in self.absent if any(key == k or key.startswith(k) for k in a.keys)), None)


PARTS = ("video", "action")


_BLOCK_OF = re.compile(r"packed_block_stack\.packed_blocks\.\d+\.(\w+)_block\.")
_CONTEXT_OF = re.compile(r"context\.(\w+)\.")


def part_of(name: str) -> str:
    """Which stream of ours a key is of: ``video``, ``action``, or one of ``ModelConfig.context``."""
    if name.startswith(("action_expert.", "core.proprio_hidden_context_encoder.")):  # what actions are told
        return "action"
    found = _BLOCK_OF.match(name.replace("#", "0")) or _CONTEXT_OF.match(name)
    return found[1] if found else "video"


def _renamed(key: str, rows: Mapping[str, str]) -> str | None:
    numbers = _NUMBER.findall(key)
    module, rest = _NUMBER.sub("#", key), ""
    while module not in rows:
        module, dot, last = module.rpartition(".")
        if not dot:
            return None
        rest = f".{last}{rest}"
    name = rows[module] + rest
    return name.replace("#", numbers[0], 1) if numbers else name


# ---- rows that systems share ----

_DIFFUSERS_BLOCKS = {f"blocks.#.{m}": f"{_VIDEO}.{m}" for m in ("attn1", "attn2", "norm2", "ffn", "scale_shift_table")}
_DIFFUSERS_VIDEO = {
    "condition_embedder.time_embedder": "core.time_conditioner.time_embedder",
    "condition_embedder.time_proj": "core.time_conditioner.time_proj",
    "condition_embedder.text_embedder": "core.text_proj",
    "proj_out": "core.proj_out",
    "scale_shift_table": "core.scale_shift_table",
}
# what Wan's own code calls a block, and its neighbours
_WAN_LEAVES = {
    **{
        f"{theirs}.{leaf}": f"{ours}.{name}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for leaf, name in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
_WAN_VIDEO = {f"blocks.#.{theirs}": f"{_VIDEO}.{ours}" for theirs, ours in _WAN_LEAVES.items()} | {
    "patch_embedding": "core.patch_embedding_mlp",
    "time_embedding.0": "core.time_conditioner.time_embedder.linear_1",
    "time_embedding.2": "core.time_conditioner.time_embedder.linear_2",
    "time_projection.1": "core.time_conditioner.time_proj",
    "text_embedding.0": "core.text_proj.linear_1",
    "text_embedding.2": "core.text_proj.linear_2",
    "head.head": "core.proj_out",
    "head.modulation": "core.scale_shift_table",
}
_DIFFUSERS_IMAGE = Absent(
    "image",
    (
        "condition_embedder.image_embedder",
        "blocks.#.attn2.add_k_proj",
        "blocks.#.attn2.add_v_proj",
        "blocks.#.attn2.norm_added_",
    ),
    "cross-attention to an image's CLIP tokens, of Wan 2.1 I2V",
)
_WAN_IMAGE = Absent(
    "image",
    ("img_emb", "blocks.#.cross_attn.k_img", "blocks.#.cross_attn.v_img", "blocks.#.cross_attn.norm_k_img"),
    "cross-attention to an image's CLIP tokens",
)

_OPENWAM_OPTIONAL = (
    Absent("state", ("core.proprio_",), "proprioception that the config's state_dim does not ask for, or as text"),
    Absent("unused projection", ("action_expert.hidden_context_proj",), "run with proprioception alone", runs=False),
    Absent("mode", ("core.generalist_mode_context_encoder",), "the mode token of GJD"),
)

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "diffusers",
            "diffusers.WanTransformer3DModel",
            _DIFFUSERS_BLOCKS | _DIFFUSERS_VIDEO | {"patch_embedding": "core.patch_embedding_mlp"},
            (_DIFFUSERS_IMAGE,),
            file="diffusion_pytorch_model",
        ),
        Layout(
            "openwam",
            "OpenWAM's dual expert",
            {name: name for name in ("core", _VIDEO, _ACTION, "action_expert")},
            (
                *_OPENWAM_OPTIONAL,
                Absent(
                    "shared stream",
                    ("core.action_", "core.runtime_stream_adapters", "frontend."),
                    "what only the parallel stream and pixels run",
                    runs=False,
                ),
            ),
            {"core.": "visual_tower.", "packed_block_stack.": "policy_variant.", "action_expert.": "policy_variant."},
            convolution=False,
        ),
        Layout(
            "openwam_parallel",
            "OpenWAM's parallel stream",
            {
                "core": "core",
                "core.blocks.#": _VIDEO,
                "core.action_embedder": "action_expert.action_embedder",
                "core.action_time_conditioner": "action_expert.time_conditioner",
                "core.action_proj_out": "action_expert.action_proj_out",
            },
            (
                *_OPENWAM_OPTIONAL,
                Absent(
                    "adapters",
                    ("core.action_text_proj", "core.runtime_stream_adapters", "frontend."),
                    "what only other rollouts and pixels run",
                    runs=False,
                ),
            ),
            {"core.": "visual_tower."},
            topology="parallel_stream",
            convolution=False,
        ),
        Layout(
            "fast_wam",
            "Fast-WAM's MoT",
            {f"mixtures.video.{theirs}": ours for theirs, ours in _WAN_VIDEO.items()},
            (
                Absent(
                    "action",
                    ("mixtures.action.",),
                    "an action expert with an MLP on its text, a head without modulation and rope in one dimension",
                ),
                Absent("state", ("proprio_encoder", "mixtures.video.action_embedding"), "proprioception"),
            ),
        ),
        Layout(
            "lingbot_va",
            "LingBot-VA's WanTransformer3DModel",
            _DIFFUSERS_BLOCKS
            | _DIFFUSERS_VIDEO
            | {
                "patch_embedding_mlp": "core.patch_embedding_mlp",
                "action_embedder": "action_expert.action_embedder",
                "condition_embedder_action.time_embedder": "action_expert.time_conditioner.time_embedder",
                "condition_embedder_action.time_proj": "action_expert.time_conditioner.time_proj",
                "action_proj_out": "action_expert.action_proj_out",
            },
            (
                Absent(
                    "action text",
                    ("condition_embedder_action.text_embedder",),
                    "a text embedder that no forward runs",
                    runs=False,
                ),
            ),
            topology="parallel_stream",
            convolution=False,
            file="diffusion_pytorch_model",
        ),
        Layout(
            "dreamzero",
            "DreamZero's CausalWanModel",
            _WAN_VIDEO,
            (
                _WAN_IMAGE,
                Absent(
                    "action", ("action_encoder", "action_decoder"), "actions in the blocks of the video, an MLP a robot"
                ),
                Absent("state", ("state_encoder",), "proprioception, an MLP a robot"),
                Absent(
                    "encoders",
                    ("action_head.vae", "action_head.text_encoder", "action_head.image_encoder"),
                    "encoders, which are models of their own",
                ),
            ),
            {"": "action_head.model."},
        ),
    )
}
