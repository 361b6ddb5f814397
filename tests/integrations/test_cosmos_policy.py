"""Cosmos Policy: norm and rope of its self-attentions; everything else stays."""

import pytest
import torch

from tests.integrations.checks import check_patch
from tests.integrations.stand_ins.cosmos_policy import Attention, MiniTrainDIT
from wam_kernels.integrations import Unsupported, cosmos_policy, patch


def model(**sizes) -> MiniTrainDIT:
    torch.manual_seed(0)
    return MiniTrainDIT(**sizes)


def call(dit: MiniTrainDIT) -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    return dit(torch.randn(2, 3, 2, 2, 24, generator=g), torch.randn(2, 5, 10, generator=g))


def test_forward_and_gradients():
    dit = model()
    check_patch(dit, lambda: call(dit), {"Attention.compute_qkv"})


def test_only_self_attention_is_replaced():
    dit = model()
    assert {owner for owner, _ in patch(dit).replaced} == {block.self_attn for block in dit.blocks}


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
    dit(torch.randn(1, 1, 2, 2, 24), torch.randn(1, 5, 10))
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
    with pytest.raises(Unsupported, match="must get .B, S, C. and rope_emb, got .2, 12, 24. and None"):
        call(dit)
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
