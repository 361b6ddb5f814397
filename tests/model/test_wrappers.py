"""The model in the wrappers that people train in: FSDP2, DistributedDataParallel, adapters, the meta device."""

import copy
import pickle
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from wam_models import (
    OBJECTIVES,
    RolloutConfig,
    RolloutEngine,
    StepConfig,
    WordEmbedding,
    WorldActionModel,
    training_step,
)
from wam_models.flow import TimestepDraw

from .test_training import ONLY, SMALL, batch, generator, small_model

CONFIG = StepConfig(program="joint", chunk_sizes=(2, 2), windows=(4, 4))
PARTS = {
    "model": lambda model: [],
    "blocks": lambda model: model.packed_block_stack.packed_blocks,
    "heads and times": lambda model: [
        *(model.core.proj_out, model.action_expert.action_proj_out),
        *(model.core.time_conditioner, model.action_expert.time_conditioner),
    ],
}


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def step(model, config=CONFIG):
    """The loss and the gradients of all parameters."""
    loss, _ = training_step(model, batch(), generator(), config)
    loss.backward()
    grads = {name.replace("module.", ""): p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    return loss.detach(), {k: getattr(g, "full_tensor", lambda g=g: g)().float() for k, g in grads.items()}


@cache
def narrow_step(dtype):
    return step(small_model().to(dtype))


def assert_same_step(got, want):
    assert torch.equal(got[0], want[0])
    for name, grad in want[1].items():
        # each block adds a gradient to its text, in the text's dtype and in another order
        bound = 0.01 if "text_proj" in name or "context_proj" in name else 1e-6
        assert (got[1][name] - grad).norm() <= bound * grad.norm(), name


@pytest.mark.parametrize(
    "part,dtype,options",
    [*((part, torch.bfloat16, {}) for part in PARTS)]
    + [("blocks", torch.float16, {}), ("blocks", torch.bfloat16, {"cast_forward_inputs": False})]
    + [("blocks", torch.bfloat16, {"output_dtype": torch.float32})],
    ids=lambda x: str(x),
)
def test_fsdp_mixed_precision_is_a_narrow_model(part, dtype, options, mesh):
    """The only casts are those of a model in this dtype: timesteps, modulation and rope tables keep theirs."""
    options |= {"param_dtype": dtype, "reduce_dtype": torch.float32}
    model = small_model()
    model.checkpoint_activations(part == "blocks")
    for module in (*PARTS[part](model), model):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(**options))
    assert_same_step(step(model), narrow_step(dtype))


@pytest.mark.parametrize("kept", [("scale_shift_table",), ("scale_shift_table", "norm", "time_embedder")], ids=len)
def test_parts_may_stay_in_float32(kept):
    """As diffusers keeps them in a narrow model."""
    model = small_model().bfloat16()
    for name, p in model.named_parameters():
        if any(part in name for part in kept):
            p.data = p.data.float()
    loss, grads = step(model)
    assert abs(loss / step(small_model())[0] - 1) < 1e-3 and all(g.isfinite().all() for g in grads.values())
    engine = RolloutEngine(model, RolloutConfig(program="joint", chunk_size=1, steps=1))
    episode = engine.start(batch()["video"][:, :, :1], batch()["text"])
    assert episode.cache.buffer.dtype == torch.bfloat16 and episode.propose(generator=generator()).action.any()


class Adapter(torch.nn.Module):
    """Stands for LoRA and quantised maps: a linear map whose own weight is not to be seen."""

    def __init__(self, linear):
        super().__init__()
        self.base = linear

    def forward(self, x):
        return self.base(x)


def test_linear_maps_may_be_replaced():
    model = small_model().bfloat16()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, Adapter(child))
    loss, _ = training_step(model, batch(), generator(), CONFIG)
    assert torch.equal(loss, narrow_step(torch.bfloat16)[0])


def test_rounded_timesteps_are_refused_with_the_flag(mesh):
    model = fully_shard(small_model(), mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    data, t = batch(), torch.full((2, 5), 997.0)
    inputs = data["video"], data["video"], data["action"], data["action"], t, t, data["text"]
    with pytest.raises(ValueError, match="video_timesteps must be float32.*cast_forward_inputs=False"):
        model(*inputs, attend=lambda layer, q, k, v: v)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_data_parallel_uses_every_parameter_in_every_step(objective, mesh):
    config = StepConfig(mixture=ONLY[objective])
    model = DistributedDataParallel(small_model())
    assert_same_step(step(model, config), step(small_model(), config))
    training_step(model, batch(), generator(), config)[0].backward()  # raises, had the step before left one out


def test_a_block_compiled_for_any_size_takes_the_same_step():
    torch._dynamo.reset()
    model = small_model(layers=1)
    model.packed_block_stack.packed_blocks[0].compile(backend="eager", dynamic=True)
    assert_same_step(step(model), step(small_model(layers=1)))


def test_recomputed_activations_give_the_same_step():
    model = small_model()
    model.checkpoint_activations()
    assert_same_step(step(model), step(small_model()))


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = WorldActionModel(SMALL)
    data = {name: t.to("meta") for name, t in batch().items()}
    loss, _ = training_step(model, data, generator())
    loss.backward()
    assert loss.shape == () and all(p.grad.shape == p.shape for p in model.parameters())
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.constant_(p, float("nan"))
    model.reset_parameters()
    fresh = dict(WorldActionModel(SMALL).named_parameters())
    for name, p in model.named_parameters():
        # as large as in a new model: the sums of squares of two draws are alike
        assert p.square().mean().item() == pytest.approx(fresh[name].square().mean().item(), rel=0.6), name
    training_step(model, batch(), generator())[0].backward()


def test_public_objects_can_be_copied_and_pickled():
    model = small_model()
    engine = RolloutEngine(model, RolloutConfig(steps=3))
    words = WordEmbedding.from_instructions(["push the cup"], 8)
    for value in (engine.config, CONFIG, TimestepDraw(), SMALL, OBJECTIVES["joint"]):
        assert copy.deepcopy(value) == pickle.loads(pickle.dumps(value)) == value
    for again in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        assert_same_step(step(again(model)), step(small_model()))
        assert torch.equal(again(words)(["push"]), words(["push"]))
        assert again(engine).config == engine.config
