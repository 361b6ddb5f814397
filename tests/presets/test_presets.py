"""Every preset of ``recipes/presets``: mask, training step, 20 steps, rollout by its schedule, weights, real size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from wam_kernels import RULE_PROGRAMS, Geometry, dense_mask
from wam_models import RolloutEngine, WorldActionModel, weights_from, weights_to
from wam_models.objectives import OBJECTIVES, sample_for
from wam_models.rollout.layout import ChunkLayout
from wam_models.train.recipe import Recipe
from wam_models.train.step import training_step

from .dense import Densely
from .masks import MASKS, Mask

PRESETS = Path(__file__).parents[2] / "recipes/presets"
FRAMES = 3


def config(name: str):
    return Recipe.read(PRESETS / f"{name}.toml").train


def batch(model, samples: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    c, draw = model.config, torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=draw, dtype=dtype)

    _, rows, columns = c.patch
    found = {
        "video": randn(samples, c.latent_channels, FRAMES, rows, columns),
        "action": randn(samples, FRAMES, c.actions_per_frame, c.action_dim),
        "text": randn(samples, 3, c.text_dim),
    }
    return found | ({"state": randn(samples, FRAMES, c.state_dim)} if c.state_dim else {})


def made(name: str, dtype=torch.float32) -> WorldActionModel:
    torch.manual_seed(0)
    model = WorldActionModel(config(name).model).to(dtype)
    for parameter in (model.core.proj_out.weight, model.action_expert.action_proj_out.weight):
        nn.init.normal_(parameter, std=0.3)  # else every flow of a new model is 0
    return model


def step_config(name: str):
    """Of the joint samples, on the three frames of the mask; of the windows the largest."""
    chunk, settings = MASKS[name].chunk, config(name)
    windows = (settings.windows[1],) * 2
    return replace(settings.draws()[0].config, chunk_sizes=(chunk, chunk), windows=windows)


def copies(per_frame: int, context: int, full: bool = False, states: int = 0) -> list[str]:
    """The token of a mask that each packed token is one of: noisy and clean video, noisy and clean actions.

    With ``full`` attention one copy of each, the observed frame clean; ``states`` is a chunk that has one.
    """
    numbers = range(FRAMES)
    video = ["V0", *(f"v{f}" for f in numbers[1:])] if full else [f"{v}{f}" for v in "vV" for f in numbers]
    action = [f"{a}{f}" for a in ("a" if full else "aA") for f in numbers for _ in range(per_frame)]
    return video + action + ["C"] * context + [f"S{f}" for f in numbers[1 :: states or FRAMES] if states]


def packed(mask: Mask, names: list[str]) -> np.ndarray:
    """The mask of a packed sequence: what it does not say attends to itself alone."""
    place = {name: i for i, name in enumerate(mask.names)}
    index = np.array([place.get(name, -1) for name in names])
    known = index >= 0
    found = mask.matrix[np.ix_(index, index)] & known[:, None] & known[None]
    return found | np.diag(~known)


def context_tokens(model_config) -> int:
    return sum(stream.tokens for stream in model_config.context)


def test_every_preset_has_a_mask_written_out():
    assert {path.stem for path in PRESETS.glob("*.toml")} == set(MASKS)


@pytest.mark.parametrize("name", MASKS)
def test_the_mask_is_the_one_written_out(name):
    mask, settings = MASKS[name], step_config(name)
    context = context_tokens(config(name).model)
    sample = sample_for(
        settings.program, OBJECTIVES["joint"], frames=FRAMES, video_tokens=1, action_tokens=1,
        chunk_size=mask.chunk, window=settings.windows[1], history=settings.history, context=context,
        full_attention=config(name).model.full_attention, state_tokens=config(name).model.state_tokens,
    )  # fmt: skip
    names = copies(1, context, mask.full, mask.chunk * config(name).model.state_tokens)
    found = dense_mask(sample) if isinstance(sample, Geometry) else sample.dense_mask()
    listed = [names.index(name) for name in mask.names]
    np.testing.assert_array_equal(found[np.ix_(listed, listed)], mask.matrix)
    # and what is listed attends to nothing else
    others = [i for i, name in enumerate(names) if name not in mask.names]
    assert not found[np.ix_(listed, others)].any()


@pytest.mark.parametrize("name", [name for name, mask in MASKS.items() if not mask.full])
def test_the_last_chunk_of_a_rollout_attends_to_the_same(name):
    mask, settings = MASKS[name], config(name).default_rollout()
    before = FRAMES - mask.chunk
    layout = ChunkLayout(replace(settings, chunk_size=mask.chunk), OBJECTIVES["joint"], 1, (1, 1), 1)
    found, names = dense_mask(layout.geometry(0, before)), copies(1, 0)
    keys = [k for k in mask.names if k[0] not in "CS"]
    queries = [q for q in keys if q[0] in "va" and int(q[1]) >= before]
    ours, by_hand = [names.index(k) for k in keys], mask.matrix[np.ix_(*map(mask.places, (queries, keys)))]
    np.testing.assert_array_equal(found[np.ix_([names.index(q) for q in queries], ours)], by_hand)


@pytest.mark.parametrize("name", [name for name, mask in MASKS.items() if mask.system])
def test_the_mask_is_that_of_the_system(name):
    mask = MASKS[name]
    rule, theirs = RULE_PROGRAMS[mask.system](**mask.sizes).dense_mask(), np.array(mask.tokens.split())
    found = np.array([[rule[np.ix_(theirs == q, theirs == k)].any() for k in mask.names] for q in mask.names])
    assert set(mask.names) == set(theirs) - {"-"}
    np.testing.assert_array_equal(found, mask.matrix)


@pytest.mark.parametrize("name", [name for name, mask in MASKS.items() if mask.full])
def test_a_step_of_a_rollout_is_that_of_a_dense_attention(name):
    mask, model = MASKS[name], made(name, torch.float64)
    c, data = model.config, batch(model, 1, torch.float64)
    assert c.full_attention
    once = {"steps": 1, "video": {}, "action": {}, "chunk_size": mask.chunk}
    engine = RolloutEngine(model.eval().requires_grad_(False), replace(config(name).default_rollout(), **once))
    state = data["state"][:, :1] if c.state_tokens else None
    episode = engine.start(data["video"][:, :, :1], data["text"], state=state)
    candidate = episode.propose(video_noise=data["video"][:, :, 1:], action_noise=data["action"][:, 1:])
    names = copies(c.actions_per_frame, context_tokens(c), True, mask.chunk * c.state_tokens)
    level = torch.tensor([[0.0, 1000.0, 1000.0]], dtype=torch.float64)
    video, action = Densely(model, packed(mask, names), names, False)(
        data["video"], None, data["action"], None, level, level, data["text"], None, impl=None, state=state
    )
    torch.testing.assert_close(candidate.video, (data["video"] - video)[:, :, 1:], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(candidate.action, (data["action"] - action)[:, 1:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MASKS)
def test_a_training_step_is_that_of_a_dense_attention(name):
    model, settings = made(name, torch.float64), step_config(name)
    names = copies(
        model.config.actions_per_frame,
        context_tokens(model.config),
        MASKS[name].full,
        MASKS[name].chunk * model.config.state_tokens,
    )
    data, found = batch(model, 2, torch.float64), []
    insulated = ("action", "video") in settings.stop_gradient
    for run in (model, Densely(model, packed(MASKS[name], names), names, insulated)):
        model.zero_grad()
        loss, _ = training_step(run, data, torch.Generator().manual_seed(2), settings)
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (dense, of_dense) = found
    torch.testing.assert_close(loss, dense, rtol=1e-10, atol=1e-12)
    assert gradients.keys() == of_dense.keys()
    for n, gradient in gradients.items():
        torch.testing.assert_close(gradient, of_dense[n], rtol=1e-6, atol=1e-9, msg=n)


# one of each kind of model; of the others training is slow
QUICK = ("fast_wam_uncond", "lingbot_va", "motus", "vpp")
SLOW_BUT = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MASKS]


@pytest.mark.parametrize("name", SLOW_BUT)
def test_twenty_steps_on_one_batch_halve_the_loss(name):
    torch.manual_seed(0)
    model = WorldActionModel(config(name).model)
    optimizer, data, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), batch(model, 4), []
    for _ in range(21):
        optimizer.zero_grad()
        loss, _ = training_step(model, data, torch.Generator().manual_seed(3), step_config(name))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[20] < losses[0] / 2


# forwards of a chunk that denoise; of one whose actions alone are wanted; and how often its video is embedded: here and
# there once more for the observed frame, for what a later stage attends to, or for features
ROLLOUTS = {
    "openwam": (20, 20, 20),
    "openwam_parallel": (20, 20, 20),
    "openwam_gjd": (20, 20, 20),
    "fast_wam_uncond": (10 + 10, 10, 1),
    "fast_wam_joint": (10, 10, 1 + 10),
    "fast_wam_idm": (10 + 10, 10 + 10, 1 + 10 + 1),
    "lingbot_va": (25 + 50, 25 + 50, 25 + 1),
    "dreamzero": (16, 16, 16),
    "motus": (10, 10, 10),
    "uwm": (10, 10, 10),
    "pad": (10, 10, 10),
    "x_wam": (50, 10, 10),
    "vpp": (10 + 10, 10, 1 + 1),
    "dit4dit": (10 + 10, 10, 1 + 1),
    "unipi": (10 + 10, 10 + 10, 1 + 10 + 1),
    "giga_world_policy": (10, 10, 1),
}


def started(name: str, model: WorldActionModel, **changes):
    engine = RolloutEngine(model.eval().requires_grad_(False), replace(config(name).default_rollout(), **changes))
    data = batch(model, 1)
    return engine.start(data["video"][:, :, :1], data["text"], state=data["state"][:, :1] if "state" in data else None)


@pytest.mark.parametrize("name", MASKS)
def test_a_rollout_follows_the_schedule_of_the_preset(name):
    model, draw = made(name), torch.Generator().manual_seed(4)
    episode, seen = started(name, model, reuse_flow=None), []
    for _ in range(2):
        candidate = episode.propose(generator=draw)
        assert candidate.video.shape[2] == candidate.action.shape[1] == episode.chunk_size
        shape = 1, episode.chunk_size, model.config.state_dim
        state = torch.zeros(shape) if model.config.state_dim else None
        episode.observe(candidate.video, candidate.action, state=state)
    hook = model.core.patch_embedding_mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    alone = episode.propose(want="action", generator=draw)
    hook.remove()
    assert alone.action.isfinite().all()
    assert (*candidate.forwards, *alone.forwards, len(seen)) == ROLLOUTS[name]


def test_lingbot_va_acts_on_video_that_is_still_noisy():
    """The early stop of its paper: three steps down to noise level 0.4, and ten of the actions."""
    asked = {"video": {"steps": 3, "stop": 0.4, "guidance": 5.0}, "action": {"steps": 10}}
    episode, draw = started("lingbot_va", made("lingbot_va"), **asked), torch.Generator().manual_seed(4)
    candidate = episode.propose(generator=draw)
    assert candidate.forwards == (13,) and candidate.video_level == pytest.approx(0.4)
    episode.observe(candidate.video, candidate.action)


def test_dreamzero_leaves_out_every_other_forward_of_flows_that_agree():
    model = made("dreamzero")
    for head in (model.core.proj_out, model.action_expert.action_proj_out):
        nn.init.zeros_(head.weight)
        nn.init.ones_(head.bias)  # the same flow whatever comes in
    candidate = started("dreamzero", model).propose(generator=torch.Generator().manual_seed(4))
    assert candidate.forwards[0] < 16 * 0.7


# The layout of public weights, and what our model has no place for.
LAYOUTS_OF = {
    "openwam": ("openwam", ()),
    "openwam_parallel": ("openwam_parallel", ()),
    "fast_wam_uncond": ("fast_wam", ("action",)),
    "lingbot_va": ("lingbot_va", ()),
    "dreamzero": ("dreamzero", ("action", "proprioception")),
}


@pytest.mark.parametrize("name", LAYOUTS_OF)
def test_weights_go_into_the_layout_of_the_system_and_back(name):
    layout, without = LAYOUTS_OF[name]
    ours, sizes = made(name).state_dict(), config(name).model
    theirs = weights_to(layout, ours, sizes, without=without)
    found = weights_from(layout, theirs, sizes).state
    assert {n.split(".")[0] for n in found} >= {"core", "packed_block_stack"}
    assert without or found.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[n]) for n, tensor in found.items())


# Parameters of the video expert: of diffusers' WanTransformer3DModel at the sizes of the released config.json.
WAN_2_2_5B, WAN_2_1_14B = 4_999_787_712, 14_288_491_584
# Then of all that is for actions and for context, beside what is published of it.
REAL = {
    # "1.02 B action expert": huggingface.co/humanoid-benchmark/fastwam
    "fast_wam": (WAN_2_2_5B, 1_019_838_471, 0),
    # 6.0216 B in all, headers of its released weights; its action expert projects text twice and has a state encoder
    "giga_world_policy": (WAN_2_2_5B, 1_019_856_912, 0),
    # "~5B-param" with the video: lerobot's documentation; the layout of its weights is exact
    "lingbot_va": (WAN_2_2_5B, 67_058_718, 0),
    # 641.5 M and 253.5 M, its README: there the two experts do not cross-attend to the text, 30 x 4 matrices of 3072 x
    # 1024 and 3072 x 512, 377 M and 189 M; and the text of neither has a projection
    "motus": (WAN_2_2_5B, 1_019_852_814, 443_684_352 + 14 * 1024 + 1024),
    # Wan 2.1 14B; its MLPs of each robot and the cross-attention to CLIP tokens are not here; states are of 64 numbers
    "dreamzero": (WAN_2_1_14B, 185_185_312, 64 * 5120 + 5120),
}


def test_every_real_size_is_counted():
    assert {path.stem for path in (PRESETS / "real").iterdir()} == set(REAL)


@pytest.mark.parametrize("name", REAL)
def test_the_real_size_has_the_published_parameters(name):
    with torch.device("meta"):
        model = WorldActionModel(config(f"real/{name}").model)
    found = [0, 0, 0]
    for n, p in model.named_parameters():
        of_context = n.startswith("context.") or ".understanding_block." in n
        found[2 if of_context else n.startswith("action_expert.") or ".action_block." in n] += p.numel()
    assert tuple(found) == REAL[name]
