"""What Triton's launchers do around a launch, as far as it shows without a GPU."""

from contextlib import nullcontext
from importlib import import_module

import pytest
import torch

from wam_kernels.runtime import backends

NO_TOKENS = torch.empty(1, 0, 2, 16)
ROWS = NO_TOKENS.flatten(2)
INDEX = torch.empty(0, dtype=torch.int32)

# launchers of an op, with tensors so empty that nothing is launched; the first tensor says the device
CALLS = {
    "block_attention.forward": (NO_TOKENS, NO_TOKENS, NO_TOKENS, [], 64, True, 1.0),
    "block_attention.backward": (*[NO_TOKENS] * 2, *[NO_TOKENS] * 5, [], [], 64, True, 1.0),
    "cached_attention.forward": (NO_TOKENS, NO_TOKENS, NO_TOKENS, torch.empty(1, 1, 1, 2), (0,), 1.0),
    "adaln.forward": (ROWS, *[None] * 9, INDEX, 1e-6),
    "adaln.backward": (None, torch.empty(0, 0, 16), ROWS, *[None] * 6, INDEX, torch.zeros(1), INDEX, 1e-6),
    "qk_norm_rope.forward": (*[ROWS] * 5, 16, False, True, 1e-6, ROWS, ROWS),
    "qk_norm_rope.backward": (*[ROWS] * 7, 16, False, True, 1e-6),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_device_of_the_tensors_is_current(name, monkeypatch):
    made_current = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: made_current.append(t) or nullcontext())
    op, _, launcher = name.partition(".")
    getattr(import_module(f"wam_kernels.{op}.kernel_triton"), launcher)(*CALLS[name])
    first = next(a for a in CALLS[name] if a is not None)
    assert len(made_current) == 1 and made_current[0] is first


def test_a_grid_that_cuda_refuses_is_refused_by_name():
    backends.check_grid("op", B=65535, H=1)
    with pytest.raises(ValueError, match=r"op: B must be at most 65535 for impl='triton', got 65536; split the call"):
        backends.check_grid("op", H=1, B=65536)


def test_every_launcher_checks_its_grid():
    from wam_kernels.adaln import kernel_triton as adaln
    from wam_kernels.block_attention import kernel_triton as block_attention
    from wam_kernels.cached_attention import kernel_triton as cached_attention

    many = torch.empty(1, 1, 1, 8, device="meta").expand(65536, 1, 1, 8)
    with pytest.raises(ValueError, match="adaln: B must be at most 65535"):
        adaln.forward(many[:, :, 0], *[None] * 9, INDEX, 1e-6)
    with pytest.raises(ValueError, match="block_attention: B must be at most 65535"):
        block_attention.forward(many, many, many, [], 64, True, 1.0)
    with pytest.raises(ValueError, match=r"cached_attention: B \* H must be at most 65535"):
        cached_attention.forward(many, many, many, torch.empty(65536, 1, 1, 2, device="meta"), (1,), 1.0)
