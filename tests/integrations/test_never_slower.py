"""A patched model launches no more than the original, and does not wait for the device in a denoising step."""

import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.integrations.checks import CLOSE, numbers, outputs_and_gradients
from tests.integrations.test_compile import DENOISING, README, TRAINING, gradients
from wam_kernels.integrations import _kernels, cosmos_policy, patch

# views and bookkeeping: nothing is launched for them
FREE = {
    "view", "_unsafe_view", "reshape", "transpose", "t", "permute", "expand", "slice", "select", "split", "unsqueeze",
    "squeeze", "chunk", "detach", "alias", "as_strided", "unbind", "split_with_sizes", "view_as_real",
    "view_as_complex", "empty", "new_empty", "empty_like", "lift_fresh", "diagonal", "_reshape_alias", "unfold",
}  # fmt: skip
# a value goes to the host
STOPS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "item", "unique_dim", "_unique2"}


class Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.of[name] += 1
        return func(*args, **(kwargs or {}))


def launches(call) -> Counter:
    with Launches() as mode:
        call()
    return mode.of


@pytest.fixture
def short(monkeypatch):
    """Calls of the tests' sizes are as short as they are."""
    monkeypatch.setattr(_kernels, "DENSE_PAIRS", 2**18)


def noting(name, own, to_host):
    def read(t, *args, **kwargs):
        # the cpu backend reads an index that lies on the host anyway
        if sys._getframe(1).f_globals["__name__"] != "wam_kernels.adaln.cpu":
            to_host.append(name)
        return own(t, *args, **kwargs)

    return read


@pytest.mark.parametrize("make", DENOISING.values(), ids=DENOISING)
def test_a_denoising_step(make, short, monkeypatch):
    monkeypatch.setattr(cosmos_policy, "waits_for_device", lambda tensor: True)  # as on a GPU
    call = make()
    with torch.no_grad():
        run = lambda: call.step(call.model, *call.inputs)  # noqa: E731
        expected = [t.clone() for t in numbers(run())]
        before = launches(run)
        patch(call.model)
        run()  # what is found once for each mask or table is found
        to_host = []
        for name in ("cpu", "numpy", "tolist", "item"):
            monkeypatch.setattr(torch.Tensor, name, noting(name, getattr(torch.Tensor, name), to_host))
        after = launches(run)
        assert not to_host and not STOPS & set(after), "a denoising step must not wait for the device"
        assert after.total() <= before.total(), (before, after)
        for a, b in zip(numbers(run()), expected, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("system", ["Fast-WAM uncond", "Fast-WAM idm", "lerobot Fast-WAM", "openpi"])
def test_a_short_call_is_a_dense_one(system, short, monkeypatch):
    monkeypatch.setattr(_kernels.MaskPlans, "of", lambda *args: pytest.fail("no plan is needed"))
    call = TRAINING[system]()
    run = lambda: call.step(call.model, *call.inputs)  # noqa: E731
    before, expected = launches(run), outputs_and_gradients(call.model, run)
    done = patch(call.model)
    for a, b in zip(outputs_and_gradients(call.model, run), expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    after = launches(run)
    assert after.total() <= before.total(), (before, after)
    assert sum(done.calls.values()) > 0


@pytest.mark.parametrize("system", ["Fast-WAM uncond", "LingBot-VA", "DreamZero"])
def test_operators_of_a_training_step_with_fused_glue(system):
    """The README's rows, for the PyTorch that they were made with."""
    call = TRAINING[system]()
    run = lambda: gradients(call, call.step)  # noqa: E731
    before = launches(run).total()
    patch(call.model)
    run()  # what is found once for each mask or table is found
    after = launches(run)
    assert after["gate_residual_norm"] > 0 and after["gate_residual_norm_backward"] > 0
    assert after.total() < 0.7 * before
    if torch.__version__.startswith("2.13."):
        assert f"| {system} | {before} to {after.total()} |" in README.read_text()
