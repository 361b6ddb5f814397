"""Cosmos Policy: norm and rope of its self-attentions, modulation, gates and norms of its blocks."""

import pytest
import torch

from tests.integrations.checks import check_patch
from tests.integrations.stand_ins.cosmos_policy import Attention, MiniTrainDIT
from wam_kernels.integrations import Unsupported, cosmos_policy, patch

REPLACED = {"Attention.compute_qkv", "Block.forward"}


def model(**options) -> MiniTrainDIT:
    torch.manual_seed(0)
    return MiniTrainDIT(**options)


def inputs(times: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Tokens of 3 latent frames of 2 x 2, a time for each frame or sample, and text."""
    g = torch.Generator().manual_seed(2)
    shapes = (2, 3, 2, 2, 32), times, (2, 5, 10)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def call(dit: MiniTrainDIT) -> torch.Tensor:
    return dit(*inputs())


@pytest.mark.parametrize("options", [{}, {"extra_pos": True, "checkpointed": True}, {"lora_dim": None}])
def test_forward_and_gradients(options):
    dit = model(**options)
    check_patch(dit, lambda: call(dit), REPLACED)


def test_one_time_for_all_frames_and_an_image_beside_the_text():
    dit = model(image_dim=6)
    image = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3))
    check_patch(dit, lambda: dit(*inputs((2,)), image), REPLACED)


@pytest.mark.parametrize("use_wan_fp32_strategy", [False, True])
@pytest.mark.filterwarnings("ignore:.*Disabling autocast")
def test_bfloat16(use_wan_fp32_strategy):
    """No further from float32 than the original, in its dtype."""
    dit = model(use_wan_fp32_strategy=use_wan_fp32_strategy)
    exact = call(dit)
    dit.bfloat16()
    error = lambda: (dit(*inputs(dtype=torch.bfloat16)).float() - exact).square().mean()  # noqa: E731
    before = error()
    done = patch(dit)
    assert error() < 1.1 * before and all(done.calls.values())


def test_a_part_of_a_model():
    """Without the model that holds them, attentions are served and blocks are not."""
    attn = model().blocks[0].self_attn
    assert {name for _, name in patch(attn).replaced} == {"compute_qkv"}


def test_only_what_is_known_is_replaced():
    dit = model()
    dit.other = type("Block", (torch.nn.Module,), {})()  # a class of this name in a text encoder
    blocks = list(dit.blocks)
    blocks[0].layer_norm_mlp = torch.nn.LayerNorm(32)
    done = patch(dit)
    assert {owner for owner, _ in done.replaced} == {block.self_attn for block in blocks} | {blocks[1]}
    assert "norms: a norm that it modulates has weights of its own" in done.explain()
    dit = model()
    del dit.blocks[1].use_wan_fp32_strategy  # as in Cosmos-Predict2, which has another rounding
    assert "Block must have use_wan_fp32_strategy, but it has none" in patch(dit).explain()


def test_the_device_is_not_stopped_in_every_call(monkeypatch):
    """The halves of the angles are compared once for each shape; on the CPU, where it costs nothing, always."""
    compared, equal = [], torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: compared.append(a.shape) or equal(a, b))
    monkeypatch.setattr(cosmos_policy, "waits_for_device", lambda tensor: True)
    dit = model()
    patch(dit)
    for _ in range(3):
        call(dit)
    assert compared == [(12, 8)]
    dit(torch.randn(1, 1, 2, 2, 32), torch.zeros(1), torch.randn(1, 5, 10))
    assert compared == [(12, 8), (4, 8)]


def test_refusals():
    dit = model()
    patch(dit)
    call(dit)
    made = dit.pos_embedder
    dit.pos_embedder = lambda x: made(x) + torch.arange(16)
    with pytest.raises(Unsupported, match="rope_emb must repeat its first half"):
        call(dit)
    dit.pos_embedder = lambda x: None
    with pytest.raises(Unsupported, match="must get .B, S, C. and rope_emb, got .2, 12, 32. and None"):
        call(dit)
    dit = model()
    patch(dit)
    with pytest.raises(Unsupported, match="an embedding .B, T, D., got .2, 3, 2, 2, 32. and .2, 2, 32."):
        dit(*inputs((2, 2)))
    dit = model()
    dit.blocks[0].self_attn.k_norm.bfloat16()
    patch(dit)
    with pytest.raises(Unsupported, match="RMSNorm must be torch.float32 like q, or float32, got torch.bfloat16"):
        call(dit)
    dit = model()
    dit.blocks[1].self_attn.q_norm.zero_centered_gamma = True
    with pytest.raises(Unsupported, match="zero_centered_gamma=False"):
        patch(dit)
    with pytest.raises(Unsupported, match="Cosmos Policy has heads of 12 channels"):
        patch(Attention(24, head_dim=12))


def test_an_attention_of_another_library_is_not_taken_for_it():
    other = type("Attention", (torch.nn.Module,), {"is_selfattn": True})()
    with pytest.raises(Unsupported, match="got Attention"):
        patch(other)
