"""What holds for every system: modes of autograd in any order, wrappers, copies, models that are not as expected."""

import copy
import pickle
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

from tests.integrations import test_cosmos_policy as cosmos
from tests.integrations import test_dreamzero as dreamzero
from tests.integrations import test_fast_wam as fast_wam
from tests.integrations import test_lerobot as lerobot
from tests.integrations import test_lingbot_va as lingbot
from tests.integrations import test_openpi as openpi
from tests.integrations.checks import CLOSE, numbers, outputs_and_gradients
from wam_kernels.integrations import Unsupported, _kernels, _systems, accelerate, patch, unpatch


def openpi_step(gemmas):
    prefix, suffix = gemmas(openpi.tokens(1), openpi.bias(openpi.visible(1)))
    return suffix


# model, a call that has gradients, one that has none (over a cache of keys and values)
SYSTEMS = {
    "Fast-WAM": (
        fast_wam.model,
        lambda m: fast_wam.train(m, "fast_wam_joint"),
        lambda m: fast_wam.cached_actions(m, "fast_wam_joint"),
    ),
    "lerobot Fast-WAM": (lerobot.model, lerobot.train, lerobot.cached_actions),
    "LingBot-VA": (lambda: lingbot.model("flex"), lambda m: m(lingbot.step(), train_mode=True), None),
    "LingBot-VA inference": (lambda: lingbot.model("torch"), None, lambda m: lingbot.episode(m, 2)),
    "DreamZero": (dreamzero.model, lambda m: dreamzero.train(m, 2), lambda m: dreamzero.rollout(m, 2)),
    "Cosmos Policy": (cosmos.model, cosmos.call, cosmos.call),
    "openpi": (openpi.model, openpi_step, openpi_step),
    "openpi, all of it": (
        openpi.whole,
        lambda m: m(*openpi.batch()),
        lambda m: m.sample_actions(*openpi.batch()),
    ),
}
MODES = {"grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}
# every mode behind every mode, itself too, and the caches are born in inference mode
ORDER = ("inference", "inference", "grad", "grad", "no_grad", "no_grad", "inference", "no_grad", "grad", "inference")
every_system = pytest.mark.parametrize("system", SYSTEMS)


def run(model: nn.Module, train, infer, mode: str) -> list[torch.Tensor]:
    if mode == "grad":
        return [] if train is None else outputs_and_gradients(model, lambda: train(model))
    with MODES[mode]():
        return [t.clone() for call in (train, infer) if call is not None for t in numbers(call(model))]


def assert_close(got: list, expected: list) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@every_system
def test_every_mode_behind_every_mode(system):
    make, *calls = SYSTEMS[system]
    model = make()
    expected = {mode: run(model, *calls, mode) for mode in MODES}
    _kernels.device_ranges.cache_clear()
    patch(model)
    for mode in ORDER:
        assert_close(run(model, *calls, mode), expected[mode])


def test_constants_born_in_inference_mode_are_recomputed():
    """A frequency or mask tensor made in inference mode says nothing of writes to it."""
    with torch.inference_mode():
        x = torch.ones(6, 1, 8, dtype=torch.complex64)
        mask = torch.ones(4, 4, dtype=torch.bool)
    tables, plans = _kernels.Tables(), _kernels.MaskPlans()
    make = lambda f: torch.view_as_real(f[:, 0])  # noqa: E731
    first, plan = tables.of(x, make), plans.of(mask, mask.device)
    assert not first.is_inference()
    with torch.inference_mode():
        x.mul_(2)
        mask[0, 1:] = False
        assert torch.equal(tables.of(x, make), 2 * first)
    assert plans.of(mask, mask.device).visible_pairs == plan.visible_pairs - 3


# ---- wrappers ----


@every_system
def test_a_class_that_fsdp_renamed(system):
    """fully_shard derives FSDP<name> from the class of the module that it shards."""
    make, *calls = SYSTEMS[system]
    model = make()
    expected = run(model, *calls, "no_grad")
    for m in model.modules():
        if not isinstance(m, nn.ModuleList | nn.ModuleDict):
            m.__class__ = type(f"FSDP{type(m).__name__}", (type(m),), {})
    done = patch(model)
    assert_close(run(model, *calls, "no_grad"), expected)
    assert all(done.calls.values()) or system.startswith("LingBot-VA")  # it does not call all that is replaced


@pytest.mark.filterwarnings("ignore:.*FSDP")
@pytest.mark.filterwarnings("ignore:.*FullyShardedDataParallel")
def test_lingbot_sharded_as_its_first_release_shards_it(process_group):
    """``FullyShardedDataParallel`` around the model and its blocks: parameters are views of one flat tensor."""
    make, _, infer = SYSTEMS["LingBot-VA inference"]
    wan = make().requires_grad_(False)
    expected = [t.clone() for t in numbers(infer(wan))]
    blocks = list(wan.blocks)
    sharded = FullyShardedDataParallel(
        wan,
        device_id=torch.device("cpu"),
        auto_wrap_policy=partial(lambda_auto_wrap_policy, lambda_fn=blocks.__contains__),
    )
    done = accelerate(lingbot_server(sharded))
    with torch.inference_mode():
        assert_close(numbers(infer(sharded)), expected)
    assert done.calls["WanTransformerBlock.forward"] > 0
    unpatch(sharded)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("patched", ["before", "after"])
def test_lingbot_sharded_as_its_programs_shard_it(patched, process_group):
    make, train, _ = SYSTEMS["LingBot-VA"]
    wan = make()
    expected = [t.clone() for t in outputs_and_gradients(wan, lambda: train(wan))]
    done = patch(wan) if patched == "before" else None
    for block in wan.blocks:
        fully_shard(block.attn1)
        fully_shard(block)
    fully_shard(wan)
    assert type(wan).__name__ == "FSDPWanTransformer3DModel"
    done = done or patch(wan)
    got = outputs_and_gradients(wan, lambda: train(wan))
    assert_close([getattr(t, "full_tensor", lambda t=t: t)() for t in got], expected)
    assert done.calls["FSDPWanAttention.forward"] == 2
    unpatch(wan)


@pytest.mark.parametrize("wrap", ["ddp", "compiled", "peft"])
def test_inside_a_wrapper(wrap, request):
    class PeftModel(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.base_model = model

        def forward(self, *args):
            return self.base_model(*args)

    if wrap == "ddp":
        request.getfixturevalue("process_group")
    torch._dynamo.reset()
    dit = cosmos.model(layers=1)
    expected = cosmos.call(dit)
    model = {
        "ddp": DistributedDataParallel,
        "compiled": lambda m: torch.compile(m, backend="eager"),
        "peft": PeftModel,
    }[wrap](dit)
    cosmos.call(model)  # what is compiled by now must not go on
    done = patch(model)
    torch.testing.assert_close(cosmos.call(model), expected, **CLOSE)
    assert done.calls["Attention.compute_qkv"] > 0
    unpatch(model)
    assert torch.equal(cosmos.call(model), expected)


def test_data_parallel_is_refused():
    with pytest.raises(Unsupported, match="use DistributedDataParallel"):
        patch(nn.DataParallel(cosmos.model()))


# ---- what was replaced ----


def test_a_patch_counts_its_calls():
    mot = fast_wam.model()
    done = patch(mot)
    assert "MoT._mixed_attention 0 calls so far" in repr(done)
    fast_wam.train(mot, "fast_wam_uncond")
    # 2 layers, 2 experts
    of_block = {"MoT._build_expert_attention_io": 4, "MoT._apply_expert_post_block": 4}
    assert done.calls == {"MoT._mixed_attention": 2, **of_block}
    assert "MoT._mixed_attention 2 calls so far" in repr(done)


@every_system
def test_explain_names_what_runs_where(system):
    make, *calls = SYSTEMS[system]
    model = nn.ModuleDict({"net": make()})
    done = patch(model)
    before = done.explain()
    assert before.startswith(f"{done.system}: {len(done.replaced)} replaced, {len(done.kept)} kept")
    assert "1 calls so far" not in before and "  kept     every other module" in before
    assert "replaced net." in before and "blocks.0" not in before, "modules that differ in a number are one line"
    run(model["net"], *calls, "no_grad")
    assert done.explain() != before
    for line in done.explain().splitlines()[1:]:
        assert line.split()[0] in ("replaced", "kept")


def test_explain_names_what_was_refused():
    gemmas, x = openpi.model(), openpi.tokens()
    done = patch(gemmas, on_unsupported="original")
    slope = openpi.bias(openpi.visible(0)).masked_fill(openpi.visible(0)[:, None], -0.5)
    with pytest.warns(UserWarning, match="original code of openpi runs instead"):
        gemmas(x, slope)
    assert re.search("refused  patch: attention_mask must hold .* of other values, 2 calls ran", done.explain())


# ---- what holds a model ----


class Script:
    def __init__(self, **parts):
        vars(self).update(parts)


class Holds(nn.Module):
    """A module that holds others under the names of a system's package."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def fast_wam_trainer(mot):
    """``Wan22Trainer`` behind its ``prepare``: the model, wrapped, twice; a long index of clips."""
    model = Holds(video_expert=mot.mixtures["video"], mot=mot, dit=mot, vae=nn.Conv2d(1, 1, 1))
    engine = Holds(module=model)
    clips = [{"path": str(i)} for i in range(1001)]
    return Script(
        model=engine, accelerator=Script(_models=[engine], state=Script()), train_dataset=Script(index=clips),
        optimizer=torch.optim.AdamW(model.dit.parameters()), cfg={"resume": None}, global_step=0,
    )  # fmt: skip


def lingbot_server(wan):
    vae = nn.Conv3d(1, 1, 1)
    return Script(
        transformer=wan, vae=vae, streaming_vae=Script(vae=vae), text_encoder=nn.Embedding(2, 2), device="cpu"
    )


def cosmos_pair(dit):
    """``get_model`` returns the model, which keeps its average beside it, and the configuration."""
    model = Holds(net=dit, net_ema=copy.deepcopy(dit), tokenizer=nn.Conv3d(1, 1, 1))
    return model, Script(model={"config": {"ema": True}})


def openpi_policy(gemmas):
    """``create_trained_policy``'s: the method that it calls is compiled."""
    model = Holds(paligemma_with_expert=gemmas)
    steps = Script(transforms=[Script(prompt="pick"), Script(stats={"mean": 0.0})])
    return Script(_model=model, _sample_actions=torch.compile(gemmas.forward, backend="eager"), _input_transform=steps)


# what the script of a system holds: its object, of which stand-in's model, how often that is in it
ENTRIES = {
    "Fast-WAM's trainer": ("Fast-WAM", fast_wam_trainer, 1),
    "Fast-WAM's evaluation": ("Fast-WAM", lambda mot: Holds(mot=mot, dit=mot), 1),
    "LingBot-VA's server": ("LingBot-VA inference", lingbot_server, 1),
    # tianshou's policies are modules
    "DreamZero's GrootSimPolicy": (
        "DreamZero", lambda wan: Holds(trained_model=Holds(backbone=nn.Identity(), action_head=Holds(model=wan))), 1,
    ),
    "Cosmos Policy's get_model": ("Cosmos Policy", cosmos_pair, 2),
    "openpi's policy": ("openpi", openpi_policy, 1),
    "a policy of a policy": ("Fast-WAM", lambda mot: Script(policy=Script(model=nn.ModuleDict({"head": mot}))), 1),
    "a list of stages": ("Fast-WAM", lambda mot: Script(stages=[nn.Linear(1, 1), {"wam": (mot,)}]), 1),
}  # fmt: skip


@pytest.mark.parametrize("system, hold, times", ENTRIES.values(), ids=ENTRIES)
def test_accelerate_finds_the_model(system, hold, times):
    make, *calls = SYSTEMS[system]
    model = make()
    held = hold(model)
    if isinstance(held, Script):
        held.me = held  # a circle
    done = accelerate(held)
    owners = [owner for owner, _ in done.replaced]
    assert len(owners) == times * len([m for m in owners if m in set(model.modules())])
    run(model, *calls, "no_grad")
    assert sum(done.calls.values()) > 0
    unpatch(done.model)
    assert not any(name in vars(owner) for owner in owners for name in ("forward", "_mixed_attention", "compute_qkv"))


def test_accelerate_refuses_by_name():
    nothing = Script(model=nn.Linear(2, 2), config={"a": Script(net=nn.Conv2d(1, 1, 1))})
    with pytest.raises(Unsupported, match=r"searched .model \(Linear\), .config\['a'\].net \(Conv2d\)"):
        accelerate(nothing)
    with pytest.raises(Unsupported, match="searched nothing, and no list or dict of more than 1000"):
        accelerate(Script(index=[fast_wam.model()] * 1001))
    with pytest.warns(UserWarning, match="Script must hold a model of Fast-WAM"):
        assert accelerate(nothing, on_unsupported="original") is None
    with pytest.raises(Unsupported, match="must hold one model, got .student, .teacher; give one to patch"):
        accelerate(Script(student=fast_wam.model(), teacher=cosmos.model()))
    for value in (None, Script, "fastwam", 3):
        with pytest.raises(TypeError, match="holder must be an object that holds a model"):
            accelerate(value)


@every_system
def test_copies_and_pickles_are_patched_and_can_be_unpatched(system):
    make, *calls = SYSTEMS[system]
    model = make()
    expected = run(model, *calls, "no_grad")
    patch(model)
    ours = run(model, *calls, "no_grad")
    assert any(not torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for p in model.parameters():
            p.data.zero_()  # a copy runs on its own weights
        got = run(twin, *calls, "no_grad")
        assert all(map(torch.equal, got, ours)), "the copy must run what the patched model ran"
        assert sum(twin._wam_kernels_patch.calls.values()) > 0
        with pytest.raises(ValueError, match="must not be patched already"):
            patch(twin)
        unpatch(twin)
        assert all(map(torch.equal, run(twin, *calls, "no_grad"), expected))
        model.load_state_dict(twin.state_dict())
    unpatch(model)


def test_a_copy_of_a_part():
    whole = nn.ModuleDict({"mot": fast_wam.model()})
    patch(whole)
    part = copy.deepcopy(whole["mot"])
    with pytest.raises(ValueError, match="unpatch it first"):
        patch(part)
    unpatch(part)
    patch(part)
    unpatch(whole)
    assert "_mixed_attention" in vars(part) and "_mixed_attention" not in vars(whole["mot"])


@pytest.mark.parametrize("given, got", [(None, "a NoneType"), ("pi0", "a str"), (nn.Linear, "the class Linear")])
@pytest.mark.parametrize("call", [patch, unpatch])
def test_what_is_no_module(call, given, got):
    with pytest.raises(TypeError, match=f"^{call.__name__}: model must be an nn.Module, got {got}; pass the module"):
        call(given)


def test_what_was_replaced_once_more():
    mot = fast_wam.model()
    patch(mot)
    mot._mixed_attention = lambda *args: None
    with pytest.raises(ValueError, match="MoT._mixed_attention must be as patch left it"):
        unpatch(mot)
    assert "_build_expert_attention_io" in vars(mot)
    del mot._mixed_attention
    unpatch(mot)
    with pytest.raises(ValueError, match="was not"):
        unpatch(mot)


# ---- models that are not as expected ----


def without(make, change):
    def changed():
        model = make()
        change(model)
        return model

    return changed


def derived(name, value):
    """The model's class with one attribute of another kind."""

    def change(model):
        model.__class__ = type("Mine", (type(model),), {name: value})

    return change


UNEXPECTED = {
    "lerobot's without layers": (
        without(lerobot.model, lambda m: m.__delattr__("layers")),
        "Fast-WAM's MoT must have _split_modulation, but it has none",
    ),
    "no mixture": (without(fast_wam.model, lambda m: m.mixtures.pop("action")), "has no action"),
    "no blocks": (
        without(fast_wam.model, lambda m: m.mixtures["video"].__delattr__("blocks")),
        "no attribute 'blocks'",
    ),
    "blocks of another type": (
        without(lambda: lingbot.model("flex"), lambda m: (m.__delattr__("blocks"), setattr(m, "blocks", 3))),
        "LingBot-VA's model is not laid out as expected: 'int' object is not iterable",
    ),
    "an empty list of blocks": (
        without(lambda: lingbot.model("flex"), lambda m: m.__setattr__("blocks", nn.ModuleList())),
        "LingBot-VA's model must have attentions to replace, but has none",
    ),
    "an attention in a wrapper of its own": (
        without(
            lambda: lingbot.model("flex"),
            lambda m: setattr(m.blocks[0], "attn1", checkpoint_wrapper(m.blocks[0].attn1)),
        ),
        "LingBot-VA must have a WanAttention, but has a CheckpointWrapper in its place",
    ),
    "another norm": (
        without(dreamzero.model, lambda m: setattr(m.blocks[1].self_attn, "norm_k", nn.LayerNorm(32))),
        "DreamZero's norms of queries and keys must be RMSNorm with a weight of 32 and no bias, got LayerNorm",
    ),
    "a norm of each head": (
        without(fast_wam.model, lambda m: setattr(m.mixtures["video"].blocks[0].self_attn, "norm_q", nn.RMSNorm(16))),
        "must be RMSNorm with a weight of 32 and no bias, got RMSNorm",
    ),
    "a norm without a weight": (
        without(cosmos.model, lambda m: setattr(m.blocks[0].self_attn.q_norm, "weight", None)),
        "must be RMSNorm with a weight of 16",
    ),
    "two eps": (
        without(lambda: lingbot.model("torch"), lambda m: setattr(m.blocks[1].attn1.norm_k, "eps", 1e-5)),
        "must have one eps, got 1e-06 and 1e-05",
    ),
    "another layout": (
        without(cosmos.model, lambda m: setattr(m.blocks[1].self_attn, "qkv_format", "sbhd")),
        "must have qkv_format='bshd', got 'sbhd'",
    ),
    "an attribute missing": (
        without(dreamzero.model, lambda m: m.blocks[1].self_attn.__delattr__("frame_seqlen")),
        "CausalWanSelfAttention must have frame_seqlen",
    ),
    "another signature": (
        without(fast_wam.model, derived("_mixed_attention", lambda self, q, k, v, mask: None)),
        "MoT must be as its package has it, but Mine overrides _mixed_attention",
    ),
    "a part of another type": (
        without(openpi.model, lambda m: m.gemma_expert.model.layers.__setitem__(0, nn.Identity())),
        "no attribute 'self_attn'",
    ),
    "a head dim that is no number": (
        without(cosmos.model, lambda m: setattr(m.blocks[0].self_attn, "head_dim", None)),
        "Cosmos Policy's model is not laid out as expected",
    ),
}


@pytest.mark.parametrize("make, message", UNEXPECTED.values(), ids=UNEXPECTED)
def test_a_model_that_is_not_as_expected(make, message):
    model = make()
    attributes = [set(vars(m)) for m in model.modules()]
    with pytest.raises(Unsupported, match=message):
        patch(model)
    with pytest.warns(UserWarning, match="original code of .* runs instead"):
        assert patch(model, on_unsupported="original") is None
    assert [set(vars(m)) for m in model.modules()] == attributes


@pytest.mark.parametrize("what", ["freqs", "mask"])
def test_an_argument_of_another_kind_is_left_to_the_original(what):
    mot = fast_wam.model()
    data = fast_wam.inputs(fast_wam.VIDEO)["video"]
    mask = fast_wam.mask("fast_wam_joint")[: fast_wam.VIDEO, : fast_wam.VIDEO]
    if what == "freqs":
        data["freqs"] = torch.ones(fast_wam.VIDEO, 1, fast_wam.D // 2)
    else:
        mask = None
    call = lambda: mot.prefill_video_cache(data["x"], data["freqs"], data["t_mod"], data["context"], mask)  # noqa: E731
    expected = numbers(call())
    patch(mot)
    with pytest.raises(
        Unsupported, match="must be a complex tensor, got torch.float32|must be torch.bool .*, got None"
    ):
        call()
    unpatch(mot)
    patch(mot, on_unsupported="original")
    with pytest.warns(UserWarning, match="original code of Fast-WAM runs instead"):
        assert_close(numbers(call()), expected)


@pytest.mark.parametrize("name", ["_mixed_attention", "_build_expert_attention_io"])
def test_a_replaced_method_has_the_expected_parameters(name, monkeypatch):
    mot = fast_wam.model()
    monkeypatch.setattr(type(mot), name, lambda self, one, *two: None)
    with pytest.raises(Unsupported, match=rf"MoT.{name} must take \(.*\), but takes \(one, \*two\)"):
        patch(mot)
    monkeypatch.delattr(type(mot), name)
    with pytest.raises(Unsupported, match=f"MoT must have the method {name}, but has none"):
        patch(mot)
    assert not {"_mixed_attention", "_build_expert_attention_io"} & set(vars(mot))


def test_a_replaced_method_that_needs_more_is_refused(monkeypatch):
    mot = fast_wam.model()
    needs = lambda self, q_cat, k_cat, v_cat, attention_mask, bias: None  # noqa: E731
    monkeypatch.setattr(type(mot), "_mixed_attention", needs)
    with pytest.raises(Unsupported, match=r"must take \(.*attention_mask.*\), but takes \(q_cat, .*, bias\)"):
        patch(mot)
    between = lambda self, q_cat, k_cat, bias=None, v_cat=None, attention_mask=None: None  # noqa: E731
    monkeypatch.setattr(type(mot), "_mixed_attention", between)
    with pytest.raises(Unsupported, match=r"but takes \(q_cat, k_cat, bias, v_cat, attention_mask\)"):
        patch(mot)


def test_a_replaced_method_may_take_more(monkeypatch):
    """A fork's method with one more parameter: calls that leave it at its default are served, others are not."""
    mot = fast_wam.model()
    original, given = type(mot)._mixed_attention, []

    def more(self, q_cat, k_cat, v_cat, attention_mask, softcap=None, **rest):
        given.append((softcap, rest))
        return original(self, q_cat, k_cat, v_cat, attention_mask)

    monkeypatch.setattr(type(mot), "_mixed_attention", more)
    q, mask = torch.randn(3, 1, fast_wam.VIDEO, 32), fast_wam.mask("fast_wam_joint")[: fast_wam.VIDEO, : fast_wam.VIDEO]
    expected = mot._mixed_attention(*q, mask)
    given.clear()
    done = patch(mot, on_unsupported="original")
    for call in (lambda: mot._mixed_attention(*q, mask), lambda: mot._mixed_attention(*q, mask, softcap=None)):
        torch.testing.assert_close(call(), expected, **CLOSE)
    assert not given and done.calls["MoT._mixed_attention"] == 2
    with pytest.warns(UserWarning, match="MoT._mixed_attention must be called without softcap.*original code of Fast-"):
        assert torch.equal(mot._mixed_attention(*q, mask, softcap=30.0), expected)
    with pytest.warns(UserWarning, match="MoT._mixed_attention must be called without bias"):
        mot._mixed_attention(*q, mask, bias=1)
    with pytest.warns(UserWarning, match="must be called with at most 5 arguments, got 6"):
        mot._mixed_attention(*q, mask, 30.0)
    assert given == [(30.0, {}), (None, {"bias": 1}), (30.0, {})] and done.calls["MoT._mixed_attention"] == 2
    unpatch(mot)
    patch(mot)
    with pytest.raises(Unsupported, match="must be called without softcap, which this library does not know"):
        mot._mixed_attention(*q, mask, softcap=30.0)


def test_a_replaced_function_has_the_expected_parameters(monkeypatch):
    monkeypatch.setattr(openpi.openpi, "eager_attention_forward", lambda module, q, k, v: None)
    with pytest.raises(Unsupported, match="eager_attention_forward must take .*but takes .module, q, k, v."):
        patch(openpi.model())


def test_no_system_is_left_out():
    readme = (Path(_systems.__file__).parent / "README.md").read_text()
    folder = Path(__file__).parent
    for system in _systems.SYSTEMS:
        name = system.__name__.rpartition(".")[2]
        assert f"| {system.SYSTEM} |" in readme, f"no row in the README for {name}"
        assert (folder / f"test_{name}.py").is_file()
        if name == "openwam":  # the real package, in tests of its own
            continue
        assert any(row.startswith(system.SYSTEM) for row in SYSTEMS), f"no row in SYSTEMS for {name}"
        assert (folder / f"stand_ins/{name}.py").is_file()
