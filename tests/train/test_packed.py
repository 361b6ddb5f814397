"""Packed steps: clips of several lengths in one sequence equal each clip by itself, whoever computes them."""

from dataclasses import replace

import pytest
import torch

from wam_kernels.masks.visibility import dense_mask
from wam_models import WorldActionModel
from wam_models.data import ClipDataset
from wam_models.data.mix import ClipMix
from wam_models.rollout.policy import Policy
from wam_models.train import train
from wam_models.train.config import TrainConfig
from wam_models.train.engine import EngineConfig
from wam_models.train.loader import PackedDraws, PackLoader, balanced, visible_pairs
from wam_models.train.packed import packed_step

from .conftest import TINY
from .test_ranks import FIELDS, check, trained

TOKENS = 400  # 2 video and 4 action tokens a frame, twice


@pytest.fixture(scope="module")
def packed():
    model = TINY["model"] | {"layers": 2}
    return TrainConfig.from_dict(TINY | {"model": model, "tokens": TOKENS, "noised_history": 0.5})


@pytest.fixture(scope="module")
def draws(packed, data):
    return PackedDraws(packed, packed.draws(), data, 3)


def text_of(pack, config):
    words = [torch.randn(1, 5, config.text_dim, generator=torch.Generator().manual_seed(len(t))) for t in pack.tasks]
    return torch.cat(words)


def stepped(model, packs, draws):
    """Loss and gradients of a step's packs."""
    model.zero_grad()
    total = 0.0
    for pack in packs:
        loss, _ = packed_step(model, pack, text_of(pack, model.config), draws)
        loss.backward()
        total += loss.item()
    grads = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return total, torch.cat([g.flatten() for g in grads])


def random_model(config):
    torch.manual_seed(0)
    model = WorldActionModel(config)
    with torch.no_grad():
        for p in model.parameters():  # no parameter at 0, behind which others would be idle
            p.add_(0.1 * torch.randn_like(p))
    return model


MODELS = {
    "two experts": {},
    "one expert": {"topology": "parallel_stream"},
    "registers and a mode": {
        "context": [{"name": "registers", "width": 32, "ffn": 32, "tokens": 3}],
        "mode_token": True,
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_a_pack_equals_its_clips_one_by_one(name, packed, data):
    config = TrainConfig.from_dict(packed.to_dict() | {"model": packed.model.to_dict() | MODELS[name]})
    draws = PackedDraws(config, config.draws(), data, 3)
    model = random_model(config.model).double()
    clips = draws.step(0)
    assert len({c.frames for c in clips}) > 1 and len({(c.kind, c.chunk_size, c.window) for c in clips}) > 2
    assert sum(draws.tokens(c.frames) for c in clips) <= TOKENS
    share = 1 / len(clips)
    loss, grads = stepped(model, [draws.pack(clips, share)], draws)
    alone_loss, alone = stepped(model, [draws.pack([c], share) for c in clips], draws)
    assert abs(loss / alone_loss - 1) < 1e-9
    torch.testing.assert_close(grads, alone, rtol=1e-6, atol=1e-9)
    assert grads.abs().sum() > 0


def test_a_step_is_the_same_for_any_number_of_processes(packed, draws):
    """Loss and gradients of every part, summed, whatever the parts and micro-batches."""
    model = random_model(packed.model).double()
    expected, found = None, []
    for parts, accumulation in ((1, 1), (2, 1), (3, 2)):
        loaders = [PackLoader(draws, part=i, parts=parts, accumulation=accumulation) for i in range(parts)]
        packs = [pack for loader in loaders for pack in loader.packs(7)]
        assert len(packs) == parts * accumulation
        drawn = sorted(draw for pack in packs if pack.share for draw in pack.draws)
        assert drawn == sorted(draws.step(7))
        loss, grads = stepped(model, packs, draws)
        expected = grads if expected is None else expected
        torch.testing.assert_close(grads, expected, rtol=1e-6, atol=1e-9)
        found.append(loss)
    assert max(found) - min(found) < 1e-9


def test_the_position_is_the_step(draws):
    loader = iter(PackLoader(draws, ahead=3))
    went_on = [next(loader)[0].draws for _ in range(4)]
    resumed = iter(PackLoader(draws, 2))
    assert [next(resumed)[0].draws for _ in range(2)] == went_on[2:]
    assert went_on[0] != went_on[1] and len({d.seed for step in went_on for d in step}) == sum(map(len, went_on))


def test_work_is_balanced_by_attention_and_not_by_length(packed, draws):
    """A rank's clips cost as much as another's where their visible pairs differ by far more than their tokens."""
    long = replace(packed, tokens=100_000, windows=(2, 64), chunk_sizes=(1, 8), programs=("joint",))
    wide = PackedDraws(long, long.draws(), draws.data, 0)
    clip = wide.step(0)[0]
    near, far = (clip._replace(frames=800, chunk_size=4, window=w) for w in (2, 400))
    assert wide.geometry(near).length == wide.geometry(far).length
    assert wide.cost(far) > 2 * wide.cost(near)
    small = wide.geometry(clip)
    assert visible_pairs(small) == dense_mask(small).sum()
    costs = [wide.cost(near)] * 6 + [wide.cost(far)] * 2
    parts = balanced(costs, 4)
    sums = [sum(costs[i] for i in part) for part in parts]
    assert sorted(i for part in parts for i in part) == list(range(8))
    assert max(sums) <= 4 / 3 * max(sum(costs) / 4, *costs)
    by_length = [sum(costs[i::4]) for i in range(4)]
    assert max(sums) <= max(by_length)


def test_data_sets_come_as_often_as_their_weights_say(packed, data, root):
    other = ClipDataset(root, data.codec, units=(data.action_mean, data.action_std, ~data.constant_actions))
    mix = ClipMix([data, other], [1.0, 3.0])
    assert len(mix) == 2 * len(data) and mix.tasks == data.tasks and len(mix.train) == 2 * len(data.train)
    draws = PackedDraws(packed, packed.draws(), mix, 0)
    clips = [clip for step in range(120) for clip in draws.step(step)]
    share = sum(clip.episode >= len(data) for clip in clips) / len(clips)
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / len(clips)) ** 0.5
    held = mix.clip(len(data) + 1, 2, 3)
    torch.testing.assert_close(torch.from_numpy(held["video"]), torch.from_numpy(data.clip(1, 2, 3)["video"]))
    drawn = mix.sample(400, 5, torch.Generator().manual_seed(0))["episode"]
    assert abs((drawn >= len(data)).float().mean() - 0.75) < 0.09
    with pytest.raises(ValueError, match="data set 1 must be made with the codec and the units of the first"):
        ClipMix([data, ClipDataset(root)], [1, 1])


def test_what_cannot_be_packed_is_refused(packed, data):
    for change, message in (
        ({"tokens": 50}, "tokens must be at least 60, those of a clip of 5 frames, got 50"),
        ({"shortest": 1}, "shortest must be"),
        ({"action_free": 0.5}, "no episode of at least 2 frames in split 'action_free'"),
    ):
        with pytest.raises(ValueError, match=message):
            config = replace(packed, **change)
            PackedDraws(config, config.draws(), data, 0)


STEPS = TrainConfig.from_dict(TINY | {"steps": 3, "tokens": 200, "model": TINY["model"] | {"layers": 2}})


def same_log(found, expected):
    """Losses and gradient norms; weights whose gradient is rounding alone go anywhere, because Muon scales it."""
    check((found[0], {}), (expected[0], {}))


@pytest.fixture(scope="module")
def one(root):
    return trained(root, STEPS)


def test_micro_batches_and_a_resumed_run_take_the_same_steps(one, root, data, tmp_path):
    same_log(trained(root, replace(STEPS, engine=EngineConfig(accumulation=3))), one)
    train(replace(STEPS, steps=2), data, seed=3, out=tmp_path, progress=False)
    policy, resume = Policy.load(tmp_path / "checkpoint")
    done = train(STEPS, data, seed=3, resume=resume, progress=False)
    assert [[row[f] for f in FIELDS] for row in done.log] == one[0][2:]
    assert all(torch.equal(value, one[1][name]) for name, value in done.policy.model.state_dict().items())


@pytest.mark.parametrize("changes", [{}, {"context_parallel": 2}], ids=str)
def test_two_processes_take_the_steps_of_one(changes, two, one, root):
    first, second = two(trained, root, replace(STEPS, engine=EngineConfig(**changes)))
    assert first[0] == second[0]
    same_log(first, one)
