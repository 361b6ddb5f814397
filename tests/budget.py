"""Error budgets: a kernel may err as much as the reference at its own dtype does, and little more."""

import torch
from torch import Tensor


def assert_within_budget(name: str, actual: Tensor, eager: Tensor, truth: Tensor, slack: float = 2.0) -> None:
    """``truth`` is the reference in float64 on the same (already rounded) inputs, ``eager`` the reference in theirs."""
    assert actual.shape == truth.shape, f"{name}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    where = torch.isfinite(truth)
    assert torch.equal(torch.isfinite(actual), where), f"{name}: non-finite values in other places than the truth"
    if not where.any():
        return
    actual, eager, truth = actual.double()[where], eager.double()[where], truth[where]
    ulp = 2**-22 * truth.abs().max().item()  # of float32, with room for another order of summation
    for measure, reduce in (("max", torch.amax), ("mean", torch.mean)):
        got, own = reduce((actual - truth).abs()).item(), reduce((eager - truth).abs()).item()
        assert got <= slack * own + ulp, f"{name}: {measure} error {got:.2e} exceeds {slack} x {own:.2e} + {ulp:.2e}"
