"""What every integration must pass: the patched model gives the original's numbers, and nothing else has changed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from wam_kernels.integrations import patch, unpatch

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def numbers(out) -> list[Tensor]:
    """The tensors of a nested output, in order."""
    if isinstance(out, Tensor):
        return [out]
    values = out.values() if isinstance(out, dict) else out or ()
    return [t for value in values for t in numbers(value)]


def outputs_and_gradients(model: nn.Module, call: Callable[[], object]) -> list[Tensor]:
    """Outputs of ``call`` and the gradient of every parameter, 0 for one that is not used, from a fixed cotangent."""
    model.zero_grad()
    out = numbers(call())
    g = torch.Generator().manual_seed(1)
    sum((t * torch.randn(t.shape, generator=g)).sum() for t in out).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    assert any(g.any() for g in grads), "no parameter has a gradient: the test would compare nothing"
    return [*(t.detach() for t in out), *grads]


def every_attribute(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(m)) for name, m in model.named_modules()}


def check_patch(model: nn.Module, call: Callable[[], object], replaced: set[str]) -> None:
    """Same outputs and gradients patched; the same bits, attributes and state dict again after unpatch."""
    keys, attributes = list(model.state_dict()), every_attribute(model)
    before = outputs_and_gradients(model, call)
    done = patch(model)
    assert {f"{type(owner).__name__}.{name}" for owner, name in done.replaced} == replaced
    after = outputs_and_gradients(model, call)
    assert list(model.state_dict()) == keys
    for a, b in zip(after, before, strict=True):
        # a small element of a gradient is what is left of large ones, whose rounding it has
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 + 1e-6 * b.abs().amax().item())
    # the same numbers would also come from a patch that does nothing
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    unpatch(model)
    assert every_attribute(model) == attributes
    for a, b in zip(outputs_and_gradients(model, call), before, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="was not"):
        unpatch(model)
