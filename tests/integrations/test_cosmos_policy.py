"""Cosmos Policy: norm and rope of its self-attentions; everything else stays."""

import pytest
import torch

from tests.integrations.checks import check_patch
from tests.integrations.stand_ins.cosmos_policy import Attention, MiniTrainDIT
from wam_kernels.integrations import Unsupported, patch


def model() -> MiniTrainDIT:
    torch.manual_seed(0)
    return MiniTrainDIT()


def angles(tokens: int, head_dim: int = 16) -> torch.Tensor:
    half = torch.randn(tokens, 1, 1, head_dim // 2, generator=torch.Generator().manual_seed(1))
    return torch.cat((half, half), -1)


def call(dit: MiniTrainDIT, rope: torch.Tensor):
    g = torch.Generator().manual_seed(2)
    x, text = torch.randn(2, 3, 2, 2, 24, generator=g), torch.randn(2, 5, 10, generator=g)
    return dit(x, text, rope)


def test_forward_and_gradients():
    dit, rope = model(), angles(12)
    check_patch(dit, lambda: call(dit, rope), {"Attention.compute_qkv"})


def test_only_self_attention_is_replaced():
    dit = model()
    assert {owner for owner, _ in patch(dit).replaced} == {block.self_attn for block in dit.blocks}


def test_refusals():
    dit = model()
    patch(dit)
    different = angles(12).clone()
    different[..., -1] += 1
    with pytest.raises(Unsupported, match="rope_emb must repeat its first half"):
        call(dit, different)
    with pytest.raises(Unsupported, match="must get .B, S, C. and rope_emb, got .2, 12, 24. and None"):
        call(dit, None)
    dit = model()
    dit.blocks[0].self_attn.k_norm.bfloat16()
    patch(dit)
    with pytest.raises(Unsupported, match="RMSNorm must be torch.float32 like q, or float32, got torch.bfloat16"):
        call(dit, angles(12))
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
