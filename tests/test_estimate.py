"""The roofline model against PyTorch's counter over real forwards, against built models, and against counts by hand."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wam_kernels import block_attention, cached_attention, compile_plan
from wam_kernels.ops import OPS
from wam_kernels.roofline import DEVICE_MODELS, Cost, device_model, device_model_of
from wam_kernels.roofline import block_attention as attention_cost
from wam_models import RolloutConfig, RolloutEngine, Schedule, WorldActionModel, cli
from wam_models.bridge import bridge_video
from wam_models.config import Stream, golden_config
from wam_models.costs import block_matrices, packed_forward
from wam_models.estimate import (
    PRESETS,
    Share,
    Sizes,
    parameters,
    rollout_chunk,
    rollout_memory,
    train_memory,
    train_step,
)
from wam_models.estimate.forward import optimizers
from wam_models.estimate.memory import block_activations
from wam_models.objectives import OBJECTIVES, frames_before_chunks, geometry_for, sample_for, told_frames
from wam_models.rollout.layout import ChunkLayout
from wam_models.train import TrainConfig
from wam_models.train.engine import EngineConfig
from wam_models.train.optimizers import make_optimizers

SMALL = golden_config()
OTHER = replace(SMALL, hidden=32, heads=3, head_dim=16, layers=3, ffn=80, actions_per_frame=3, text_dim=24)
QUERIES = Stream(name="queries", width=24, ffn=40, tokens=3, aligned=6)
REGISTERS = Stream(name="registers", width=64, ffn=128, tokens=2, expert="video")
KINDS = {
    "small": SMALL,
    "other": OTHER,
    "one expert": replace(
        SMALL, topology="parallel_stream", action_hidden=64, action_ffn=128, state_dim=5, mode_token=True
    ),
    "video alone": replace(SMALL, topology="video_only", context=(REGISTERS,)),
    "further streams": replace(SMALL, state_dim=5, context=(QUERIES, REGISTERS)),
    "bridge": replace(OTHER, bridge_dim=32, bridge_layer=1),
    "state tokens": replace(OTHER, state_dim=5, state_tokens=True, context=(QUERIES,)),
}
FULL = {
    "full attention": replace(OTHER, full_attention=True, state_dim=5, context=(QUERIES,)),
    "full attention to state tokens": replace(OTHER, full_attention=True, state_dim=5, state_tokens=True),
    "full attention of video alone": replace(KINDS["video alone"], full_attention=True),
}
KINDS |= FULL
GRID, TEXT = (2, 3), 5


def made(config):
    torch.manual_seed(0)
    return WorldActionModel(config).eval().requires_grad_(False)


def counted(call):
    # PyTorch's counter has no formula of the CPU's fused attention (of the text), but of the products that it replaces
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_parameters_are_those_of_the_model(config):
    assert parameters(config) == sum(p.numel() for p in made(config).parameters())


@pytest.mark.parametrize("config,frames", [(c, 9 if c.layers == 3 else 5) for c in KINDS.values()], ids=KINDS)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_flops_of_a_packed_forward_are_those_that_torch_counts(config, frames, impl):
    """Exact over visible pairs; the reference computes all pairs, and one number more of each."""
    B, c = 2, config
    y, x = 2 * GRID[0], 2 * GRID[1]
    sizes, size = Sizes(c, GRID, TEXT, 4), frames - 1 if c.full_attention else 2
    sample = sample_for(
        "joint", OBJECTIVES["joint"], frames=frames, video_tokens=6, action_tokens=c.actions_per_frame * c.has_actions,
        chunk_size=size, window=4, context=sizes.context_tokens, full_attention=c.full_attention,
        state_tokens=c.state_tokens,
    )  # fmt: skip
    plan, model = compile_plan(sample), made(c)
    video, action = torch.randn(B, c.latent_channels, frames, y, x), torch.randn(B, frames, c.actions_per_frame, 7)
    t = torch.full((B, frames), 500.0)
    text = torch.randn(B, TEXT, c.text_dim)
    states = len(told_frames(frames, size, c.state_tokens))
    told = {"state": torch.randn(B, states, c.state_dim) if c.state_dim else None}
    told["modes"] = torch.zeros(B, dtype=torch.int64) if c.mode_token else None
    if c.bridge_dim:
        last = video[:, :, frames_before_chunks(frames, 2)[-1] :]
        told["bridge"] = bridge_video(c, last, last)
    of_actions = (action, action, t) if c.has_actions else (None, None, None)
    clean = video
    if c.full_attention:
        clean, of_actions = None, (of_actions[0], None, of_actions[2])
    got = counted(lambda: model(video, clean, *of_actions[:2], t, of_actions[2], text, plan, impl=impl, **told))
    others, attention = packed_forward(sizes, B, frames, "joint", chunk_size=size, window=4, history="full")
    more = 0
    if impl == "reference":
        more = 4 * c.inner * (plan.length**2 - plan.visible_pairs) + 2 * c.heads * plan.length**2
    assert got == others.flops + attention.flops + c.layers * B * more


CACHED = {name: config for name, config in KINDS.items() if name not in FULL}


@pytest.mark.parametrize("config", FULL.values(), ids=FULL)
@pytest.mark.parametrize("options", [{}, {"guidance": 3.0}, {"video": Schedule(steps=5), "candidates": 3}])
def test_flops_of_a_chunk_of_full_attention_are_those_that_torch_counts(config, options):
    test_flops_of_a_chunk_are_those_that_torch_counts(config, "joint", options | {"cache": "last_frame"})
    assert rollout_memory(Sizes(config, GRID, TEXT, 4), RolloutConfig(cache="last_frame"))["keys and values"] == 0


@pytest.mark.parametrize("config", CACHED.values(), ids=CACHED)
@pytest.mark.parametrize(
    "program,options",
    [
        ("joint", {}),
        ("joint", {"guidance": 3.0, "steps": 3}),
        ("video_then_action", {"cache": "recomputed"}),
        ("decoupled_same_step", {"cache": "last_frame"}),
        ("action_then_video", {"history": "video_only"}),
        ("action_noisy_to_video", {"video": Schedule(steps=1), "action": Schedule(steps=4, solver="heun")}),
        ("joint", {"video": Schedule(steps=2), "action": Schedule(steps=5), "interleave": True, "reuse_keys": True}),
        ("video_then_action", {"video": Schedule(steps=3, stop=0.2), "candidates": 3}),
    ],
)
def test_flops_of_a_chunk_are_those_that_torch_counts(config, program, options):
    c, model = config, made(config)
    if c.bridge_layer is not None:  # it has no candidates
        options = {name: value for name, value in options.items() if name != "candidates"}
    rollout = RolloutConfig(program=program, **{"chunk_size": 2, "window": 4, "steps": 2} | options)
    episode = RolloutEngine(model, rollout).start(
        torch.randn(1, c.latent_channels, 1, 2 * GRID[0], 2 * GRID[1]), torch.randn(1, TEXT, c.text_dim),
        state=torch.randn(1, 1, c.state_dim) if c.state_dim else None,
    )  # fmt: skip
    for seed in range(4):  # until the window is full
        candidate = episode.propose(generator=torch.Generator().manual_seed(seed))
        episode.accept(replace(candidate, video_level=0.0))

    if c.full_attention:  # what is set up once
        episode.propose_many(generator=torch.Generator().manual_seed(9))

    def chunk():
        *_, last = episode.propose_many(generator=torch.Generator().manual_seed(9))
        episode.accept(replace(last, video_level=0.0))

    parts = rollout_chunk(Sizes(c, GRID, TEXT, 4), rollout)
    assert counted(chunk) == sum(part.times * part.cost.flops for part in parts)


def test_backward_and_cached_attention_are_counted():
    q, k, v = (torch.randn(2, 24, 2, 16, requires_grad=True) for _ in range(3))
    geometry = geometry_for(
        "joint", OBJECTIVES["joint"], frames=2, video_tokens=4, action_tokens=2, chunk_size=1, window=4
    )
    plan = compile_plan(geometry)
    out = block_attention(q, k, v, plan)
    assert counted(lambda: out.sum().backward()) == 10 * 2 * 16 * 2 * plan.visible_pairs
    ranges = torch.tensor([[[[0, 5], [7, 9]], [[2, 2], [0, 1]]]], dtype=torch.int32)
    k_cache = torch.randn(1, 12, 2, 16)
    q = torch.randn(1, 5, 2, 16)
    got = counted(lambda: cached_attention(q, k_cache, k_cache, ranges, group_rows=(3, 2)))
    assert got == 4 * 2 * 16 * (3 * 7 + 2 * 1)


def test_bytes_of_attention_by_hand():
    # 10 tokens, 2 heads of 8 in bf16: q, k, v, out of 320 bytes each and lse of 80; backward 8 tensors, lse and delta
    assert attention_cost(37, 10, 2, 8, 2) == Cost(4 * 16 * 37, 4 * 320 + 80)
    assert attention_cost(37, 10, 2, 8, 2, backward=True) == Cost(10 * 16 * 37, 8 * 320 + 160)


def test_the_larger_time_binds():
    h100, h200 = DEVICE_MODELS["h100"], DEVICE_MODELS["h200"]
    work = Cost(int(989e9), int(3.35e9))  # 1 ms of arithmetic on both, 1 ms of memory on the first
    assert work.ms(h100) == pytest.approx(1) and work.ms(h200) == pytest.approx(1)
    assert (work * 2 + Cost(1, 0)).bound(h200) == "arithmetic"
    assert (work + Cost(0, int(1e9))).bound(h100) == "memory"
    # float32 products take turns with those of bf16
    assert (work + Cost(float32_flops=int(67e9))).ms(h100) == pytest.approx(2)


def test_an_unknown_device_model_names_the_known():
    with pytest.raises(ValueError, match=r"device model must be one of \('h100', 'h200', .*\), got 'b300'"):
        device_model("b300")
    assert device_model_of("NVIDIA H100 80GB HBM3") == "h100" and device_model_of("NVIDIA H200") == "h200"
    # of one series, but with other memory
    assert device_model_of("NVIDIA GH200 480GB") is None and device_model_of("NVIDIA H100 NVL") is None


# ---- what is kept, and the optimizers ----


def training_forward(config, frames, batch):
    model = made(config).train().requires_grad_(True)
    geometry = geometry_for(
        "joint", OBJECTIVES["joint"], frames=frames, video_tokens=6, action_tokens=config.actions_per_frame,
        chunk_size=2, window=4,
    )  # fmt: skip
    video = torch.randn(batch, config.latent_channels, frames, 2 * GRID[0], 2 * GRID[1])
    action = torch.randn(batch, frames, config.actions_per_frame, config.action_dim)
    t, text = torch.full((batch, frames), 500.0), torch.randn(batch, TEXT, config.text_dim)
    out = model(video, video, action, action, t, t, text, compile_plan(geometry))
    return model, out


def saved_bytes(config, frames, batch):
    """Of the tensors that the backward needs, parameters left out."""
    found = {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model, _out = training_forward(config, frames, batch)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(t.untyped_storage().nbytes() for place, t in found.items() if place not in weights)


@pytest.mark.parametrize("config", [SMALL, OTHER], ids=["small", "other"])
def test_activations_are_what_autograd_saves(config, monkeypatch):
    fused = replace(OPS["ada_layer_norm"], small=0)  # as on a GPU
    monkeypatch.setattr("wam_kernels.adaln.op._ROW", fused)
    sizes = Sizes(config, GRID, TEXT, 4)
    one, two = (saved_bytes(replace(config, layers=n), 5, 2) for n in (1, 2))
    # statistics of the norms and log-sum-exps are the rest
    assert 0.95 * (two - one) < block_activations(sizes, 2, 5) <= two - one


@pytest.mark.parametrize("config", [SMALL, OTHER], ids=["small", "other"])
def test_optimizers_are_those_of_a_run(config):
    model, out = training_forward(config, 2, 1)
    sum(o.sum() for o in out).backward()
    for p in model.parameters():  # the head begins as zeros, which leaves the blocks no gradient
        p.grad = torch.ones_like(p)
    muon, adamw = make_optimizers(torch.nn.ModuleDict({"model": model}), TrainConfig())
    got = counted(lambda: (muon.step(), adamw.step()))
    assert got == optimizers(config, TrainConfig()).float32_flops
    of_muon = sum(state["average"].numel() for state in muon.state.values())
    assert of_muon == sum(rows * columns * times for rows, columns, times in block_matrices(config))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_those_of_models_at_full_size(name):
    """On the meta device, where nothing has memory: parameters, the cache, and the FLOPs of a forward."""
    preset = PRESETS[name]
    sizes, frames = preset.sizes(), 4
    c = replace(sizes.model, layers=2)
    with torch.device("meta"):
        full, model = WorldActionModel(sizes.model), WorldActionModel(c).requires_grad_(False).bfloat16()
    assert parameters(sizes.model) == sum(p.numel() for p in full.parameters())
    layout = ChunkLayout(preset.rollout, OBJECTIVES["joint"], 1, sizes.grid, c.actions_per_frame)
    cache = layout.new_cache(full.bfloat16()).buffer
    assert rollout_memory(sizes, preset.rollout)["keys and values"] == cache.numel() * 2

    def attend(layer, q, k, v):  # all pairs
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return ((q @ k.mT) @ v).transpose(1, 2)

    def meta(*shape):
        return torch.empty(shape, device="meta")

    y, x = (tokens * cell for tokens, cell in zip(sizes.grid, c.patch[1:], strict=True))
    video, action = meta(1, c.latent_channels, frames, y, x), meta(1, frames, c.actions_per_frame, c.action_dim)
    t, text = meta(1, frames), meta(1, sizes.text_tokens, c.text_dim).bfloat16()
    got = counted(lambda: model(video, video, action, action, t, t, text, attend=attend))
    here = replace(sizes, model=c)
    others, _ = packed_forward(here, 1, frames, "joint", chunk_size=2, window=4, history="full")
    tokens = 2 * frames * (sizes.grid[0] * sizes.grid[1] + c.actions_per_frame)
    assert got == others.flops + c.layers * 4 * c.inner * tokens**2


# ---- several GPUs ----


def test_eight_gpus_share_a_step():
    preset = PRESETS["libero"]
    sizes, one = preset.sizes(), preset.train()
    eight = replace(one, batch=8)
    alone, shared = train_memory(sizes, one), train_memory(sizes, eight, 8)
    for name in ("weights and gradients", "optimizers", "average"):
        assert shared[name] == alone[name] // 8
    assert shared["activations of blocks"] == alone["activations of blocks"]  # a sample each, as alone
    assert shared["gathered blocks"] < 0.2 * alone["weights in bf16"]
    for a, b in zip(train_step(sizes, one)[1:3], train_step(sizes, eight, 8)[1:3], strict=True):
        assert a == b
    # the tokens of one sample over all eight
    split = replace(one, engine=EngineConfig(context_parallel=8))
    for a, b in zip(train_step(sizes, one)[1:3], train_step(sizes, split, 8)[1:3], strict=True):
        assert b.cost.flops == a.cost.flops // 8 and b.tokens == a.tokens // 8
    # two forwards and a backward of weights in, gradients out, but for the own eighth
    total = parameters(sizes.model)
    assert Share.of(sizes, eight, 8).exchanged(sizes, 68) == pytest.approx(total * 7 / 8 * (2 + 2 + 4), rel=1e-6)
    assert Share.of(sizes, one).exchanged(sizes, 68) == 0
    hybrid = replace(eight, engine=EngineConfig(replicas=2))
    assert train_memory(sizes, hybrid, 8)["average"] == alone["average"] // 4


@pytest.mark.parametrize("config", [SMALL, OTHER], ids=["small", "other"])
def test_what_is_computed_again_is_not_kept(config):
    sizes, training = Sizes(config, GRID, TEXT), TrainConfig(model=config, batch=2, frames=5)

    def activations(recompute):
        return train_memory(sizes, replace(training, engine=EngineConfig(recompute=recompute)))["activations of blocks"]

    of_block = block_activations(sizes, 2, 5)
    tokens = 2 * 2 * 5
    streams = sum(tokens * n * w for n, w in ((6, config.hidden), (config.actions_per_frame, config.action_hidden)))
    assert activations("none") == config.layers * of_block
    assert activations("block") == of_block + config.layers * 2 * streams
    assert activations("block") < activations("selective") < activations("none") + of_block


def test_packed_tokens_are_as_many_long_clips():
    preset = PRESETS["libero"]
    sizes, config = preset.sizes(), replace(preset.train(), frames=1000, tokens=100_000)
    assert train_step(sizes, config)[1].tokens == 72_000  # one of 1,000 frames fits
    split = replace(config, engine=EngineConfig(context_parallel=8))
    assert train_step(sizes, split, 8)[1].tokens == 9_000


def test_the_page_has_what_the_commands_print(capsys):
    page = (Path(__file__).parents[1] / "docs/training.md").read_text()
    rows = re.findall(r"\| `(wam train .* --gpus 8 .*)` \| (\S+) B \| (\S+) \| (\S+) \| (\S+) \|", page)
    assert len(rows) == 2
    for command, *figures in rows:
        assert cli.main([*command.split()[1:], *"--device-model h100 --video-tokens 32 --text-tokens 512".split()]) == 0
        out = capsys.readouterr().out
        found = re.search(r"parameters +(\S+)\n.*\nmemory +(\S+) GB, fits", out)
        ms, rate = re.search(r"takes at least (\S+) ms.* at most (\S+) tokens", out).groups()
        billions = int(found[1].replace(",", "")) / 1e9
        assert figures == [f"{billions:.2f}", found[2], ms, rate]


# ---- the command line ----


def test_rollout_estimate_at_full_size(capsys):
    assert cli.main("rollout --estimate --preset libero --device-model h200 --steps 10".split()) == 0
    out = capsys.readouterr().out
    assert "all figures are estimated, nothing is measured" in out and "NVIDIA H200 SXM data sheet" in out
    (step,) = (line.split() for line in out.splitlines() if line.startswith("denoising step"))
    preset = PRESETS["libero"]
    part = rollout_chunk(preset.sizes(), replace(preset.rollout, steps=10))[0]
    assert step[6:8] == ["10", "144"]
    assert float(step[10]) == pytest.approx(part.ms(DEVICE_MODELS["h200"]), abs=1e-3) and step[-1] == "memory"


def test_train_estimate_reads_the_sizes_of_a_data_set(capsys):
    assert cli.main("train --estimate --data data/libero_demo --device-model h100".split()) == 0
    out = capsys.readouterr().out
    # 128 x 256 pixels in cells of 16, two by two cells in a token
    assert "32 video and 4 action in a frame" in out and "clipping and optimizers" in out


def test_rollout_estimate_reads_a_checkpoint_without_its_weights(capsys, tmp_path):
    from wam_models.checkpoint import save_checkpoint

    save_checkpoint(tmp_path, made(SMALL))
    (tmp_path / "model.safetensors").unlink()
    estimate = ["rollout", "--estimate", "--checkpoint", str(tmp_path), "--device-model", "h100"]
    assert cli.main(estimate) == 2
    assert "--video-tokens must be given" in capsys.readouterr().err
    assert cli.main([*estimate, "--video-tokens", "6", "--text-tokens", "5"]) == 0
    assert f"{parameters(SMALL):,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command, message",
    [
        ("rollout --checkpoint x --data y --preset libero", "--preset must be left out without --estimate"),
        ("rollout --estimate", "--estimate must have exactly one of --preset and --checkpoint"),
        (
            "rollout --estimate --preset libero2",
            "--preset must be one of ('libero', 'libero-small', 'robotwin', 'demo')",
        ),
        ("train --estimate --preset demo --device-model tpu", "--device-model must be one of ('h100', 'h200', "),
        ("train --estimate --device-model h100", "--estimate must have one of --preset, --data and --video-tokens"),
        ("train --estimate --preset demo --resume x", "--resume must be left out with --estimate"),
        ("train --estimate --preset demo --gpus 8", "batch must be a multiple of 8 on --gpus 8, got 2"),
        ("train --gpus 8 --data x --out y", "--gpus must be left out without --estimate"),
    ],
)
def test_a_bad_estimate_is_one_line(command, message, capsys):
    assert cli.main(command.split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
