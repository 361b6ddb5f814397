"""A patched model launches no more than the original, and does not wait for the device in a denoising step."""

import re
import sys

import pytest
import torch

from tests.integrations import counts
from tests.integrations.checks import CLOSE, numbers, outputs_and_gradients
from tests.integrations.counts import launches
from tests.integrations.test_compile import TRAINING, gradients
from wam_kernels.integrations import _kernels, cosmos_policy, patch

# a value goes to the host
STOPS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "item", "unique_dim", "_unique2"}


@pytest.fixture
def short(monkeypatch):
    """Calls of the tests' sizes are as short as they are."""
    monkeypatch.setattr(_kernels, "DENSE_PAIRS", 2**18)


def noting(name, own, to_host):
    def read(t, *args, **kwargs):
        # the cpu backends read indices and ranges, which lie on the host
        if not re.fullmatch(r"wam_kernels\.\w+\.cpu", sys._getframe(1).f_globals["__name__"]):
            to_host.append(name)
        return own(t, *args, **kwargs)

    return read


DENOISING = counts.STEPS["denoising"]


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


@pytest.mark.parametrize("system", ["Fast-WAM uncond", "lerobot Fast-WAM", "LingBot-VA", "DreamZero", "Cosmos Policy"])
def test_a_training_step_with_fused_glue(system):
    call = TRAINING[system]()
    run = lambda: gradients(call, call.step)  # noqa: E731
    before = launches(run).total()
    with counts.fused_norms():
        patch(call.model)
        run()  # what is found once for each mask or table is found
        after = launches(run)
    assert after["uniform_gate_residual_norm"] > 0 and after["uniform_gate_residual_norm_backward"] > 0
    assert after.total() < 0.7 * before


def test_the_page_has_the_recorded_counts():
    assert counts.Page.read().table == counts.table(), "python -m tests.integrations.counts writes it"


@pytest.mark.parametrize(
    "step, system", [(step, system) for step, systems in counts.STEPS.items() for system in systems]
)
def test_recorded_counts(step, system):
    """Rows are what a count gives now; with another PyTorch, whose operators may be others, only less than before."""
    (before, after), recorded = counts.rows(step, system), counts.recorded(step, system)
    for key in ("operators", "bytes", "peak_bytes"):
        if torch.__version__ == recorded[0]["torch"]:
            assert [before[key], after[key]] == [row[key] for row in recorded], "python -m tests.integrations.counts"
        assert after[key] <= before[key]
    if torch.__version__ == recorded[0]["torch"]:
        # the ops may change a little; a newer Python enters fewer, as comprehensions are no calls there
        assert after["python_calls"] <= 1.05 * recorded[1]["python_calls"]


@pytest.mark.parametrize("step, system", [("training", "Fast-WAM uncond"), ("denoising", "Fast-WAM")])
def test_a_step_enters_no_more_functions(step, system):
    """Where that is so. The other stand-ins are terser than their sources: their counts are rows."""
    before, after = counts.rows(step, system)
    assert after["python_calls"] <= before["python_calls"]


def test_bytes_and_peak_of_a_known_step():
    """Two products of 4 kB matrices; the first result is dropped before the third is there."""
    a = torch.ones(32, 32)

    def step():
        b = a @ a.T
        c = b + torch.ones(1, device=a.device).expand(32, 32)
        del b
        return c * 2

    with counts.Launches() as mode:
        step()
    assert mode.of == {"mm": 1, "ones": 1, "add": 1, "mul": 1}
    assert mode.bytes == 3 * 4096 + 4 + (2 * 4096 + 4) + 2 * 4096
    assert counts.peak_bytes(step) == 2 * 4096 + 4
