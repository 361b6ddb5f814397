"""Answers before speeds: what is wrong is not timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wam_kernels.ops import OPS
from wam_models import doctor

CHECKED_AT_ONCE = 1 << 18  # numbers, see require_equal

Function = Callable[..., Sequence[Tensor]]  # a provider as a function of its inputs


def require_equal(name: str, actual: Tensor, expected: Tensor, rtol: float) -> None:
    """No speed is printed for a wrong answer.

    Raises:
        RuntimeError: another shape, relative error ``||a - b|| / ||b||`` above ``rtol``, or a value that is not finite.
    """
    if actual.shape != expected.shape:
        raise RuntimeError(f"bench: {name} is wrong: {list(actual.shape)} instead of {list(expected.shape)}")
    squares = torch.zeros(2, dtype=torch.float64, device=expected.device)  # of the differences, of the truth
    # in pieces: float64 copies of a large answer would take longer to get from the system than all the rest
    for a, b in zip(*(t.detach().flatten().split(CHECKED_AT_ONCE) for t in (actual, expected)), strict=True):
        squares[0] += (a.double() - b).square().sum()
        squares[1] += b.double().square().sum()
    error = squares[0].div(squares[1]).sqrt().item()
    if not error <= rtol:
        raise RuntimeError(f"bench: {name} is wrong: relative error {error:.2e}, allowed {rtol:.0e}; no speed for it")


def outputs_and_gradients(fn: Function, leaves: Sequence[Tensor], incoming: Sequence[Tensor]) -> list[Tensor]:
    """What ``fn(*leaves)`` returns, then the gradients of ``leaves`` for ``incoming``, one for each output."""
    outputs = fn(*leaves)
    return [*outputs, *torch.autograd.grad(outputs, leaves, incoming)]


def correct_providers(
    providers: dict[str, Function], leaves: Sequence[Tensor], incoming: Sequence[Tensor], rtol: float
) -> tuple[dict[str, Function], dict[str, str]]:
    """The providers with the outputs and gradients of the first in float64, and of each other one what it did instead.

    Raises:
        RuntimeError: the first provider, which the others are measured against, or one of this repository, whose name
            begins with ``wam``, is wrong.
    """
    double = [t.detach().double().requires_grad_() for t in leaves]
    truth = outputs_and_gradients(next(iter(providers.values())), double, [t.double() for t in incoming])
    truth = [t.detach() for t in truth]
    correct: dict[str, Function] = {}
    failed: dict[str, str] = {}
    for name, fn in providers.items():
        try:
            for n, (a, b) in enumerate(zip(outputs_and_gradients(fn, leaves, incoming), truth, strict=True)):
                require_equal(f"output or gradient {n} of {name}", a, b, rtol)
        except Exception as error:  # a peer may fail in any way; its error is what the row says
            if name.startswith("wam") or not correct:
                raise
            failed[name] = first_line(error)
        else:
            correct[name] = fn
    return correct, failed


def own_backends(op: str, device: str) -> tuple[list[str], dict[str, str]]:
    """The backends of ``op`` that are measured on ``device`` and run here; of the others why not, as rows name them."""
    machine, ready, missing = doctor.probe(), [], {}
    for impl in OPS[op].gpu_backends if device == "cuda" else ("cpu",):
        if reason := doctor.missing(OPS[op].backends[impl], machine):
            missing[f"wam {impl}"] = f"not run here: {reason}"
        else:
            ready.append(impl)
    return ready, missing


def first_line(error: BaseException) -> str:
    """An exception as one line, for a row's ``error``."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
