"""Every public entry works in every mode after any other; what is built in a mode of its own is plain afterwards."""

import copy
import gc
from collections.abc import Callable
from dataclasses import replace
from functools import _lru_cache_wrapper, cache

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.geometries import small
from wam_kernels import (
    RULE_PROGRAMS,
    FrameIndex,
    Ranges,
    StreamingCache,
    ada_layer_norm,
    block_attention,
    cached_attention,
    compile_plan,
    gate_residual_ada_layer_norm,
    plan_from_mask_mod,
    qk_norm_rope,
    rope_table,
    varlen_attention,
)
from wam_kernels.masks.visibility import ACTION, CLEAN, VIDEO
from wam_models import RolloutConfig, RolloutEngine, StepConfig, WorldActionModel, golden_config, training_step

CONFIG = replace(golden_config(), layers=1, text_dim=8)
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
PAIRS = [(first, second) for first in MODES for second in MODES if first != second]


@torch.inference_mode(False)  # what a caller brings is its own business
def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(op, *tensors: Tensor) -> list[Tensor]:
    """What an op gives; with its gradients, where they are recorded."""
    leaves = [t.clone().requires_grad_(torch.is_grad_enabled()) for t in tensors]
    out = op(*leaves)
    out = [out] if isinstance(out, Tensor) else [t for t in out if t is not None]
    if torch.is_grad_enabled():
        out += torch.autograd.grad(sum(t.square().sum() for t in out), leaves)
    return out


def attends(plan, impl=None):
    q = randn(1, plan.length, 2, 16)
    kv = randn(1, plan.key_length, 2, 16, seed=1)
    return lambda: stepped(lambda q, k, v: block_attention(q, k, v, plan, impl=impl), q, kv, kv)


def norms(index: FrameIndex, fused: bool = False):
    x, s = randn(1, index.length, 16), randn(1, index.frames, 16, seed=1)
    if not fused:
        return lambda: stepped(lambda x, s: ada_layer_norm(x, s, s, index), x, s)
    return lambda: stepped(lambda x, s: gate_residual_ada_layer_norm(x, x, s, s, s, index), x, s)


def rotates():
    x, weight, table = randn(1, 5, 32), randn(32, seed=1), rope_table(torch.arange(15.0).view(5, 3), 16)
    return lambda: stepped(lambda q, w: qk_norm_rope(q, q, w, w, table, head_dim=16), x, weight)


# one frame of history and a chunk of one
ONE_CHUNK = small(video_frames=2, video_tokens=3, action_frames=2, action_tokens=2, chunk_size=1)
CACHE = {"layers": 1, "batch": 1, "heads": 2, "head_dim": 16, "video_tokens": 3, "action_tokens": 2, "chunk_size": 1}
CACHE |= {"frames": 2, "dtype": torch.float32, "device": "cpu"}


def caches(copied=lambda made: made):
    cache = StreamingCache(**CACHE)
    cache.buffer.copy_(randn(*cache.buffer.shape))
    cache, streams = copied(cache), (VIDEO, ACTION)
    ranges = cache.ranges([ONE_CHUNK], [0], [1], [1], streams, CLEAN)
    q = randn(1, 5, 2, 16, seed=1)

    def call():
        cache.store_chunk(streams, [1], [1])
        cache.buffer[:, :, :, cache.chunk_slots(streams, CLEAN)] += 1
        ranges.add_(0)
        return [cached_attention(q, cache.keys(0), cache.values(0), ranges, group_rows=cache.rows(streams))]

    return call


@cache
def small_model() -> WorldActionModel:
    torch.manual_seed(0)
    return WorldActionModel(CONFIG)


def forwards(model: Callable | None = None):
    model = small_model() if model is None else model
    c, frames = CONFIG, 2
    geometry = small(video_frames=2, video_tokens=1, action_frames=2, action_tokens=2, chunk_size=1)
    plan = compile_plan(geometry)
    video, action = randn(1, c.latent_channels, frames, 2, 2), randn(1, frames, c.actions_per_frame, c.action_dim)
    t, text = randn(1, frames).abs(), randn(1, 3, c.text_dim)
    return lambda: stepped(lambda video, action: model(video, video, action, action, t, t, text, plan), video, action)


def trains():
    c, config = CONFIG, StepConfig(program="joint", chunk_sizes=(1, 1), windows=(4, 4))
    batch = {
        "video": randn(1, c.latent_channels, 2, 2, 2),
        "action": randn(1, 2, c.actions_per_frame, c.action_dim),
        "text": randn(1, 3, c.text_dim),
    }

    def call():
        loss = training_step(small_model(), batch, torch.Generator().manual_seed(0), config)[0]
        if torch.is_grad_enabled():
            loss.backward()
        return [loss]

    return call


def rolls_out():
    c = CONFIG
    config = RolloutConfig(program="video_then_action", chunk_size=1, window=2, steps=1, guidance=2.0)
    first, text = randn(1, c.latent_channels, 1, 2, 2), randn(1, 3, c.text_dim)
    episode = RolloutEngine(small_model(), config).start(first, text)

    def call():
        candidate = episode.propose(generator=torch.Generator().manual_seed(0))
        episode.accept(candidate)
        episode.observe(candidate.video, candidate.action)
        after = episode.propose(generator=torch.Generator().manual_seed(0))
        episode.restart([0], first, text)
        return [candidate.video, candidate.action, after.video, after.action, *episode.accepted()]

    return call


PAIRS_OF_TOKENS = [(0, 4), (4, 6)]
# What a user makes once, in any mode, and then calls in any: (name, make); make() gives the call.
ENTRIES = {
    "block_attention": lambda: attends(compile_plan(small())),
    "block_attention-reference": lambda: attends(compile_plan(small()), "reference"),
    "plan-of-ranges": lambda: attends(compile_plan(Ranges(PAIRS_OF_TOKENS, [(0, 5), (2, 9)], 6, 9))),
    "plan-of-a-program": lambda: attends(compile_plan(RULE_PROGRAMS["tri_tower"](video=3, actions=2, understanding=1))),
    "plan-copied": lambda: attends(copy.deepcopy(compile_plan(small()))),
    "plan_from_mask_mod": lambda: attends(plan_from_mask_mod(lambda b, h, q, k: q >= k, 5)),
    "varlen_attention": lambda: (
        lambda: stepped(
            lambda q, kv: varlen_attention(q, kv, kv, PAIRS_OF_TOKENS, PAIRS_OF_TOKENS),
            randn(6, 2, 16),
            randn(7, 2, 16),
        )
    ),
    "ada_layer_norm": lambda: norms(FrameIndex.from_runs([2, 3])),
    "ada_layer_norm-per-token": lambda: norms(FrameIndex.per_token(3)),
    "gate_residual_ada_layer_norm": lambda: norms(FrameIndex.from_tensor(torch.tensor([0, 1, 0])), fused=True),
    "index-copied": lambda: norms(copy.deepcopy(FrameIndex.per_sample(3))),
    "qk_norm_rope": rotates,
    "cached_attention": caches,
    "cache-copied": lambda: caches(copy.deepcopy),
    "model": forwards,
    "training_step": trains,
    "rollout": rolls_out,
}


@pytest.fixture(autouse=True)
def nothing_cached():
    """Every lru_cache of the packages is empty: which call comes first is what matters."""
    for cached in lru_caches():
        cached.cache_clear()


@cache
def lru_caches() -> list:
    wrappers = [o for o in gc.get_objects() if type(o) is _lru_cache_wrapper]
    return [w for w in wrappers if w.__module__.startswith(("wam_kernels", "wam_models"))]


@pytest.mark.parametrize("first, second", PAIRS, ids=["-then-".join(pair) for pair in PAIRS])
@pytest.mark.parametrize("make", ENTRIES.values(), ids=ENTRIES)
def test_works_in_any_mode_after_any_other(make, first, second):
    with MODES[first]():
        kept = make()
        before = kept()
    with MODES[second]():
        kept()  # what was made in the other mode
        after = make()()  # what the caches have kept of it
    for a, b in zip(before, after, strict=False):  # one of the two may lack gradients
        torch.testing.assert_close(a, b)


def vmapped(build):
    return torch.vmap(lambda x: (build(), x)[1])(torch.ones(2))


def under(mode):
    def run(build):
        with mode():
            build()

    return run


# Where a build may happen to come first. Each calls ``build`` in a surrounding of its own.
SURROUNDINGS = {
    "inference_mode": under(torch.inference_mode),
    "device": under(lambda: torch.device("meta")),
    "fake": under(FakeTensorMode),
    "vmap": vmapped,
    "grad": lambda build: torch.func.grad(lambda x: (build(), x.sum())[1])(torch.ones(2)),
    "functionalize": lambda build: torch.func.functionalize(lambda x: (build(), x)[1])(torch.ones(2)),
    "make_fx": lambda build: make_fx(lambda x: (build(), x)[1])(torch.ones(2)),
}


@pytest.mark.parametrize("surrounding", SURROUNDINGS.values(), ids=SURROUNDINGS)
def test_what_is_built_is_plain_whatever_surrounds_it(surrounding):
    def build():
        plan, index = compile_plan(small()), FrameIndex.from_runs([2, 3])
        ranges = compile_plan(Ranges([(0, 4)], [(0, 5)], 4, 9))
        by_value = FrameIndex.from_tensor(row_of_token)
        built[:] = plan, index, ranges, by_value
        moved[:] = plan.to("meta"), index.to("meta")
        tensors[:] = plan.mask(), cache.ranges([ONE_CHUNK], [0], [1], [1], (VIDEO,), CLEAN)

    cache, row_of_token = StreamingCache(**CACHE), torch.tensor([0, 0, 1])
    built, moved, tensors = [], [], []
    build()
    expected = [t.clone() for b in built for t in b.tensors()] + [t.clone() for t in tensors]
    for cached in lru_caches():
        cached.cache_clear()
    surrounding(build)
    got = [t for b in built for t in b.tensors()] + tensors
    assert compile_plan(small()) is built[0] and FrameIndex.from_runs([2, 3]) is built[1]
    for t in [*got, *(t for m in moved for t in m.tensors())]:
        assert type(t) is Tensor and not t.is_inference() and not torch._C._functorch.is_functorch_wrapped_tensor(t)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert all(t.device.type == "meta" for m in moved for t in m.tensors())


@pytest.mark.parametrize(
    "change", [lambda: torch.set_default_device("meta"), lambda: torch.set_default_dtype(torch.float64)]
)
def test_process_wide_defaults_do_not_stick(change):
    try:
        change()
        calls = [ENTRIES[name] for name in ("block_attention", "ada_layer_norm")]
        plan, index, table = compile_plan(small()), FrameIndex.from_runs([2, 3]), rope_table(POSITIONS, 16)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for t in (*plan.tensors(), *index.tensors(), plan.mask()):
        assert t.device.type == "cpu"
    assert table.dtype == torch.float32 and table.device.type == "cpu"
    for call in calls:
        call()()


POSITIONS = torch.arange(15.0).view(5, 3)


def compiled_attention(x: Tensor) -> Tensor:
    plan = compile_plan(small()).to(x.device)
    q = x[:, None, None].expand(1, plan.length, 2, 16).contiguous()
    return block_attention(q, q * 2, q, plan)


def compiled_varlen(x: Tensor) -> Tensor:
    q = x[:, None, None] * torch.ones(6, 2, 16)
    return varlen_attention(q, q * 2, q, PAIRS_OF_TOKENS, PAIRS_OF_TOKENS)


def compiled_norm(x: Tensor) -> Tensor:
    by_run, by_value = FrameIndex.from_runs([4, 2]), FrameIndex.from_tensor(torch.tensor([0, 1, 1, 0, 0, 1]))
    out, s = x * torch.arange(96.0).view(1, 6, 16), x * torch.ones(1, 2, 16)
    for index in (by_run, by_value, FrameIndex.per_sample(6).to(x.device)):
        out = ada_layer_norm(out, s[:, : index.frames], s[:, : index.frames], index)
    return out


def compiled_cache(x: Tensor) -> Tensor:
    cache, streams = StreamingCache(**CACHE), (VIDEO, ACTION)
    cache.buffer.fill_(1)
    cache.buffer[:, :, :, cache.chunk_slots(streams, CLEAN)] += x
    ranges = cache.ranges([ONE_CHUNK], [0], [1], [1], streams, CLEAN)
    cache.store_chunk(streams, [1], [1])
    q = x.expand(1, 5, 2, 16).contiguous()
    return cached_attention(q, cache.keys(0), cache.values(0), ranges, group_rows=cache.rows(streams))


COMPILED = (compiled_attention, compiled_varlen, compiled_norm, compiled_cache)


@pytest.mark.parametrize("function", COMPILED, ids=lambda f: f.__name__.removeprefix("compiled_"))
def test_compiles_around_what_is_built_on_the_host(function):
    torch._dynamo.reset()
    with torch.no_grad():
        x = torch.ones(1)
        torch.testing.assert_close(torch.compile(function, backend="eager")(x), function(x))


def test_the_whole_model_compiles():
    torch._dynamo.reset()
    with torch.no_grad():
        call = forwards(torch.compile(small_model(), backend="eager"))
        torch.testing.assert_close(call(), forwards()())
