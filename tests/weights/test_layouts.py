"""Key layouts of other systems: real key lists, in and out, and what is refused.

keys.json holds names and shapes of one-block models of the real classes: diffusers 0.37.1, openwam 0.2.0, Fast-WAM
45d8e14, LingBot-VA 6f092cb, DreamZero ab790c1.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wam_models import WorldActionModel, from_diffusers, load_weights
from wam_models.config import Stream
from wam_models.weights.convert import shapes_of, sizes_from, weights_from, weights_to
from wam_models.weights.layouts import LAYOUTS, part_of

KEYS = json.loads((Path(__file__).parent / "keys.json").read_text())
# what each system has and our model has not, as its users must name it
WITHOUT = {
    "diffusers": (),
    "openwam": (),
    "openwam_parallel": (),
    "fast_wam": ("action",),
    "lingbot_va": (),
    "dreamzero": ("image", "action", "state"),
}


def weights(layout):
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) for key, shape in KEYS[layout].items()}


def sizes(layout, **changes):
    return sizes_from(layout, weights(layout), head_dim=12, **changes)


def convert(layout, state=None, **changes):
    arguments = {"without": WITHOUT[layout]} | changes
    return weights_from(layout, weights(layout) if state is None else state, sizes(layout), **arguments)


def test_every_layout_has_a_recorded_model():
    assert set(LAYOUTS) == set(WITHOUT) == set(KEYS) - {"diffusers_image"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_are_those_of_the_weights(layout):
    c = sizes(layout)
    assert (c.hidden, c.heads, c.head_dim, c.layers, c.ffn, c.patch) == (24, 2, 12, 1, 32, (1, 2, 2))
    if layout == "openwam":
        assert (c.action_hidden, c.action_ffn, c.action_dim, c.latent_channels) == (12, 24, 4, 48)
    elif layout == "openwam_parallel":
        assert (c.topology, c.action_hidden, c.action_dim, c.latent_channels) == ("parallel_stream", 24, 4, 48)
    else:
        assert c.topology == ("parallel_stream" if layout == "lingbot_va" else "video_only")
        assert (c.latent_channels, c.text_dim, c.freq_dim) == (4, 8, 16)
    with pytest.raises(ValueError, match="head_dim must divide 24"):
        sizes_from(layout, weights(layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_round_trip_gives_the_same_tensors(layout):
    theirs, found = weights(layout), convert(layout)
    assert set(found.state) == {name for name in shapes_of(sizes(layout)) if part_of(name) in found.parts}
    model = WorldActionModel(sizes(layout))
    assert not load_weights(model, model.state_dict() | found.state)
    back = weights_to(layout, model.state_dict(), sizes(layout))
    assert len(back) == len(found.state) and all(torch.equal(value, theirs[key]) for key, value in back.items())
    left = {key for keys in found.left_out.values() for key in keys}
    assert left | set(back) == set(theirs) and not left & set(back)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_wrong_key_is_named(layout):
    theirs = weights(layout)
    q = next(
        key
        for key in theirs
        if key.endswith(("attn1.to_q.weight", "video.blocks.0.self_attn.q.weight", "model.blocks.0.self_attn.q.weight"))
        and "action_block" not in key
    )
    rest = {key: value for key, value in theirs.items() if key != q}
    with pytest.raises(ValueError, match=rf"missing keys \['{q}'\]"):
        convert(layout, rest)
    with pytest.raises(ValueError, match=r"unexpected keys \['colour'\]"):
        convert(layout, theirs | {"colour": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"{q}: expected \[24, 24\], got \[3, 24\]"):
        convert(layout, theirs | {q: torch.zeros(3, 24)})
    with pytest.raises(ValueError, match=rf"{q}: expected floating point, got torch.int8"):
        convert(layout, theirs | {q: torch.zeros(24, 24, dtype=torch.int8)})
    for part in WITHOUT[layout]:
        with pytest.raises(ValueError, match=rf"no place in our model for part '{part}', .*without=\['{part}'\]"):
            convert(layout, without=[p for p in WITHOUT[layout] if p != part])


def test_image_cross_attention_of_wan_is_refused_by_name():
    with pytest.raises(ValueError, match="part 'image', cross-attention to an image's CLIP tokens, of Wan 2.1 I2V"):
        convert("diffusers", weights("diffusers_image"))
    found = convert("diffusers", weights("diffusers_image"), without=("image",))
    assert len(found.left_out["image"]) == len(KEYS["diffusers_image"]) - len(KEYS["diffusers"])


def test_a_video_expert_with_more_channels_in_than_out_is_refused():
    wide = weights("diffusers") | {"patch_embedding.weight": torch.randn(24, 9, 1, 2, 2)}
    with pytest.raises(ValueError, match=r"proj_out.weight: expected \[36, 24\], got \[16, 24\]"):
        weights_from("diffusers", wide, sizes_from("diffusers", wide, head_dim=12))


def test_openwam_without_its_prefixes_or_actions():
    theirs = weights("openwam")
    bare = {key.removeprefix("visual_tower.").removeprefix("policy_variant."): value for key, value in theirs.items()}
    assert convert("openwam", bare).state.keys() == convert("openwam").state.keys()
    video = convert("openwam", without=("action",))
    assert video.parts == ("video",) and set(map(part_of, video.state)) == {"video"}


def test_actions_go_into_a_model_of_the_layout_s_topology():
    dual = sizes("diffusers", action_hidden=12, action_ffn=16, action_dim=5)
    with pytest.raises(ValueError, match="part 'action', actions, which models of topology parallel_stream have"):
        weights_from("lingbot_va", weights("lingbot_va"), dual)
    found = weights_from("lingbot_va", weights("lingbot_va"), dual, without=["action"])
    assert found.parts == ("video",) and set(found.left_out) == {"action", "action text"}
    shared = sizes("lingbot_va")
    with pytest.raises(ValueError, match="no place for our stream action of topology parallel_stream"):
        weights_to("openwam", WorldActionModel(shared).state_dict(), shared)
    registers = replace(dual, context=(Stream(name="registers", width=8, ffn=8, tokens=2),))
    state = WorldActionModel(registers).state_dict()
    assert {part_of(name) for name in state} == {"video", "action", "registers"}
    with pytest.raises(ValueError, match=r"no place for our stream registers .* without=\['registers'\]"):
        weights_to("openwam", state, registers)
    back = weights_to("openwam", state, registers, without=["registers"])
    assert len(back) == sum(part_of(name) != "registers" for name in state)
    assert len(weights_from("openwam", back, registers, without=["registers"]).state) == len(back)


def test_what_a_layout_has_no_place_for_is_refused_on_the_way_out():
    config = sizes("diffusers", action_hidden=12, action_ffn=16, action_dim=5)
    state = WorldActionModel(config).state_dict()
    with pytest.raises(
        ValueError, match=r"no place for our stream action of .*; leave it out with without=\['action'\]"
    ):
        weights_to("diffusers", state, config)
    with pytest.raises(ValueError, match=r"missing keys \['core.proj_out.bias'\]"):
        weights_to("openwam", {k: v for k, v in state.items() if k != "core.proj_out.bias"}, config)
    with pytest.raises(ValueError, match="without must be some of"):
        weights_to("openwam", state, config, without=("video",))
    with pytest.raises(ValueError, match="layout must be one of"):
        weights_to("wan", state, config)


def test_from_diffusers_uses_the_same_rows():
    assert from_diffusers(weights("diffusers")).keys() == convert("diffusers").state.keys()


@pytest.mark.parametrize("architecture, layout", [("dual_expert", "openwam"), ("parallel_stream", "openwam_parallel")])
def test_openwam_s_proprioception(architecture, layout):
    pytest.importorskip("open_wam", reason="openwam is in requirements/test.txt")
    from bench.workloads.openwam_models import PREFIX, build

    policy = {"sequence_contract": PREFIX}
    theirs = build(architecture, "joint", hidden=24, heads=3, action_hidden=16, policy=policy).state_dict()
    config = sizes_from(layout, theirs, head_dim=8)
    assert config.state_dim == 3
    found = weights_from(layout, theirs, config)
    assert set(found.state) == set(shapes_of(config)) and "state" not in found.left_out
    with pytest.raises(ValueError, match="part 'state', proprioception that the config's state_dim does not ask for"):
        weights_from(layout, theirs, replace(config, state_dim=0))
    assert weights_from(layout, theirs, replace(config, state_dim=0), without=["state"]).left_out["state"]


def test_diffusers_keys_are_the_recorded_ones():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is in requirements/test.txt")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 8}
    sizes |= {"freq_dim": 16, "ffn_dim": 32, "num_layers": 1}
    for name, image in (("diffusers", {}), ("diffusers_image", {"image_dim": 10, "added_kv_proj_dim": 24})):
        with torch.device("meta"):
            model = diffusers.WanTransformer3DModel(**sizes, **image)
        assert {key: list(value.shape) for key, value in model.state_dict().items()} == KEYS[name]


def test_openwam_keys_are_the_recorded_ones():
    pytest.importorskip("open_wam", reason="openwam is in requirements/test.txt")
    from bench.workloads.openwam_models import build

    for name, architecture in (("openwam", "dual_expert"), ("openwam_parallel", "parallel_stream")):
        model = build(architecture, "joint", hidden=24, heads=2, action_hidden=12, layers=1, ffn=32)
        assert {key: list(value.shape) for key, value in model.state_dict().items()} == KEYS[name]
