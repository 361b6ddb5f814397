"""The roofline model against PyTorch's counter over real forwards, and against counts by hand."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wam_kernels import block_attention, cached_attention, compile_plan
from wam_kernels.roofline import HARDWARE, Cost, hardware
from wam_kernels.roofline import block_attention as attention_cost
from wam_models import RolloutConfig, RolloutEngine, WorldActionModel
from wam_models.config import golden_config
from wam_models.estimate import Sizes, packed_forward, parameters, rollout_chunk
from wam_models.objectives import OBJECTIVES, geometry_for

SMALL = golden_config()
OTHER = replace(SMALL, hidden=32, heads=3, head_dim=16, layers=3, ffn=80, actions_per_frame=3, text_dim=24)
GRID, TEXT = (2, 3), 5


def made(config):
    torch.manual_seed(0)
    return WorldActionModel(config).eval().requires_grad_(False)


def counted(call):
    # PyTorch's counter has no formula of the CPU's fused attention (of the text), but of the products that it replaces
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", [SMALL, OTHER], ids=["small", "other"])
def test_parameters_are_those_of_the_model(config):
    assert parameters(config) == sum(p.numel() for p in made(config).parameters())


@pytest.mark.parametrize("config,frames", [(SMALL, 5), (OTHER, 9)], ids=["small", "other"])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_flops_of_a_packed_forward_are_those_that_torch_counts(config, frames, impl):
    """Exact over visible pairs; the reference computes all pairs, and one number more of each."""
    B, c = 2, config
    y, x = 2 * GRID[0], 2 * GRID[1]
    geometry = geometry_for(
        "joint", OBJECTIVES["joint"], frames=frames, video_tokens=6, action_tokens=c.actions_per_frame,
        chunk_size=2, window=4,
    )  # fmt: skip
    plan, model = compile_plan(geometry), made(c)
    video, action = torch.randn(B, c.latent_channels, frames, y, x), torch.randn(B, frames, c.actions_per_frame, 7)
    t = torch.full((B, frames), 500.0)
    text = torch.randn(B, TEXT, c.text_dim)
    got = counted(lambda: model(video, video, action, action, t, t, text, plan, impl=impl))
    sizes = Sizes(c, GRID, TEXT, 4)
    others, attention = packed_forward(sizes, B, frames, "joint", chunk_size=2, window=4, history="full")
    more = 0
    if impl == "reference":
        more = 4 * c.inner * (plan.length**2 - plan.visible_pairs) + 2 * c.heads * plan.length**2
    assert got == others.flops + attention.flops + c.layers * B * more


@pytest.mark.parametrize("config", [SMALL, OTHER], ids=["small", "other"])
@pytest.mark.parametrize(
    "program,options",
    [
        ("joint", {}),
        ("joint", {"guidance": 3.0, "steps": 3}),
        ("video_then_action", {"cache": "recomputed"}),
        ("action_then_video", {"history": "video_only"}),
    ],
)
def test_flops_of_a_chunk_are_those_that_torch_counts(config, program, options):
    c, model = config, made(config)
    rollout = RolloutConfig(program=program, **{"chunk_size": 2, "window": 4, "steps": 2} | options)
    episode = RolloutEngine(model, rollout).start(
        torch.randn(1, c.latent_channels, 1, 2 * GRID[0], 2 * GRID[1]), torch.randn(1, TEXT, c.text_dim)
    )
    for seed in range(4):  # until the window is full
        episode.accept(episode.propose(generator=torch.Generator().manual_seed(seed)))

    def chunk():
        episode.accept(episode.propose(generator=torch.Generator().manual_seed(9)))

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
    h100, h200 = HARDWARE["h100"], HARDWARE["h200"]
    work = Cost(int(989e9), int(3.35e9))  # 1 ms of arithmetic on both, 1 ms of memory on the first
    assert work.ms(h100) == pytest.approx(1) and work.ms(h200) == pytest.approx(1)
    assert (work * 2 + Cost(1, 0)).bound(h200) == "arithmetic"
    assert (work + Cost(0, int(1e9))).bound(h100) == "memory"


def test_unknown_hardware_names_the_known():
    with pytest.raises(ValueError, match=r"hardware must be one of \('h100', 'h200'\), got 'a100'"):
        hardware("a100")
