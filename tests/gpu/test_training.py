"""The model and its training step on a GPU: the numbers of a CPU, under autocast, under torch.compile."""

import pytest
import torch

from wam_models import ModelConfig, StepConfig, WorldActionModel, training_step

CONFIG = ModelConfig(
    hidden=256, heads=4, head_dim=64, layers=2, ffn=512, action_hidden=128, action_ffn=256, action_dim=7,
    actions_per_frame=4, text_dim=32,
)  # fmt: skip


def model(**to) -> WorldActionModel:
    torch.manual_seed(0)
    made = WorldActionModel(CONFIG)
    for side in (made.core.proj_out, made.action_expert.action_proj_out):
        torch.nn.init.normal_(side.weight, std=0.3)  # a fresh model predicts 0 and sends no gradient back
    return made.to(**to)


def loss_and_gradients(made: WorldActionModel, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """The same draws on every device. Three samples of several objectives, one clip of 17 frames each."""
    g = torch.Generator().manual_seed(0)
    shapes = {"video": (3, 48, 17, 8, 16), "action": (3, 17, 4, 7), "text": (3, 5, 32)}
    batch = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    made.zero_grad()
    with torch.autocast(made.device.type, dtype, enabled=dtype is not None):
        loss, _ = training_step(made, batch, g, StepConfig())
    loss.backward()
    return [loss.detach(), *(p.grad for p in made.parameters() if p.grad is not None)]


def error(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """``||a - b|| / ||b||`` of the loss and of all gradients together, whichever is larger."""
    sides = [torch.cat([t.double().cpu().flatten() for t in side[1:]]) for side in (got, want)]
    of_gradients = (sides[0] - sides[1]).norm() / sides[1].norm()
    return max(of_gradients.item(), abs(got[0].item() / want[0].item() - 1))


def test_float32_equals_the_cpu():
    assert error(loss_and_gradients(model(device="cuda")), loss_and_gradients(model())) < 1e-4


def test_bfloat16_under_autocast_and_as_weights():
    want = loss_and_gradients(model(device="cuda"))
    got = loss_and_gradients(model(device="cuda"), torch.bfloat16)
    assert all(g.dtype == torch.float32 for g in got)
    assert error(got, want) < 0.05
    assert error(loss_and_gradients(model(device="cuda", dtype=torch.bfloat16)), want) < 0.05


def test_checkpointed_activations_change_nothing():
    made = model(device="cuda", dtype=torch.bfloat16)
    want = [t.clone() for t in loss_and_gradients(made)]
    made.checkpoint_activations()
    for a, b in zip(loss_and_gradients(made), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_blocks_equal_eager_ones(dtype):
    made = model(device="cuda", dtype=dtype)
    want = [t.clone() for t in loss_and_gradients(made)]
    torch._dynamo.reset()
    made.packed_block_stack.compile(fullgraph=True)
    assert error(loss_and_gradients(made), want) < (1e-4 if dtype == torch.float32 else 0.05)
