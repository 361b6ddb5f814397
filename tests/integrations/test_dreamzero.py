"""DreamZero: teacher-forced training, cached inference with a cache that grows and then slides, refusals."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.integrations.checks import CLOSE, check_patch
from tests.integrations.stand_ins.dreamzero import CausalWanModel
from wam_kernels.integrations import Unsupported, patch, unpatch

REPLACED = {"CausalWanSelfAttention.forward", "CausalWanAttentionBlock.forward"}
FRAME, BLOCK, REGISTERS = 6, 12, 5  # tokens of a frame, of a block of two frames, and of its actions and state


def model(**sizes) -> CausalWanModel:
    torch.manual_seed(0)
    return CausalWanModel(**sizes)


def train(wan: CausalWanModel, blocks: int, window: int = 5, **arguments):
    for block in wan.blocks:
        block.self_attn.local_attn_size = window
    video = FRAME + blocks * BLOCK
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2 * video + blocks * REGISTERS, 32, generator=g)
    return wan(x, 0, video, action_register_length=blocks * REGISTERS, **arguments)[0]


@pytest.mark.parametrize("blocks, window", [(3, 5), (3, 2), (3, 11), (1, 5), (4, 3)])
def test_training(blocks, window):
    wan = model()
    check_patch(wan, lambda: train(wan, blocks, window), REPLACED)


def test_compiles():
    wan = model(layers=1)
    x = torch.randn(2, 2 * (FRAME + BLOCK) + REGISTERS, 32)
    call = lambda wan: wan(x, 0, FRAME + BLOCK, action_register_length=REGISTERS)[0]  # noqa: E731
    expected = call(wan)
    done = patch(wan)
    torch._dynamo.reset()
    backend = CompileCounter()
    compiled = torch.compile(call, backend=backend)
    torch.testing.assert_close(compiled(wan), expected, **CLOSE)
    graphs = backend.frame_count
    assert done.calls["CausalWanSelfAttention.forward"] > 0
    compiled(wan)
    assert backend.frame_count == graphs, "what counts the calls must not be a reason to compile anew"


@torch.no_grad()
def rollout(wan: CausalWanModel, chunks: int) -> list:
    """First frame into empty caches; then chunks denoised twice with actions, and written once without them."""
    g = torch.Generator().manual_seed(2)
    heads = wan.blocks[0].self_attn.num_heads, wan.blocks[0].self_attn.head_dim
    caches = [torch.zeros(2, 2, 0, *heads) for _ in wan.blocks]
    x, caches = wan(torch.randn(2, FRAME, 32, generator=g), 0, FRAME, caches, action_register_length=None)
    out = [x, *caches]
    for chunk in range(chunks):
        frame = 1 + 2 * chunk
        place = {"first_position": frame * FRAME, "video": BLOCK, "caches": caches, "current_start_frame": frame}
        for _ in range(2):
            x, kept = wan(torch.randn(2, BLOCK + REGISTERS, 32, generator=g), action_register_length=REGISTERS, **place)
            out += [x, *kept]
        x, caches = wan(torch.randn(2, BLOCK, 32, generator=g), action_register_length=None, **place)
        out += [x, *caches]
    return out


def test_cached_inference():
    wan = model()
    expected = rollout(wan, 5)
    assert expected[-1].shape[2] == wan.blocks[0].self_attn.max_attention_size, "the window must have been full"
    patch(wan)
    # every cache is compared after the last step: none may have been written again
    for got, want in zip(rollout(wan, 5), expected, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)
    unpatch(wan)
    assert all(torch.equal(a, b) for a, b in zip(rollout(wan, 5), expected, strict=True))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda wan: train(wan, 2, window=-1), "max_chunk_size must be limited, got -1"),
        (lambda wan: train(wan, 2, is_tf=False), "is_tf=True and action_register_length.*got is_tf=False"),
        (lambda wan: wan(torch.zeros(1, 61, 32), 0, 28, action_register_length=5), "must be two copies of 1"),
        (
            lambda wan: wan(
                torch.zeros(1, 6, 32), 0, 6, [torch.zeros(2, 1, 0, 2, 16)] * 2, action_register_length=None
            ),
            "cached attention has no gradient",
        ),
    ],
)
def test_refusals(call, message):
    wan = model()
    patch(wan)
    with pytest.raises(Unsupported, match=message):
        call(wan)


def test_left_to_the_original():
    wan = model()
    video = FRAME + 2 * BLOCK
    x = torch.randn(1, video + 2 * REGISTERS, 32)
    call = lambda: wan(x, 0, video, action_register_length=2 * REGISTERS, is_tf=False)[0]  # noqa: E731
    expected = call()
    patch(wan, on_unsupported="original")
    with pytest.warns(UserWarning, match="original code of DreamZero runs"):
        torch.testing.assert_close(call(), expected, **CLOSE)  # the glue of the block stays ours


def test_head_dims():
    with pytest.raises(Unsupported, match="DreamZero has heads of 12 channels"):
        patch(model(dim=24))
    wan = model()
    wan.blocks[1].self_attn.qk_norm = False
    with pytest.raises(Unsupported, match="must have qk_norm=True"):
        patch(wan)
    assert "forward" not in vars(wan.blocks[0].self_attn)


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_a_row_of_the_modulation_for_a_block_a_frame_or_more_than_the_tokens(rows):
    wan = model()
    wan.modulation_rows = rows
    check_patch(wan, lambda: train(wan, 2, 5), REPLACED)
